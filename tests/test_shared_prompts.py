"""Requests that nobody names and that share their prompt: given up, begun in the middle, mixed, of any size.

Oracle: each output is that of the request alone, bit for bit, or the model's own: a step in doubt computes.
"""

from __future__ import annotations

import os
import random
from typing import Any

import pytest

import fx_cache
from fx_cache.testing import Outputs, Request, assert_as_if_alone, interleaved, run
from tests.models import conditioning, walk
from tests.running import compile_cached, shallow

STEPS = 8
SCHEDULES = int(os.environ.get("FX_CACHE_SCHEDULES", "60"))
"""Schedules in all, over all kinds of models."""

KINDS = ("dit", "wan")
POLICIES: tuple[dict[str, Any], ...] = (
    {"residual_diff_threshold": 0.6, "max_warmup_steps": 0},
    {"residual_diff_threshold": 2.0, "max_warmup_steps": 1},
    {"residual_diff_threshold": 0.6, "max_warmup_steps": 2, "max_continuous_cached_steps": 2},
    {"steps_computation_mask": (1, 0, 0, 1, 0, 0, 0, 1), "steps_computation_policy": "static", "max_warmup_steps": 1},
)

Pool = dict[tuple[int, int], dict[str, Any]]


def request(kind: str, rng: random.Random, pool: Pool, name: str | None) -> Request:
    """One of 1 to 3 passes; also with several windows at a time, backwards, begun in the middle, given up."""
    batch, count = rng.choice((1, 1, 2)), rng.choice((1, 1, 2, 3))
    prompts = rng.sample(range(3), count)
    windows = 2 if rng.random() < 0.15 else 1
    walks = {}
    for k in range(count):
        prompt = pool[prompts[k], batch]
        for window in range(windows):
            seed = rng.randrange(1 << 16)
            walks[f"pass-{k}", window] = walk(kind, STEPS, seed=seed, conditioning=prompt, batch=batch)
            if windows == 1 and k:  # passes of one step are given one latent
                first = walks["pass-0", 0]
                for step, other in zip(walks[f"pass-{k}", 0], first, strict=True):
                    step["hidden_states"] = other["hidden_states"]
    begins = rng.choice((0, 0, 0, rng.randrange(STEPS)))
    ends = rng.choice((STEPS, STEPS, rng.randint(begins + 1, STEPS)))
    numbers = list(range(begins, ends))
    if rng.random() < 0.15:
        numbers.reverse()
    calls = []
    for i in numbers:
        for key, steps in walks.items():
            if key == ("pass-0", 0) or rng.random() < 0.95:
                calls.append((key[0], steps[i]))
    breaks = rng.random() < 0.1
    # Windows of one pass are one branch: who names branches has to name them apart.
    return Request(calls, name, breaks, told=windows == 1 and rng.random() < 0.5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::fx_cache.CacheWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_alone_or_computed(kind: str) -> None:
    pool = {(seed, batch): conditioning(kind, seed=seed, batch=batch) for seed in range(3) for batch in (1, 2)}
    model = shallow(kind)
    compiled, other = (compile_cached(shallow(kind), max_warmup_steps=0) for _ in range(2))
    for captured in (compiled, other):
        for batch in (1, 2):
            captured(**walk(kind, 1, batch=batch)[0])
    count, hits = SCHEDULES // len(KINDS), 0

    def alone(one: Request) -> list[Outputs]:
        fx_cache.reset(other)
        return run(other, one)

    usual = {"steps_computation_mask": None, "steps_computation_policy": "dynamic", "max_continuous_cached_steps": -1}
    for number in range(count):
        rng = random.Random(f"{kind} {number}")
        policy = POLICIES[number % len(POLICIES)]
        fx_cache.reset(compiled)
        for captured in (compiled, other):
            fx_cache.configure(captured, **{**usual, **policy})
        # Now and then by name, with and without saying which pass it is.
        found = [
            request(kind, rng, pool, f"request-{number}-{k}" if rng.random() < 0.3 else None)
            for k in range(rng.randint(2, 5))
        ]
        mixed = rng.random() < 0.3
        order = interleaved(found, rng) if mixed else [k for k, r in enumerate(found) for _ in r.calls]
        hits += assert_as_if_alone(compiled, found, order, alone, plain=model)
    assert hits > 2 * count
    print(f"{kind}: {count} schedules, {hits} hits")
