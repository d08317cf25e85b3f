"""Where blocks begin and what is within what: contexts, lists of lists, loops, weights of all layers in one tensor."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fx_cache
from tests.nested import WIDTH, Attention, Block, Dit, Mlp, check_blocks, made, steps_of
from tests.running import compile_cached

BFLOAT16 = {"device_type": "cpu", "dtype": torch.bfloat16}


# Contexts that a block enters


class AutocastFirst(Block):
    """The modulation in float32 whatever is around it, the attention in bfloat16."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            scale, gate, scale_mlp, gate_mlp = self.modulated(c.float())
        with torch.autocast(**BFLOAT16):
            y = self.attention(self.norm(x) * (1 + scale))
        x = x + gate * y.float()
        return x + gate_mlp * self.mlp(self.norm(x) * (1 + scale_mlp))


class AutocastLast(Block):
    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        scale, gate, scale_mlp, gate_mlp = self.modulated(c)
        x = x + gate * self.attention(self.norm(x) * (1 + scale))
        with torch.autocast(**BFLOAT16):
            return x + gate_mlp * self.mlp(self.norm(x) * (1 + scale_mlp))


class Decorated(Block):
    forward = torch.autocast(**BFLOAT16)(Block.forward)


class Nested(Block):
    """Contexts in contexts, two of which begin where the block does."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        with torch.inference_mode(), torch.autocast(**BFLOAT16):
            with torch.autocast("cpu", enabled=False):
                scale, gate, scale_mlp, gate_mlp = self.modulated(c)
            y = self.attention(self.norm(x) * (1 + scale))
        x = x + gate * y
        return x + gate_mlp * self.mlp(self.norm(x) * (1 + scale_mlp))


class Kernel(Block):
    """A context that is left by setting what held before."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return super().forward(x, c)


class Gradients(Block):
    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        with torch.enable_grad():
            with torch.no_grad():
                scale, gate, scale_mlp, gate_mlp = self.modulated(c)
            y = self.attention.out.weight.sum() * 0
        x = x + gate * self.attention(self.norm(x) * (1 + scale)) + y.detach()
        with torch.no_grad():
            return x + gate_mlp * self.mlp(self.norm(x) * (1 + scale_mlp))


@pytest.mark.parametrize("block", [AutocastFirst, AutocastLast, Decorated, Nested, Kernel, Gradients])
def test_contexts_belong_to_the_block_that_enters_them(block: type[Block]) -> None:
    class Model(Dit):
        def add_blocks(self) -> None:
            self.blocks = nn.ModuleList(block() for _ in range(self.depth))

    check_blocks(made(Model))


