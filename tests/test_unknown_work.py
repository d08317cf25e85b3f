"""Operations whose FLOPs the counter does not know. Oracles: the known form of the same one, and counted hits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

import fx_cache
from fx_cache.patterns.work import MOVED, Work
from tests.running import compile_cached, hits_of

WIDTH = 16


@torch.library.custom_op("fx_cache_tests::projected", mutates_args=())
def projected(x: Tensor, weight: Tensor) -> Tensor:
    return torch.tanh(x @ weight.T)


@projected.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("fx_cache_tests::mixed", mutates_args=())
def mixed(x: Tensor) -> Tensor:
    return x.softmax(1) + 0.1 * x


@mixed.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(WIDTH, WIDTH))

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        return x + projected(x + shift, self.weight)


class Weightless(nn.Module):
    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        return x + mixed(torch.tanh(x) + shift)


class Fused(nn.Module):
    """A layer that is one operator in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, 0.0, batch_first=True, norm_first=True)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        return self.layer(x + shift)


class Experts(nn.Module):
    """Each token goes through one of two layers: how many come to each depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        flat = (x + shift).flatten(0, 1)
        first = (flat[:, 0] > 0).nonzero().squeeze(1)
        second = (flat[:, 0] <= 0).nonzero().squeeze(1)
        out = torch.zeros_like(flat)
        out = out.index_add(0, first, self.experts[0](flat[first]))
        out = out.index_add(0, second, self.experts[1](flat[second]))
        return x + torch.tanh(out).view_as(x)


class Counted(nn.Module):
    """The same with the tokens sorted, and a number read on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 2)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        flat = (x + shift).flatten(0, 1)
        expert = self.gate(flat).argmax(-1)
        order, count = expert.argsort(), (expert == 0).sum().item()
        torch._check(count >= 0)
        torch._check(count <= flat.shape[0])
        first, second = flat[order][:count], flat[order][count:]
        out = torch.cat([self.experts[0](first), self.experts[1](second)])
        return x + torch.zeros_like(flat).index_copy(0, order, out).view_as(x)


class Stack(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.time = nn.Linear(4, WIDTH), nn.Linear(1, WIDTH)
        self.blocks = nn.ModuleList(kind() for _ in range(6))
        self.out = nn.Linear(WIDTH, 4)
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        shift = self.time(torch.sin(t)[:, None])[:, None]
        h = self.embed(x)
        for block in self.blocks:
            h = block(h, shift)
        return self.out(h)


@pytest.mark.parametrize("kind", [Custom, Weightless, Fused, Experts, Counted])
def test_the_stack_is_cached(kind: type[nn.Module]) -> None:
    model = Stack(kind)
    compiled = compile_cached(model, residual_diff_threshold=10.0)
    x = torch.randn(1, 32, 4)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True):
        for i in range(5):
            x = x - 0.01 * compiled(x, torch.tensor([0.9 - 0.1 * i]))
        found = fx_cache.explain(compiled, x, torch.tensor([0.3]))
    # Blocks whose data-dependent sizes differ in their symbols only are compiled once.
    assert "6 blocks of 1 kind(s)" in str(found)
    assert hits_of(compiled) == [[2, 3, 4]]
    (share,) = found.shares
    assert share is not None and share > 0.6
    assert ("FLOPs estimated" in str(found)) == (kind not in (Experts, Counted))


def traced(function: object, *args: Tensor) -> Work:
    from torch.fx.experimental.proxy_tensor import make_fx

    gm = make_fx(function, tracing_mode="fake")(*args)
    return Work(gm.graph)


def test_what_is_estimated_is_near_what_is_counted() -> None:
    x, weight = torch.randn(8, WIDTH), nn.Parameter(torch.randn(WIDTH, WIDTH))
    gm = fx.symbolic_trace(lambda x, w: projected(x, w))
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), (x, weight), strict=True):
        node.meta["example_value"] = value
    call = next(iter(gm.graph.find_nodes(op="call_function", target=projected)), None) or list(gm.graph.nodes)[-2]
    call.meta["example_value"] = projected(x, weight)
    work = Work(gm.graph)
    assert work.of(call) == 2 * 8 * WIDTH * WIDTH + MOVED * (8 * WIDTH + 8 * WIDTH)
    counted = traced(lambda x: x @ torch.ones(WIDTH, WIDTH), x)
    assert counted.total == 2 * 8 * WIDTH * WIDTH and not counted.estimated
