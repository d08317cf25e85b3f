"""Tests of what a device is to the host. On a card all of them run, else those that a stand-in for it can serve.

``FX_CACHE_GPU_PART=2/4`` runs the second of four parts, ``FX_CACHE_GPU_EVERY=10`` one test of ten.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from tests.gpu.card import REAL

HERE = Path(__file__).parent

if REAL:
    # Results bit for bit the same from one call to the next: no TF32, no choice of algorithm by what is free.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    own = [item for item in items if HERE in item.path.parents]
    if not REAL and shutil.which("g++") is None:
        for item in own:
            item.add_marker(pytest.mark.skip(reason="the stand-in for a card needs a C++ compiler"))
    some = own[:: int(os.environ.get("FX_CACHE_GPU_EVERY", "1"))]
    part, _, parts = os.environ.get("FX_CACHE_GPU_PART", "1/1").partition("/")
    run = {id(item) for i, item in enumerate(some) if i % int(parts) == int(part) - 1}
    others = [item for item in own if id(item) not in run]
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]
