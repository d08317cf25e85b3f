"""Higher-order operators: what can be written out is, and any other one is an operation of its block."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops.map import map as map_over
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch._ops import HigherOrderOperator
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from fx_cache.patterns.graph import value_of
from tests.nested import TOKENS, WIDTH, Attention, Block, Dit, captured, check_blocks, made, steps_of

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def calls(model: nn.Module) -> list[str]:
    """The higher-order operators that are left in the graph."""
    graph = captured(model, steps_of(1)[0]).graph
    return [n.target.name() for n in graph.nodes if isinstance(n.target, HigherOrderOperator)]


class Checkpointed(Dit):
    def step(self, i: int, x: Tensor, c: Tensor) -> Tensor:
        return checkpoint(self.blocks[i], x, c, use_reentrant=False)


class Reentrant(Dit):
    def step(self, i: int, x: Tensor, c: Tensor) -> Tensor:
        return checkpoint(self.blocks[i], x, c, use_reentrant=True)


class EverySecond(Dit):
    def step(self, i: int, x: Tensor, c: Tensor) -> Tensor:
        return checkpoint(self.blocks[i], x, c, use_reentrant=False) if i % 2 else self.blocks[i](x, c)


class InPairs(Dit):
    """Two blocks are recomputed at a time, by a function that holds what it reads."""

    depth = 6

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor]:
        x, c = self.begin(x, t)
        for i in range(0, self.depth, 2):
            x = checkpoint(lambda x, i=i: self.step(i + 1, self.step(i, x, c), c), x, use_reentrant=False)
        return (self.end(x, c),)


class PartCheckpointed(Block):
    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        scale, gate, scale_mlp, gate_mlp = self.modulated(c)
        x = x + gate * checkpoint(self.attention, self.norm(x) * (1 + scale), use_reentrant=False)
        return x + gate_mlp * self.mlp(self.norm(x) * (1 + scale_mlp))


class Parts(Dit):
    def add_blocks(self) -> None:
        self.blocks = nn.ModuleList(PartCheckpointed() for _ in range(self.depth))


class Nested(Checkpointed, Parts):
    """A part of what is recomputed is recomputed in it."""


class Scanned(Dit):
    """The layers' weights are stacked, and a scan goes through them; each also gives out what it made."""

    def add_blocks(self) -> None:
        self.qkv = nn.Parameter(torch.randn(self.depth, 3 * WIDTH, WIDTH) / 4)
        self.mlp = nn.Parameter(torch.randn(self.depth, 2, WIDTH, WIDTH) / 4)

    def layer(self, x: Tensor, weights: tuple[Tensor, ...], c: Tensor) -> Tensor:
        qkv, mlp = weights
        q, k, v = F.linear(F.layer_norm(x, (WIDTH,)) * (1 + c[:, None]), qkv).chunk(3, dim=-1)
        x = x + F.scaled_dot_product_attention(q, k, v)
        return x + F.linear(F.gelu(F.linear(F.layer_norm(x, (WIDTH,)), mlp[0])), mlp[1])

    def step(self, i: int, x: Tensor, c: Tensor) -> Tensor:
        return self.layer(x, (self.qkv[i], self.mlp[i]), c)

    def through(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        def layer(x: Tensor, weights: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
            x = self.layer(x, weights, c)
            return x, x.mean()

        return scan(layer, x, (self.qkv, self.mlp), dim=0)

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor]:
        x, c = self.begin(x, t)
        return (self.end(self.through(x, c)[0], c),)


@pytest.mark.parametrize("kind", [Checkpointed, Reentrant, EverySecond, InPairs, Parts, Nested, Scanned])
def test_what_is_called_is_written_out(kind: type[Dit]) -> None:
    model = made(kind)
    assert not calls(model)
    check_blocks(model)


def test_checkpoints_under_autocast() -> None:
    """The values within are of the type that autocast gives them."""

    class Autocast(Dit):
        def step(self, i: int, x: Tensor, c: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return checkpoint(self.blocks[i], x, c, use_reentrant=False).float()

    graph = captured(made(Autocast), steps_of(1)[0]).graph
    linears = [value_of(n).dtype for n in graph.nodes if n.target is torch._C._nn.linear]
    assert linears.count(torch.bfloat16) == 5 * Autocast.depth


def test_what_a_scan_gives_out() -> None:
    class Collected(Scanned):
        def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
            x, c = self.begin(x, t)
            x, means = self.through(x, c)
            return self.end(x, c), means

    model, (step,) = made(Collected), steps_of(1)
    graph = captured(model, step)
    assert not calls(model)
    compiled = torch.compile(model, backend="dit_cache", options={"compiler": "eager", "Fn_compute_blocks": 1})
    with torch.no_grad():
        assert all(map(torch.equal, compiled(*step), model(*step)))
    assert sum(n.target is torch.stack for n in graph.graph.nodes) == 1


def test_a_scan_over_tokens_stays_a_call() -> None:
    """Only layers are written out: there may be any number of tokens."""

    class OverTokens(Dit):
        def step(self, i: int, x: Tensor, c: Tensor) -> Tensor:
            x = self.blocks[i](x, c)
            sums, _ = scan(lambda s, z: (s * 0.5 + z, s.mean()), torch.zeros(1, WIDTH), x.transpose(0, 1), dim=0)
            return x + sums[:, None]

    model = made(OverTokens)
    assert calls(model) == ["scan"] * model.depth
    check_blocks(model)


class Flex(Attention):
    """Attention with a bias of its own, and a mask that all blocks share."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(TOKENS))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: object = None) -> Tensor:
        q, k, v = (z.contiguous() for z in (q, k, v))
        return flex_attention(q, k, v, lambda s, b, h, i, j: s + self.bias[i] - (i - j).abs() / 8, block_mask=mask)


class FlexBlocks(Dit):
    depth = 3

    def add_blocks(self) -> None:
        super().add_blocks()
        for block in self.blocks:
            block.attention = Flex()


class Masked(FlexBlocks):
    def begin(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        mask = create_block_mask(lambda b, h, i, j: (i - j).abs() < 7, None, None, TOKENS, TOKENS, device="cpu")
        for block in self.blocks:
            block.attention.attend = lambda q, k, v, b=block: Flex.attend(b.attention, q, k, v, mask)
        return super().begin(x, t)


class CondInBlock(Block):
    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = super().forward(x, c)
        return x + torch.cond(x.mean() > 0, lambda z: self.mlp(z).sin(), lambda z: z.cos(), (x,))


class Cond(Dit):
    def add_blocks(self) -> None:
        self.blocks = nn.ModuleList(CondInBlock() for _ in range(self.depth))


class Experts(Dit):
    """A map over the weights of experts within each block."""

    def add_blocks(self) -> None:
        super().add_blocks()
        self.experts = nn.ParameterList(torch.randn(3, WIDTH, WIDTH) / 8 for _ in range(self.depth))

    def step(self, i: int, x: Tensor, c: Tensor) -> Tensor:
        x = self.blocks[i](x, c)
        return x + map_over(lambda w, z: F.linear(z, w).tanh(), self.experts[i], x).sum(0)


@pytest.mark.parametrize("kind", [FlexBlocks, Masked, Cond, Experts])
def test_what_is_called_is_an_operation_of_its_block(kind: type[Dit]) -> None:
    model = made(kind)
    assert len(calls(model)) == model.depth
    check_blocks(model)


class Loop(Dit):
    """As many rounds as the condition wants: no blocks, and no change."""

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor]:
        x, c = self.begin(x, t)
        more = lambda i, x: i < self.depth  # noqa: E731
        _, x = while_loop(more, lambda i, x: (i + 1, x + x.sin() * 0.1), (torch.tensor(0), x))
        return (self.end(x, c),)


class WholeBlocks(Dit):
    """Each block runs or not, as the data says."""

    def step(self, i: int, x: Tensor, c: Tensor) -> Tensor:
        return torch.cond(x.mean() > -9, lambda x, c: self.blocks[i](x, c), lambda x, c: x.clone(), (x, c))


@pytest.mark.parametrize("kind", [Loop, WholeBlocks])
def test_what_cannot_be_written_out_is_refused_and_exact(kind: type[Dit]) -> None:
    model = made(kind)
    compiled = torch.compile(model, backend="dit_cache", options={"compiler": "eager", "Fn_compute_blocks": 1})
    with torch.no_grad(), pytest.warns(match="no stack of repeated blocks"):
        for step in steps_of(3):
            assert torch.equal(compiled(*step)[0], model(*step)[0])
