"""An error of ours never leaves `torch.compile`: one warning that says where it was, and the model's own result."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

import fx_cache
from fx_cache import backend, compiling
from fx_cache.passes import PIPELINE, runner
from fx_cache.patterns import candidates, relays, spans
from fx_cache.runtime import clock, forwards, given, relay, sessions
from tests.running import compile_cached

WIDTH = 8


class Broken(Exception):
    """What is raised on purpose."""


def fail(*_: Any, **__: Any) -> Any:
    raise Broken("on purpose")


class Block(nn.Module):
    def __init__(self, breaks: bool) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)
        self.breaks = breaks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.breaks:
            torch._dynamo.graph_break()
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Model(nn.Module):
    """Four blocks; a graph break "before" them, or in "each", or none."""

    def __init__(self, breaks: str = "none") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.time = nn.Linear(2, WIDTH)
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block(breaks == "each") for _ in range(4))
        self.breaks = breaks

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        x = self.embed(x) + self.time(torch.stack([torch.sin(t), torch.cos(t)], dim=-1))[:, None]
        if self.breaks == "before":
            torch._dynamo.graph_break()
        for block in self.blocks:
            x = block(x)
        return x


def steps() -> list[tuple[torch.Tensor, torch.Tensor]]:
    x = torch.randn(1, 5, WIDTH)
    return [(x + 0.1 * i, torch.tensor([1.0 - 0.1 * i])) for i in range(4)]


def said_of(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in caught if issubclass(w.category, fx_cache.CacheWarning)]


def assert_plain(place: str, **options: Any) -> tuple[nn.Module, str]:
    """Compiled, a model gives its own result and one warning that names the place; returns both."""
    model = Model()
    compiled = compile_cached(model, residual_diff_threshold=10.0, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in steps():
            assert torch.equal(compiled(*step), model(*step))
    (text,) = said_of(caught)
    for part in ("dit_cache runs this graph uncached", place, "Broken: on purpose"):
        assert part in text
    return compiled, text


def assert_explained(compiled: nn.Module, place: str) -> None:
    """`explain` says it too."""
    found = fx_cache.explain(compiled, *steps()[0])
    assert found.reason is not None and f"{place}: got Broken: on purpose" in found.reason
    assert not found.spans and found.reason in str(found)


@pytest.mark.parametrize("number", range(len(PIPELINE)), ids=[p.__name__ for p in PIPELINE])
def test_a_pass(number: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(gm: fx.GraphModule, context: runner.RewriteContext) -> int:
        PIPELINE[number](gm, context)
        raise Broken("on purpose")

    broken.__name__ = name = PIPELINE[number].__name__
    monkeypatch.setattr(backend, "PIPELINE", (*PIPELINE[:number], broken, *PIPELINE[number + 1 :]))
    compiled, text = assert_plain(f"the pass {name}", dump_dir=tmp_path)
    assert str(tmp_path / "graph_0") in text and "test_never_raises.py:" in text
    written = (tmp_path / "graph_0" / "error.txt").read_text()
    assert f"the pass {name}" in written and "Traceback" in written
    assert_explained(compiled, f"the pass {name}")


@pytest.mark.parametrize(
    ("module", "function", "place"),
    [
        (sys.modules["fx_cache.passes.mark_regions"], "plan_spans", "plan_spans"),
        (spans, "classify_inputs", "plan_spans"),
        (spans, "read_stacks", "plan_spans"),
        (candidates, "chains", "plan_spans"),
        (spans, "find_invariants", "plan_spans"),
        (spans, "Work", "plan_spans"),
        (runner, "check_rewritten", "the pass name_inputs"),
        (backend, "read_facts", "read_facts"),
        (backend, "run_passes", "rewrite"),
        (backend, "written_out", "written_out"),
        (backend, "surroundings", "read_graph"),
        (backend, "break_of", "read_graph"),
        (backend, "refuse_gradients", "read_graph"),
    ],
)
def test_the_analysis(module: Any, function: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, function, fail)
    compiled, text = assert_plain(place)
    assert "dump_dir" in text
    assert_explained(compiled, place)


@pytest.mark.parametrize(
    ("module", "function"),
    [
        (backend, "compile_pieces"),
        (backend, "CachedForward"),
        (backend, "fewer_allowed"),
        (backend, "written_storages"),
        (compiling, "box"),
        (compiling, "_examples"),
    ],
)
def test_the_making_of_pieces(module: Any, function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, function, fail)
    assert_plain("compile_pieces")


@pytest.mark.parametrize("function", ["open", "graph", "report"])
def test_the_dump(function: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(backend.Dump, function, fail)
    assert_plain({"open": "dump_dir"}.get(function, "rewrite"), dump_dir=tmp_path)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_compiler_that_refuses_a_piece(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be ours that is wrong, or the compiler: the graph is tried as a whole."""

    def compile_it(gm: fx.GraphModule, examples: list[Any]) -> Any:
        weights = [e for e in examples if isinstance(e, nn.Parameter)]
        if len(weights) == len(list(whole.parameters())):
            return gm.forward
        pieces.append(gm)
        if len(pieces) == at:
            raise Broken("on purpose")
        return gm.forward

    whole, pieces = Model(), list[fx.GraphModule]()
    monkeypatch.setattr(backend, "inner_compiler", lambda *_: compile_it)
    assert_plain("compile_pieces")
    assert len(pieces) == at


