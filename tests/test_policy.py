"""The policy alone. Oracles: cache-dit's own context and manager fed the same diffs, and counts of host reads."""

from __future__ import annotations

import random

import pytest
import torch
from cache_dit.caching.cache_contexts.cache_config import DBCacheConfig
from cache_dit.caching.cache_contexts.cache_manager import CachedContextManager
from torch.profiler import ProfilerActivity, profile

import fx_cache
from fx_cache.exporting.policy import Counts
from fx_cache.exporting.policy import decide as decide_in_tensors
from fx_cache.runtime import sessions
from fx_cache.runtime.gate import SpanGate
from fx_cache.runtime.policy import Counters, decide, judge
from tests.models import build, conditioning, walk
from tests.running import compile_cached, schedule_on_a_device


def ours(config: fx_cache.CacheConfig, diffs: list[float]) -> list[int]:
    counters = Counters()
    filled = False
    for step, diff in enumerate(diffs):
        verdict = decide(config, counters, step, filled=filled)
        if verdict.reuse is None:
            counters.measured(step, diff)
            verdict = judge(config, diff)
        counters.record(step, verdict.reason)
        filled = filled or not verdict.reuse
    return counters.hits


def exported(config: fx_cache.CacheConfig, diffs: list[float]) -> list[int]:
    """The policy of exported programs, in tensors."""
    zero = torch.zeros((), dtype=torch.int64)
    counts, no = Counts(zero, zero, zero, zero.double()), torch.zeros((), dtype=torch.bool)
    hits = []
    for step, diff in enumerate(diffs):

        def measure(settled: torch.Tensor, diff: float = diff) -> torch.Tensor:
            return torch.tensor(-1.0 if settled else diff, dtype=torch.float64)

        decision = decide_in_tensors(config, counts, no, measure)
        counts = decision.counted(counts)
        hits += [step] if decision.reuse else []
    assert (int(counts.step), int(counts.hits)) == (len(diffs), len(hits))
    return hits


def theirs(config: fx_cache.CacheConfig, diffs: list[float]) -> list[int]:
    """cache-dit's `can_cache` on probes whose diff to the stored probe of ones is what `diffs` says."""
    names = [n for n in fx_cache.CacheConfig.__dataclass_fields__ if n in DBCacheConfig.__dataclass_fields__]
    manager = CachedContextManager("policy")
    manager.new_context(name="c", cache_config=DBCacheConfig(**{n: getattr(config, n) for n in names}))
    manager.set_context("c")
    for diff in diffs:
        manager.mark_step_begin()
        probe = torch.ones(4, dtype=torch.float64)
        if manager.can_cache(probe * (1.0 + diff), prefix="Fn"):
            manager.add_cached_step()
        else:
            manager.set_Fn_buffer(probe, prefix="Fn")
    return manager.get_cached_steps()


@pytest.mark.parametrize("seed", range(200))
def test_decisions_are_those_of_cache_dit(seed: int) -> None:
    rng = random.Random(seed)
    config = fx_cache.CacheConfig(
        residual_diff_threshold=rng.choice([0.0, 0.1, 0.3, 0.6, 1.0]),
        max_warmup_steps=rng.choice([0, 1, 4, 8]),
        warmup_interval=rng.choice([1, 2, 3]),
        max_cached_steps=rng.choice([-1, -1, 0, 3, 8]),
        max_continuous_cached_steps=rng.choice([-1, 0, 1, 2, 3]),
        max_accumulated_residual_diff_threshold=rng.choice([None, 0.0, 0.5, 2.0]),
        # cache-dit reuses what it does not have where the very first step says 0.
        steps_computation_mask=rng.choice([None, [1, *rng.choices([0, 1], k=29)], [1] * 6 + [0] * 24]),
        steps_computation_policy=rng.choice(["dynamic", "static"]),
    )
    diffs = [rng.uniform(0.0, 0.7) for _ in range(30)]
    assert ours(config, diffs) == theirs(config, diffs) == exported(config, diffs)


