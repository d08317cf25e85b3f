"""cache-dit and diffusers' FirstBlockCache as oracles: the same hit steps and the same outputs on the same weights."""

from __future__ import annotations

import pytest

from tests.models import NAMES, build, walk
from tests.oracles import MEASURE_ONLY, run_cache_dit, run_first_block_cache, thresholds_with_both
from tests.running import relative_error, run_cached

STEPS = 10
CONFIGS = {
    "F1B0": {"Fn": 1, "Bn": 0, "max_warmup_steps": 1},
    "F2B1": {"Fn": 2, "Bn": 1, "max_warmup_steps": 2},
    "W4": {"Fn": 1, "Bn": 0, "max_warmup_steps": 4},
    "MC3": {"Fn": 1, "Bn": 0, "max_warmup_steps": 1, "max_continuous_cached_steps": 3},
}


def options_of(config: dict, threshold: float) -> dict:
    config = dict(config)
    return {
        "Fn_compute_blocks": config.pop("Fn"),
        "Bn_compute_blocks": config.pop("Bn"),
        "residual_diff_threshold": threshold,
        **config,
    }


def two_thresholds(diffs: dict) -> list[float]:
    """A threshold at which hits and misses both occur, and one above it."""
    middle = thresholds_with_both(diffs)
    return [middle, 1.25 * middle]


def check(expected, run, *, spans: list[str]) -> None:
    assert run.hits == [expected.hits[name] for name in spans]
    for reference, output in zip(expected.outputs, run.outputs, strict=True):
        assert relative_error(reference, output) < 1e-5


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", NAMES)
def test_scope_stack_is_cache_dit(name: str, config: str) -> None:
    settings = CONFIGS[config]
    model, steps = build(name), walk(name, STEPS)
    measured = run_cache_dit(model, steps, threshold=MEASURE_ONLY, separate_lists=True, **settings)
    hits = 0
    for threshold in two_thresholds(measured.diffs):
        expected = run_cache_dit(model, steps, threshold=threshold, separate_lists=True, **settings)
        run = run_cached(model, steps, scope="stack", **options_of(settings, threshold))
        check(expected, run, spans=list(expected.hits))
        hits += sum(map(len, run.hits))
    assert hits


@pytest.mark.parametrize("config", CONFIGS)
def test_scope_model_is_cache_dit_on_a_merged_list(config: str) -> None:
    settings = CONFIGS[config]
    model, steps = build("flux"), walk("flux", STEPS)
    measured = run_cache_dit(model, steps, threshold=MEASURE_ONLY, **settings)
    for threshold in two_thresholds(measured.diffs):
        expected = run_cache_dit(model, steps, threshold=threshold, **settings)
        check(expected, run_cached(model, steps, **options_of(settings, threshold)), spans=list(expected.hits))


@pytest.mark.parametrize("name", NAMES)
def test_scope_model_is_first_block_cache(name: str) -> None:
    model, steps = build(name), walk(name, STEPS)
    measured = run_first_block_cache(model, steps, threshold=MEASURE_ONLY)
    if measured is None:
        pytest.skip(f"diffusers' FirstBlockCache does not support {name}")
    for threshold in two_thresholds(measured.diffs):
        expected = run_first_block_cache(model, steps, threshold=threshold)
        run = run_cached(model, steps, residual_diff_threshold=threshold, max_warmup_steps=0)
        check(expected, run, spans=list(expected.hits))
        assert 0 < len(run.hits[0]) < STEPS
