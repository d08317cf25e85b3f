"""Random transformers against the caching rule in plain Python: the same decisions and the same outputs."""

from __future__ import annotations

import os
import statistics

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

import fx_cache
from tests.random_models import Oracle, RandomModel, Spec, specs, steps_of
from tests.running import last_branch, relative_error

STEPS = 7
SHARDS = 4
MODELS = int(os.environ.get("FX_CACHE_RANDOM_MODELS", "60"))


def check(spec: Spec) -> None:
    torch._dynamo.reset()
    fx_cache.reset()
    model, steps = RandomModel(spec).eval().requires_grad_(False), steps_of(spec, STEPS)
    never = Oracle(model, 0.0)
    for i, step in enumerate(steps):
        assert torch.equal(never(i, **step), model(**step)[0])
    diffs = [d for slot in never.slots for d in slot.diffs.values()]
    threshold = 1.001 * statistics.median(diffs)
    options = {
        "compiler": "eager",
        "Fn_compute_blocks": spec.fn,
        "Bn_compute_blocks": spec.bn,
        "scope": spec.scope,
        "max_warmup_steps": 1,
        "residual_diff_threshold": threshold,
    }
    compiled = torch.compile(model, backend="dit_cache", fullgraph=True, options=options)
    oracle = Oracle(model, threshold)
    for i, step in enumerate(steps):
        expected, output = oracle(i, **step), compiled(**step)[0]
        assert relative_error(expected, output) < 1e-6, f"step {i}"
    spans = last_branch(compiled)["spans"]
    assert [s["hits"] for s in spans] == [slot.hits for slot in oracle.slots]
    assert [list(s["diffs"]) for s in spans] == [list(slot.diffs) for slot in oracle.slots]


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(SHARDS))
def test_random_models(shard: int) -> None:
    @seed(shard)
    @settings(
        max_examples=MODELS // SHARDS,
        deadline=None,
        database=None,
        # Every example compiles a model: what fails is told as it was found, not searched for something smaller.
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(specs())
    def every(spec: Spec) -> None:
        check(spec)

    every()
