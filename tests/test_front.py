"""What a forward in several graphs has run before a span of it. Oracles: the model itself, and the rule in Python."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module
from torch.utils import module_tracker

import fx_cache
from tests.running import compile_cached, hits_of
from tests.test_who_is_called import REUSING, Block, Dit

STEPS = 8
CHANGED_AT = 5
ELSEWHERE: list[Tensor] = []


class Reading(Block):
    """Adds a mean of the text, but for the first one: the head does not show it."""

    def forward(self, x: Tensor, e: Tensor, text: Tensor) -> Tensor:
        return super().forward(x, e) + text.mean(1, keepdim=True)


class Broken(Dit):
    """Reads what it holds in front of a graph break, and the blocks read that behind it."""

    def __init__(self, held: str, breaks: str) -> None:
        super().__init__()
        self.held_as, self.breaks = held, breaks
        self.blocks = nn.ModuleList(Reading() for _ in range(5)).requires_grad_(False)
        self.number, self.scalar, self.tensor, self.bag = 1.0, torch.tensor(1.0), torch.randn(1, 5, 24), {}
        self.register_buffer("buffer", torch.randn(1, 5, 24))

    def forward(self, latent: Tensor, t: Tensor, text: Tensor) -> Tensor:
        given = {"tensor": self.tensor, "buffer": self.buffer, "elsewhere": ELSEWHERE[0], "bag": self.bag.get("text")}
        return self.run(latent, t, text if (held := given.get(self.held_as)) is None else held)

    def run(self, latent: Tensor, t: Tensor, text: Tensor) -> Tensor:
        e, x, text = self.embedded(t), self.patch(latent), self.text(text) * self.number * self.scalar
        if self.breaks:
            torch._dynamo.graph_break()
        for i, block in enumerate(self.blocks):
            if self.breaks == "between":
                torch._dynamo.graph_break()
            x = block(x, e, text if i else torch.zeros_like(text))
        return self.last(x)

    def change(self, how: str) -> None:
        """Another text, or a text read otherwise, in one of several ways."""
        other = torch.randn(1, 5, 24)
        if how == "written":
            self.text.weight.mul_(-1)
        elif how == "another parameter":
            self.text.weight = nn.Parameter(-self.text.weight, requires_grad=False)
        elif how == "number":
            self.number = -1.0
        elif how == "scalar":
            self.scalar = torch.tensor(-1.0)
        elif how == "scalar written":
            self.scalar.fill_(-1.0)
        elif how == "tensor written":
            self.tensor.copy_(other)
        elif how == "tensor":
            self.tensor = other
        elif how == "buffer":
            self.buffer.copy_(other)
        elif how == "bag":
            self.bag["text"] = other
        else:
            ELSEWHERE[0] = other


HELD = {
    "written": "",
    "another parameter": "",
    "number": "",
    "scalar": "",
    "scalar written": "",
    "tensor written": "tensor",
    "tensor": "tensor",
    "buffer": "buffer",
    "bag": "bag",
    "elsewhere": "elsewhere",
}
"""What changes, and as what the text is held."""


@pytest.mark.filterwarnings("ignore::fx_cache.CacheWarning")
@pytest.mark.parametrize("branch", [None, "only"])
@pytest.mark.parametrize("breaks", ["", "front", "between"])
@pytest.mark.parametrize("change", HELD)
def test_what_is_read_before_the_span_changes(change: str, breaks: str, branch: str | None) -> None:
    """In the midst of a request; the step computes, and those behind it reuse what it has computed."""
    ELSEWHERE[:] = [torch.randn(1, 5, 24)]
    model, text = Broken(HELD[change], breaks), torch.randn(1, 5, 24)
    model.bag["text"] = torch.randn(1, 5, 24)
    compiled, computed = torch.compile(model, backend="dit_cache", options=REUSING), []
    x = torch.randn(1, 16, 16)
    with torch.no_grad():
        for i in range(STEPS):
            if i == CHANGED_AT:
                model.change(change)
            inputs = x, torch.tensor([0.9 - 0.05 * i]), text
            with contextlib.nullcontext() if branch is None else fx_cache.session("request", branch):
                output = compiled(*inputs)
            computed.append(torch.equal(output, model(*inputs)))
            x = x - 0.1 * output
    assert not computed[CHANGED_AT - 1]
    assert computed[CHANGED_AT]
    assert not computed[-1]


@torch._dynamo.disable
def _elsewhere() -> Tensor:
    return ELSEWHERE[0]


class Behind(Broken):
    """The blocks' own graph is given what it holds."""

    def run(self, latent: Tensor, t: Tensor, text: Tensor) -> Tensor:
        e, x = self.embedded(t), self.patch(latent)
        torch._dynamo.graph_break()
        held = _elsewhere() if self.breaks == "handed over" else ELSEWHERE[0]
        held = self.text(held) * NUMBERS[0] * self.bag["number"]
        for i, block in enumerate(self.blocks):
            x = block(x, e, held if i else torch.zeros_like(held))
        return self.last(x)


