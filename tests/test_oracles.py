"""The oracles work on the ten tiny models: exact where nothing is reused, both decisions where something is."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tests.models import MODELS, NAMES, SIZES, build, conditioning, walk
from tests.models.tiny import LAYERS
from tests.oracles import (
    MEASURE_ONLY,
    WHOLE_MODEL,
    OracleRun,
    run_cache_dit,
    run_eager,
    run_first_block_cache,
    thresholds_with_both,
)

STEPS = 8
WARMUP = 2
NO_FIRST_BLOCK_CACHE = {"sd3", "auraflow", "sana"}
# cache-dit as registered: Flux' two lists are one, AuraFlow's joint blocks are left alone.
CACHE_DIT_LISTS = {name: {MODELS[name].stacks[0]} for name in NAMES} | {"auraflow": {"single_transformer_blocks"}}
CACHE_DIT_BLOCKS = dict.fromkeys(NAMES, LAYERS) | {"flux": 2 * LAYERS, "sd3": LAYERS + 1}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads only cost time at this width, and much of it where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _equal(first: list[Tensor], second: list[Tensor]) -> list[bool]:
    return [torch.equal(one, other) for one, other in zip(first, second, strict=True)]


def _check_both(run: OracleRun, eager: OracleRun) -> None:
    """Hits and decided misses both occur; a step is exact just where every list was computed."""
    assert any(run.hits.values())
    assert any(step not in run.hits[name] for name, diffs in run.diffs.items() for step in diffs)
    reused = {step for steps in run.hits.values() for step in steps}
    assert _equal(run.outputs, eager.outputs) == [step not in reused for step in range(len(run.outputs))]


@pytest.mark.parametrize("name", NAMES)
def test_build_and_walk(name: str) -> None:
    """Seeded, free of zeros and ones that diffusers left, finite at every size and batch."""
    first, second, other = build(name), build(name), build(name, seed=1)
    assert not first.training
    for parameter, same, different in zip(first.parameters(), second.parameters(), other.parameters(), strict=True):
        assert torch.equal(parameter, same)
        assert not torch.equal(parameter, different)
        assert parameter.requires_grad
    for size in SIZES:
        for batch in (1, 2):
            calls = walk(name, steps=2, size=size, batch=batch)
            for output in run_eager(first, calls).outputs:
                assert output.shape[0] == batch
                assert output.isfinite().all()
                assert 0.1 < output.std() < 10


@pytest.mark.parametrize("name", NAMES)
def test_walk_keeps_the_conditioning(name: str) -> None:
    """Conditioning tensors are the same objects; latents and timesteps are new and move as asked."""
    prompt = conditioning(name, seed=3)
    first = walk(name, seed=1, conditioning=prompt)
    second = walk(name, seed=2, conditioning=prompt)
    for kwargs in first + second:
        assert all(kwargs[key] is value for key, value in prompt.items())
        assert kwargs["return_dict"] is False
    times = [kwargs["timestep"] for kwargs in first]
    assert all((later < earlier).all() for earlier, later in pairwise(times))
    for kwargs, other in zip(first, second, strict=True):
        assert not torch.equal(kwargs["hidden_states"], other["hidden_states"])
        assert torch.equal(kwargs["timestep"], other["timestep"])
    latents = [kwargs["hidden_states"] for kwargs in first]
    assert len({latent.data_ptr() for latent in latents}) == len(latents)
    assert all(0.1 < (later - earlier).std() < 0.2 for earlier, later in pairwise(latents))
    # The noise of a seed does not depend on where the prompt comes from.
    assert torch.equal(walk(name, seed=1)[0]["hidden_states"], latents[0])


@pytest.mark.parametrize("name", NAMES)
def test_cache_dit(name: str) -> None:
    """Exact without reuse, both decisions at a mid threshold, reuse at every step at a threshold of 1."""
    model, calls = build(name), walk(name, steps=STEPS)
    eager = run_eager(model, calls)

    never = run_cache_dit(model, calls, Fn=1, Bn=0, threshold=0.0, max_warmup_steps=WARMUP)
    assert set(never.hits) == CACHE_DIT_LISTS[name]
    assert set(never.num_blocks.values()) == {CACHE_DIT_BLOCKS[name]}
    assert not any(never.hits.values())
    assert all(_equal(never.outputs, eager.outputs))

    measured = run_cache_dit(model, calls, Fn=1, Bn=1, threshold=MEASURE_ONLY, max_warmup_steps=WARMUP)
    assert all(_equal(measured.outputs, eager.outputs))
    for diffs in measured.diffs.values():
        assert sorted(diffs) == list(range(WARMUP, STEPS))
    threshold = thresholds_with_both(measured.diffs)
    for last in (0, 1):
        run = run_cache_dit(model, calls, Fn=1, Bn=last, threshold=threshold, max_warmup_steps=WARMUP)
        _check_both(run, eager)
        for list_name, hits in run.hits.items():
            assert hits == [step for step, diff in run.diffs[list_name].items() if diff < threshold]

    always = run_cache_dit(model, calls, Fn=1, Bn=0, threshold=1.0, max_warmup_steps=WARMUP)
    assert all(hits == list(range(WARMUP, STEPS)) for hits in always.hits.values())

    # The runs worked on copies.
    assert all(_equal(run_eager(model, calls).outputs, eager.outputs))


@pytest.mark.parametrize("name", ["flux", "auraflow"])
def test_cache_dit_with_a_context_for_each_list(name: str) -> None:
    """Flux and AuraFlow with two lists, two probes and two decisions."""
    model, calls = build(name), walk(name, steps=STEPS)
    eager = run_eager(model, calls)
    settings = {"Fn": 1, "Bn": 0, "max_warmup_steps": WARMUP, "separate_lists": True}
    measured = run_cache_dit(model, calls, threshold=MEASURE_ONLY, **settings)
    assert all(_equal(measured.outputs, eager.outputs))
    assert measured.num_blocks == dict.fromkeys(MODELS[name].stacks, LAYERS)
    run = run_cache_dit(model, calls, threshold=thresholds_with_both(measured.diffs), **settings)
    _check_both(run, eager)
    assert all(run.hits.values())


def test_cache_dit_limits() -> None:
    """The limits and the step mask reach cache-dit."""
    model, calls = build("wan"), walk("wan", steps=STEPS)
    settings = {"Fn": 1, "Bn": 0, "threshold": 1.0, "max_warmup_steps": WARMUP}
    capped = run_cache_dit(model, calls, max_cached_steps=2, **settings)
    assert capped.hits == {"blocks": [2, 3]}
    continuous = run_cache_dit(model, calls, max_continuous_cached_steps=2, **settings)
    assert continuous.hits == {"blocks": [2, 3, 5, 6]}
    masked = run_cache_dit(
        model, calls, steps_computation_mask=[1, 1, 0, 0, 1, 0, 1, 0], steps_computation_policy="static", **settings
    )
    assert masked.hits == {"blocks": [2, 3, 5, 7]}


@pytest.mark.parametrize("name", NAMES)
def test_first_block_cache(name: str) -> None:
    """None where diffusers cannot; else exact without reuse and both decisions at a mid threshold."""
    model, calls = build(name), walk(name, steps=STEPS)
    eager = run_eager(model, calls)
    measured = run_first_block_cache(model, calls, threshold=MEASURE_ONLY)
    if name in NO_FIRST_BLOCK_CACHE:
        assert measured is None
        return
    assert measured is not None
    assert measured.num_blocks == {WHOLE_MODEL: CACHE_DIT_BLOCKS[name]}
    assert measured.hits == {WHOLE_MODEL: []}
    assert all(_equal(measured.outputs, eager.outputs))
    run = run_first_block_cache(model, calls, threshold=thresholds_with_both(measured.diffs))
    assert run is not None
    _check_both(run, eager)


@pytest.mark.parametrize("name", sorted(set(NAMES) - NO_FIRST_BLOCK_CACHE))
def test_the_two_oracles_agree(name: str) -> None:
    """F1 B0 with one warm-up step is First Block Cache: the same hits and, but for rounding, the same samples."""
    model, calls = build(name), walk(name, steps=STEPS)
    measured = run_cache_dit(model, calls, Fn=1, Bn=0, threshold=MEASURE_ONLY, max_warmup_steps=1)
    threshold = thresholds_with_both(measured.diffs)
    one = run_cache_dit(model, calls, Fn=1, Bn=0, threshold=threshold, max_warmup_steps=1)
    other = run_first_block_cache(model, calls, threshold=threshold)
    assert other is not None
    assert [other.hits[WHOLE_MODEL]] == list(one.hits.values())
    torch.testing.assert_close(one.outputs, other.outputs)
