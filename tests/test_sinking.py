"""What is computed in front of a span for the span alone is skipped with it."""

from __future__ import annotations

import pytest
import torch

from tests.models import NAMES, build, walk
from tests.oracles import run_eager
from tests.running import compile_cached, last_branch, layers, run_cached


def test_a_hit_skips_what_only_later_blocks_read() -> None:
    """Of the text in the head's double block: the layer behind its attention, and the two of its MLP."""
    model, steps = build("flux"), walk("flux", 3)
    compiled = compile_cached(model, hoist_invariants=False, residual_diff_threshold=1.0)
    for step in steps[:2]:
        compiled(**step)
    count = layers(compiled, steps[2])
    assert last_branch(model)["spans"][0]["hits"] == [2]
    first = build("flux")
    del first.transformer_blocks[1:], first.single_transformer_blocks[:]
    assert count == layers(first, steps[1]) - 3


@pytest.mark.parametrize("name", NAMES)
def test_behind_a_head_of_two_blocks_the_model_is_itself(name: str) -> None:
    model, steps = build(name), walk(name, 3)
    run = run_cached(model, steps, residual_diff_threshold=0.0, Fn_compute_blocks=2)
    expected = run_eager(model, steps).outputs
    assert all(torch.equal(a, b) for a, b in zip(expected, run.outputs, strict=True))
