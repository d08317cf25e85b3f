"""A named request whose loop makes its conditioning anew at every step (``torch.cat([negative, prompt])``, say).

Branches are told apart by the content then. Oracles: the same request with inputs that are the same objects at each
step, and the model itself.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fx_cache
from fx_cache.runtime.identity import ContentHold, identity_key
from tests.models import conditioning, walk
from tests.running import REUSING, compile_cached, hits_of, last_branch, layers, schedule_on_a_device, shallow

NAME = "flux"
MODES = [contextlib.nullcontext, torch.inference_mode]
Steps = list[dict[str, Any]]


def anew(step: dict[str, Any]) -> dict[str, Any]:
    """A step with copies of all that it is given."""
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in step.items()}


def passes(count: int, *seeds: int) -> list[Steps]:
    """Walks that begin with the same latents, one for each pass, by the seeds of their prompts."""
    return [walk(NAME, count, conditioning=conditioning(NAME, seed=seed)) for seed in seeds]


def run(
    compiled: torch.nn.Module, name: str, passes: list[Steps], change: Callable[[dict], dict], numbered: bool = False
) -> tuple[list[torch.Tensor], list[list[int]]]:
    """Outputs of all calls of a named request, pass by pass at each step, and the hits of each of its branches."""
    outputs = []
    for i, calls in enumerate(zip(*passes, strict=True)):
        with fx_cache.session(name, step=i if numbered else None):
            outputs += [compiled(**change(call))[0].clone() for call in calls]
    session = fx_cache.summary(compiled).to_dict()["sessions"][-1]
    assert session["name"] == name
    return outputs, [branch["spans"][0]["hits"] for branch in session["branches"]]


@pytest.mark.parametrize("mode", MODES)
def test_it_is_the_request_with_inputs_that_stay(mode: Any) -> None:
    """Also where two passes are given the same content: each goes on with its own."""
    compiled = compile_cached(shallow(NAME), **REUSING)
    with mode():
        for numbered, seeds in itertools.product((False, True), ((0,), (0, 1), (0, 0))):
            expected, hits = run(compiled, f"stay {numbered} {seeds}", passes(7, *seeds), dict, numbered)
            outputs, found = run(compiled, f"anew {numbered} {seeds}", passes(7, *seeds), anew, numbered)
            assert found == hits
            assert len(hits) == len(seeds)
            assert all(hits)
            assert all(map(torch.equal, expected, outputs))


def test_with_a_timestep_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule_on_a_device(monkeypatch)
    compiled = compile_cached(shallow(NAME), **REUSING)
    expected, hits = run(compiled, "stay", passes(7, 0, 1), dict)
    outputs, found = run(compiled, "anew", passes(7, 0, 1), anew)
    assert found == hits
    assert all(hits)
    assert all(map(torch.equal, expected, outputs))


def test_a_model_without_a_timestep() -> None:
    class Untimed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.blocks = torch.nn.ModuleList([torch.nn.Linear(16, 16) for _ in range(5)])

        def forward(self, x: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = x + torch.tanh(block(x + prompt.mean(dim=1, keepdim=True)))
            return x

    hits = []
    for change in (lambda t: t, torch.clone):
        model = Untimed()
        compiled = compile_cached(model, **REUSING)
        generator = torch.Generator().manual_seed(0)
        x, *prompts = (torch.randn(1, n, 16, generator=generator) for n in (8, 5, 5))
        with fx_cache.session("request"):
            for i in range(6):
                for prompt in prompts:
                    compiled(x + 0.02 * i, change(prompt))
        hits.append(hits_of(compiled))
    assert hits[0] == hits[1]
    assert len(hits[0]) == 2


def test_without_a_name_each_call_is_a_request() -> None:
    """Somebody else may have the same prompt."""
    model, (steps,) = shallow(NAME), passes(5, 0)
    compiled = compile_cached(model, **REUSING)
    assert all(torch.equal(compiled(**anew(s))[0], model(**s)[0]) for s in steps)


@pytest.mark.parametrize("mode", MODES)
def test_other_content_is_another_branch(mode: Any) -> None:
    """Down to one bit."""
    model, (steps,) = shallow(NAME), passes(6, 0)
    compiled = compile_cached(model, **{**REUSING, "residual_diff_threshold": 1.0})
    with mode(), fx_cache.session("request"):
        for step in map(anew, steps[:4]):
            compiled(**step)
        other = anew(steps[4])
        other["encoder_hidden_states"].view(torch.int32)[0, 3, 5] ^= 1
        assert torch.equal(compiled(**other)[0], model(**other)[0])
    (session,) = fx_cache.summary(model).to_dict()["sessions"]
    assert [len(b["spans"][0]["hits"]) for b in session["branches"]] == [2, 0]


@pytest.mark.parametrize("mode", MODES)
def test_one_buffer_and_a_copy_of_it(mode: Any) -> None:
    """What a request began with was written to since: a copy of what is there now is not what was there then."""
    model, (steps, others) = shallow(NAME), passes(6, 0, 1)
    compiled = compile_cached(model, **{**REUSING, "residual_diff_threshold": 1.0})
    with mode(), fx_cache.session("request"):
        first = anew(steps[0])
        compiled(**first)
        for name, value in others[1].items():
            if isinstance(value, torch.Tensor):
                first[name].copy_(value)
        for i in range(1, 3):
            given = {**anew(first), "hidden_states": others[i]["hidden_states"], "timestep": others[i]["timestep"]}
            output = compiled(**given)[0]
            if i == 1:
                assert torch.equal(output, model(**given)[0])


def test_what_is_computed_once() -> None:
    """Projections of the prompt: as often as with inputs that stay."""
    model, (steps,) = shallow(NAME), passes(4, 0)
    compiled = compile_cached(model, residual_diff_threshold=0.0)
    compiled(**steps[0])
    fx_cache.reset(model)
    with fx_cache.session("request"):
        first, second, third = (layers(compiled, anew(step)) for step in steps[:3])
    assert first - second == first - third == 3


@pytest.mark.parametrize("mode", MODES)
def test_what_is_held_is_what_is_made_anew(mode: Any) -> None:
    model, (steps,) = shallow(NAME), passes(4, 0)
    compiled = compile_cached(model, **REUSING, hoist_invariants=False)
    with mode(), fx_cache.session("request"):
        for step in steps:
            compiled(**{**step, "encoder_hidden_states": step["encoder_hidden_states"].clone()})
    assert last_branch(model)["kept_bytes"] == steps[0]["encoder_hidden_states"].nbytes
    fx_cache.end("request")
    assert last_branch(model)["kept_bytes"] == 0


def test_inputs_that_stay_are_not_held() -> None:
    """A request that is named and never ended lets go of what it cached when its prompt is gone."""
    model, (steps,) = shallow(NAME), passes(4, 0)
    compiled = compile_cached(model, **REUSING)
    with fx_cache.session("request"):
        for step in steps[:3]:
            compiled(**step)
    del steps, step
    with fx_cache.session("other"):
        compiled(**passes(1, 1)[0][0])
    held = {
        s["name"]: sum(b["spans"][0]["bytes"] for b in s["branches"])
        for s in fx_cache.summary(model).to_dict()["sessions"]
    }
    assert held["request"] == 0 < held["other"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64, torch.complex128])
def test_content_is_bits(dtype: torch.dtype) -> None:
    values = torch.zeros(100, dtype=dtype)
    values[3] = float("nan")
    hold = ContentHold([values, 7])

    def same(given: list[Any]) -> bool:
        return hold.same(given, identity_key(given))

    assert same([values.clone(), 7])
    assert not same([values.clone(), 8])
    assert not same([values.clone()[:99], 7])
    assert not same([values.clone()])
    negative = values.clone()
    negative.view(torch.uint8)[-1] ^= 128  # the last zero's sign
    assert not same([negative, 7])
