"""``force_refresh_step_hint``: a request that starts afresh gives what two requests give that are run alone."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterator

import pytest
import torch

import fx_cache
from tests.models import build, conditioning, walk
from tests.running import REUSING, compile_cached, hits_of

STEPS = 8


@contextlib.contextmanager
def named(name: str | None, branch: str | None = None) -> Iterator[None]:
    with contextlib.nullcontext() if name is None else fx_cache.session(name, branch=branch):
        yield


def alone(model: torch.nn.Module, chunks: list[list[dict]], name: str | None) -> list[torch.Tensor]:
    """The outputs of requests, each the first that its copy of the model sees."""
    outputs = []
    for steps in chunks:
        compiled = compile_cached(copy.deepcopy(model), **REUSING)
        with named(name):
            outputs += [compiled(**step)[0].clone() for step in steps]
        assert hits_of(compiled)
    return outputs


@pytest.mark.parametrize("name", [None, "request"])
@pytest.mark.parametrize(
    ("options", "cuts"),
    [
        ({"force_refresh_step_hint": 3}, [0, 3, STEPS]),
        ({"force_refresh_step_hint": 4, "force_refresh_step_policy": "repeat"}, [0, 4, STEPS]),
    ],
)
def test_a_request_starts_afresh(name: str | None, options: dict, cuts: list[int]) -> None:
    model, steps = build("dit"), walk("dit", STEPS)
    chunks = [steps[a:b] for a, b in itertools.pairwise(cuts)]
    expected = alone(model, chunks, "alone")
    compiled = compile_cached(model, **REUSING, **options)
    with named(name):
        outputs = [compiled(**step)[0].clone() for step in steps]
    assert [torch.equal(a, b) for a, b in zip(expected, outputs, strict=True)] == [True] * STEPS
    sessions = fx_cache.summary(model).to_dict()["sessions"]
    assert [s["branches"][0]["spans"][0]["steps"] for s in sessions] == [b - a for a, b in itertools.pairwise(cuts)]


@pytest.mark.parametrize("named_so", [True, False])
def test_calls_of_all_branches_count(named_so: bool) -> None:
    """As cache-dit counts them: with two passes a step, the sixth call is that of step 3."""
    model = build("dit")
    passes = {
        branch: walk("dit", STEPS, conditioning=conditioning("dit", k)) for k, branch in enumerate(("cond", "uncond"))
    }
    expected = {branch: alone(model, [steps[:3], steps[3:]], "alone") for branch, steps in passes.items()}
    compiled = compile_cached(model, **REUSING, force_refresh_step_hint=6)
    for i in range(STEPS):
        for branch, steps in passes.items():
            with named("request" if named_so else None, branch):
                assert torch.equal(compiled(**steps[i])[0], expected[branch][i])


def test_a_hint_where_a_request_begins_anyway_changes_nothing() -> None:
    """Editing pipelines call the transformer once before the loop: that call is no part of the request."""
    model, steps = build("dit"), walk("dit", STEPS)
    outputs = []
    for options in ({}, {"force_refresh_step_hint": 1}):
        compiled = compile_cached(copy.deepcopy(model), **REUSING, **options)
        compiled(**walk("dit", 1, conditioning=conditioning("dit", 3))[0])
        outputs.append([compiled(**step)[0].clone() for step in steps])
        assert hits_of(compiled)
    assert [torch.equal(a, b) for a, b in zip(*outputs, strict=True)] == [True] * STEPS
