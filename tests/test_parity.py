"""cache-dit and diffusers' FirstBlockCache as oracles: the same hit steps and the same outputs on the same weights."""

from __future__ import annotations

import copy

import pytest

import fx_cache
from tests.models import NAMES, build, walk
from tests.oracles import MEASURE_ONLY, run_cache_dit, run_first_block_cache, thresholds_with_both
from tests.running import compile_cached, last_branch, relative_error, run_cached
from tests.selection import few

STEPS = 10
CONFIGS = {
    "F1B0": {"Fn": 1, "Bn": 0, "max_warmup_steps": 1},
    "F2B1": {"Fn": 2, "Bn": 1, "max_warmup_steps": 2},
    "W4": {"Fn": 1, "Bn": 0, "max_warmup_steps": 4},
    "SCM static": {
        "Fn": 1,
        "Bn": 0,
        "max_warmup_steps": 3,
        "steps_computation_policy": "static",
        "steps_computation_mask": (1, 1, 1, 0, 0, 1, 0, 1, 0, 1),
    },
    "SCM dynamic": {"Fn": 1, "Bn": 0, "max_warmup_steps": 3, "steps_computation_mask": (1, 1, 0, 0, 0, 1, 0, 0, 0, 1)},
    "MC3": {"Fn": 1, "Bn": 0, "max_warmup_steps": 1, "max_continuous_cached_steps": 3},
}


USUAL = {"max_continuous_cached_steps": -1, "steps_computation_mask": None, "steps_computation_policy": "dynamic"}
"""What some configurations say, and the others leave."""


def two_thresholds(diffs: dict) -> list[float]:
    """A threshold at which hits and misses both occur, and one above it."""
    middle = thresholds_with_both(diffs)
    return [middle, 1.25 * middle]


def check_against(model, steps, scope: str, settings: dict, compiled: dict, **oracle) -> int:
    """Runs cache-dit and the backend at two thresholds; one compiled model serves all run-time settings."""
    runtime = {**USUAL, **settings}
    cut = runtime.pop("Fn"), runtime.pop("Bn")
    if cut not in compiled:
        compiled[cut] = compile_cached(
            copy.deepcopy(model), scope=scope, Fn_compute_blocks=cut[0], Bn_compute_blocks=cut[1]
        )
        compiled[cut](**steps[0])
    unmasked = {name: value for name, value in settings.items() if "computation" not in name}
    measured = run_cache_dit(model, steps, threshold=MEASURE_ONLY, **unmasked, **oracle)
    hits = 0
    for threshold in two_thresholds(measured.diffs):
        expected = run_cache_dit(model, steps, threshold=threshold, **settings, **oracle)
        fx_cache.reset(compiled[cut])
        fx_cache.configure(compiled[cut], **runtime, residual_diff_threshold=threshold)
        with fx_cache.session("request", branch="only"):
            outputs = [compiled[cut](**step)[0].clone() for step in steps]
        spans = last_branch(compiled[cut])["spans"]
        assert [span["hits"] for span in spans] == list(expected.hits.values())
        for reference, output in zip(expected.outputs, outputs, strict=True):
            assert relative_error(reference, output) < 1e-5
        hits += sum(len(span["hits"]) for span in spans)
    return hits


@pytest.mark.parametrize("name", few(NAMES, 3))
def test_scope_stack_is_cache_dit(name: str) -> None:
    model, steps, compiled = build(name), walk(name, STEPS), {}
    for settings in CONFIGS.values():
        assert check_against(model, steps, "stack", settings, compiled, separate_lists=True)


def test_scope_model_is_cache_dit_on_a_merged_list() -> None:
    model, steps, compiled = build("flux"), walk("flux", STEPS), {}
    for settings in CONFIGS.values():
        assert check_against(model, steps, "model", settings, compiled)


@pytest.mark.parametrize("name", few(NAMES, 3))
def test_scope_model_is_first_block_cache(name: str) -> None:
    model, steps = build(name), walk(name, STEPS)
    measured = run_first_block_cache(model, steps, threshold=MEASURE_ONLY)
    if measured is None:
        pytest.skip(f"diffusers' FirstBlockCache does not support {name}")
    threshold = thresholds_with_both(measured.diffs)
    expected = run_first_block_cache(model, steps, threshold=threshold)
    run = run_cached(model, steps, residual_diff_threshold=threshold, max_warmup_steps=0)
    assert run.hits == list(expected.hits.values())
    assert 0 < len(run.hits[0]) < STEPS
    for reference, output in zip(expected.outputs, run.outputs, strict=True):
        assert relative_error(reference, output) < 1e-5
