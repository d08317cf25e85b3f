"""Random transformers against the caching rule in plain Python: the same decisions and the same outputs."""

from __future__ import annotations

import os
import statistics

import pytest
import torch

import fx_cache
from tests.random_models import KINDS, RandomModel, Spec, kinds_of, spec_of, steps_of
from tests.random_rule import Oracle
from tests.running import last_branch, relative_error

STEPS = 7
SHARDS = 12
MODELS = int(os.environ.get("FX_CACHE_RANDOM_MODELS", "300" if os.environ.get("FX_CACHE_TESTS") == "all" else "150"))


def check(spec: Spec) -> None:
    torch._dynamo.reset()
    fx_cache.reset()
    model, steps = RandomModel(spec).eval().requires_grad_(False), steps_of(spec, STEPS)
    never, plain = Oracle(model, 0.0), [model(**step)[0] for step in steps]
    for i, step in enumerate(steps):
        assert torch.equal(never(i, **step), plain[i])
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
        # Named: what a block does is looked at here, not who a call belongs to.
        with fx_cache.session("request", branch="only"):
            expected, output = oracle(i, **step), compiled(**step)[0]
        assert relative_error(expected, output) < 1e-6, f"step {i}"
        if not any(i in slot.hits for slot in oracle.slots):
            assert torch.equal(plain[i], output), f"step {i}"
    spans = last_branch(compiled)["spans"]
    assert [s["hits"] for s in spans] == [slot.hits for slot in oracle.slots]
    assert [list(s["diffs"]) for s in spans] == [list(slot.diffs) for slot in oracle.slots]


@pytest.mark.parametrize("name", KINDS)
def test_one_of_each_kind(name: str) -> None:
    assert name in kinds_of(KINDS[name])
    check(KINDS[name])


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(SHARDS))
def test_random_models(shard: int) -> None:
    wrong = []
    for number in range(shard, MODELS, SHARDS):
        spec = spec_of(number)
        try:
            check(spec)
        except Exception as error:
            wrong.append(f"spec_of({number}, PENDING): {spec}: {type(error).__name__}: {str(error)[:300]}")
    assert not wrong, "\n".join([f"{len(wrong)} models:", *wrong])
