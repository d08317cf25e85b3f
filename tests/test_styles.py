"""What real projects write otherwise is read alike: what is cached, exact where it computes, the plain rule on hits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import fx_cache
from fx_cache import compiling
from tests.counting import flops
from tests.models.styles import CASES, Model, State, build
from tests.oracles import tensors
from tests.running import last_branch, relative_error

STEPS = 10
TIMES = [0.5 + 0.01 * k for k in range(STEPS)]
WARMUP = 3


@dataclass(frozen=True)
class Expected:
    """How a case is to be cached with one block as the head.

    Attributes:
        blocks: number of blocks of each stack that is cached, in order of execution.
        skipped: the least share of a step's work that a hit saves, counted while it runs.
        spans: for each span the range of blocks that it skips; their residual is what is stored, and nothing else.
        learned: how many calls at the beginning show what the schedule is; each may count as a request of its own.
        hoisted: the least share of a first step's work that later steps do not repeat.
        missing: what is wrong today.
    """

    blocks: tuple[int, ...]
    skipped: float
    spans: tuple[tuple[int, int], ...] = field(default=())
    learned: int = 0
    hoisted: float = 0.0
    missing: str = ""

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        return self.spans or ((1, sum(self.blocks)),)


EXPECTED = {
    "checkpointed": Expected((10,), 0.85),
    "looped_step": Expected((12,), 0.88),
    "stacked_weights": Expected((10,), 0.85),
    "torch_encoder": Expected((8,), 0.8),
    "autocast_block": Expected((8,), 0.8),
    "nested_in_list": Expected((8,), 0.8),
    "dict_of_lists": Expected((8,), 0.8),
    "inplace_drop": Expected((8,), 0.8),
    "inplace_two": Expected((4, 6), 0.85),
    "outplace_two": Expected((4, 6), 0.85),
    "hyper_connections": Expected((8,), 0.8),
    "encoder_decoder": Expected((8, 4), 0.78, ((1, 8), (9, 12))),
    "side_network": Expected((8,), 0.75),
    "text_encoder": Expected((6,), 0.75, hoisted=0.6),
    "writes_condition": Expected((8,), 0.8),
    "integer_time": Expected((8,), 0.8, learned=1),
    "token_time": Expected((8,), 0.8),
    "token_time_in_pieces": Expected((8,), 0.75),
    "listed_latents": Expected((8,), 0.8),
    "listed_latents_in_pieces": Expected((8,), 0.75),
}


def in_pieces(name: str) -> bool:
    """Whether the forward is captured in several graphs."""
    return name.endswith("_in_pieces")


def compile_case(name: str, **options: Any) -> tuple[Model, Any]:
    """A compiled case that computes every step, and its inputs."""
    model, inputs = build(name)
    options = {"compiler": "counting_flops", "Fn_compute_blocks": 1, "residual_diff_threshold": 0.0, **options}
    options = {"max_warmup_steps": WARMUP, **options}
    return torch.compile(model, backend="dit_cache", fullgraph=not in_pieces(name), options=options), inputs


class Rule:
    """The caching rule of a case in plain Python: the model's own blocks, or their streams plus what they added."""

    def __init__(self, name: str) -> None:
        self.model, self.inputs = build(name)
        self.spans = EXPECTED[name].ranges
        self.residuals: dict[int, tuple[Tensor, ...]] = {}

    def step(self, t: float, reuse: bool) -> list[Tensor]:
        args, kwargs = self.inputs(t)
        state, done = self.model.begin(*args, **kwargs), 0
        for first, stop in self.spans:
            state = self.blocks(state, done, first)
            goes_on = self.glue_alone(state, first, stop)
            if reuse:
                streams = zip(goes_on["x"], self.residuals[first], strict=True)
                state = {**goes_on, "x": tuple(x + r for x, r in streams)}
            else:
                state = self.blocks(state, first, stop)
                self.residuals[first] = tuple(a - b for a, b in zip(state["x"], goes_on["x"], strict=True))
            done = stop
        return tensors(self.model.finish(self.blocks(state, done, self.model.depth)))

    def blocks(self, state: State, first: int, stop: int) -> State:
        """Runs blocks; what they write in place is not seen outside."""
        state = {**state, "x": tuple(x.clone() for x in state["x"])}
        for i in range(first, stop):
            state = self.model.step(i, self.model.glue(i, state))
        return state

    def glue_alone(self, state: State, first: int, stop: int) -> State:
        """The streams in the form that they have behind some blocks: joined where those join them."""
        for i in range(first, stop):
            state = self.model.glue(i, state)
        return {**state, "x": tuple(x.clone() for x in state["x"])}


def run(call: Any, inputs: Any) -> tuple[list[list[Tensor]], list[int]]:
    """The outputs of every step, and the work of each."""
    outputs, work = [], []
    for t in TIMES:
        args, kwargs = inputs(t)
        output, counted = flops(lambda args=args, kwargs=kwargs: call(*args, **kwargs))
        outputs.append([x.clone() for x in tensors(output)])
        work.append(counted)
    return outputs, work


def equal(a: Sequence[Sequence[Tensor]], b: Sequence[Sequence[Tensor]]) -> bool:
    return all(torch.equal(x, y) for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True))


def marked(name: str, wrong: bool) -> Any:
    """A case as a parameter; what is wrong today has to be wrong."""
    reason = EXPECTED[name].missing
    return pytest.param(name, marks=pytest.mark.xfail(strict=True, reason=reason)) if wrong else name


def test_every_case_is_looked_at() -> None:
    assert EXPECTED.keys() == CASES.keys()


@pytest.mark.parametrize("name", [marked(name, bool(EXPECTED[name].missing)) for name in CASES])
def test_found_and_right(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is cached; as much work skipped as that says; hits of a request nobody named are the rule's."""
    # A block that is one operation is counted too.
    monkeypatch.setattr(compiling, "_is_one_operation", lambda piece: False)
    expected = EXPECTED[name]
    compiled, inputs = compile_case(name, residual_diff_threshold=10.0)
    args, kwargs = build(name)[1](TIMES[0])
    found = fx_cache.explain(compiled, *args, **kwargs)
    assert found.reason is None
    assert tuple(s.blocks for s in found.stacks if s.span is not None) == expected.blocks
    assert len(found.spans) == len(expected.ranges)
    assert {rule for span in found.spans for _, rule in span} == {"residual"}

    outputs, work = run(compiled, inputs)
    spans = last_branch(compiled)["spans"]
    begun = STEPS - spans[0]["steps"]
    assert begun <= expected.learned
    assert all(span["hits"] == list(range(WARMUP, STEPS - begun)) for span in spans)
    hits = range(begun + WARMUP, STEPS)
    rule = Rule(name)
    for i, (t, output) in enumerate(zip(TIMES, outputs, strict=True)):
        for reference, value in zip(rule.step(t, i in hits), output, strict=True):
            assert relative_error(reference, value) < 1e-5, f"step {i}"
    computed = work[WARMUP - 1]
    assert all(1 - work[i] / computed >= expected.skipped for i in hits)
    assert 1 - computed / work[0] >= expected.hoisted
    # The blocks of the head are left, and no block has less than its share.
    most = 1 - len(expected.ranges) / sum(expected.blocks)
    assert all(1 - work[i] / computed <= most for i in hits)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::fx_cache.CacheWarning")
@pytest.mark.parametrize("name", CASES)
def test_exact_where_nothing_is_reused(name: str) -> None:
    model, inputs = build(name)
    expected, _ = run(model, inputs)
    compiled, inputs = compile_case(name, compiler="eager")
    assert equal(run(compiled, inputs)[0], expected)
