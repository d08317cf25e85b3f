"""A day on a card, rehearsed: the same scripts and parts on the CPU, in tiny sizes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
REUSED = {"compile": 0, "dit_cache": 18, "cache-dit + compile": 18, "FirstBlockCache + compile": 18}
"""Steps of 28 that each way reuses."""


def day(out: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    few = {"FX_CACHE_GPU_EVERY": "40", "FX_CACHE_GPU_JOBS": "1", "FX_CACHE_GPU_SECONDS": "200"}
    return subprocess.run(
        [str(ROOT / "scripts" / "gpu_day.sh"), "--dry", "--out", str(out), *flags],
        env={**os.environ, **few, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the stand-in for a card needs a C++ compiler")
def test_a_dry_day(tmp_path: Path) -> None:
    """All parts that it has go well, each once: what is done is not run again. Everybody reuses the same steps."""
    ran = day(tmp_path)
    logs = {log.name: log.read_text()[-2000:] for log in tmp_path.glob("*.log")}
    assert ran.returncode == 0, (ran.stdout, ran.stderr, logs)
    assert ran.stdout.count(" rc 0 ") == len(ran.stdout.splitlines()) == len(logs) == 5
    assert ran.stdout == (tmp_path / "summary.txt").read_text()
    before = {log: log.stat().st_mtime_ns for log in tmp_path.glob("*.log")}
    assert day(tmp_path).stdout == ran.stdout
    assert before == {log: log.stat().st_mtime_ns for log in tmp_path.glob("*.log")}
    result = json.loads((tmp_path / "gpu_1.json").read_text())
    assert result["dry"]
    assert {row["way"]: row["reused"] for row in result["rows"]} == REUSED


def test_the_parts_of_a_day(tmp_path: Path) -> None:
    parts = day(tmp_path, "--list").stdout.split()
    assert parts[:5] == ["tests-1", "tests-2", "tests-3", "tests-4", "bench-1"]
    assert len(parts) == 17