@pytest.mark.parametrize(
    "context", [lambda: torch.autocast(**BFLOAT16), torch.inference_mode, lambda: sdpa_kernel(SDPBackend.MATH)]
)
def test_contexts_around_each_block(context: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
    class Model(Dit):
        def step(self, i: int, x: Tensor, c: Tensor) -> Tensor:
            with context():
                return self.blocks[i](x * 1.5, c).float()

    check_blocks(made(Model))


@pytest.mark.parametrize(
    "context", [lambda: torch.autocast(**BFLOAT16), torch.inference_mode, lambda: torch.autocast("cpu", enabled=False)]
)
def test_contexts_around_all_blocks(context: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
    """With what is in front of the blocks, but not what is behind; another context within."""

    class Model(Dit):
        def add_blocks(self) -> None:
            self.blocks = nn.ModuleList(AutocastLast() for _ in range(self.depth))

        def step(self, i: int, x: Tensor, c: Tensor) -> Tensor:
            with context():
                return super().step(i, x, c)

        def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor]:
            x, c = self.begin(x, t)
            with context(), torch.no_grad():
                x = x + 0 * x.mean()
                for block in self.blocks:
                    x = block(x, c)
            return (self.end(x, c),)

    check_blocks(made(Model))


# Lists that hold lists


class InOneList(Dit):
    """Everything in one list, what comes before and behind the blocks as wide as they."""

    def add_blocks(self) -> None:
        blocks = nn.ModuleList(Block() for _ in range(self.depth))
        self.net = nn.ModuleList([nn.Linear(WIDTH, WIDTH), blocks, nn.Linear(WIDTH, WIDTH)])

    def begin(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        x, c = super().begin(x, t)
        return self.net[0](x), c

    def step(self, i: int, x: Tensor, c: Tensor) -> Tensor:
        return self.net[1][i](x, c)

    def end(self, x: Tensor, c: Tensor) -> Tensor:
        return super().end(self.net[2](x), c)


class Apart(Block):
    """A block that is given its condition before, as those of a Sequential are."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, x.mean(1))


class InOneSequential(Dit):
    def add_blocks(self) -> None:
        blocks = nn.Sequential(*(Apart() for _ in range(self.depth)))
        self.net = nn.Sequential(nn.Linear(4, WIDTH), blocks, nn.Linear(WIDTH, 4))

    def begin(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.net[0](x * torch.sin(t * torch.ones(4))), t

    def step(self, i: int, x: Tensor, c: Tensor) -> Tensor:
        return self.net[1][i](x)

    def end(self, x: Tensor, c: Tensor) -> Tensor:
        return self.net[2](x)

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor]:
        return (self.net(x * torch.sin(t * torch.ones(4))),)


class Pairs(Dit):
    """A list of lists of two: attention and feed-forward part."""

    def add_blocks(self) -> None:
        self.layers = nn.ModuleList(nn.ModuleList([Attention(), Mlp()]) for _ in range(self.depth))

    def step(self, i: int, x: Tensor, c: Tensor) -> Tensor:
        attention, mlp = self.layers[i]
        x = x + attention(F.layer_norm(x, (WIDTH,)) * (1 + c[:, None]))
        return x + mlp(F.layer_norm(x, (WIDTH,)))


class Part(nn.Module):
    """One of the parts of a block, alike from outside."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.modulation = inner, nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        scale, gate = self.modulation(F.silu(c))[:, None].chunk(2, dim=-1)
        return x + gate * self.inner(F.layer_norm(x, (WIDTH,)) * (1 + scale))


class OfParts(nn.Module):
    """A block that is a list of parts."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Part(Attention()), Part(Attention()), Part(Mlp())])
        self.blocks[0].inner.attend = lambda q, k, v: F.scaled_dot_product_attention(q, k.roll(1, -2), v)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, c)
        return x


def held_by(holder: Callable[[list[nn.Module]], Callable[[nn.Module, int], nn.Module]]) -> type[Dit]:
    """A model of blocks of parts, held as `holder` says."""

    class Held(Dit):
        def add_blocks(self) -> None:
            blocks = [OfParts() for _ in range(self.depth)]
            self.add, self.get = holder(blocks)
            self.add(self)

        def step(self, i: int, x: Tensor, c: Tensor) -> Tensor:
            return self.get(self, i)(x, c)

    return Held


def numbered_attributes(blocks: list[nn.Module]) -> tuple[Callable, Callable]:
    return (
        lambda model: [setattr(model, f"joint_{i}", b) for i, b in enumerate(blocks)],
        lambda model, i: getattr(model, f"joint_{i}"),
    )


def numbered_keys(blocks: list[nn.Module]) -> tuple[Callable, Callable]:
    held = nn.ModuleDict({f"block{i}": b for i, b in enumerate(blocks)})
    return lambda model: setattr(model, "blocks", held), lambda model, i: model.blocks[f"block{i}"]


def other_keys(blocks: list[nn.Module]) -> tuple[Callable, Callable]:
    names = ["alpha", "beta", "gamma", "delta", "epsilon"]
    held = nn.ModuleDict(dict(zip(names, blocks, strict=True)))
    return lambda model: setattr(model, "blocks", held), lambda model, i: model.blocks[names[i]]


@pytest.mark.parametrize("holder", [numbered_attributes, numbered_keys, other_keys])
def test_blocks_of_parts(holder) -> None:
    check_blocks(made(held_by(holder)))


class SideBySide(Dit):
    """Each block is made of one child of each of three lists."""

    def add_blocks(self) -> None:
        self.first, self.second, self.third = (
            nn.ModuleList(kind() for _ in range(self.depth)) for kind in (Block, Attention, Block)
        )

    def step(self, i: int, x: Tensor, c: Tensor) -> Tensor:
        x = self.first[i](x, c)
        x = x + self.second[i](F.layer_norm(x, (WIDTH,)))
        return self.third[i](x, c * 0.5)


@pytest.mark.parametrize("kind", [InOneList, InOneSequential, Pairs, SideBySide])
def test_lists_of_lists(kind: type[Dit]) -> None:
    check_blocks(made(kind))


# One block for all rounds


class Looped(Dit):
    """Its rounds differ in a row of a table; what goes in is added at each, and to itself at the first."""

    depth = 6

    def add_blocks(self) -> None:
        self.block, self.rounds = Block(), nn.Embedding(self.depth, WIDTH)

    def begin(self, x: Tensor, t: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        x, c = super().begin(x, t)
        return x, (c, x)

    def round(self, i: int) -> Tensor:
        return self.rounds.weight[i]

    def step(self, i: int, x: Tensor, c: tuple[Tensor, Tensor]) -> Tensor:
        return self.block(x + 0.1 * c[1], c[0] + self.round(i))

    def end(self, x: Tensor, c: tuple[Tensor, Tensor]) -> Tensor:
        return super().end(x, c[0])


class LookedUp(Looped):
    def round(self, i: int) -> Tensor:
        return self.rounds(torch.tensor([i]))


class Unlike(Looped):
    """Nothing is different from round to round."""

    def step(self, i: int, x: Tensor, c: tuple[Tensor, Tensor]) -> Tensor:
        return self.block(x, c[0])


class ByTurns(Looped):
    """Two blocks take turns."""

    def add_blocks(self) -> None:
        self.blocks, self.rounds = nn.ModuleList([Block(), Block()]), nn.Embedding(self.depth, WIDTH)

    def step(self, i: int, x: Tensor, c: tuple[Tensor, Tensor]) -> Tensor:
        return self.blocks[i % 2](x, c[0] + self.round(i // 2))


class LoopedParts(Looped):
    """The block has a list within."""

    def add_blocks(self) -> None:
        super().add_blocks()
        self.block = OfParts()


@pytest.mark.parametrize(("kind", "kinds"), [(Looped, 2), (LookedUp, 6), (Unlike, 1), (ByTurns, 1), (LoopedParts, 2)])
def test_rounds_of_a_loop_are_blocks(kind: type[Dit], kinds: int) -> None:
    check_blocks(made(kind), kinds=kinds)


# All layers' weights in one tensor


class Stacked(Dit):
    """Functions over rows of a few tensors that hold the weights of all layers."""

    def add_blocks(self) -> None:
        self.qkv = nn.Parameter(torch.randn(self.depth, 3 * WIDTH, WIDTH) / 4)
        self.mlp = nn.Parameter(torch.randn(self.depth, 2, WIDTH, WIDTH) / 4)
        self.bias = nn.Parameter(torch.randn(self.depth, WIDTH))

    def of_layer(self, weight: Tensor, i: int) -> Tensor:
        return weight[i]

    def step(self, i: int, x: Tensor, c: Tensor) -> Tensor:
        qkv, mlp, bias = (self.of_layer(w, i) for w in (self.qkv, self.mlp, self.bias))
        q, k, v = F.linear(F.layer_norm(x, (WIDTH,)) * (1 + c[:, None]), qkv).chunk(3, dim=-1)
        x = x + F.scaled_dot_product_attention(q, k, v)
        return x + F.linear(F.gelu(F.linear(F.layer_norm(x, (WIDTH,)), mlp[0], bias)), mlp[1])


PARTS = {
    "unbind": lambda w, i: w.unbind(0)[i],
    "unbind_function": lambda w, i: torch.unbind(w)[i],
    "select": lambda w, i: w.select(0, i),
    "narrow": lambda w, i: w.narrow(0, i, 1).squeeze(0),
    "chunk": lambda w, i: w.chunk(len(w))[i][0],
    "split": lambda w, i: torch.split(w, 1)[i].squeeze(0),
    "slice": lambda w, i: w[i : i + 1].flatten(0, 1) if w.ndim == 2 else w[i : i + 1][0],
    "flat": lambda w, i: w.view(w.shape[0], -1)[i].view(w.shape[1:]),
    "transposed": lambda w, i: w.transpose(0, 1)[:, i],
}


@pytest.mark.parametrize("part", ["index", *PARTS])
def test_rows_of_weights(part: str) -> None:
    class Model(Stacked):
        def of_layer(self, weight: Tensor, i: int) -> Tensor:
            return weight[i] if part == "index" else PARTS[part](weight, i)

    check_blocks(made(Model))


def test_unbound_once() -> None:
    class Model(Stacked):
        def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor]:
            x, c = self.begin(x, t)
            layers = zip(self.qkv.unbind(), self.mlp.unbind(), self.bias.unbind(), strict=True)
            for qkv, (up, down), bias in layers:
                q, k, v = F.linear(F.layer_norm(x, (WIDTH,)) * (1 + c[:, None]), qkv).chunk(3, dim=-1)
                x = x + F.scaled_dot_product_attention(q, k, v)
                x = x + F.linear(F.gelu(F.linear(F.layer_norm(x, (WIDTH,)), up, bias)), down)
            return (self.end(x, c),)

    check_blocks(made(Model))


def test_rows_of_weights_that_are_changed_are_seen() -> None:
    """A row that somebody writes to is read as it is now, in blocks that were compiled before."""
    model, steps = made(Stacked), steps_of(3)
    compiled = compile_cached(model, residual_diff_threshold=1.0)
    with torch.no_grad():
        for step in steps:
            compiled(*step)
        model.qkv[3].mul_(1.5)
        assert torch.equal(compiled(*steps[0])[0], model(*steps[0])[0])
    fx_cache.reset(model)
