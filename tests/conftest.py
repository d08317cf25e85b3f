"""Every test runs alone: nothing compiled, nothing cached, the spec of the rewritten graph checked after every pass."""

from __future__ import annotations

import warnings

import pytest
import torch

import fx_cache

# Tiny tensors: a second thread costs more than it gives, above all on a busy machine.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setenv("FX_CACHE_CHECK", "1")
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fx_cache.CacheWarning)  # of requests that earlier tests left unfinished
        fx_cache.reset()
    with torch.no_grad():
        yield
