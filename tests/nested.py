"""Small transformers that say themselves what their blocks are, and what must hold of each of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fx_cache
from benchmarks.zoo import cuts, detectors_agree
from fx_cache.backend import rewrite
from fx_cache.config import CacheConfig
from fx_cache.regions import written_out
from tests.running import compile_cached, last_branch, relative_error

WIDTH = 16
TOKENS = 12


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def heads(self, x: Tensor) -> list[Tensor]:
        return [z.unflatten(-1, (2, -1)).transpose(1, 2) for z in self.qkv(x).chunk(3, dim=-1)]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attend(*self.heads(x)).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """Attention and a feed-forward part, modulated by the time."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.attention, self.mlp, self.modulation = Attention(), Mlp(), nn.Linear(WIDTH, 4 * WIDTH)

    def modulated(self, c: Tensor) -> Sequence[Tensor]:
        return self.modulation(F.silu(c))[:, None].chunk(4, dim=-1)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        scale, gate, scale_mlp, gate_mlp = self.modulated(c)
        x = x + gate * self.attention(self.norm(x) * (1 + scale))
        return x + gate_mlp * self.mlp(self.norm(x) * (1 + scale_mlp))


class Dit(nn.Module):
    """Embeds, runs its blocks and makes an output; `step` is one block, so that a test can run them one by one."""

    depth = 5

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 4)
        self.time = nn.Linear(WIDTH, WIDTH)
        self.add_blocks()

    def add_blocks(self) -> None:
        self.blocks = nn.ModuleList(Block() for _ in range(self.depth))

    def begin(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        angles = t[:, None] * torch.exp(-torch.arange(WIDTH // 2) / 2.0)
        return self.embed(x), self.time(torch.cat([angles.sin(), angles.cos()], dim=-1))

    def step(self, i: int, x: Tensor, c: Tensor) -> Tensor:
        return self.blocks[i](x, c)

    def end(self, x: Tensor, c: Tensor) -> Tensor:
        return self.out(x * (1 + c[:, None]))

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor]:
        x, c = self.begin(x, t)
        for i in range(self.depth):
            x = self.step(i, x, c)
        return (self.end(x, c),)


def made(kind: type[Dit]) -> Dit:
    torch.manual_seed(0)
    return kind().eval()


def steps_of(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x, drift = (torch.randn(1, TOKENS, 4, generator=generator) for _ in range(2))
    return [(x + 0.05 * i * drift, torch.tensor([9.0 - 0.1 * i])) for i in range(count)]


def captured(model: nn.Module, step: Sequence[Any]) -> fx.GraphModule:
    """The one graph of a forward, with what it calls written out."""
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=keep, fullgraph=True)(*step)
    (graph,) = graphs
    return written_out(graph)


def check_blocks(model: Dit, *, kinds: int = 1, fn: int = 1) -> None:
    """That the blocks are those of the model, to both detectors; that it is exact; and that a hit is by the rule."""
    steps = steps_of(4)
    graph = captured(model, steps[0])
    assert detectors_agree(graph)
    assert cuts(graph, strip=True) == cuts(graph, strip=False)
    plan = rewrite(graph, CacheConfig(Fn_compute_blocks=fn)).plan
    assert plan.refusal is None, plan.refusal
    found = [r.streams for r in plan.stacks if r.stack.name in plan.spans[0].stacks]
    assert sum(len(s.stack.blocks) for s in found) == model.depth
    assert max(len(set(s.kinds)) for s in found) == kinds
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = compile_cached(model, residual_diff_threshold=0.0, Fn_compute_blocks=fn)
        for step in steps:
            assert torch.equal(compiled(*step)[0], model(*step)[0])
        fx_cache.configure(compiled, residual_diff_threshold=1.0)
        with fx_cache.session("rule", "only"):
            outputs = [compiled(*step)[0].clone() for step in steps]
        (span,) = last_branch(model)["spans"]
        assert span["hits"] == [1, 2, 3]
        residual = None
        for step, output in zip(steps, outputs, strict=True):
            x, c = model.begin(*step)
            for i in range(fn):
                x = model.step(i, x, c)
            if residual is None:
                whole = x
                for i in range(fn, model.depth):
                    whole = model.step(i, whole, c)
                residual = whole - x
            assert relative_error(model.end(x + residual, c), output) < 1e-5
