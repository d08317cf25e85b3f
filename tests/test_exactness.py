"""The model's own forward as oracle: with a policy that never reuses, every output is bit for bit the same."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from tests.models import NAMES, build, walk
from tests.oracles import run_eager
from tests.running import compile_cached, last_branch, run_cached


@pytest.mark.parametrize("scope", ["model", "stack"])
@pytest.mark.parametrize("name", NAMES)
def test_never_reusing_is_the_model_itself(name: str, scope: str) -> None:
    model, steps = build(name), walk(name, 6)
    expected = run_eager(model, steps).outputs
    run = run_cached(model, steps, scope=scope, residual_diff_threshold=0.0)
    assert [torch.equal(a, b) for a, b in zip(expected, run.outputs, strict=True)] == [True] * 6


@pytest.mark.parametrize("name", NAMES)
def test_no_breaks_and_no_recompiles(name: str) -> None:
    model, steps = build(name), walk(name, 6)
    counters.clear()
    compiled = compile_cached(model, residual_diff_threshold=1.0, max_continuous_cached_steps=1)
    compiled(**steps[0])
    graphs = counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in steps[1:]:
            compiled(**step)
    span = last_branch(model)["spans"][0]
    assert span["hits"] and len(span["misses"]) > 1
    assert counters["stats"]["unique_graphs"] == graphs == 1
    assert not counters["graph_break"]
