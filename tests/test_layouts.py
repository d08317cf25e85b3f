"""Blocks that differ in nothing but how the first one's stream lies in memory are one kind of block."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo import register_backend

from fx_cache.config import CacheConfig
from fx_cache.passes.align_layouts import align_layouts
from fx_cache.passes.runner import RewriteContext
from tests.running import compile_cached, needs_inductor, relative_error

graphs: list[torch.fx.GraphModule] = []
CHANNELS = 16


@register_backend
def captured(gm, example_inputs):
    graphs.append(gm)
    return gm.forward


class Block(nn.Module):
    def __init__(self, autocast: bool) -> None:
        super().__init__()
        self.autocast = autocast
        self.norm = nn.LayerNorm(CHANNELS)
        self.layers = nn.Sequential(nn.Linear(CHANNELS, 2 * CHANNELS), nn.GELU(), nn.Linear(2 * CHANNELS, CHANNELS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.autocast:
            return self.layers(self.norm(x)) + x
        with torch.autocast("cpu", torch.bfloat16):
            return self.layers(self.norm(x)) + x


class Model(nn.Module):
    """Tokens come from a convolution, transposed; optionally the first block's input is written to, or given back."""

    def __init__(self, kind: str = "plain") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.patches = nn.Conv2d(4, CHANNELS, 2, 2)
        self.time = nn.Linear(1, CHANNELS)
        self.blocks = nn.ModuleList(Block(kind == "autocast") for _ in range(6))
        self.out = nn.Linear(CHANNELS, 16)

    def forward(self, latent: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        tokens = self.patches(latent).flatten(2).transpose(1, 2)
        x = tokens + self.time(torch.sin(timestep)[:, None])[:, None]
        first = x
        if self.kind == "written":
            x += 1
        for block in self.blocks:
            x = block(x)
        x = self.out(x).transpose(1, 2).reshape(latent.shape[0], 4, *latent.shape[2:])
        return (x, first) if self.kind == "given back" else x


def steps(count: int) -> list[dict]:
    torch.manual_seed(1)
    start = torch.randn(1, 4, 8, 8)
    return [
        {"latent": start + 0.01 * i * torch.randn(1, 4, 8, 8), "timestep": torch.tensor([1.0 - 0.1 * i])}
        for i in range(count)
    ]


def run_pass(model: nn.Module, compiler: str) -> int:
    """How many streams the pass lays out anew; every value it leaves has to be what the graph then computes."""
    from fx_cache import backend
    from fx_cache.passes import PIPELINE

    graphs.clear()
    compiled = torch.compile(model, backend="captured", fullgraph=True)
    compiled(**steps(1)[0])
    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(graphs[0].graph, {}))
    gm = backend.Draft(graphs[0], graph)
    context = RewriteContext(CacheConfig(Fn_compute_blocks=1, compiler=compiler))
    for rewrite in PIPELINE[: PIPELINE.index(align_layouts)]:
        rewrite(gm, context)
    return align_layouts(gm, context)


@pytest.mark.parametrize(
    ("kind", "compiler", "count"),
    [
        ("plain", "inductor", 1),
        ("plain", "eager", 0),
        ("written", "inductor", 0),
        ("given back", "inductor", 0),
        ("autocast", "inductor", 0),
    ],
)
def test_a_stream_is_laid_out_as_later_blocks_take_it(kind: str, compiler: str, count: int) -> None:
    """Not where another compiler has to give the model's own bits, somebody else sees the tensor, or dtypes change."""
    with torch.no_grad():
        assert run_pass(Model(kind).eval(), compiler) == count


@needs_inductor
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "written", "given back"])
def test_compiled_the_model_is_itself(kind: str, tmp_path) -> None:
    model = Model(kind).eval()
    options = {"compiler": "inductor", "residual_diff_threshold": 0.0, "dump_dir": str(tmp_path)}
    compiled = compile_cached(Model(kind).eval(), **options)
    for step in steps(3):
        expected, got = model(**step), compiled(**step)
        if kind == "given back":
            assert expected[1].stride() == got[1].stride()
            expected, got = expected[0], got[0]
        assert relative_error(expected, got) < 1e-5
    pieces = [p for p in (tmp_path / "graph_0" / "pieces").iterdir() if p.name.startswith("blocks_block")]
    assert len(pieces) == (1 if kind == "plain" else 2)
