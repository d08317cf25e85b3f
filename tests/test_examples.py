"""The examples run as they stand, and their caches reuse."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.selection import few

EXAMPLES = Path(__file__).parents[1] / "examples"
SUFFIX = {"text_to_image": ".png", "image_edit": ".png", "video": ".gif"}
STEPS = "28"


def run(name: str, folder: Path, backend: str) -> tuple[str, bytes]:
    """What an example prints, and what it writes."""
    output = folder / f"{name}-{backend}{SUFFIX[name]}"
    options = ("--tiny", "--cache-backend", backend, "--enable-cache-summary", "--num-inference-steps", STEPS)
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *options, "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, output.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", few(SUFFIX, 1))
def test_an_example(name: str, tmp_path: Path) -> None:
    told, written = run(name, tmp_path, "dit_cache")
    assert written.startswith((b"\x89PNG", b"GIF8"))
    (row,) = [line for line in told.splitlines() if "request-1" in line][:1]
    steps, hits = [int(cell) for cell in row.split("│")[4:6]]
    assert 0 < hits < steps <= int(STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("backend", few(["cache_dit", "none"], 1))
def test_an_example_with_another_backend(backend: str, tmp_path: Path) -> None:
    told, image = run("text_to_image", tmp_path, backend)
    assert image.startswith(b"\x89PNG")
    assert f"{STEPS} steps in" in told
