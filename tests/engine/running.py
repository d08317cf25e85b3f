"""Runs the engine, or transformers of it, and reads what happened."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
Digests = list[list[str]]
"""Of what requests make: for each, of each of its prompts."""

SUMMARY = {"enable_cache_dit_summary": True}
NEVER = {"cache_backend": "dit_cache", "cache_config": {"residual_diff_threshold": 0.0, "compiler": "eager"}}
ALWAYS = {"cache_backend": "dit_cache", "cache_config": {"residual_diff_threshold": 2.0, "compiler": "eager"}}

OPTIONS = {"compiler": "eager", "Fn_compute_blocks": 1, "max_warmup_steps": 2}


def tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    found = output if isinstance(output, tuple | list) else getattr(output, "__dict__", {}).values()
    return [t.clone() for part in found for t in tensors(part)]


def hits(handle: Any, name: str) -> list[list[int]]:
    (session,) = handle.summary(name).sessions
    return [span["hits"] for branch in session["branches"] for span in branch["spans"]]


def same(expected: list[list[Tensor]], got: list[list[Tensor]]) -> bool:
    """Bit for bit, every output of every step."""
    pairs = [pair for x, y in zip(expected, got, strict=True) for pair in zip(x, y, strict=True)]
    return all(torch.equal(a, b) for a, b in pairs)


def make(pipeline: str, folder: Path) -> str:
    """The folder of a tiny pipeline."""
    command = [sys.executable, "-m", "tests.engine.tiny", pipeline, str(folder)]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    return str(folder)


def run(
    model: str, options: list[dict[str, Any]], requests: list[Any], **environment: str
) -> list[tuple[Digests, str]]:
    """With an engine of each of some options: what requests make, and everything that the engine said."""
    command = [sys.executable, "-m", "tests.engine.images", model, json.dumps(options), json.dumps(requests)]
    settings = {"VLLM_TARGET_DEVICE": "cpu", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2", **environment}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=1200, env={**os.environ, **settings}, check=False, cwd=ROOT
    )
    said = re.split(r"DIGESTS (.*)", done.stdout)
    found = [(json.loads(digests), before) for before, digests in zip(said[::2], said[1::2], strict=False)]
    assert len(found) == len(options), (done.stdout + done.stderr)[-4000:]
    return found


def summarised(said: str) -> list[int]:
    """The hits of each pass of each request, as the engine's log has them."""
    rows = [line.split("│") for line in said.splitlines() if "│ branch-" in line and "dummy" not in line]
    return [int(row[5]) for row in rows]
