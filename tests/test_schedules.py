"""Random schedules of interleaved requests: every output is bit for bit what the request gives alone."""

from __future__ import annotations

import copy
import os
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import fx_cache
from fx_cache.runtime.gate import SpanGate
from fx_cache.runtime.registry import stores
from tests.models import build, conditioning, walk
from tests.running import compile_cached

REUSING = {"residual_diff_threshold": 0.6, "max_warmup_steps": 1}
STEPS = 6
SCHEDULES = int(os.environ.get("FX_CACHE_SCHEDULES", "30"))
"""Schedules in all, over all kinds of models."""

KINDS = ("dit", "flux", "wan")


@dataclass
class Request:
    """A request: its calls in order, each with the name of its branch.

    Attributes:
        breaks: whether its last call is interrupted.
        complete: whether every branch comes to its last step.
    """

    name: str | None
    calls: list[tuple[str, dict[str, Any]]]
    breaks: bool = False
    complete: bool = True
    outputs: list[torch.Tensor] = field(default_factory=list)

    def call(self, compiled, i: int) -> torch.Tensor:
        branch, step = self.calls[i]
        if self.name is None:
            return compiled(**step)[0].clone()
        with fx_cache.session(self.name, branch=branch):
            return compiled(**step)[0].clone()


def unused(kind: str, rng: random.Random, size: int, used: set[str]) -> dict[str, Any]:
    """A prompt that no other request has: small tensors on the host are compared by value."""
    while True:
        prompt = conditioning(kind, seed=rng.randrange(1 << 16), size=size)
        key = str([(k, v.tolist() if isinstance(v, torch.Tensor) else v) for k, v in prompt.items()])
        if key not in used:
            used.add(key)
            return prompt


def requests(kind: str, rng: random.Random, pool: dict[Any, dict[str, Any]]) -> list[Request]:
    """2 to 6 requests of 1 to 3 branches: another resolution, a prompt used before, skipped branches, steps evaluated
    twice, and some that break off."""
    found = []
    used: set[str] = set()
    for r in range(rng.randint(2, 6)):
        # The fewest different prompts that a kind has are ten class labels.
        size, named = rng.choice((0, 0, 1)), rng.random() < 0.5 or len(used) > 6
        branches = [f"branch-{b}" for b in range(rng.randint(1, 3))]
        walks = {}
        for branch in branches:
            seed = rng.randrange(3)
            # Two requests that share a prompt and run at once have to be named.
            prompt = pool[size, seed] if named else unused(kind, rng, size, used)
            walks[branch] = walk(kind, STEPS, seed=rng.randrange(1 << 16), size=size, conditioning=prompt)
        calls = []
        for i in range(STEPS):
            for branch in rng.sample(branches, len(branches)):
                if branch == branches[0] or rng.random() < 0.85:
                    calls += [(branch, walks[branch][i])] * (2 if rng.random() < 0.08 else 1)
        breaks = rng.random() < 0.3
        if breaks:
            calls = calls[: rng.randint(1, len(calls))]
        complete = not breaks and sum(step is walks[b][-1] for b, step in dict(calls).items()) == len(branches)
        found.append(Request(f"request-{r}" if named else None, calls, breaks, complete))
    return found


def play(compiled, found: list[Request], rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs all requests call by call, in a random order that keeps that of each."""
    decide = SpanGate.__call__

    def interrupted(self: SpanGate, *seen: Any) -> bool:
        decide(self, *seen)
        raise KeyboardInterrupt

    order = [r for r in found for _ in r.calls]
    rng.shuffle(order)
    for request in order:
        i = len(request.outputs)
        if request.breaks and i == len(request.calls) - 1:
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(SpanGate, "__call__", interrupted)
                request.call(compiled, i)
            request.outputs.append(torch.empty(0))
        else:
            request.outputs.append(request.call(compiled, i))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::fx_cache.CacheWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_every_request_is_as_if_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(kind)
    compiled, alone = (compile_cached(copy.deepcopy(model), **REUSING) for _ in range(2))
    pool = {(size, seed): conditioning(kind, seed=seed, size=size) for size in (0, 1) for seed in range(3)}
    hits = 0
    for number in range(SCHEDULES // len(KINDS)):
        rng = random.Random(f"{kind} {number}")
        found = requests(kind, rng, pool)
        play(compiled, found, rng, monkeypatch)
        for request in found:
            fx_cache.reset(alone)
            for i in range(len(request.calls) - request.breaks):
                assert torch.equal(request.call(alone, i), request.outputs[i]), (number, request.name, i)
            # What is alive of the one alone is this request; the outputs are equal, and so are the hits.
            (store,) = stores(alone)
            hits += sum(len(slot.counters.hits) for b in store._branches.values() for slot in b.slots)
        for name in {r.name for r in found} - {None}:
            fx_cache.end(name)
        if any(r.name is None and not r.complete for r in found):
            # It has left branches on the way. Whoever comes with a prompt of the same value may have to compute steps
            # in doubt, which alone are reused, since nobody has said that those are over; here somebody does.
            fx_cache.reset(compiled)
    assert hits > 10 * (SCHEDULES // len(KINDS))
    print(f"{kind}: {SCHEDULES // len(KINDS)} schedules, at least {hits} hits")
