"""Blocks marked with ``torch.compiler.nested_compile_region``: what a graph only calls is looked into."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._higher_order_ops.invoke_subgraph import invoke_subgraph
from torch._subclasses.fake_tensor import FakeTensor

import fx_cache
from fx_cache.backend import rewrite
from fx_cache.config import CacheConfig
from fx_cache.patterns.graph import value_of
from fx_cache.patterns.programs import Program
from fx_cache.regions import written_out
from tests.models import walk
from tests.running import REUSING, compile_cached, hits_of, run_cached, shallow

MARKED = {"dit": "transformer_blocks", "wan": "blocks", "pixart": "transformer_blocks", "flux": "transformer_blocks"}
"""A stack of each model; those of FLUX's second stack return views of one tensor, and torch refuses to mark them."""


def mark(monkeypatch: pytest.MonkeyPatch, model: nn.Module, stack: str) -> None:
    """Marks the blocks of a model as its author would: their `forward`."""
    kind = type(getattr(model, stack)[0])
    monkeypatch.setattr(kind, "forward", torch.compiler.nested_compile_region(kind.forward))


def captured(model: nn.Module, step: dict[str, Any]) -> fx.GraphModule:
    graphs = []

    def keep(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(model, backend=keep, fullgraph=True)(**step)
    (graph,) = graphs
    return graph


def regions(gm: fx.GraphModule) -> int:
    return len(gm.graph.find_nodes(op="call_function", target=invoke_subgraph))


def names(gm: fx.GraphModule) -> Counter[str]:
    """The names of a graph's nodes, but for the numbers that make them unique."""
    return Counter(re.sub(r"(_\d+)+$", "", n.name) for n in gm.graph.nodes)


@pytest.mark.parametrize(("name", "stack"), MARKED.items())
def test_marked_blocks_are_seen_as_unmarked_ones(name, stack, monkeypatch):
    step = walk(name, 1)[0]
    plain = captured(shallow(name), step)
    mark(monkeypatch, model := shallow(name), stack)
    marked = captured(model, step)
    assert regions(marked) >= 2  # torch itself writes out a region that runs once

    flat = written_out(marked)
    assert regions(flat) == 0
    assert Program.of(flat.graph).at(()) == Program.of(plain.graph).at(())
    one, other = (rewrite(gm, CacheConfig(Fn_compute_blocks=1)) for gm in (marked, plain))
    assert names(one.gm) == names(other.gm)
    assert [s.stacks for s in one.plan.spans] == [s.stacks for s in other.plan.spans]


@pytest.mark.parametrize(("name", "stack"), MARKED.items())
def test_marked_blocks_are_cached(name, stack, monkeypatch):
    steps = walk(name, 6)
    expected = run_cached(shallow(name), steps, **REUSING)
    assert any(expected.hits)
    torch._dynamo.reset()
    mark(monkeypatch, model := shallow(name), stack)
    run = run_cached(model, steps, **REUSING)
    assert run.hits == expected.hits
    assert all(map(torch.equal, run.outputs, expected.outputs))


class Block(nn.Module):
    """A block with a region inside a region, that writes to a tensor of its own, under autocast of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 64), nn.Linear(64, 16)

    @torch.compiler.nested_compile_region
    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.second(torch.nn.functional.silu(self.first(x)))

    @torch.compiler.nested_compile_region
    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        y = torch.zeros_like(x)
        y.add_(self.mlp(x * (1 + emb)))
        return x + y * torch.arange(16, dtype=x.dtype) / 64


class Marked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block() for _ in range(4)])

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor]:
        emb = torch.sin(t * torch.arange(16) / 8).view(-1, 1, 16)
        for block in self.blocks:
            x = block(x, emb)
        return (x * 0.5,)


def test_regions_in_regions():
    model = Marked().eval()
    graph = captured(model, steps_of(6, 5)[0])
    flat = written_out(graph)
    assert regions(graph) and not regions(flat)
    for node in flat.graph.find_nodes(op="call_function", target=torch.arange):
        assert isinstance(value_of(node), FakeTensor)
    matmuls = [value_of(n).dtype for n in flat.graph.nodes if n.target is torch._C._nn.linear]
    assert matmuls == [torch.bfloat16] * 8
    compiled = compile_cached(model, residual_diff_threshold=0.0)
    for tokens in (6, 9, 6):  # the second size is captured with dynamic shapes
        steps = steps_of(tokens, 5)
        expected = [model(**step)[0] for step in steps]
        assert all(torch.equal(compiled(**s)[0], e) for s, e in zip(steps, expected, strict=True))
    fx_cache.configure(compiled, residual_diff_threshold=1.0)
    for step in steps_of(9, 5):
        compiled(**step)
    assert hits_of(compiled)


def steps_of(tokens: int, count: int) -> list[dict[str, torch.Tensor]]:
    noise = torch.randn(1, tokens, 16, generator=torch.Generator().manual_seed(tokens))
    return [{"x": noise * (1 - 0.02 * i), "t": torch.tensor([900.0 - i])} for i in range(count)]
