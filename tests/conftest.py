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

if torch.__version__ < "2.12":
    # It captures each block anew where graphs break, and what has run into the limit once is not captured any more.
    torch._dynamo.config.recompile_limit = 64


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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fx_cache.CacheWarning)  # of requests that earlier tests left unfinished
        fx_cache.reset()
    with torch.no_grad():
        yield
