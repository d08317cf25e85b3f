"""Several graphs: what blocks make beside their streams is current wherever it is read. Oracle: the plain rule."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fx_cache
from fx_cache.runtime import legs
from tests.running import hits_of, last_branch
from tests.test_relay import BLOCKS, STEPS, WIDTH, Block, Model, Oracle, compile_broken, walk

LATER = 5
"""The step from which on a tail reads what it has not read before."""


@pytest.fixture(autouse=True)
def many_graphs() -> Iterator[None]:
    with torch._dynamo.config.patch(recompile_limit=200), torch.no_grad():
        yield


def in_python(function: Any) -> Any:
    """The function runs as Python, and what it calls is captured."""
    return torch._dynamo.disable(function, recursive=False)


def uncaptured(function: Any) -> Any:
    """Nothing of the function is captured, nor of what it calls."""
    return torch._dynamo.disable(function)


SHIFTS = {
    "real": lambda time: time * 1.5,
    "integer": lambda time: (time * 100).long(),
    "complex": lambda time: torch.polar(torch.ones_like(time), time),
}


class Plain(Block):
    """Captured whole."""

    def forward(self, x: Tensor, text: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.time(time)[:, None] * self.mix(self.norm(x)) + text.mean(dim=1, keepdim=True)
        return x, text + torch.tanh(self.text(text)) * x.mean(dim=1, keepdim=True)


class Beside(Model):
    """Every block makes something of the time alone, and the tail reads what the last one made."""

    def __init__(self, made: str, read: str = "graph", kind: str = "real") -> None:
        super().__init__()
        if made == "with the block":
            self.blocks = nn.ModuleList(Plain() for _ in range(BLOCKS))
        self.side = nn.Linear(WIDTH, WIDTH)
        self.made, self.read, self.kind = made, read, kind
        self.note: Any = None

    def shift(self, time: Tensor) -> Tensor:
        return SHIFTS[self.kind](self.side(time))

    def block_and_shift(self, block: Block, x: Tensor, text: Tensor, time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, text = block(x, text, time)
        return x, text, self.shift(time)

    @uncaptured
    def activate(self, time: Tensor) -> Tensor:
        return torch.tanh(time)

    @uncaptured
    def take(self, shift: Tensor) -> None:
        """What is read, as code outside all graphs finds it."""
        real = torch.view_as_real(shift) if shift.is_complex() else shift
        self.note = float(real.sum()) if self.read == "number" else real * 1

    def shown(self, shift: Any) -> Any:
        if isinstance(shift, float):
            return shift
        return (torch.view_as_real(shift) if shift.is_complex() else shift).float().mean(dim=0).flatten()[:1]

    def tail(self, x: Tensor, text: Tensor, shift: Any) -> tuple[Tensor, Any]:
        return self.out(x + text.mean(dim=1, keepdim=True)), shift if shift is None else self.shown(shift) * 2.0

    @in_python
    def finish(self, x: Tensor, text: Tensor, shift: Tensor | None) -> tuple[Tensor, Any]:
        if self.read == "graph" or shift is None:
            return self.tail(x, text, shift)
        self.take(shift)
        return self.tail(x, text, self.note)

    @in_python
    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor, read: bool = True) -> tuple[Tensor, Any]:
        x, time = self.begin(latent, timestep)
        for block in self.blocks:
            if self.made == "with the block":
                x, text, shift = self.block_and_shift(block, x, text, time)
                continue
            x, text = block(x, text, time)
            shift = self.shift(time if self.made == "in a graph of its own" else self.activate(time))
        return self.finish(x, text, shift if read else None)


MADE = ["with the block", "in a graph of its own", "of what Python has made"]


def sampled(compiled: nn.Module, seed: int, **given: Any) -> list[tuple[Tensor, Any]]:
    with fx_cache.session(f"request-{seed}", branch="only"):
        return [compiled(**step, **given) for step in walk(seed)]


class Rule:
    """What a request gives at each step, whose hits are known."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.added = torch.zeros(()), torch.zeros(())

    def __call__(self, hit: bool, latent: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        x, time = self.model.begin(latent, timestep)
        begun = x, text = self.model.window(0, x, text, time)
        for i in range(1, 1 if hit else BLOCKS):
            x, text = self.model.window(i, x, text, time)
        if not hit:
            self.added = x - begun[0], text - begun[1]
        x, text = begun[0] + self.added[0], begun[1] + self.added[1]
        return self.model.out(x + text.mean(dim=1, keepdim=True))


@pytest.mark.parametrize("kind", SHIFTS)
@pytest.mark.parametrize("read", ["graph", "number", "tensor"])
@pytest.mark.parametrize("made", MADE)
def test_it_is_current_behind_the_blocks(made: str, read: str, kind: str) -> None:
    model = Beside(made, read, kind)
    compiled = compile_broken(model, residual_diff_threshold=10.0)
    for seed in (1, 2):
        sampled(compiled, seed)
    outputs, oracle = sampled(compiled, 3), Oracle(model, 1, 0, 10.0)
    for i, (step, (output, shown)) in enumerate(zip(walk(3), outputs, strict=True)):
        assert torch.allclose(output, oracle(i, **step), atol=1e-5)
        own = model(**step)[1]
        assert torch.equal(torch.as_tensor(shown), torch.as_tensor(own))
    assert last_branch(compiled)["spans"][0]["hits"] == oracle.hits == [2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize(
    ("reads", "hits"),
    [
        (range(STEPS), [2, 3, 4, 5, 6, 7]),
        (range(LATER, STEPS), [2, 3, 4, 7]),  # what the user gives has changed; behind it, a graph ran the first time
        (range(LATER, LATER + 1), [2, 3, 4, 7]),
    ],
    ids=str,
)
def test_a_tail_that_reads_it_later(reads: range, hits: list[int], made: str) -> None:
    """The forward that was watched had a tail that did not."""
    model = Beside(made)
    compiled = compile_broken(model, residual_diff_threshold=10.0)
    for seed in (1, 2):
        sampled(compiled, seed, read=False)
    rule = Rule(model)
    with fx_cache.session("request-3", branch="only"):
        for i, step in enumerate(walk(3)):
            output, shown = compiled(**step, read=i in reads)
            assert torch.allclose(output, rule(i in hits, **step), atol=1e-5)
            assert shown is None if i not in reads else torch.equal(shown, model(**step)[1])
    assert last_branch(compiled)["spans"][0]["hits"] == hits


class Heavy(Beside):
    """As much is made of what Python has made as the blocks are work: it may be the work on their streams."""

    def __init__(self, read_by: str, made_of: str = "time") -> None:
        super().__init__("of what Python has made")
        self.heavy = nn.Sequential(nn.Linear(WIDTH, 64 * WIDTH), nn.Linear(64 * WIDTH, WIDTH))
        self.read_by, self.made_of = read_by, made_of
        self.level = 0.5

    @uncaptured
    def leveled(self, time: Tensor) -> Tensor:
        return torch.full_like(time, self.level)

    def weigh(self, made: Tensor, time: Tensor) -> Tensor:
        return self.heavy(made + time if self.made_of == "both" else made)

    @in_python
    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor, read: bool = True) -> tuple[Tensor, Any]:
        x, time = self.begin(latent, timestep)
        for block in self.blocks:
            made = self.activate(time) if self.made_of in ("time", "time and more") else self.leveled(time)
            shift = self.weigh(made, time)
            shift = self.shift(shift) if self.made_of == "time and more" else shift
            x, text = block(
                x, text, shift if self.read_by == "blocks" else time * shift if self.read_by == "python" else time
            )
        return self.finish(x, text, shift if read and self.read_by != "blocks" else None)


@pytest.mark.parametrize("made_of", ["time", "time and more", "both"])
@pytest.mark.parametrize("read_by", ["blocks", "tail", "python"])
def test_what_may_be_work_on_a_stream_is_of_the_time(read_by: str, made_of: str) -> None:
    """What it is made of is another one at every step: the forward is begun anew, and the model is left alone."""
    model = Heavy(read_by, made_of)
    compiled = compile_broken(model, residual_diff_threshold=10.0)
    with pytest.warns(fx_cache.CacheWarning, match="other values between them"):
        for seed in (1, 2):
            for step, found in zip(walk(seed), sampled(compiled, seed), strict=True):
                assert all(torch.equal(a, b) for a, b in zip(found, model(**step), strict=True) if a is not None)
    assert not hits_of(compiled)


@pytest.mark.parametrize("level", [0.5, float("nan"), 0.0])
@pytest.mark.parametrize("fails", [False, True])
def test_what_may_be_work_on_a_stream_is_what_it_was(
    level: float, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is reused as long as what it is made of is the same; an error of ours in asking that lets nothing out."""
    model = Heavy("tail", "level")
    compiled, rule = compile_broken(model, residual_diff_threshold=10.0), Rule(model)
    hits = [2, 3, 4] if fails else [2, 3, 4, 7]  # behind a forward begun anew one step computes
    for seed in (1, 2):
        sampled(compiled, seed)
    with fx_cache.session("request-3", branch="only"), warnings.catch_warnings():
        warnings.simplefilter("ignore" if fails else "error", fx_cache.CacheWarning)
        for i, step in enumerate(walk(3)):
            model.level = level if i < LATER else -level if level == 0.0 else 0.9
            if fails and i == LATER:
                monkeypatch.setattr(legs, "any_of", lambda _: 1 / 0)
            output, shown = compiled(**step)
            assert torch.allclose(output, rule(i in hits, **step), atol=1e-5)
            assert torch.equal(shown.nan_to_num(7.0), model(**step)[1].nan_to_num(7.0))
    assert last_branch(compiled)["spans"][0]["hits"] == hits


class Given(Heavy):
    """What Python has made of the time before the blocks is given to all of them, or a slice of it to each."""

    def __init__(self, given: str) -> None:
        super().__init__("tail")
        self.given = given

    @uncaptured
    def make(self, time: Tensor) -> Tensor:
        return torch.tanh(torch.stack([time * (k + 1) for k in range(BLOCKS)]))

    @uncaptured
    def write(self, made: Tensor) -> None:
        made.mul_(1.5)

    def hand(self, made: Tensor) -> tuple[Tensor, Tensor]:
        return made, made.sum()

    @in_python
    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor, read: bool = True) -> tuple[Tensor, Any]:
        x, time = self.begin(latent, timestep)
        made = self.make(time)
        for i, block in enumerate(self.blocks):
            if self.given == "written" and i == 2:
                self.write(made)
            mine = made[i] if self.given == "cut" else self.hand(made[0])[0] if self.given == "handed" else made[0]
            shift = self.weigh(mine, time)
            x, text = block(x, text, time)
        return self.finish(x, text, shift)


@pytest.mark.parametrize("given", ["whole", "cut", "handed", "written"])
@pytest.mark.filterwarnings("ignore::fx_cache.CacheWarning")
def test_what_python_has_made_before_the_blocks(given: str) -> None:
    """The head was given it, and nobody has written to it since: it is of this step, whatever it is made of."""
    model = Given(given)
    compiled = compile_broken(model, residual_diff_threshold=10.0)
    for seed in (1, 2):
        sampled(compiled, seed)
    outputs, oracle = sampled(compiled, 3), Oracle(model, 1, 0, 10.0)
    for i, (step, (output, shown)) in enumerate(zip(walk(3), outputs, strict=True)):
        own, own_shown = model(**step)
        assert torch.equal(shown, own_shown)
        assert torch.equal(output, own) if given == "written" else torch.allclose(output, oracle(i, **step), atol=1e-5)
    assert hits_of(compiled)[-1:] == ([] if given == "written" else [[2, 3, 4, 5, 6, 7]])


class HandedOn(Model):
    """Python makes the stream another tensor before every block, and a graph hands that to the block."""

    def __init__(self, whole: bool) -> None:
        super().__init__()
        if whole:
            self.blocks = nn.ModuleList(Plain() for _ in range(BLOCKS))

    @uncaptured
    def add(self, x: Tensor, number: int) -> Tensor:
        return x + 0.3 * number

    def hand(self, x: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x, text, x.sum()

    @in_python
    def window(self, i: int, x: Tensor, text: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        x, text, _ = self.hand(self.add(x, i), text)
        return self.blocks[i](x, text, time)

    @in_python
    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor]:
        x, time = self.begin(latent, timestep)
        for i in range(BLOCKS):
            x, text = self.window(i, x, text, time)
        return (self.out(x + text.mean(dim=1, keepdim=True)),)


@pytest.mark.parametrize("whole", [False, True])
def test_a_stream_that_python_has_made_is_handed_to_the_blocks(whole: bool) -> None:
    model = HandedOn(whole)
    compiled = compile_broken(model, residual_diff_threshold=10.0)
    for seed in (1, 2):
        sampled(compiled, seed)
    outputs, oracle = sampled(compiled, 3), Oracle(model, 1, 0, 10.0)
    for i, (step, (output,)) in enumerate(zip(walk(3), outputs, strict=True)):
        assert torch.allclose(output, oracle(i, **step), atol=1e-5)
    assert last_branch(compiled)["spans"][0]["hits"] == oracle.hits == [2, 3, 4, 5, 6, 7]


class Entered(Plain):
    """A layer of one kind takes the stream first, and another one the time."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.side = Layer(), Layer()

    def rest(self, x: Tensor, text: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x, text, time)

    @in_python
    def forward(self, x: Tensor, text: Tensor, time: Tensor, first: bool) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        shift = self.side(time) if first else None
        x = self.enter(x)
        shift = self.side(time) if shift is None else shift
        return *self.rest(x, text, time), shift


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weigh = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.weigh(x)) + x


class Entering(Beside):
    def __init__(self, first: bool) -> None:
        super().__init__("")
        self.blocks = nn.ModuleList(Entered() for _ in range(BLOCKS))
        self.first = first

    def window(self, i: int, x: Tensor, text: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        return self.blocks[i](x, text, time, self.first)[:2]

    @in_python
    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor, read: bool = True) -> tuple[Tensor, Any]:
        x, time = self.begin(latent, timestep)
        for block in self.blocks:
            x, text, shift = block(x, text, time, self.first)
        return self.finish(x, text, shift)


@pytest.mark.parametrize("first", [False, True])
def test_the_same_code_takes_a_stream_and_the_time(first: bool) -> None:
    model, hits = Entering(first), [2, 3, 4, 5, 6, 7]
    compiled, rule = compile_broken(model, residual_diff_threshold=10.0), Rule(model)
    for seed in (1, 2, 3):
        for i, (step, (output, shown)) in enumerate(zip(walk(seed), sampled(compiled, seed), strict=True)):
            assert torch.equal(shown, model(**step)[1])
            assert seed < 3 or torch.allclose(output, rule(i in hits, **step), atol=1e-5)
    assert last_branch(compiled)["spans"][0]["hits"] == hits


class Routed(Block):
    """Python chooses the tokens that an expert works on, and adds what it makes of them."""

    def __init__(self) -> None:
        super().__init__()
        self.expert = nn.Sequential(nn.Linear(WIDTH, 64 * WIDTH), nn.Linear(64 * WIDTH, WIDTH))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(x)
        return x, x.sum(dim=-1) > 0

    def mixed(self, x: Tensor, y: Tensor, text: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.time(time)[:, None] * y + text.mean(dim=1, keepdim=True)
        return x, text + torch.tanh(self.text(text)) * x.mean(dim=1, keepdim=True)

    @in_python
    def forward(self, x: Tensor, text: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        normed, chosen = self.route(x)
        y = torch.zeros_like(normed)
        y[chosen] += self.expert(normed[chosen])
        return self.mixed(x, y, text, time)


def test_what_python_has_chosen_of_a_stream() -> None:
    """It is as it was then, and so is what it is made of."""
    model = Model()
    model.blocks = nn.ModuleList(Routed() for _ in range(BLOCKS))
    model.forward = in_python(model.forward)  # type: ignore[method-assign]
    compiled = compile_broken(model, residual_diff_threshold=10.0)
    for seed in (1, 2):
        sampled(compiled, seed)
    outputs, oracle = sampled(compiled, 3), Oracle(model, 1, 0, 10.0)
    for i, (step, (output,)) in enumerate(zip(walk(3), outputs, strict=True)):
        assert torch.allclose(output, oracle(i, **step), atol=1e-5)
    assert last_branch(compiled)["spans"][0]["hits"] == oracle.hits == [2, 3, 4, 5, 6, 7]


class Gathering(Beside):
    """What the blocks make of the time is added to what is made of it before them, or within, and read in the end."""

    def __init__(self, added: str, begun: str) -> None:
        super().__init__("in a graph of its own")
        self.blocks = nn.ModuleList(Plain() for _ in range(BLOCKS))
        self.added, self.begun = added, begun

    def add(self, gathered: Tensor, time: Tensor) -> None:
        gathered.add_(self.shift(time))

    @uncaptured
    def add_in_python(self, gathered: Tensor, time: Tensor) -> None:
        gathered.add_(torch.tanh(time))

    def block_and_add(self, block: Block, x: Tensor, text: Tensor, time: Tensor, to: Tensor) -> tuple[Tensor, Tensor]:
        self.add(to, time)
        return block(x, text, time)

    @in_python
    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor, read: bool = True) -> tuple[Tensor, Any]:
        x, time = self.begin(latent, timestep)
        gathered = self.shift(time)
        for block in self.blocks:
            if self.added == "with the block":
                gathered = gathered if self.begun == "before" else self.shift(time)
                x, text = self.block_and_add(block, x, text, time, gathered)
                continue
            x, text = block(x, text, time)
            gathered = gathered if self.begun == "before" else self.shift(time)
            (self.add if self.added == "in a graph" else self.add_in_python)(gathered, time)
        return self.tail(x, text, gathered)


@pytest.mark.filterwarnings("ignore::fx_cache.CacheWarning")
@pytest.mark.parametrize("begun", ["before", "within"])
@pytest.mark.parametrize("added", ["in a graph", "with the block", "in Python"])
def test_what_is_gathered_in_a_tensor(added: str, begun: str) -> None:
    """A write to what is made before them rules the blocks out, and so does one that cannot be made without them."""
    model = Gathering(added, begun)
    compiled, rule = compile_broken(model, residual_diff_threshold=10.0), Rule(model)
    reused = added == "in Python" or (added == "in a graph" and begun == "within")
    hits = [2, 3, 4, 5, 6, 7] if reused else []
    for seed in (1, 2, 3):
        for i, (step, (output, shown)) in enumerate(zip(walk(seed), sampled(compiled, seed), strict=True)):
            assert torch.equal(shown, model(**step)[1])
            assert seed < 3 or torch.allclose(output, rule(i in hits, **step), atol=1e-5)
    assert hits_of(compiled)[-1:] == ([hits] if hits else [])


class Chained(Model):
    """Every block makes of the time what the next one is given, and the tail reads the last of it."""

    def __init__(self, made: str, first: bool, cast: bool) -> None:
        super().__init__()
        self.cast = cast
        self.blocks = nn.ModuleList(Plain() for _ in range(BLOCKS))
        self.turns = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(BLOCKS))
        self.made, self.first = made, first

    def turn(self, i: int, time: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if self.cast else contextlib.nullcontext():
            return time + torch.tanh(self.turns[i](time)).float()

    @uncaptured
    def turn_in_python(self, i: int, time: Tensor) -> Tensor:
        return self.turn(i, time)

    def step(self, i: int, x: Tensor, text: Tensor, time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        turn = self.turn_in_python if self.made == "in Python" else self.turn
        if self.first:
            time = turn(i, time)
            return *self.blocks[i](x, text, time), time
        return *self.blocks[i](x, text, time), turn(i, time)

    def tail(self, x: Tensor, text: Tensor, time: Tensor) -> Tensor:
        return self.out(x + text.mean(dim=1, keepdim=True) + time[:, None])

    def in_one_graph(self, latent: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor]:
        x, time = self.begin(latent, timestep)
        for i in range(BLOCKS):
            x, text, time = self.step(i, x, text, time)
        return (self.tail(x, text, time),)

    def by_step(self, latent: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor]:
        """The same; what a step makes comes of one graph."""
        x, time = self.begin(latent, timestep)
        for i in range(BLOCKS):
            torch._dynamo.graph_break()
            x, text, time = self.step(i, x, text, time)
        torch._dynamo.graph_break()
        return (self.tail(x, text, time),)

    def forward(self, **given: Tensor) -> tuple[Tensor]:
        if self.made == "in one graph":
            return self.in_one_graph(**given)
        return self.by_step(**given) if self.made == "with the block" else in_python(self.in_one_graph)(**given)


class ChainedOracle:
    def __init__(self, model: Chained) -> None:
        self.model = model
        self.added: tuple[Tensor, Tensor] | None = None

    def __call__(self, step: int, latent: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        x, time = self.model.begin(latent, timestep)
        times = [time]
        for i in range(BLOCKS):
            times.append(self.model.turn(i, times[-1]))
        given = times[1:] if self.model.first else times
        x, text = self.model.blocks[0](x, text, given[0])
        if step < 2 or self.added is None:
            begun = x, text
            for i in range(1, BLOCKS):
                x, text = self.model.blocks[i](x, text, given[i])
            self.added = x - begun[0], text - begun[1]
        else:
            x, text = x + self.added[0], text + self.added[1]
        return self.model.tail(x, text, times[-1])


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("made", ["in one graph", "with the block", "in graphs of its own", "in Python"])
@pytest.mark.filterwarnings("ignore::fx_cache.CacheWarning")
def test_a_chain_beside_the_streams(made: str, first: bool, cast: bool) -> None:
    """It is handed on from block to block as streams are, and is none: nothing of what is denoised is in it.

    In one graph it is not moved out of a context: it would be computed otherwise.
    """
    model = Chained(made, first, cast)
    compiled = compile_broken(model, residual_diff_threshold=10.0)
    for seed in (1, 2):
        sampled(compiled, seed)
    refused = cast and made == "in one graph"
    outputs, oracle = sampled(compiled, 3), ChainedOracle(model)
    for i, (step, (output,)) in enumerate(zip(walk(3), outputs, strict=True)):
        if refused:
            assert torch.equal(output, model(**step)[0])
        else:
            assert torch.allclose(output, oracle(i, **step), atol=1e-5)
    assert hits_of(compiled)[-1:] == ([] if refused else [[2, 3, 4, 5, 6, 7]])


class PerToken(Chained):
    """A time for each token: the chain has the stream's shape."""

    def __init__(self, made: str, name: str, reads: bool, width: int) -> None:
        super().__init__(made, first=False, cast=False)
        self.blocks = nn.ModuleList(Alone() for _ in range(BLOCKS))
        self.name, self.reads, self.width = name, reads, width

    def begin(self, latent: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        x, time = super().begin(latent, timestep)
        return x, time[:, None].expand(-1, self.width * x.shape[1], -1) * 1.0

    def both(self, i: int, x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        return self.blocks[i](x, a[:, : x.shape[1]] if self.reads else 0 * x), self.turn(i, a)

    def both_named(self, i: int, x: Tensor, zz: Tensor) -> tuple[Tensor, Tensor]:
        return self.both(i, x, zz)

    @in_python
    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, time = self.begin(latent, timestep)
        for i in range(BLOCKS):
            x, time = (self.both if self.name == "a" else self.both_named)(i, x, time)
        return self.out(x), time.sin()


class Dependent(PerToken):
    """The stream is added to the chain, which so is another stream: they are made of each other one way alone."""

    def both(self, i: int, x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        x, a = super().both(i, x, a)
        return x, a + x.mean(dim=1, keepdim=True)


class Alone(Plain):
    """One stream."""

    def forward(self, x: Tensor, time: Tensor) -> Tensor:  # type: ignore[override]
        return x + torch.tanh(self.mix(self.norm(x)) + time)


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("name", ["a", "zz"])
def test_a_chain_as_large_as_the_stream(name: str, reads: bool, width: int) -> None:
    """What decides is the stream, and what is reused is that."""
    model = PerToken("with the block", name, reads, width)
    compiled = compile_broken(model, residual_diff_threshold=10.0)
    for seed in (1, 2):
        sampled(compiled, seed)
    outputs = sampled(compiled, 3)
    added = None
    for i, (step, (output, found)) in enumerate(zip(walk(3), outputs, strict=True)):
        x, time = model.begin(step["latent"], step["timestep"])
        begun, time = model.both(0, x, time)
        if i < 2:
            x = begun
            for k in range(1, BLOCKS):
                x, time = model.both(k, x, time)
            added = x - begun
        assert torch.allclose(output, model.out(begun + added), atol=1e-5)
        assert torch.equal(found, model(**step)[1])
    assert last_branch(compiled)["spans"][0]["hits"] == [2, 3, 4, 5, 6, 7]


@pytest.mark.filterwarnings("ignore::fx_cache.CacheWarning")
@pytest.mark.parametrize("name", ["a", "zz"])
def test_a_chain_that_the_main_stream_is_added_to(name: str) -> None:
    """It begins with the time, and no other is made of it: all that it shows of the picture would be what it was."""
    model = Dependent("with the block", name, reads=False, width=1)
    compiled = compile_broken(model, residual_diff_threshold=10.0)
    for seed in (1, 2, 3):
        for step, found in zip(walk(seed), sampled(compiled, seed), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(found, model(**step), strict=True))


@pytest.mark.parametrize("name", ["a", "zz"])
def test_it_is_not_known_which_stream_is_denoised(name: str) -> None:
    """Python has made what both begin with. Neither is taken for the main one."""

    class Unknown(PerToken):
        @uncaptured
        def begin(self, latent: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
            return super().begin(latent, timestep)

    model = Unknown("with the block", name, reads=False, width=1)
    compiled = compile_broken(model, residual_diff_threshold=10.0)
    with pytest.warns(fx_cache.CacheWarning, match="neither known to hold what is denoised"):
        for seed in (1, 2):
            for step, found in zip(walk(seed), sampled(compiled, seed), strict=True):
                assert all(torch.equal(a, b) for a, b in zip(found, model(**step), strict=True))


class Failing(Model):
    fails = False

    @uncaptured
    def may_fail(self) -> None:
        if self.fails:
            raise KeyError("no")

    def window(self, i: int, x: Tensor, text: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        if i == 2:
            self.may_fail()
        return super().window(i, x, text, time)

    @in_python
    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor]:
        x, time = self.begin(latent, timestep)
        for i in range(BLOCKS):
            x, text = self.window(i, x, text, time)
        return (self.out(x + text.mean(dim=1, keepdim=True)),)


@pytest.mark.parametrize(
    ("calls", "reused"),
    [
        ("B0 A0 C0! D0! A1 D1 A2 A3 A4", "A3 A4"),
        ("B0 A0 A1 A2 C0! D0! A3 D1 A4 A5", "A2 A5"),
        ("A0 B0 A1 C0! C1! A2 B1 A3 A4", "A4"),
    ],
)
def test_a_step_that_did_not_run_as_planned(calls: str, reused: str) -> None:
    """A hit goes on from the last step that was computed, also if that was watched. Oracle: the rule, step by step."""
    model = Failing()
    compiled = compile_broken(model, residual_diff_threshold=10.0)
    for seed in (90, 91):
        sampled(compiled, seed)
    oracles: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}
    hits = []
    for call in calls.split():
        name, number, model.fails = call[0], int(call[1]), call.endswith("!")
        step = walk(ord(name))[number]
        with fx_cache.session(name, branch="only"):
            if model.fails:
                with pytest.raises(KeyError):
                    compiled(**step)
                continue
            output = compiled(**step)[0]
        x, time = model.begin(step["latent"], step["timestep"])
        begun = model.window(0, x, step["text"], time)
        computed = oracles.setdefault(name, {})
        if torch.equal(output, model(**step)[0]):
            x, text = begun
            for i in range(1, BLOCKS):
                x, text = model.window(i, x, text, time)
            computed[number] = x - begun[0], text - begun[1]
            continue
        hits.append(call)
        x, text = (a + b for a, b in zip(begun, computed[max(computed)], strict=True))
        assert torch.allclose(output, model.out(x + text.mean(dim=1, keepdim=True)), atol=1e-5)
    assert " ".join(hits) == reused