def test_a_compiler_that_refuses_the_graph_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """That error is the user's."""
    monkeypatch.setattr(backend, "inner_compiler", lambda *_: fail)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="on purpose"):
        compile_cached(Model())(*steps()[0])


@pytest.mark.parametrize("exception", [torch._dynamo.exc.TensorifyScalarRestartAnalysis, torch._dynamo.exc.SkipFrame])
def test_what_dynamo_asks_of_itself_goes_through(exception: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def restart(*_: Any) -> Any:
        raise exception

    monkeypatch.setattr(backend, "compile_pieces", restart)
    with pytest.raises(exception):
        backend.dit_cache(capture(Model()), list(steps()[0]), options={"compiler": "eager", "Fn_compute_blocks": 1})


def capture(model: nn.Module) -> fx.GraphModule:
    found: list[fx.GraphModule] = []

    def look(gm: fx.GraphModule, examples: list[Any]) -> Any:
        del examples
        found.append(gm)
        return gm.forward

    torch.compile(model, backend=look, fullgraph=True)(*steps()[0])
    return found[0]


@pytest.mark.parametrize("breaks", ["before", "each"])
@pytest.mark.parametrize(
    ("module", "function", "place"),
    [
        (backend, "read_facts", "read_facts"),
        (backend, "run_passes", "rewrite"),
        (backend, "compile_pieces", "compile_pieces"),
        (relays, "_planned", "plan_relays"),
    ],
)
def test_a_forward_in_several_graphs(
    module: Any, function: str, place: str, breaks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, function, fail)
    model = Model(breaks)
    options = {"compiler": "eager", "Fn_compute_blocks": 1, "max_warmup_steps": 1, "residual_diff_threshold": 0.0}
    compiled = torch.compile(model, backend="dit_cache", options=options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for step in steps():
            assert torch.equal(compiled(*step), model(*step))
    # No graph of those with a break in each block has pieces; the other's blocks lie in one graph.
    needed = (function, breaks) not in (("compile_pieces", "each"), ("_planned", "before"))
    assert any(f"{place}: got Broken: on purpose" in text for text in said_of(caught)) == needed
    found = fx_cache.explain(compiled, *steps()[0])
    assert found.graphs == (2 if breaks == "before" else 1)
    if function != "compile_pieces":  # which `explain` does not ask for
        assert found.spans or (f"{place}: got Broken: on purpose" in str(found.reason)) == needed


@pytest.mark.parametrize(
    ("module", "function"),
    [(given.Reader, "__call__"), (sessions.Store, "begin"), (sessions.Store, "changed"), (clock.Clock, "move")],
)
def test_who_a_call_belongs_to(module: Any, function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is found out at each call: behind an error nothing is reused, or remembered."""
    monkeypatch.setattr(module, function, fail)
    assert_plain("begin")


@pytest.mark.parametrize("breaks", ["before", "each"])
@pytest.mark.parametrize(
    ("module", "function"),
    [(relay.Relay, "begin"), (forwards.Forward, "see_schedule"), (forwards, "identity_key"), (forwards, "spread")],
)
def test_who_a_forward_in_several_graphs_belongs_to(
    module: Any, function: str, breaks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, function, fail)
    model = Model(breaks)
    options = {"compiler": "eager", "Fn_compute_blocks": 1, "max_warmup_steps": 1, "residual_diff_threshold": 10.0}
    compiled = torch.compile(model, backend="dit_cache", options=options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for step in steps():
            assert torch.equal(compiled(*step), model(*step))
    assert any("got Broken: on purpose" in text for text in said_of(caught))