def test_behind_the_mask_the_other_options_decide() -> None:
    config = fx_cache.CacheConfig(
        steps_computation_mask=(1, 0, 1, 0), steps_computation_policy="static", residual_diff_threshold=0.1
    )
    diffs = [0.5, 0.5, 0.5, 0.5, 0.5, 0.05]
    assert ours(config, diffs) == exported(config, diffs) == [1, 3, 5]
    assert decide(config, Counters(), 1, filled=False).reason == "nothing cached"


def test_a_nan_is_never_a_hit() -> None:
    for value in (float("nan"), float("inf")):
        assert judge(fx_cache.CacheConfig(residual_diff_threshold=0.5), value).reason == "probe not finite"


def host_reads(compiled, steps: list[dict], monkeypatch) -> list[int]:
    """For each step, how often the host waited for a number of a tensor: for the diffs, or for any other."""
    reads = []
    decide = SpanGate.__call__

    def counting(gate: SpanGate, measure, *seen):
        def counted() -> torch.Tensor:
            reads[-1] += 1
            return measure()

        return decide(gate, counted, *seen)

    monkeypatch.setattr(SpanGate, "__call__", counting)
    for step in steps:
        reads.append(0)
        with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
            compiled(**step)
        reads[-1] += sum(e.count for e in profiler.key_averages() if e.key == "aten::item")
    return reads


def test_at_most_one_host_read_a_step(monkeypatch) -> None:
    model, steps = build("wan"), walk("wan", 8)
    compiled = compile_cached(model, residual_diff_threshold=0.6, max_warmup_steps=3, max_continuous_cached_steps=1)
    compiled(**steps[0])
    reads = host_reads(compiled, steps[1:], monkeypatch)
    span = fx_cache.summary(model).to_dict()["sessions"][0]["branches"][0]["spans"][0]
    assert [i + 1 for i, n in enumerate(reads) if n] == sorted(span["diffs"])
    assert max(reads) == 1 and span["hits"]
    assert {span["misses"][i] for i in range(8) if i not in span["diffs"]} == {"warm-up", "max_continuous_cached_steps"}


@pytest.mark.parametrize("most", [sessions.MAX_PENDING, 2])
@pytest.mark.parametrize("warmup", [1, 3])
def test_a_schedule_on_a_device_is_read_late_and_decides_the_same(monkeypatch, warmup: int, most: int) -> None:
    monkeypatch.setattr(sessions, "MAX_PENDING", most)
    prompt = conditioning("dit")
    # A whole request, one aborted in its warm-up, and two more, all with one prompt object.
    walks = [walk("dit", n, seed=s, conditioning=prompt) for s, n in enumerate((8, 2, 8, 8))]
    results = []
    for device in (False, True):
        if device:
            schedule_on_a_device(monkeypatch)
        model = build("dit")
        compiled = compile_cached(model, residual_diff_threshold=0.6, max_warmup_steps=warmup)
        outputs = [compiled(**s)[0].clone() for steps in walks for s in steps]
        results.append((outputs, fx_cache.summary(model).to_dict()["sessions"]))
    assert all(torch.equal(a, b) for a, b in zip(results[0][0], results[1][0], strict=True))
    spans = [[s["branches"][0]["spans"][0] for s in r[1]] for r in results]
    assert [s["hits"] for s in spans[0]] == [s["hits"] for s in spans[1]]
    assert [s["diffs"] for s in spans[0]] == [s["diffs"] for s in spans[1]]
    assert any(s["hits"] for s in spans[0])


def test_changing_thresholds_recompiles_nothing() -> None:
    model, steps = build("dit"), walk("dit", 8)
    compiled = compile_cached(model, residual_diff_threshold=0.0)
    compiled(**steps[0])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step, threshold in zip(steps[1:], [0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0], strict=True):
            fx_cache.configure(model, residual_diff_threshold=threshold)
            compiled(**step)
    span = fx_cache.summary(model).to_dict()["sessions"][0]["branches"][0]["spans"][0]
    assert span["hits"] == [2, 4, 5, 7]
