"""Elements that change places, streams in each other's, and what is no stream but near. Oracle: the rule, or the model.

What was added to a stream once is added to its elements where they are now: if blocks hand them on elsewhere, or one
stream as another, nothing is cached.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fx_cache
from fx_cache.testing import counted_hits
from tests.models import build, conditioning, walk
from tests.running import compile_cached
from tests.test_relay import compile_broken
from tests.test_relay_beside import in_python, uncaptured
from tests.test_side_values import BLOCKS, HITS, OPTIONS, TOKENS, WIDTH, Block, Model, cached
from tests.test_side_values import walk as steps

ORDER = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(0))
ELEMENTS = torch.arange(TOKENS * WIDTH).view(1, TOKENS, WIDTH)[:, ORDER]
ORDERED = ORDER.tolist()


def scatter_reduce(x: Tensor) -> Tensor:
    return x.scatter_reduce(1, ORDER[None, :, None].expand_as(x), x, "amax", include_self=False)


def index_copy(x: Tensor) -> Tensor:
    moved = torch.empty_like(x)
    moved[:, ORDER] = x
    return moved


def put_into_copy(x: Tensor) -> Tensor:
    moved = x.clone()
    moved[:, ORDER] = x
    return moved


def left(x: Tensor) -> Tensor:
    return (torch.arange(TOKENS) < TOKENS // 2)[None, :, None].expand_as(x)


def by_content(x: Tensor) -> Tensor:
    at = x.mean(-1).argsort(1)
    return x.gather(1, at[..., None].expand_as(x))


def by_einsum(x: Tensor) -> Tensor:
    return torch.einsum("bhwc->bwhc", x[:, :16].reshape(1, 4, 4, WIDTH)).reshape(1, 16, WIDTH)


Move = Callable[[Tensor], Tensor]
MOVES: dict[str, Move] = {
    "flip": lambda x: x.flip(1),
    "roll": lambda x: x.roll(5, 1),
    "half": lambda x: torch.cat([x[:, TOKENS // 2 :], x[:, : TOKENS // 2]], 1),
    "channels": lambda x: torch.cat(x.chunk(2, -1)[::-1], -1),
    "grid": lambda x: x.view(1, 4, TOKENS // 4, WIDTH).transpose(1, 2).reshape(1, TOKENS, WIDTH),
    "index": lambda x: x[:, ORDER],
    "select": lambda x: x.index_select(1, ORDER),
    "gather": lambda x: x.gather(1, ORDER[None, :, None].expand_as(x)),
    "list": lambda x: x[:, ORDERED],
    "short index": lambda x: x[:, ORDER.int()],
    "left and right": lambda x: x.transpose(0, 1).flipud().transpose(0, 1),
    "stacked": lambda x: torch.hstack([x[:, 8:], x[:, :8]]),
    "axes": lambda x: torch.moveaxis(x.view(1, 4, -1, WIDTH), 1, 2).reshape(1, TOKENS, WIDTH),
    "turned": lambda x: x.reshape(1, WIDTH, TOKENS).mT.contiguous(),
    "einsum": lambda x: torch.cat([by_einsum(x), x[:, 16:]], 1),
    "shuffled": lambda x: torch.nn.functional.channel_shuffle(x[..., None], 4)[..., 0],
    "views": lambda x: x.flip(1).clone().view(1, 4, -1, WIDTH).contiguous().view(1, TOKENS, WIDTH) + torch.tanh(x),
    "put": index_copy,
    "put into a copy": put_into_copy,
    "copied": lambda x: x.index_copy(1, ORDER, x),
    "scattered": lambda x: x.scatter(1, ORDER[None, :, None].expand_as(x), x),
    "chosen": lambda x: torch.where(left(x), x, x.flip(1)),
    "chosen otherwise": lambda x: torch.where(left(x), x.flip(1), x),
    "taken": lambda x: x.take(ELEMENTS),
    "shifted": lambda x: torch.fft.fftshift(x, 1),
    "scattered and reduced": scatter_reduce,
    "channels flipped": lambda x: x.flip(-1),
    "content": by_content,
}
IN_GRAPHS = ("content", "views", "chosen", "chosen otherwise")
"""What is not told from a change where Python does it: it moves by content, adds, or gives some elements twice."""

BACK: dict[str, Move] = {
    "flip": lambda x: x.flip(1),
    "roll": lambda x: x.roll(-5, 1),
    "half": MOVES["half"],
    "channels": MOVES["channels"],
    "grid": lambda x: x.view(1, TOKENS // 4, 4, WIDTH).transpose(1, 2).reshape(1, TOKENS, WIDTH),
}


class Moving(Model):
    """Before or behind each block its tokens are put elsewhere, or before it and back behind it."""

    def __init__(self, how: str, where: str) -> None:
        super().__init__(how)
        self.where = where

    def window(self, block: Block, x: Tensor, time: Tensor) -> Tensor:
        x = block(x if self.where == "behind" else MOVES[self.how](x), time)
        return {"before": lambda x: x, "behind": MOVES[self.how], "back": BACK.get(self.how)}[self.where](x)

    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor]:
        x, time = self.begin(latent, timestep)
        for block in self.blocks:
            x = self.window(block, x, time)
        return (self.out(x),)


@pytest.mark.filterwarnings("ignore::fx_cache.CacheWarning")
@pytest.mark.parametrize("where", ["before", "behind"])
@pytest.mark.parametrize("how", MOVES)
@torch.no_grad()
def test_elements_in_other_places(how: str, where: str) -> None:
    model = Moving(how, where)
    outputs, hits = cached(model)
    assert not hits
    assert all(torch.equal(found, model(**step)[0]) for step, (found,) in zip(steps(), outputs, strict=True))


@pytest.mark.parametrize("how", BACK)
@torch.no_grad()
def test_elements_that_are_put_back(how: str) -> None:
    model = Moving(how, "back")
    outputs, hits = cached(model)
    assert hits == [HITS]
    follow(model, outputs)


@torch.no_grad()
def follow(model: Moving, outputs: list[Any]) -> None:
    """What a hit gives is what the stream is behind the first block, and what the others added at the last step."""
    added = torch.zeros(())
    for i, (step, (found,)) in enumerate(zip(steps(), outputs, strict=True)):
        x, time = model.begin(step["latent"], step["timestep"])
        begun = x = model.window(model.blocks[0], x, time)
        if i not in HITS:
            for block in model.blocks[1:]:
                x = model.window(block, x, time)
            added = x - begun
        assert torch.allclose(found, model.out(begun + added), atol=1e-5), i


class MovedBetweenGraphs(Moving):
    """Each block is a graph of its own."""

    @uncaptured
    def move(self, x: Tensor) -> Tensor:
        return MOVES[self.how](x)

    def moved(self, block: Block, x: Tensor, time: Tensor) -> Tensor:
        return block(MOVES[self.how](x), time)

    @in_python
    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor]:
        x, time = self.begin(latent, timestep)
        for block in self.blocks:
            x = self.moved(block, x, time) if self.where == "graph" else block(self.move(x), time)
        return (self.out(x),)


@pytest.mark.filterwarnings("ignore::fx_cache.CacheWarning")
@pytest.mark.parametrize(
    ("how", "where"),
    [(h, w) for h in MOVES for w in ("graph", "Python") if w == "graph" or h not in IN_GRAPHS],
)
@torch.no_grad()
def test_elements_in_other_places_over_several_graphs(how: str, where: str) -> None:
    check_computed(MovedBetweenGraphs(how, where))


@pytest.mark.parametrize("where", ["graph", "Python"])
@torch.no_grad()
def test_elements_that_stay_over_several_graphs(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model that the others are compared with is cached."""
    monkeypatch.setitem(MOVES, "stay", lambda x: x)
    assert hits_in_graphs(MovedBetweenGraphs("stay", where)) > 0