NUMBERS = [1.0]


@pytest.mark.filterwarnings("ignore::fx_cache.CacheWarning")
@pytest.mark.parametrize("branch", [None, "only"])
@pytest.mark.parametrize("breaks", ["", "handed over"])
@pytest.mark.parametrize("change", ["tensor", "global number", "held number"])
def test_what_is_read_behind_the_graph_break_changes(change: str, breaks: str, branch: str | None) -> None:
    """More than once: from the second time on a number is an input of the graph."""
    ELSEWHERE[:], NUMBERS[:] = [torch.randn(1, 5, 24)], [1.0]
    model, text = Behind("", breaks), torch.randn(1, 5, 24)
    model.bag["number"] = 1.0
    compiled, computed = torch.compile(model, backend="dit_cache", options=REUSING), []
    x, changes = torch.randn(1, 16, 16), (4, 7, 10)
    with torch.no_grad():
        for i in range(13):
            if i in changes and change == "tensor":
                ELSEWHERE[0] = torch.randn(1, 5, 24)
            elif i in changes and change == "global number":
                NUMBERS[0] += 1.5
            elif i in changes:
                model.bag["number"] += 1.5
            inputs = x, torch.tensor([0.9 - 0.05 * i]), text
            with contextlib.nullcontext() if branch is None else fx_cache.session("request", branch):
                output = compiled(*inputs)
            computed.append(torch.equal(output, model(*inputs)))
            x = x - 0.1 * output
    assert all(computed[i] for i in changes)
    assert not any(computed[i] for i in (3, 6, 9, 12))


class Two(Dit):
    """Two stacks in many graphs; the blocks of the first one read what they hold."""

    class Holding(Block):
        def __init__(self) -> None:
            super().__init__()
            self.held = torch.randn(1, 5, 32)

        def forward(self, x: Tensor, e: Tensor) -> Tensor:
            return super().forward(x, e) + self.held.mean(1, keepdim=True)

    def __init__(self) -> None:
        super().__init__()
        self.holding = nn.ModuleList(self.Holding() for _ in range(5)).requires_grad_(False)

    def forward(self, latent: Tensor, t: Tensor, text: Tensor) -> Tensor:
        e, x = self.embedded(t), torch.cat([self.text(text), self.patch(latent)], 1)
        for block in (*self.holding, *self.blocks):
            torch._dynamo.graph_break()
            x = block(x, e)
        return self.last(x[:, text.shape[1] :])


