"""The model's own forward as oracle: with a policy that never reuses, every output is bit for bit the same."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

import fx_cache
from tests.models import NAMES, build, walk
from tests.oracles import run_eager
from tests.running import compile_cached, last_branch, relative_error, run_cached
from tests.selection import few


@pytest.mark.parametrize("scope", ["model", "stack"])
@pytest.mark.parametrize("name", few(NAMES, 3))
def test_never_reusing_is_the_model_itself(name: str, scope: str) -> None:
    model, steps = build(name), walk(name, 6)
    expected = run_eager(model, steps).outputs
    run = run_cached(model, steps, scope=scope, residual_diff_threshold=0.0)
    assert [torch.equal(a, b) for a, b in zip(expected, run.outputs, strict=True)] == [True] * 6


@pytest.mark.parametrize("name", few(NAMES, 3))
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


@pytest.mark.parametrize("scope", ["model", "stack"])
@pytest.mark.parametrize("name", few(NAMES, 3))
def test_a_hit_on_the_same_inputs_gives_the_same_output(name: str, scope: str) -> None:
    model, step = build(name), walk(name, 1)[0]
    compiled = compile_cached(model, scope=scope, residual_diff_threshold=1.0, Fn_compute_blocks=2, Bn_compute_blocks=1)
    expected = model(**step)[0]
    with fx_cache.session("replay", "only"):
        outputs = [compiled(**step)[0].clone() for _ in range(3)]
    assert all(relative_error(expected, output) < 1e-5 for output in outputs)
    assert all(span["hits"] == [1, 2] for span in last_branch(model)["spans"])