def hits_in_graphs(model: nn.Module) -> int:
    """How often three requests reuse."""
    compiled = compile_broken(model, residual_diff_threshold=10.0)
    with counted_hits() as hits:
        for seed in (1, 2, 3):
            with fx_cache.session(f"request-{seed}", branch="only"):
                for step in steps(seed):
                    compiled(**step)
    return hits.count


def check_computed(model: nn.Module) -> None:
    """Three requests give what the model does."""
    compiled = compile_broken(model, residual_diff_threshold=10.0)
    for seed in (1, 2, 3):
        with fx_cache.session(f"request-{seed}", branch="only"):
            for step in steps(seed):
                own = model(**step)
                assert all(torch.equal(a, b) for a, b in zip(compiled(**step), own, strict=True))


class Coupling(Block):
    """Hands on two streams in the place of each other."""

    def forward(self, a: Tensor, b: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return self.hand_on(b), a + torch.tanh(time) * self.down(torch.tanh(self.up(b)))

    def hand_on(self, b: Tensor) -> Tensor:
        return b


class Coupled(Model):
    """Two streams of one shape."""

    def __init__(self, how: str) -> None:
        super().__init__(how)
        self.blocks = nn.ModuleList(Coupling() for _ in range(BLOCKS))

    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor]:
        a, time = self.begin(latent, timestep)
        b = a.flip(1)
        for block in self.blocks:
            a, b = block(a, b, time)
        return (self.out(a - b),)