class Gained(Two):
    """Code that is not captured stands between the stacks."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, latent: Tensor, t: Tensor, text: Tensor) -> Tensor:
        e, x = self.embedded(t), torch.cat([self.text(text), self.patch(latent)], 1)
        for block in self.holding:
            torch._dynamo.graph_break()
            x = block(x, e)
        x = self.between(x)
        for block in self.blocks:
            torch._dynamo.graph_break()
            x = block(x, e)
        return self.last(x[:, text.shape[1] :])

    @torch._dynamo.disable
    def between(self, x: Tensor) -> Tensor:
        if ELSEWHERE:
            self.gain.mul_(ELSEWHERE.pop())
        return x * self.gain


def test_a_weight_changes_between_two_spans() -> None:
    model, text = Gained(), torch.randn(1, 7, 24)
    compiled = torch.compile(model, backend="dit_cache", options=REUSING)
    x = torch.randn(1, 16, 16)
    for i in range(10):
        ELSEWHERE[:] = [torch.tensor(-1.0)] if i == 6 else []
        with torch.no_grad(), fx_cache.session("request", "only"):
            x = x - 0.1 * compiled(x, torch.tensor([0.9 - 0.05 * i]), text)
    # Behind that step everything begins anew; whether its request goes on is seen at the one after.
    assert hits_of(compiled) == [[3, 4, 5, 6], [3, 4, 5], [2], [2]]


def test_what_an_earlier_span_reads_changes() -> None:
    """The later one was computed behind that."""
    model, text = Two(), torch.randn(1, 7, 24)
    compiled = torch.compile(model, backend="dit_cache", options=REUSING)
    x = torch.randn(1, 16, 16)
    for i in range(9):
        if i == 6:
            for block in model.holding[1:]:
                block.held = torch.randn(1, 5, 32)
        with torch.no_grad(), fx_cache.session("request", "only"):
            x = x - 0.1 * compiled(x, torch.tensor([0.9 - 0.05 * i]), text)
    assert hits_of(compiled) == [[3, 4, 5, 7, 8]] * 2


class Given(Dit):
    """What the blocks read, but for the first one, comes from somewhere else in each way of `held`."""

    def __init__(self, many: bool) -> None:
        super().__init__()
        self.many = many
        self.blocks = nn.ModuleList(Reading() for _ in range(5)).requires_grad_(False)

    def held(self, text: Tensor) -> Tensor:
        raise NotImplementedError

    def behind(self, x: Tensor) -> Tensor:
        """Something behind the blocks."""
        return x

    def forward(self, latent: Tensor, t: Tensor, text: Tensor) -> Tensor:
        e, x, held = self.embedded(t), self.patch(latent), self.held(text)
        torch._dynamo.graph_break()
        for i, block in enumerate(self.blocks):
            if self.many:
                torch._dynamo.graph_break()
            x = block(x, e, held if i else torch.zeros(1, 5, 32))
        return self.behind(self.last(x))


def _computed(
    model: Given,
    text: Tensor,
    branch: str | None,
    changes: Mapping[int, Callable[[], Any]],
    within: Mapping[int, Callable[[], Any]] | None = None,
) -> list[int]:
    """The steps of a request that are computed.

    Args:
        model: what runs.
        text: its conditioning.
        branch: name of the pass, if any.
        changes: what happens before a step.
        within: what happens in one, behind the blocks.
    """
    compiled, computed = torch.compile(model, backend="dit_cache", options=REUSING), []
    x = torch.randn(1, 16, 16)
    for i in range(13):
        changes.get(i, lambda: None)()
        inputs = x, torch.tensor([0.9 - 0.05 * i]), text
        expected = model(*inputs)
        BEHIND[:] = [within[i]] if within and i in within else []
        with contextlib.nullcontext() if branch is None else fx_cache.session("request", branch):
            try:
                output = compiled(*inputs)
            except ZeroDivisionError:
                ELSEWHERE[0] = torch.randn(1, 5, 32)
                output = expected
        BEHIND.clear()
        if torch.equal(output, expected):
            computed.append(i)
        x = x - 0.1 * output
    return computed


BEHIND: list[Callable[[], Any]] = []


@torch._dynamo.disable
def _behind(x: Tensor) -> Tensor:
    for call in BEHIND:
        call()
    return x


def _another() -> None:
    ELSEWHERE[0] = torch.randn(1, 5, 32)


EITHER_WAY = [
    pytest.mark.filterwarnings("ignore::fx_cache.CacheWarning"),
    pytest.mark.parametrize("branch", [None, "only"]),
    pytest.mark.parametrize("many", [False, True]),
]


def either_way(test: Any) -> Any:
    """With the blocks in one graph, or in one each; the pass has a name, or none."""
    for mark in EITHER_WAY:
        test = mark(test)
    return test


@either_way
@pytest.mark.parametrize("ends", [_another, lambda: 1 / 0])
def test_what_is_handed_over_is_replaced_behind_the_blocks(
    ends: Callable[[], Any], many: bool, branch: str | None
) -> None:
    """By a step that reuses, or by one that computes and raises: the step behind that computes."""

    class Model(Given):
        def held(self, text: Tensor) -> Tensor:
            return _elsewhere()

        def behind(self, x: Tensor) -> Tensor:
            return _behind(x)

    ELSEWHERE[:] = [torch.randn(1, 5, 32)]
    computed = _computed(Model(many), torch.randn(1, 5, 24), branch, {6: _another}, {6: ends, 8: ends})
    assert {6, 7, 9} <= {*computed}
    assert not {5, 11, 12} & {*computed}


@either_way
def test_what_a_graph_made_is_handed_over_from_then_on(many: bool, branch: str | None) -> None:
    """At the first step it is known, later it is not."""

    class Model(Given):
        def held(self, text: Tensor) -> Tensor:
            return _kept(self.text(text))

    ELSEWHERE[:] = []
    kept = torch._dynamo.disable(lambda: ELSEWHERE.__setitem__(slice(None), [torch.randn(1, 5, 32)]))
    computed = _computed(Model(many), torch.randn(1, 5, 24), branch, {0: ELSEWHERE.clear, 6: kept})
    assert 6 in computed
    assert not {5, 11, 12} & {*computed}


@torch._dynamo.disable
def _kept(made: Tensor) -> Tensor:
    if not ELSEWHERE:
        ELSEWHERE.append(made)
    return ELSEWHERE[0]


@either_way
@pytest.mark.parametrize("place", ["dict", "list", "closure"])
@pytest.mark.parametrize("first", [1, 1.0])
def test_a_number_of_a_local_name_changes(first: float, place: str, many: bool, branch: str | None) -> None:
    """By its name it may be made of the time; from the second time on it is an input of the graph."""

    class Model(Given):
        def __init__(self) -> None:
            super().__init__(many)
            self.bag, self.numbers = {"number": first}, [first]

        def forward(self, latent: Tensor, t: Tensor, text: Tensor) -> Tensor:
            bag, numbers = self.bag, self.numbers
            e, x = self.embedded(t), self.patch(latent)
            torch._dynamo.graph_break()
            factor = {"dict": bag["number"], "list": numbers[0], "closure": number}[place]
            held = self.text(text) * factor
            torch._dynamo.graph_break()
            for i, block in enumerate(self.blocks):
                if self.many:
                    torch._dynamo.graph_break()
                x = block(x, e, held if i else torch.zeros(1, 5, 32))
            return self.last(x)

    number, model = first, Model()

    def change() -> None:
        nonlocal number
        number += 3
        model.bag["number"] += 3
        model.numbers[0] += 3

    computed = _computed(model, torch.randn(1, 5, 24), branch, dict.fromkeys((4, 7, 10), change))
    assert {4, 7, 10} <= {*computed}
    assert not {3, 6, 9, 12} & {*computed}


@either_way
def test_weights_of_code_between_the_graphs_change(many: bool, branch: str | None) -> None:
    class Model(Given):
        @torch._dynamo.disable
        def held(self, text: Tensor) -> Tensor:
            return self.text(text)

    model = Model(many)
    computed = _computed(model, torch.randn(1, 5, 24), branch, {6: lambda: model.text.weight.mul_(-1)})
    assert 6 in computed
    assert not {5, 11, 12} & {*computed}


@either_way
@pytest.mark.parametrize("given", [0, 1])
def test_one_of_several_that_the_user_gives_in_one_storage_is_held(given: int, many: bool, branch: str | None) -> None:
    """He gives a row of a bank of prompts; another one is held, and replaced by a third one."""

    class Model(Given):
        def held(self, text: Tensor) -> Tensor:
            return self.text(ELSEWHERE[0]) + self.text(text)

    bank = torch.randn(4, 5, 24)
    rows = [bank[k : k + 1] for k in range(4)]
    text = rows.pop(given)
    ELSEWHERE[:] = [rows[0]]
    computed = _computed(Model(many), text, branch, {6: lambda: ELSEWHERE.__setitem__(0, rows[1])})
    assert 6 in computed
    assert not {5, 7, 11, 12} & {*computed}


@pytest.mark.parametrize("branch", [None, "only"])
@pytest.mark.parametrize("how", ["counts", "replaced", "offloaded", "behind"])
def test_what_changes_at_every_step_is_no_change(how: str, branch: str | None) -> None:
    """Code between the graphs counts its calls, hooks replace parameters, in front of the blocks or behind them."""

    class Model(Given):
        def __init__(self) -> None:
            super().__init__(False)
            self.register_buffer("calls", torch.zeros(1))

        def held(self, text: Tensor) -> Tensor:
            self.count("counts", "replaced")
            return self.text(text)

        def behind(self, x: Tensor) -> Tensor:
            self.count("behind", "offloaded")
            return x

        @torch._dynamo.disable
        def count(self, *places: str) -> None:
            if how in places and how == "replaced":
                self.calls = self.calls + 1
            elif how in places and how == "offloaded":
                self.patch2.weight = nn.Parameter(self.patch2.weight.clone(), requires_grad=False)
            elif how in places:
                self.calls += 1

    computed = _computed(Model(), torch.randn(1, 5, 24), branch, {})
    assert computed == [0, 1]


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ([9, 8, 8, 7, 6, 5, 4, 3, 2], [0, 1]),  # PNDM: the second step is repeated
        ([9, 9, 8, 8, 7, 7, 6, 6, 5, 5], [0, 2]),  # Heun: two evaluations a step
    ],
)
def test_a_number_that_is_made_of_the_time_rests_with_it(times: Sequence[int], expected: Sequence[int]) -> None:
    """Only its first move is no evidence. In a named branch, a call at the time of the one before goes on with it."""
    model, text = Indexed(False), torch.randn(1, 7, 24)
    compiled = torch.compile(model, backend="dit_cache", options=REUSING)
    for request in range(2):
        x, computed = torch.randn(1, 16, 16), []
        for i, time in enumerate(times):
            inputs = x, torch.tensor([time / 10]), text
            with torch.no_grad(), fx_cache.session(f"request {request}", "only"):
                output = compiled(*inputs)
            if torch.equal(output, model(*inputs)):
                computed.append(i)
            x = x - 0.1 * output
    assert computed == expected


@pytest.mark.parametrize("given", [(1.0, 4.0), (5.0, 7.0)])
def test_a_number_changes_from_one_that_the_user_gives_to_another(given: tuple[float, float]) -> None:
    """He gives both as something else."""

    class Model(Given):
        def __init__(self) -> None:
            super().__init__(False)
            self.bag = {"number": 1.0}

        def forward(self, latent: Tensor, t: Tensor, text: Tensor, a: float, b: float) -> Tensor:
            bag = self.bag
            e, x = self.embedded(t) + a, self.patch(latent) * b
            torch._dynamo.graph_break()
            held = self.text(text) * bag["number"]
            torch._dynamo.graph_break()
            for i, block in enumerate(self.blocks):
                x = block(x, e, held if i else torch.zeros(1, 5, 32))
            return self.last(x)

    model, text, computed = Model(), torch.randn(1, 5, 24), []
    compiled = torch.compile(model, backend="dit_cache", options=REUSING)
    for request in range(2):
        x, model.bag["number"] = torch.randn(1, 16, 16), 1.0
        for i in range(STEPS):
            model.bag["number"] = 1.0 if i < CHANGED_AT else 4.0
            inputs = x, torch.tensor([0.9 - 0.05 * i]), text, *given
            with torch.no_grad(), fx_cache.session(f"request {request}", "only"):
                output = compiled(*inputs)
            computed.append(torch.equal(output, model(*inputs)))
            x = x - 0.01 * output
    assert computed[CHANGED_AT] and computed[STEPS + CHANGED_AT]
    assert not any(computed[i] for i in (CHANGED_AT - 1, STEPS + CHANGED_AT - 1, 2 * STEPS - 1))


@pytest.mark.parametrize("step", [1, 2, 5])
def test_weights_change_where_another_one_came(step: int) -> None:
    """A buffer is registered at the first step; the other weights are looked at all the same."""

    class Model(Given):
        @torch._dynamo.disable
        def held(self, text: Tensor) -> Tensor:
            return self.text(text)

        def behind(self, x: Tensor) -> Tensor:
            return _behind(x)

    model = Model(False)
    registers = {0: lambda: model.register_buffer("table", torch.zeros(1))}
    changes = {step: lambda: model.text.weight.mul_(-1)}
    computed = _computed(model, torch.randn(1, 5, 24), "only", changes, registers)
    assert step in computed
    assert not {4, 12} & {*computed}


class Stacks(Dit):
    """Two graphs, each with a stack."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList(Block() for _ in range(4)).requires_grad_(False)

    def forward(self, latent: Tensor, t: Tensor, text: Tensor) -> Tensor:
        e, x = self.embedded(t), torch.cat([self.text(text), self.patch(latent)], 1)
        for block in self.first:
            x = block(x, e)
        torch._dynamo.graph_break()
        for block in self.blocks:
            x = block(x, e)
        return self.last(x[:, text.shape[1] :])


