"""Inputs that feed only the blocks a hit skips: no probe shows them, so a step with others computes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fx_cache
from fx_cache.runtime.gate import SpanGate
from tests.models import build, walk
from tests.oracles import run_eager
from tests.running import compile_cached, hits_of, last_branch, relative_error, run_cached
from tests.selection import few

NAME = "FluxTransformer2DModel+controlnet"
CHANGED = "an input that feeds only the span changed"


def controls_of(step: dict) -> list[torch.Tensor]:
    return [*step["controlnet_block_samples"], *step["controlnet_single_block_samples"]]


def with_controls(step: dict, change) -> dict:
    double, single = step["controlnet_block_samples"], step["controlnet_single_block_samples"]
    # The first sample is added behind block 0, which every step runs: it stays the same object.
    return {
        **step,
        "controlnet_block_samples": [double[0], *map(change, double[1:])],
        "controlnet_single_block_samples": [*map(change, single)],
    }


def test_explain_names_them() -> None:
    model, step = build(NAME), walk(NAME, 1)[0]
    found = fx_cache.explain(compile_cached(model), **step)
    assert len(found.inputs["controls"]) == len(controls_of(step)) - 1
    assert not any("encoder_hidden_states" in name or "pooled" in name for name in found.inputs["controls"])


def test_unchanged_controls_do_not_matter() -> None:
    steps = walk(NAME, 5)
    run = run_cached(build(NAME), steps, residual_diff_threshold=2.0)
    assert all(hits == [1, 2, 3, 4] for hits in run.hits)


@pytest.mark.parametrize("branch", few([None, "cond"], 1))
def test_a_step_with_other_controls_computes(branch: str | None) -> None:
    """cache-dit reuses here, and shows the picture of the old control (its issue 482)."""
    model, steps = build(NAME), walk(NAME, 6)
    other = with_controls(steps[3], lambda t: -2.0 * t)
    given = [*steps[:3], other, *(with_controls(s, lambda t, o=other: t) for s in steps[4:])]
    for step in given[4:]:
        step.update({k: other[k] for k in other if k.startswith("controlnet")})
    expected = run_eager(model, given).outputs
    compiled = compile_cached(model, residual_diff_threshold=2.0)
    with fx_cache.session("request", branch=branch):
        outputs = [compiled(**step)[0].clone() for step in given]
    for span in last_branch(model)["spans"]:
        # Guidance is embedded as the time is: which of them has moved first, no latent shows here, nor anything said.
        assert span["hits"] == ([2, 4, 5] if branch is None else [1, 2, 4, 5])
        assert span["misses"][3] == CHANGED
    assert torch.equal(outputs[3], expected[3])
    assert relative_error(expected[4], outputs[4]) < 0.5 * relative_error(
        run_eager(model, steps).outputs[4], expected[4]
    )


def test_written_in_place_is_changed() -> None:
    model, steps = build(NAME), walk(NAME, 4)
    compiled = compile_cached(model, residual_diff_threshold=2.0)
    with fx_cache.session("request", branch="cond"):
        for i, step in enumerate(steps):
            if i == 2:
                controls_of(step)[-1].mul_(-1.0)
            output = compiled(**step)[0].clone()
            if i == 2:
                assert torch.equal(output, model(**step)[0])
    assert all(CHANGED in span["misses"].values() for span in last_branch(model)["spans"])


def test_two_requests_with_one_prompt_and_two_controls_stay_apart() -> None:
    """Told apart by the controls alone, call by call in turns."""
    model, steps = build(NAME), walk(NAME, 5)
    others = [with_controls(s, lambda t: t) for s in steps]
    second = with_controls(steps[0], lambda t: -2.0 * t)
    for step in others:
        step.update({k: second[k] for k in second if k.startswith("controlnet")})
    compiled = compile_cached(model, residual_diff_threshold=2.0)
    alone = [[compiled(**s)[0].clone() for s in request] for request in (steps, others) if not fx_cache.reset(compiled)]
    fx_cache.reset(compiled)
    turns = [[compiled(**a)[0].clone(), compiled(**b)[0].clone()] for a, b in zip(steps, others, strict=True)]
    for i, (a, b) in enumerate(turns):
        assert torch.equal(a, alone[0][i])
        assert torch.equal(b, alone[1][i])
    branches = fx_cache.summary(compiled).to_dict()["sessions"][-1]["branches"]
    assert [span["hits"] for b in branches for span in b["spans"]] == [[2, 3, 4]] * sum(
        len(b["spans"]) for b in branches
    )


@pytest.mark.parametrize("mode", few([contextlib.nullcontext, torch.inference_mode], 1))
def test_made_anew_with_the_same_content_they_are_the_same(mode: Any) -> None:
    """Where the request is named: the keys and values of a prompt, joined at every step."""
    model, steps = build(NAME), walk(NAME, 6)
    compiled = compile_cached(model, residual_diff_threshold=2.0, max_continuous_cached_steps=2)

    def run(name: str, branch: str | None, change: Callable[[Any], Any]) -> list[torch.Tensor]:
        outputs = []
        with fx_cache.session(name, branch=branch):
            for i, step in enumerate(steps):
                given = {k: v if k in ("hidden_states", "timestep") else change(v) for k, v in step.items()}
                if i == 5:
                    given = with_controls(given, lambda t: t + 1.0)
                outputs.append(compiled(**given)[0].clone())
        for span in last_branch(model)["spans"]:
            assert span["hits"] == ([2, 3] if branch is None else [1, 2, 4])
            assert span["misses"][5] == CHANGED
        return outputs

    with mode():
        for branch in (None, "cond"):
            expected = run(f"stay {branch}", branch, lambda value: value)
            assert all(map(torch.equal, expected, run(f"anew {branch}", branch, clones)))


def clones(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    return type(value)(map(clones, value)) if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("name", few([None, "request"], 1))
def test_written_while_the_span_is_computed(name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """By another thread, say. What the span was computed from is not known: the next step computes."""
    model, steps = build(NAME), walk(NAME, 5)
    compiled = compile_cached(model, residual_diff_threshold=2.0, max_warmup_steps=3)
    remember = SpanGate.remember_control

    def written(gate: SpanGate) -> None:
        controls_of(steps[0])[-1].mul_(-1.0)
        remember(gate)

    with contextlib.nullcontext() if name is None else fx_cache.session(name):
        for i, step in enumerate(steps):
            with monkeypatch.context() as patch:
                if i == 2:
                    patch.setattr(SpanGate, "remember_control", written)
                compiled(**step)
    (span,) = last_branch(model)["spans"]
    assert span["misses"][3] == CHANGED
    assert span["hits"] == [4]


WIDTH = 16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.time, self.text = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor, time: Tensor, text: Tensor, added: Tensor | float) -> Tensor:
        gate = torch.sigmoid(self.time(time))[:, None]
        return x + gate * torch.tanh(self.layer(x)) + self.text(text).mean(1, keepdim=True) + added


class Late(nn.Module):
    """The first blocks of a stack do not read an input that the others do; `how` says what else does."""

    def __init__(self, how: str, stacks: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.embed, self.time, self.out = nn.Linear(4, WIDTH), nn.Linear(2, WIDTH), nn.Linear(WIDTH, 4)
        self.control = nn.Linear(WIDTH, WIDTH)
        self.stacks = nn.ModuleList(nn.ModuleList(Block() for _ in range(6)) for _ in range(stacks))
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, control: Any) -> Any:
        time = self.time(torch.stack([timestep.sin(), timestep.cos()], -1))
        x = self.embed(x)
        added = control if self.how == "number" else self.control(control).mean(1, keepdim=True)
        for k, stack in enumerate(self.stacks):
            for i, block in enumerate(stack):
                x = block(x, time, text, added if k == 0 and i >= 2 else 0.0)
            x = torch.tanh(x) * 2.0
        out = self.out(x)
        if self.how == "gate":
            out = out * torch.sigmoid(control.mean())
        return (out, control * 1.0) if self.how == "returned" else (out,)


LATE: list[tuple[str, Any, dict[str, Any]]] = [
    ("", (1, 8, WIDTH), {}),
    ("gate", (1, 8, WIDTH), {}),
    ("returned", (1, 8, WIDTH), {}),
    ("tail", (1, 8, WIDTH), {"Bn_compute_blocks": 1}),
    ("stack", (1, 8, WIDTH), {"scope": "stack"}),
    ("number", (), {}),
    ("number", (1,), {}),
    ("number", float, {}),
]


@pytest.mark.singly
@pytest.mark.parametrize("said", [{}, {"branch": "only"}, {"step": 0}, {"branch": "only", "step": 0}], ids=str)
@pytest.mark.parametrize(("how", "shape", "options"), LATE)
def test_what_no_probe_shows(how: str, shape: Any, options: dict[str, Any], said: dict[str, Any]) -> None:
    """Whatever else reads an input, and whatever it looks like: with another one a step computes."""
    model = Late(how, 2 if how == "stack" else 1)
    compiled = compile_cached(model, residual_diff_threshold=10.0, max_warmup_steps=1, **options)
    text = torch.randn(1, 80, WIDTH)
    values = (1.0, 3.0) if shape is float else [k * torch.ones(shape) + torch.randn(shape) for k in (0, 3)]
    for request in range(2):
        x = torch.randn(1, 8, 4)
        for i in range(8):
            inputs = x, torch.tensor([0.9 - 0.05 * i]), text, values[i >= 5]
            named = {**said, "step": i} if "step" in said else said
            with fx_cache.session(f"request-{request}", **named):
                output = compiled(*inputs)[0]
            if i in (0, 5):
                assert torch.equal(output, model(*inputs)[0]), (request, i)
            x = x - 0.05 * output
    assert sum(map(len, hits_of(model))) >= 6