@torch.no_grad()
def test_streams_that_change_places() -> None:
    """What is added to each is what was added to it, wherever it is; in doubt it is computed."""
    model = Coupled("")
    outputs, hits = cached(model)
    assert hits == [HITS]
    kept: tuple[Tensor, ...] = ()
    for i, (step, (found,)) in enumerate(zip(steps(), outputs, strict=True)):
        x, time = model.begin(step["latent"], step["timestep"])
        a, b = begun = model.blocks[0](x, x.flip(1), time)
        if i not in HITS:
            for block in model.blocks[1:]:
                a, b = block(a, b, time)
            kept = a - begun[0], b - begun[1]
        # An even number of blocks behind the first: each is where it was.
        assert torch.allclose(found, model.out(begun[0] + kept[0] - begun[1] - kept[1]), atol=1e-5), i


class CoupledInGraphs(Coupled):
    """Each block is one graph, or two, and hands on a stream of its own."""

    def first(self, block: Coupling, b: Tensor, time: Tensor) -> Tensor:
        return torch.tanh(time) * block.down(torch.tanh(block.up(b)))

    def second(self, a: Tensor, b: Tensor, made: Tensor) -> tuple[Tensor, Tensor]:
        return (b * 1.0, a + made) if self.how != "apart" else (a + made, b + 0.1 * (a + made))

    def whole(self, block: Coupling, a: Tensor, b: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        return self.second(a, b, self.first(block, b, time))

    @in_python
    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor]:
        a, time = self.begin(latent, timestep)
        b = a.flip(1)
        for block in (*self.blocks, self.blocks[0]):
            if self.how == "one":
                a, b = self.whole(block, a, b, time)
            else:
                a, b = self.second(a, b, self.first(block, b, time))
        return (self.out(a - b),)


@pytest.mark.filterwarnings("ignore::fx_cache.CacheWarning")
@pytest.mark.parametrize("how", ["one", "two"])
@torch.no_grad()
def test_streams_that_change_places_over_several_graphs(how: str) -> None:
    check_computed(CoupledInGraphs(how))


@torch.no_grad()
def test_streams_that_keep_their_places_over_several_graphs() -> None:
    """The model that the others are compared with is cached."""
    assert hits_in_graphs(CoupledInGraphs("apart")) > 0


class FlippedInTheSecond(CoupledInGraphs):
    """One stream, whose tokens the second graph of each block puts elsewhere."""

    def second(self, a: Tensor, b: Tensor, made: Tensor) -> Tensor:  # type: ignore[override]
        return (a.flip(1) if self.how == "moved" else a) + made

    @in_python
    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor]:
        a, time = self.begin(latent, timestep)
        for block in (*self.blocks, self.blocks[0]):
            a = self.second(a, a, self.first(block, a, time))
        return (self.out(a),)


@pytest.mark.filterwarnings("ignore::fx_cache.CacheWarning")
@torch.no_grad()
def test_elements_that_the_second_graph_of_a_block_moves() -> None:
    check_computed(FlippedInTheSecond("moved"))
    assert hits_in_graphs(FlippedInTheSecond("")) > 0


class Delta(Model):
    """The blocks work on the stream behind a norm, and what they give is added to it; the tail reads the last of it."""

    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor]:
        x, time = self.begin(latent, timestep)
        for i, block in enumerate(self.blocks):
            normed = torch.nn.functional.layer_norm(x, (WIDTH,))
            delta = block(normed, time) - normed
            x = x + delta if self.how != "the last is none" or i < BLOCKS - 1 else delta
        return (self.out(x) + self.out(delta) if self.how == "both" else self.out(x),)


@pytest.mark.filterwarnings("ignore::fx_cache.CacheWarning")
@pytest.mark.parametrize("how", ["", "both", "the last is none"])
@torch.no_grad()
def test_what_blocks_give_is_added_to_the_stream(how: str) -> None:
    """It is no stream: what is reused moves as the model does."""
    model = Delta(how)
    outputs, hits = cached(model)
    assert hits == ([] if how == "both" else [HITS])
    check_moves(model, 0, [found for (found,) in outputs])


@torch.no_grad()
def check_moves(model: nn.Module, seed: int, outputs: list[Tensor]) -> None:
    """What a hit gives is nearer to what the model does than to what it gave when it computed last."""
    own, computed = [model(**step)[0] for step in steps(seed)], 0
    for i, found in enumerate(outputs):
        if torch.equal(found, own[i]):
            computed = i
        else:
            assert (found - own[i]).norm() < 0.6 * (own[i] - own[computed]).norm(), i