@pytest.mark.parametrize("function", [False, True])
@pytest.mark.parametrize("branch", [None, "only"])
def test_weights_of_an_earlier_graph_change(branch: str | None, function: bool) -> None:
    """It caches too; what the later one has cached was computed behind it."""
    model, text = Stacks(), torch.randn(1, 7, 24)
    compiled = torch.compile(
        (lambda *inputs: model(*inputs)) if function else model, backend="dit_cache", options=REUSING
    )
    x, computed = torch.randn(1, 16, 16), []
    for i in range(STEPS):
        if i == CHANGED_AT:
            for block in model.first:
                block.out.weight.mul_(-1)
        inputs = x, torch.tensor([0.9 - 0.05 * i]), text
        with torch.no_grad(), contextlib.nullcontext() if branch is None else fx_cache.session("request", branch):
            output = compiled(*inputs)
        computed.append(torch.equal(output, model(*inputs)))
        x = x - 0.1 * output
    assert computed == [i == CHANGED_AT or (i < 2 and (i == 0 or branch is None)) for i in range(STEPS)]


@torch._dynamo.disable
def _index(t: Tensor) -> int:
    return round(float(t) * 1000)


class Indexed(Dit):
    """Code between the graphs makes an integer of the time."""

    def __init__(self, breaks: bool) -> None:
        super().__init__()
        self.breaks, self.table = breaks, nn.Parameter(torch.randn(1000, 32), requires_grad=False)

    def forward(self, latent: Tensor, t: Tensor, text: Tensor) -> Tensor:
        k = _index(t)
        e, x = self.embedded(t) + self.table[k][None], torch.cat([self.text(text), self.patch(latent)], 1)
        torch._dynamo.graph_break()
        for block in self.blocks:
            if self.breaks:
                torch._dynamo.graph_break()
            x = block(x, e)
        return self.last(x[:, text.shape[1] :])


