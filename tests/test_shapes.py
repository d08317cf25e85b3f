"""Dynamic shapes: the second resolution switches to a dynamic graph, or the first one is dynamic already."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

import fx_cache
from tests.models import build, walk
from tests.running import needs_inductor, relative_error


def run(name: str, compiler: str, dynamic: bool | None, tolerance: float) -> None:
    model = build(name)
    walks = [walk(name, 4, size=size) for size in (0, 1, 2, 0)]
    options = {"compiler": compiler, "Fn_compute_blocks": 1, "residual_diff_threshold": 0.0, "max_warmup_steps": 1}
    compiled = torch.compile(model, backend="dit_cache", fullgraph=True, dynamic=dynamic, options=options)
    counters.clear()
    for steps in walks:
        for step in steps:
            expected = model(**step)[0]
            assert relative_error(expected, compiled(**step)[0]) <= tolerance
    graphs = counters["stats"]["unique_graphs"]
    # Reuse at every size: nothing compiles any more, and the shapes fit.
    fx_cache.configure(model, residual_diff_threshold=1.0)
    fx_cache.reset(model)
    for steps in walks:
        for step in steps:
            assert compiled(**step)[0].shape == model(**step)[0].shape
    assert counters["stats"]["unique_graphs"] == graphs
    hits = [s["branches"][0]["spans"][0]["hits"] for s in fx_cache.summary(model).to_dict()["sessions"]]
    assert any(hits)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", ["flux", "wan", "ltx", "pixart"])
def test_resolutions(name: str, dynamic: bool | None) -> None:
    run(name, "eager", dynamic, 0.0)


@needs_inductor
@pytest.mark.slow
@pytest.mark.parametrize(("name", "dynamic"), [("dit", None), ("wan", True)])
def test_resolutions_with_inductor(name: str, dynamic: bool | None) -> None:
    run(name, "inductor", dynamic, 1e-5)


class Scaled(torch.nn.Module):
    """Blocks that take sizes and a Python number: both cross every cut."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(8, 8) for _ in range(4)])

    def forward(self, x: torch.Tensor, t: torch.Tensor, scale: float) -> tuple[torch.Tensor]:
        batch, tokens, _ = x.shape
        emb = torch.sin(t).reshape(batch, 1, 1) * scale
        for block in self.blocks:
            y = block(x.reshape(batch * tokens, -1)).view(batch, tokens, -1)
            x = x + torch.tanh(y * emb) * (scale / tokens)
        return (x.reshape(batch, -1, tokens) * scale,)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("dynamic", [None, True])
def test_sizes_and_numbers_are_computed_again_behind_a_cut(compiler: str, dynamic: bool | None) -> None:
    torch.manual_seed(0)
    model = Scaled()
    options = {"compiler": compiler, "Fn_compute_blocks": 1, "residual_diff_threshold": 0.0}
    compiled = torch.compile(model, backend="dit_cache", fullgraph=True, dynamic=dynamic, options=options)
    for batch, tokens, scale in [(1, 5, 0.5), (1, 7, 0.75), (2, 6, 1.25), (1, 5, 0.5)]:
        x, t = torch.randn(batch, tokens, 8), torch.full((batch,), 3.0)
        assert torch.equal(compiled(x, t, scale)[0], model(x, t, scale)[0])
    skeletons = [g for s in fx_cache.summary(model).to_dict()["sessions"] for g in s["branches"]]
    assert skeletons
