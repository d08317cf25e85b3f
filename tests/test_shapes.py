"""Dynamic shapes: the second resolution switches to a dynamic graph, or the first one is dynamic already."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

import fx_cache
from tests.models import build, walk
from tests.running import compile_cached, needs_inductor, relative_error
from tests.selection import few


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


@pytest.mark.parametrize(("name", "dynamic"), few([("wan", None), ("flux", True), ("ltx", True), ("pixart", None)], 1))
def test_resolutions(name: str, dynamic: bool | None) -> None:
    run(name, "eager", dynamic, 0.0)


@pytest.mark.long
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


class Cropped(torch.nn.Module):
    """Patches of what is denoised and of a picture beside it; what comes out has ``2 * (height // 2)`` rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Conv2d(4, 16, 2, stride=2)
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(16, 16) for _ in range(4)])
        self.out = torch.nn.Linear(16, 16)

    def forward(self, latents: list[torch.Tensor], picture: torch.Tensor, t: torch.Tensor) -> list[torch.Tensor]:
        grids = [(y.shape[2] // 2, y.shape[3] // 2) for y in latents]
        x = torch.cat([self.embed(y).flatten(2).mT for y in (picture, *latents)], dim=1) + t.sin().reshape(1, 1, 1)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        parts = self.out(x[:, -sum(a * b for a, b in grids) :]).split([a * b for a, b in grids], dim=1)
        patches = [p.unflatten(1, grid).unflatten(3, (4, 2, 2)) for p, grid in zip(parts, grids, strict=True)]
        return [p.permute(0, 3, 1, 4, 2, 5).flatten(2, 3).flatten(3, 4) for p in patches]


@pytest.mark.parametrize("count", [1, 2])
def test_what_is_denoised_is_seen_at_any_size(count: int) -> None:
    """A request has the hits that the next one has, also where its size, or number, is the first of its kind."""
    model = Cropped()
    compiled = compile_cached(model, residual_diff_threshold=2.0)
    for name, size, number in [("usual", 16, 1), ("other", 8, count), ("again", 8, count)]:
        generator = torch.Generator().manual_seed(0)
        picture, *latents = (torch.randn(1, 4, n, n, generator=generator) for n in (6, *[size] * number))
        with fx_cache.session(name):
            for i in range(5):
                compiled([y + 0.01 * i for y in latents], picture, torch.tensor([1.0 - 0.1 * i]))
    sessions = fx_cache.summary(model).to_dict()["sessions"]
    assert [[b["spans"][0]["hits"] for b in s["branches"]] for s in sessions] == [[[1, 2, 3, 4]]] * 3