@pytest.mark.parametrize("breaks", [False, True])
def test_a_number_that_is_made_of_the_time_is_no_change(breaks: bool) -> None:
    model, found = Indexed(breaks), []
    compiled = torch.compile(model, backend="dit_cache", options=REUSING)
    for request in range(2):
        x, text = torch.randn(1, 16, 16), torch.randn(1, 7, 24)
        for i in range(STEPS):
            inputs = x, torch.tensor([0.9 - 0.05 * i]), text
            with torch.no_grad(), fx_cache.session(f"request {request}", "only"):
                output = compiled(*inputs)
            found.append(not torch.equal(output, model(*inputs)))
            x = x - 0.1 * output
    # The first time the number is a part of the program; then its first move may be any change.
    assert found == [*[i > (2 if breaks else 1) for i in range(STEPS)], *[i > 1 for i in range(STEPS)]]


def test_nothing_is_hooked_to_the_modules_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other threads' forwards would capture it."""

    def refuse(*_: Any) -> None:
        pytest.fail("a hook for all modules of the process")

    for name in ("register_module_forward_pre_hook", "register_module_forward_hook"):
        monkeypatch.setattr(module, name, refuse)
        monkeypatch.setattr(module_tracker, name, refuse)
    model, text = Dit().eval(), torch.randn(1, 7, 24)
    compiled, x = compile_cached(model, residual_diff_threshold=10.0), torch.randn(1, 16, 16)
    for i in range(STEPS):
        x = x - 0.1 * compiled(x, torch.tensor([0.9 - 0.05 * i]), text)
    assert hits_of(compiled) == [list(range(2, STEPS))]
