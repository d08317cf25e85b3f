"""Every test runs alone: nothing compiled, nothing cached, the spec of the rewritten graph checked after every pass."""

from __future__ import annotations

import gc
import os
import warnings

import pytest
import torch

import fx_cache
from tests.selection import selected

# Tiny tensors: a second thread costs more than it gives, above all on a busy machine.
torch.set_num_threads(1)

OLDEST = torch.__version__ < "2.12"
if OLDEST:
    # It captures each block anew where graphs break, and what has run into the limit once is not captured any more.
    torch._dynamo.config.recompile_limit = 64
    # Where there is no card, whoever enters a fake mode puts a guard for CUDA in, which ends with its thread: what is
    # compiled behind that reads freed memory. That of the main thread stays.
    torch._C._ensureCUDADeviceGuardSet()
    torch._C._ensureCUDADeviceGuardSet = lambda: None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.environ.get("FX_CACHE_TESTS") != "all" and not config.option.markexpr:
        items[:], others = selected(items)
        if others:
            config.hook.pytest_deselected(items=others)


def pytest_collection_finish() -> None:
    """What is imported stays; to go through it again and again takes a fifth of the time of compiling."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setenv("FX_CACHE_CHECK", "1")
    torch._dynamo.reset()
    if OLDEST:  # threads that call one model with fullgraph=True can leave it behind: nothing after a break is captured
        from torch._C._dynamo import eval_frame

        eval_frame.set_eval_frame_override(eval_frame._EvalFrameOverride.NONE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fx_cache.CacheWarning)  # of requests that earlier tests left unfinished
        fx_cache.reset()
    with torch.no_grad():
        yield
