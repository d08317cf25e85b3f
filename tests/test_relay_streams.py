"""Several graphs: which stream is the main one, and what nobody sees of it. Oracle: the plain rule, or the model."""

from __future__ import annotations

import enum
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fx_cache
from fx_cache.runtime.forwards import Forward
from tests.test_relay import BLOCKS, WIDTH, Model, compile_broken, walk
from tests.test_relay_beside import Alone, Plain, in_python, sampled, uncaptured

ALL = [2, 3, 4, 5, 6, 7]
LATER = 3
"""The step from which on a forward goes as it has not gone before."""


@pytest.fixture(autouse=True)
def many_graphs() -> Iterator[None]:
    with torch._dynamo.config.patch(recompile_limit=200), torch.no_grad():
        yield


class Ruled(Model):
    """A model that says, in plain Python, what its streams are behind the first block, behind the last, and shown."""

    def head(self, step: dict[str, Any]) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def rest(self, streams: Sequence[Tensor], step: dict[str, Any]) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def tail(self, streams: Sequence[Tensor], step: dict[str, Any]) -> Any:
        raise NotImplementedError


def follow(model: Ruled, compiled: nn.Module, hits: Sequence[int], new: str = "", **given: Any) -> None:
    """A third request is the model's own at each step, or at those that hit the rule's.

    Args:
        model: the model.
        compiled: it, compiled, behind two requests.
        hits: the steps that are reused.
        new: an input that is set from the step `LATER` on, if any.
        given: more of what it is given.
    """
    added: tuple[Tensor, ...] | None = None
    reused = []
    with fx_cache.session("request-3", branch="only"):
        for i, step in enumerate(walk(3)):
            step = {**step, **given, **({new: i >= LATER} if new else {})}
            found, own = compiled(**step), model(**step)
            begun = model.head(step)
            if i not in hits or added is None:
                added = tuple(b - a for a, b in zip(begun, model.rest(begun, step), strict=True))
                expected = own
            else:
                expected = model.tail([a + b for a, b in zip(begun, added, strict=True)], step)
            assert torch.allclose(found[0], expected[0], atol=1e-5), i
            reused += [] if torch.equal(found[0], own[0]) else [i]
            assert all(a is b is None or torch.equal(a, b) for a, b in zip(found[1:], own[1:], strict=True)), i
    assert reused == [*hits]


def twice(model: nn.Module, **given: Any) -> nn.Module:
    """The model, compiled, behind two requests."""
    compiled = compile_broken(model, residual_diff_threshold=10.0)
    for seed in (1, 2):
        sampled(compiled, seed, **given)
    return compiled


