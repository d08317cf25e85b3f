"""``vllm-omni serve`` with the cache: 40 requests at once. Oracle: each of them asked for alone."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.engine.running import make

CASES = [(prompt, size) for prompt in ("a cat", "a dog on the grass", "a red house", "two boats") for size in (64, 96)]
STEPS, AT_ONCE = 8, 40


@contextlib.contextmanager
def server(folder: Path, pipeline: str, *more: str) -> Iterator[tuple[str, Path]]:
    """Its address, and the file with what it says."""
    model = make(pipeline, folder / pipeline)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    config = {"residual_diff_threshold": 2.0, "compiler": "eager"}
    options = ["--omni", "--dtype", "float32", "--enforce-eager", "--port", str(port), "--enable-cache-dit-summary"]
    command = [str(Path(sys.executable).with_name("vllm-omni")), "serve", model, *options, *more]
    command += ["--cache-backend", "dit_cache", "--cache-config", json.dumps(config)]
    settings = {"VLLM_TARGET_DEVICE": "cpu", "HF_HUB_OFFLINE": "1"}
    said, address = folder / "said.txt", f"http://localhost:{port}"
    with said.open("w") as out, subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | settings) as process:
        try:
            wait_for(address, process, said)
            yield address, said
        finally:
            process.terminate()


def wait_for(address: str, process: subprocess.Popen[bytes], said: Path) -> None:
    for _ in range(240):
        assert process.poll() is None, said.read_text()[-3000:]
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5)
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(said.read_text()[-3000:])


def ask(address: str, prompt: str, size: int) -> str:
    """The digest of an image."""
    body: dict[str, Any] = {"prompt": prompt, "size": f"{size}x{size}", "n": 1, "seed": 7}
    body |= {"num_inference_steps": STEPS, "response_format": "b64_json"}
    request = urllib.request.Request(
        f"{address}/v1/images/generations", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return hashlib.sha256(json.load(answer)["data"][0]["b64_json"].encode()).hexdigest()


@pytest.mark.parametrize(
    ("pipeline", "more"),
    [
        pytest.param("klein", [], id="requests", marks=pytest.mark.long),
        pytest.param("qwen-image", ["--step-execution", "--max-num-seqs", "4"], id="steps"),
    ],
)
def test_40_requests_at_once(tmp_path: Path, pipeline: str, more: list[str]) -> None:
    """One after another, and in step mode, where several are under way together."""
    with server(tmp_path, pipeline, *more) as (address, said):
        alone = {case: ask(address, *case) for case in CASES}
        assert len(set(alone.values())) == len(CASES)
        asked = CASES * (AT_ONCE // len(CASES))
        with ThreadPoolExecutor(AT_ONCE) as pool:
            found = list(pool.map(lambda case: ask(address, *case), asked))
        assert found == [alone[case] for case in asked]
    # The first row is the engine's own, of two steps. Four to begin with, three reused, and one computed.
    rows = [line.split("│") for line in said.read_text().splitlines() if "│ branch-" in line]
    assert [int(row[5]) for row in rows] == [0, *[3] * (len(CASES) + AT_ONCE)]