class Queries(Model):
    """Tokens that begin with zeros, learned, with the time or the text, read the stream behind every block."""

    def __init__(self, how: str) -> None:
        super().__init__(how)
        self.queries = nn.Parameter(torch.randn(1, TOKENS, WIDTH))

    def read(self, queries: Tensor, x: Tensor) -> Tensor:
        normed = torch.nn.functional.layer_norm(queries, (WIDTH,))
        return queries + torch.nn.functional.scaled_dot_product_attention(normed, x, x)

    def start(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        return {
            "zeros": lambda: torch.zeros_like(x),
            "learned": lambda: self.queries,
            "time": lambda: self.queries + time,
            "text": lambda: self.queries + text.mean(1, keepdim=True),
        }[self.how]()

    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor]:
        x, time = self.begin(latent, timestep)
        queries = self.start(x, time, text)
        for block in self.blocks:
            x = block(x, time)
            queries = self.read(queries, x)
        return (self.out(queries),)


class QueriesInGraphs(Queries):
    forward = in_python(Queries.forward)


@pytest.mark.filterwarnings("ignore::fx_cache.CacheWarning")
@pytest.mark.parametrize("form", [Queries, QueriesInGraphs])
@pytest.mark.parametrize("how", ["zeros", "learned", "time", "text"])
@torch.no_grad()
def test_what_only_reads_is_no_stream(how: str, form: type[Queries]) -> None:
    model = form(how)
    compiled = compile_broken(model, **OPTIONS) if form is QueriesInGraphs else compile_cached(model, **OPTIONS)
    for seed in (1, 2, 3):
        with fx_cache.session(f"request-{seed}", branch="only"):
            check_moves(model, seed, [compiled(**step)[0].clone() for step in steps(seed)])


class Kept(Model):
    """Each block is two graphs; code between them keeps what the first one makes, and reads or returns some of it."""

    def first(self, block: Block, x: Tensor, time: Tensor) -> Tensor:
        return x + torch.tanh(block.gate(x)) * torch.tanh(time)

    @in_python
    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor, ...]:
        x, time = self.begin(latent, timestep)
        kept = []
        for block in self.blocks:
            half = self.first(block, x, time)
            kept += [half] if self.how != "dropped" else []
            x = block(half, time)
        ends = {"returned": lambda: (self.out(x), kept[2]), "read": lambda: (self.out(kept[2]),)}
        ends["dropped"] = lambda: (self.out(x),)
        ends |= {"summed": lambda: (self.out(sum(kept)),), "stacked": lambda: (self.out(x), torch.stack(kept))}
        return ends[self.how]()


@pytest.mark.filterwarnings("ignore::fx_cache.CacheWarning")
@pytest.mark.parametrize("how", ["returned", "read", "summed", "stacked"])
@torch.no_grad()
def test_what_code_between_graphs_keeps(how: str) -> None:
    """It would be given back as it was: nothing is cached."""
    check_computed(Kept(how))


@torch.no_grad()
def test_what_code_between_graphs_does_not_keep() -> None:
    """The model that the others are compared with is cached."""
    assert hits_in_graphs(Kept("dropped")) > 0


@pytest.mark.parametrize("tokens", [15, 16])
@torch.no_grad()
def test_a_text_as_long_as_the_picture(tokens: int) -> None:
    """The last block hands on the picture alone, which has the shape of the text. Oracle: the rule, by hooks."""
    model, given = build("flux"), conditioning("flux", 0)
    given |= {"encoder_hidden_states": torch.randn(1, tokens, 24), "txt_ids": torch.zeros(tokens, 3)}
    compiled = compile_cached(copy.deepcopy(model), **OPTIONS)
    begun, added = [torch.zeros(())], [torch.zeros(())]

    def end(_: nn.Module, __: Any, output: Any) -> Any:
        added[:] = [output[1] - begun[0]]

    def reuse(_: nn.Module, __: Any, output: Any) -> Any:
        return output[0], begun[0] + added[0]

    model.transformer_blocks[0].register_forward_hook(lambda _, __, output: begun.__setitem__(0, output[1]))
    last, found_hits = model.single_transformer_blocks[-1], 0
    for step in walk("flux", 6, conditioning=given):
        with fx_cache.session("request", branch="only"), counted_hits() as hits:
            found = compiled(**step)[0].clone()
        found_hits += hits.count
        hook = last.register_forward_hook(reuse if hits.count else end)
        expected = model(**step)[0]
        hook.remove()
        assert torch.allclose(found, expected, atol=1e-5)
    assert found_hits == len(HITS)