class Turned(Ruled):
    """A time for each token is turned by a graph of its own in every block. Python touches the stream or the time."""

    def __init__(self, first: bool, touches: str, head: str = "captured", factor: float = 1.0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Alone() for _ in range(BLOCKS))
        self.turns = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(BLOCKS))
        self.first, self.touches, self.uncaptured_head, self.factor = first, touches, head == "Python", factor

    def turn(self, i: int, time: Tensor) -> Tensor:
        return time + torch.tanh(self.turns[i](time))

    def started(self, latent: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        x, time = self.begin(latent, timestep)
        return x, time[:, None].expand(-1, x.shape[1], -1) * 1.0

    @uncaptured
    def started_in_python(self, latent: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        return self.started(latent, timestep)

    @uncaptured
    def touch(self, value: Tensor, on: str) -> Tensor:
        return value * self.factor if on in self.touches else value

    def block(self, i: int, x: Tensor, t: Tensor) -> Tensor:
        return self.blocks[i](x, t)

    def both(self, i: int, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        return self.blocks[i](x, time), self.turn(i, time)

    @in_python
    def window(self, i: int, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        if self.touches == "time with the block":
            x, time = self.both(i, x, time)
            return x, self.touch(time, "time")
        if self.first:
            time = self.touch(self.turn(i, time), "time")
            return self.block(i, self.touch(x, "stream"), time), time
        x = self.block(i, self.touch(x, "stream"), time)
        return x, self.touch(self.turn(i, time), "time")

    def finish(self, x: Tensor) -> Tensor:
        return self.out(x)

    @in_python
    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        start = self.started_in_python if self.uncaptured_head else self.started
        x, time = start(latent, timestep)
        for i in range(BLOCKS):
            x, time = self.window(i, x, time)
        return self.finish(x), time.sin()

    def head(self, step: dict[str, Any]) -> tuple[Tensor, ...]:
        x, self.time_now = self.window(0, *self.started(step["latent"], step["timestep"]))
        return (x,)

    def rest(self, streams: Sequence[Tensor], step: dict[str, Any]) -> tuple[Tensor, ...]:
        x, time = streams[0], self.time_now
        for i in range(1, BLOCKS):
            x, time = self.window(i, x, time)
        return (x,)

    def tail(self, streams: Sequence[Tensor], step: dict[str, Any]) -> Any:
        return (self.finish(streams[0]),)


@pytest.mark.parametrize("head", ["captured", "Python"])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.filterwarnings("ignore::fx_cache.CacheWarning")
def test_python_touches_the_stream_and_a_graph_the_time(first: bool, head: str) -> None:
    """The time is handed on by graphs alone, in the stream's form: it is none of the streams all the same."""
    model = Turned(first, "stream", head)
    # Where nothing is known of either, and each begins a block, it is not known which is denoised.
    follow(model, twice(model), [] if head == "Python" and not first else ALL)


@pytest.mark.parametrize("factor", [1.0, 1.05])
@pytest.mark.parametrize("touches", ["time", "time with the block"])
@pytest.mark.filterwarnings("ignore::fx_cache.CacheWarning")
def test_python_touches_the_time_of_each_token(touches: str, factor: float) -> None:
    """It is made of no stream, and of something else at every step; and it is too much work to make it anew."""
    model = Turned(False, touches, factor=factor)
    follow(model, twice(model), [])


class Growing(Model):
    """The picture has another form in every block. What has the same, and is handed on as well, is another stream."""

    def __init__(self, handed: str, grows: str, head: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Plain() for _ in range(BLOCKS))
        self.handed, self.grows, self.uncaptured_head = handed, grows, head == "Python"

    @uncaptured
    def begin_in_python(self, latent: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        return self.begin(latent, timestep)

    @in_python
    def between(self, x: Tensor) -> Tensor:
        if self.grows == "tokens dropped":
            return x[:, :-1]
        if self.grows == "tokens joined":
            return torch.cat([x, x[:, :1]], dim=1)
        return x.double() if x.dtype == torch.float32 else x.float()

    def block(self, i: int, x: Tensor, text: Tensor, time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        block = self.blocks[i]
        if self.handed == "the text":
            found, text = block(x.float(), text, time)
            return found.to(x.dtype), text, time
        found = x.float() + torch.tanh(time)[:, None] * block.mix(block.norm(x.float()))
        return found.to(x.dtype), text, time + 0.3 * torch.tanh(block.time(time))

    @in_python
    def finish(self, x: Tensor, text: Tensor) -> tuple[Tensor]:
        x = torch.cat([x.float(), x[:, :12].float()], dim=1)[:, :24]
        return (self.out(x + 0.1 * text.mean(dim=1, keepdim=True)),)

    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor]:
        x, time = (self.begin_in_python if self.uncaptured_head else self.begin)(latent, timestep)
        for i in range(BLOCKS):
            x, text, time = self.block(i, x, text, time)
            x = self.between(x)
        return self.finish(x, text)


class GrowingInGraphs(Growing):
    forward = in_python(Growing.forward)


@pytest.mark.parametrize("grows", ["tokens dropped", "tokens joined", "another dtype"])
@pytest.mark.parametrize("handed", ["the text", "the time"])
@pytest.mark.parametrize("head", ["captured", "Python"])
@pytest.mark.parametrize("kind", [Growing, GrowingInGraphs])
@pytest.mark.filterwarnings("ignore::fx_cache.CacheWarning")
def test_a_picture_that_is_no_stream(kind: type[Growing], head: str, handed: str, grows: str) -> None:
    """It would be given back as it was: nothing is cached."""
    model = kind(handed, grows, head)
    for step, found in zip(walk(3), sampled(twice(model), 3), strict=True):
        assert torch.equal(found[0], model(**step)[0])


class Cut(Model):
    """Text and picture are joined and cut in code between the blocks; in the block the text is made first."""

    def __init__(self, tokens_first: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Plain() for _ in range(BLOCKS))
        self.dim = 0 if tokens_first else 1

    @uncaptured
    def cut(self, text: Tensor, x: Tensor) -> list[Tensor]:
        return list(torch.cat([text, x], dim=self.dim).split([text.shape[self.dim], x.shape[self.dim]], dim=self.dim))

    def first(self, block: Plain, text: Tensor, x: Tensor) -> Tensor:
        return text + torch.tanh(block.text(text)) + 0.1 * x.mean(dim=self.dim, keepdim=True)

    def second(self, block: Plain, text: Tensor, x: Tensor, time: Tensor) -> Tensor:
        return x + block.time(time)[:, None] * torch.tanh(block.mix(x)) + text.mean(dim=self.dim, keepdim=True)

    @in_python
    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor]:
        x, time = self.begin(latent, timestep)
        text = text + 0.1 * time[:, None]
        if self.dim == 0:
            x, text = x.transpose(0, 1), text.transpose(0, 1)
        for block in self.blocks:
            text, x = self.cut(text, x)
            text = self.first(block, text, x)
            x = self.second(block, text, x, time)
        return (self.out(x if self.dim else x.transpose(0, 1)),)


class Longer(Cut):
    """Code between the blocks adds tokens to the picture."""

    @uncaptured
    def cut(self, text: Tensor, x: Tensor) -> list[Tensor]:
        return [text, torch.cat([x, x.narrow(self.dim, 0, 1)], dim=self.dim)]


@pytest.mark.parametrize("tokens_first", [False, True])
@pytest.mark.parametrize("kind", [Cut, Longer])
@pytest.mark.filterwarnings("ignore::fx_cache.CacheWarning")
def test_the_picture_is_cut_out_of_a_join(kind: type[Cut], tokens_first: bool) -> None:
    """It moves with the latents, or nothing is cached."""
    model = kind(tokens_first)
    outputs, own = sampled(twice(model), 3), [model(**step)[0] for step in walk(3)]
    computed = 0
    for i, (found,) in enumerate(outputs):
        if torch.equal(found, own[i]):
            computed = i
        else:
            moved = (own[i] - own[computed]).norm()
            assert (found - outputs[computed][0]).norm() > 0.3 * moved, i
            assert (found - own[i]).norm() < 0.8 * moved, i


ADDITIONS = {
    "added": lambda x, delta: x + delta,
    "a part added": lambda x, delta: x + 0.5 * delta,
    "taken away": lambda x, delta: x - delta,
    "faded": lambda x, delta: 0.9 * x + delta,
}


class Added(Model):
    """Blocks give what code between the graphs adds to the stream."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Alone() for _ in range(BLOCKS))
        self.how = how

    @uncaptured
    def add(self, x: Tensor, delta: Tensor) -> Tensor:
        return ADDITIONS[self.how](x, delta)

    def delta(self, block: Alone, x: Tensor, time: Tensor) -> Tensor:
        return block(x, time) - x

    @in_python
    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor]:
        x, time = self.begin(latent, timestep)
        for block in self.blocks:
            x = self.add(x, self.delta(block, x, time[:, None]))
        return (self.out(x),)


@pytest.mark.parametrize("how", ADDITIONS)
@pytest.mark.filterwarnings("ignore::fx_cache.CacheWarning")
def test_code_between_the_graphs_adds_to_a_stream_of_its_own(how: str) -> None:
    """What blocks give is not the stream: nothing is cached."""
    model = Added(how)
    for step, found in zip(walk(3), sampled(twice(model), 3), strict=True):
        assert torch.equal(found[0], model(**step)[0])


SUMS = {
    "sum": lambda total, x: total + x,
    "mean": lambda total, x: torch.lerp(total, x, 0.2),
    "early exit": lambda total, x: torch.where(x.mean(-1, keepdim=True) > 0, x, total),
}


class Summed(Model):
    """A graph of its own adds what every block gives to a sum, of which alone the output is made."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Alone() for _ in range(BLOCKS))
        self.how = how

    def add(self, total: Tensor, x: Tensor) -> Tensor:
        return SUMS[self.how](total, x)

    @in_python
    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor]:
        x, time = self.begin(latent, timestep)
        total = x.clone()
        for block in self.blocks:
            x = block(x, time[:, None])
            total = self.add(total, x)
        return (self.out(total),)


@pytest.mark.parametrize("how", SUMS)
@pytest.mark.filterwarnings("ignore::fx_cache.CacheWarning")
def test_a_running_sum_is_no_stream(how: str) -> None:
    """It would be as far as the stream had come: nothing is cached."""
    model = Summed(how)
    for step, found in zip(walk(3), sampled(twice(model), 3), strict=True):
        assert torch.equal(found[0], model(**step)[0])


class Second(Model):
    """A second stream, which Python touches, is taken by a later graph of every block."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Plain() for _ in range(BLOCKS))
        self.factor = factor

    @uncaptured
    def touch(self, text: Tensor) -> Tensor:
        return text * self.factor

    def first(self, block: Plain, x: Tensor, time: Tensor) -> Tensor:
        return x + block.time(time)[:, None] * torch.tanh(block.mix(block.norm(x)))

    def second(self, block: Plain, text: Tensor, x: Tensor) -> Tensor:
        return text + torch.tanh(block.text(text)) * x.mean(dim=1, keepdim=True)

    @in_python
    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor]:
        x, time = self.begin(latent, timestep)
        for block in self.blocks:
            x = self.first(block, x, time)
            text = self.second(block, self.touch(text), x)
        return (self.out(x + text.mean(dim=1, keepdim=True)),)


@pytest.mark.parametrize("factor", [1.0, 1.1])
@pytest.mark.filterwarnings("ignore::fx_cache.CacheWarning")
def test_a_second_stream_that_nobody_sees(factor: float) -> None:
    """It would be given back as it was: nothing is cached."""
    model = Second(factor)
    for step, found in zip(walk(3), sampled(twice(model), 3), strict=True):
        assert torch.equal(found[0], model(**step)[0])


class Later(Ruled):
    """From some step on the blocks' graphs are others."""

    def __init__(self, does: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Plain() for _ in range(BLOCKS))
        self.side = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("own", torch.randn(BLOCKS, 1, 7, WIDTH))
        self.does = does

    @uncaptured
    def fresh(self) -> Tensor:
        return torch.zeros(1, WIDTH)

    @uncaptured
    def join(self, x: Tensor, i: int) -> Tensor:
        return torch.cat([x, self.own[i]], dim=1)

    def turn(self, x: Tensor) -> Tensor:
        return torch.tanh(self.side(x))

    def mix(self, x: Tensor) -> Tensor:
        return (x * 1.5 + 0.1).mean(dim=(1, 2))

    def block(self, i: int, x: Tensor, text: Tensor, time: Tensor, to: Tensor, later: bool) -> tuple[Any, ...]:
        shown = None
        if self.does == "gives back another first":
            shown = self.side(time)[:, None].expand(-1, x.shape[1], -1) * 1.0 if later else None
            return shown, self.mixed(i, x, time), text
        if later and self.does == "writes" and i >= 2:
            to.add_(self.side(time))
        x, text = self.blocks[i](x, text, time)
        if later and self.does == "draws random numbers" and i >= 2:
            shown = torch.rand(1, WIDTH)
        return shown, x, text

    def mixed(self, i: int, x: Tensor, time: Tensor) -> Tensor:
        block = self.blocks[i]
        return x + torch.tanh(block.time(time))[:, None] * block.mix(block.norm(x))

    def finish(self, x: Tensor, text: Tensor) -> Tensor:
        return self.out(x + text.mean(dim=1, keepdim=True))

    @in_python
    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor, later: bool = False) -> tuple[Tensor, Any]:  # type: ignore[override]
        torch.manual_seed(int(timestep * 1000))
        x, time = self.begin(latent, timestep)
        to, shown = self.fresh(), None
        turned = []
        for i in range(BLOCKS):
            shown, x, text = self.block(i, x, text, time, to, later)
            if self.does == "calls another code":
                turned.append(self.turn(time) if later else self.mix(self.join(x, i)))
                shown = sum(turned) if later else None
        return self.finish(x, text), to * 1 if self.does == "writes" else shown

    def head(self, step: dict[str, Any]) -> tuple[Tensor, ...]:
        x, time = self.begin(step["latent"], step["timestep"])
        return self.block(0, x, step["text"], time, time, later=False)[1:]

    def rest(self, streams: Sequence[Tensor], step: dict[str, Any]) -> tuple[Tensor, ...]:
        x, text = streams
        time = self.begin(step["latent"], step["timestep"])[1]
        for i in range(1, BLOCKS):
            _, x, text = self.block(i, x, text, time, time, later=False)
        return x, text

    def tail(self, streams: Sequence[Tensor], step: dict[str, Any]) -> Any:
        return (self.finish(*streams),)


@pytest.mark.parametrize(
    ("does", "hits"),
    [
        ("gives back another first", [2, 7]),
        ("writes", [2]),
        ("draws random numbers", [2]),
        ("calls another code", [2, 5, 6, 7]),
    ],
)
@pytest.mark.filterwarnings("ignore::fx_cache.CacheWarning")
def test_graphs_that_were_not_planned_by(does: str, hits: list[int]) -> None:
    """They compute, and the model is looked at anew."""
    model = Later(does)
    follow(model, twice(model, later=False), hits, new="later")


class Swapped(Ruled):
    """From some step on the blocks give back their two streams in the other order. Each is made of both."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(BLOCKS))

    def block(self, i: int, x: Tensor, y: Tensor, time: Tensor, later: bool) -> tuple[Tensor, Tensor]:
        added = torch.tanh(self.blocks[i](x + 0.1 * y)) * time[:, None]
        x, y = x + added, y + 0.3 * added
        return (y, x) if later else (x, y)

    def finish(self, x: Tensor, y: Tensor) -> Tensor:
        return self.out(x + y)

    def started(self, latent: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, time = self.begin(latent, timestep)
        return x, x.flip(1), time

    @in_python
    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor, later: bool = False) -> tuple[Tensor]:  # type: ignore[override]
        x, y, time = self.started(latent, timestep)
        for i in range(BLOCKS):
            found = self.block(i, x, y, time, later)
            x, y = found[later], found[not later]
        return (self.finish(x, y),)

    def head(self, step: dict[str, Any]) -> tuple[Tensor, ...]:
        x, y, time = self.started(step["latent"], step["timestep"])
        return self.block(0, x, y, time, later=False)

    def rest(self, streams: Sequence[Tensor], step: dict[str, Any]) -> tuple[Tensor, ...]:
        (x, y), time = streams, self.begin(step["latent"], step["timestep"])[1]
        for i in range(1, BLOCKS):
            x, y = self.block(i, x, y, time, later=False)
        return x, y

    def tail(self, streams: Sequence[Tensor], step: dict[str, Any]) -> Any:
        return (self.finish(*streams),)


@pytest.mark.filterwarnings("ignore::fx_cache.CacheWarning")
def test_graphs_that_give_back_the_streams_in_another_order() -> None:
    """They compute, and the model is looked at anew."""
    model = Swapped()
    follow(model, twice(model, later=False), [2, 7], new="later")


class Written(Ruled):
    """A block's second graph writes in place to what its first one made, and gives that back, or a copy."""

    def __init__(self, does: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(BLOCKS))
        self.does = does

    def first(self, i: int, x: Tensor) -> Tensor:
        return x + 0.1 * torch.tanh(self.blocks[i](x))

    def second(self, i: int, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.does == "the copy":
            made = x + torch.tanh(self.blocks[i](x)) * time[:, None]
            x.copy_(made)
            return made, None
        x.add_(torch.tanh(self.blocks[i](x)) * time[:, None])
        return x.view(x.shape), x[:, :4] if self.does == "a part" else None

    @uncaptured
    def show(self, part: Tensor) -> Tensor:
        return part.mean(dim=1, keepdim=True).tanh()[..., :4]

    def finish(self, x: Tensor) -> Tensor:
        return self.out(x)

    @in_python
    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor]:  # type: ignore[override]
        x, time = self.begin(latent, timestep)
        for i in range(BLOCKS):
            kept = self.first(i, x)
            x, part = self.second(i, kept, time)
        shown = self.finish(kept if self.does == "what is written to" else x)
        return (shown if part is None else shown + self.show(part),)

    def head(self, step: dict[str, Any]) -> tuple[Tensor, ...]:
        x, time = self.begin(step["latent"], step["timestep"])
        return self.second(0, self.first(0, x), time)[:1]

    def rest(self, streams: Sequence[Tensor], step: dict[str, Any]) -> tuple[Tensor, ...]:
        (x,), time = streams, self.begin(step["latent"], step["timestep"])[1]
        for i in range(1, BLOCKS):
            x, _ = self.second(i, self.first(i, x), time)
        return (x,)

    def tail(self, streams: Sequence[Tensor], step: dict[str, Any]) -> Any:
        return (self.finish(streams[0]),)


@pytest.mark.parametrize(
    ("does", "hits"), [("the copy", ALL), ("what is written to", []), ("what is given back", []), ("a part", [])]
)
@pytest.mark.filterwarnings("ignore::fx_cache.CacheWarning")
def test_a_block_writes_to_what_it_made(does: str, hits: list[int]) -> None:
    """What it wrote to is not what it was: where that is read, or is the stream, nothing is cached."""
    model = Written(does)
    follow(model, twice(model), hits)


class Sharing(Later):
    """A block gives back a part of its stream, or another form of it, beside the stream. Python writes to that."""

    def part(self, x: Tensor) -> Tensor:
        parts = {"tokens": x[:, :4], "channels": x[:, :, 3:7], "all": x.view(-1), "turned": x.transpose(1, 2)}
        return parts[self.does]

    @uncaptured
    def write(self, part: Tensor, time: Tensor) -> None:
        part.add_(torch.tanh(time).mean() * 3)

    def sharing(self, i: int, x: Tensor, text: Tensor, time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, text = self.blocks[i](x, text, time)
        return x, text, self.part(x)

    @in_python
    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor]:  # type: ignore[override]
        x, time = self.begin(latent, timestep)
        for i in range(BLOCKS):
            x, text, part = self.sharing(i, x, text, time)
        self.write(part, time)
        return (self.finish(x, text),)

    def tail(self, streams: Sequence[Tensor], step: dict[str, Any]) -> Any:
        self.write(self.part(streams[0]), self.begin(step["latent"], step["timestep"])[1])
        return (self.finish(*streams),)


@pytest.mark.parametrize(("part", "hits"), [("tokens", ALL), ("all", []), ("channels", []), ("turned", [])])
@pytest.mark.filterwarnings("ignore::fx_cache.CacheWarning")
def test_what_shares_memory(part: str, hits: list[int]) -> None:
    """It does so on a hit too; or nothing is cached, since what is read may be a picture of its own."""
    model = Sharing(part)
    follow(model, twice(model), hits)


class Seen(Later):
    """A block gives back, beside its streams, what it was given as a view. Python makes something of that."""

    def seen(self, x: Tensor) -> Tensor:
        views = {"tokens": x[:, :8], "all": x.unflatten(1, (-1, 4)), "turned": x.transpose(1, 2)}
        return views[self.does]

    def seeing(self, i: int, x: Tensor, text: Tensor, time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return *self.blocks[i](x, text, time), self.seen(x)

    @uncaptured
    def show(self, view: Tensor) -> Tensor:
        return view.flatten(1)[:, None, :4].tanh()

    @in_python
    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor]:  # type: ignore[override]
        x, time = self.begin(latent, timestep)
        for i in range(BLOCKS):
            x, text, view = self.seeing(i, x, text, time)
        return (self.finish(x, text) + self.show(view),)

    def head(self, step: dict[str, Any]) -> tuple[Tensor, ...]:
        x, time = self.begin(step["latent"], step["timestep"])
        x, text = self.blocks[0](x, step["text"], time)
        return x, text, x

    def rest(self, streams: Sequence[Tensor], step: dict[str, Any]) -> tuple[Tensor, ...]:
        x, text, given = streams
        time = self.begin(step["latent"], step["timestep"])[1]
        for i in range(1, BLOCKS):
            given = x
            x, text = self.blocks[i](x, text, time)
        return x, text, given

    def tail(self, streams: Sequence[Tensor], step: dict[str, Any]) -> Any:
        x, text, given = streams
        return (self.finish(x, text) + self.show(self.seen(given)),)


@pytest.mark.parametrize("view", ["tokens", "all", "turned"])
@pytest.mark.filterwarnings("ignore::fx_cache.CacheWarning")
def test_a_view_of_what_a_block_is_given(view: str) -> None:
    """It is a view of that on a hit too: of the stream on its way, which goes on by a residual."""
    model = Seen(view)
    follow(model, twice(model), ALL)


class Copied(Later):
    """A block gives back, beside its stream, what it makes of it. The code behind all blocks takes only that."""

    def copy(self, x: Tensor) -> Tensor:
        copies = {
            "norm": lambda: self.blocks[0].norm(x),
            "dtype": x.double,
            "clone": x.clone,
            "linear": lambda: self.turn(x),
            "heads": lambda: x.unflatten(-1, (4, 4)).clone(),
        }
        return copies[self.does]()

    def copying(self, i: int, x: Tensor, text: Tensor, time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, text = self.blocks[i](x, text, time)
        return x, text, self.copy(x)

    @in_python
    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor]:  # type: ignore[override]
        x, time = self.begin(latent, timestep)
        for i in range(BLOCKS):
            x, text, copy = self.copying(i, x, text, time)
        return (self.finish(copy.float().flatten(2), text),)


@pytest.mark.parametrize("copy", ["norm", "dtype", "clone", "linear", "heads"])
@pytest.mark.filterwarnings("ignore::fx_cache.CacheWarning")
def test_a_copy_of_the_stream_is_taken_behind_the_blocks(copy: str) -> None:
    """It would be given back as it was: nothing is cached."""
    model = Copied(copy)
    follow(model, twice(model), [])


class Mode(enum.Enum):
    """It has no hash."""

    A = 1

    def __eq__(self, other: object) -> bool:
        return self is other


class Asked(Later):
    @in_python
    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor, mode: Mode) -> tuple[Tensor]:  # type: ignore[override]
        x, time = self.begin(latent, timestep)
        for i in range(BLOCKS):
            _, x, text = self.block(i, x, text, time, time, later=False)
        return (self.finish(x, text),)


def test_an_input_without_a_hash() -> None:
    """Whether it changed is not known: the model computes."""
    model = Asked("")
    compiled = compile_broken(model, residual_diff_threshold=10.0)
    for step in walk(1):
        assert torch.equal(compiled(**step, mode=Mode.A)[0], model(**step, mode=Mode.A)[0])


class OneStack(Later):
    """All blocks lie in one graph of several."""

    def stack(self, x: Tensor, text: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        for block in self.blocks:
            x, text = block(x, text, time)
        return x, text

    @in_python
    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor]:  # type: ignore[override]
        x, time = self.begin(latent, timestep)
        return (self.finish(*self.stack(x, text, time)),)


@pytest.mark.parametrize("kind", [OneStack, Later])
def test_an_error_of_ours_at_a_step(kind: type[Later], monkeypatch: pytest.MonkeyPatch) -> None:
    """That step computes, and what is behind it does not go on from an older one."""
    model = kind("")
    compiled = twice(model)
    note, failing = Forward.note, 4

    def fail(self: Forward, *args: Any) -> None:
        if i == failing:
            raise ValueError("ours")
        note(self, *args)

    monkeypatch.setattr(Forward, "note", fail)
    with fx_cache.session("request-3", branch="only"), warnings.catch_warnings():
        warnings.simplefilter("ignore", fx_cache.CacheWarning)
        for i, step in enumerate(walk(3)):
            own = model(**step)[0]
            assert torch.equal(compiled(**step)[0], own) == (i not in (2, 3))


class Towers(Model):
    """Blocks on one picture, then others of the same class on another one, which begins from what is given itself."""

    def __init__(self, reads: bool, touches: bool) -> None:
        super().__init__()
        self.touches = touches
        self.blocks = nn.ModuleList(Alone() for _ in range(BLOCKS))
        self.others = nn.ModuleList(Alone() for _ in range(BLOCKS))
        self.second = nn.Linear(4, WIDTH)
        self.reads = reads

    @uncaptured
    def started(self, latent: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, time = self.begin(latent, timestep)
        return x, self.second(latent.flip(1)), time[:, None]

    @uncaptured
    def both(self, x: Tensor, y: Tensor) -> Tensor:
        return y + x.mean(dim=1, keepdim=True) if self.reads else y

    @uncaptured
    def finish(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.out(x), self.out(y)

    @uncaptured
    def touch(self, x: Tensor) -> Tensor:
        return x * 1.01 if self.touches else x

    @in_python
    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, y, time = self.started(latent, timestep)
        for block in self.blocks:
            x = self.touch(block(x, time))
        y = self.both(x, y)
        for block in self.others:
            y = self.touch(block(y, time))
        return self.finish(x, y)


@pytest.mark.parametrize("touches", [False, True])
@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.filterwarnings("ignore::fx_cache.CacheWarning")
def test_two_towers_of_one_class(reads: bool, touches: bool) -> None:
    """Each is a stack: both pictures move with the latents, by the rule."""
    model = Towers(reads, touches)
    outputs = sampled(twice(model), 3)
    added: list[Tensor] = [torch.zeros(()), torch.zeros(())]

    def through(blocks: nn.ModuleList, k: int, x: Tensor, time: Tensor, computes: bool) -> Tensor:
        begun = model.touch(blocks[0](x, time))
        if computes:
            x = blocks[1](begun, time)
            for block in blocks[2:]:
                x = block(model.touch(x), time)
            added[k] = x - begun
        return model.touch(begun + added[k])

    for i, (step, found) in enumerate(zip(walk(3), outputs, strict=True)):
        x, y, time = model.started(step["latent"], step["timestep"])
        x = through(model.blocks, 0, x, time, i < 2)
        y = through(model.others, 1, model.both(x, y), time, i < 2)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, model.finish(x, y), strict=True)), i
