"""CUDA graphs write their results to the same memory at every run: what is remembered has to be a copy.

Without a GPU a compiler stands in for them whose pieces do the same.
"""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch._dynamo import register_backend
from torch._inductor.utils import fresh_cache

import fx_cache
from fx_cache import backend, compiling
from fx_cache.runtime.registry import stores
from tests import test_relay
from tests.models import build, walk
from tests.running import compile_cached, hits_of, last_branch, needs_inductor, relative_error, run_cached
from tests.selection import few

results: list[weakref.ref[torch.Tensor]] = []
"""What all pieces made in the present call of the model, as long as somebody has it."""


@register_backend
def overwriting(gm, example_inputs):
    def piece(*args: Any) -> Any:
        made = gm.forward(*args)
        # Inputs that are handed on, and views of them, are nothing that was made.
        given = {a.untyped_storage()._cdata for a in args if isinstance(a, torch.Tensor)}
        results.extend(weakref.ref(t) for t in made if t.untyped_storage()._cdata not in given)
        return made

    return piece


def begin_run() -> None:
    """The memory of all pieces is used anew."""
    for reference in results:
        tensor = reference()
        if tensor is not None:
            tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
    results.clear()


@pytest.mark.parametrize("name", few(["dit", "wan", "flux", "pixart"], 2))
def test_what_is_remembered_is_not_overwritten(name: str, monkeypatch) -> None:
    monkeypatch.setattr(backend, "uses_cuda_graphs", lambda *_: True)
    steps = [*walk(name, 8), *walk(name, 8, seed=1)]
    policy = {"residual_diff_threshold": 1.0, "max_continuous_cached_steps": 2}
    expected = run_cached(build(name), steps, **policy)
    model = build(name)
    compiled = compile_cached(model, compiler="overwriting", **policy)
    with fx_cache.session("request", "only"):
        for step, output in zip(steps, expected.outputs, strict=True):
            begin_run()
            assert torch.equal(compiled(**step)[0], output)
    spans = last_branch(model)["spans"]
    assert [s["hits"] for s in spans] == expected.hits
    assert expected.hits[0]


def test_what_is_remembered_of_many_graphs_is_not_overwritten() -> None:
    """A span over several graphs: each of them overwrites its results."""
    steps = test_relay.walk(0)
    found = []
    for compiler in ("eager", "overwriting"):
        torch._dynamo.reset()
        model = test_relay.Model()
        options = {**test_relay.OPTIONS, "compiler": compiler, "residual_diff_threshold": 0.99}
        compiled = torch.compile(model, backend="dit_cache", options=options)
        outputs = []
        for step in [*steps, *steps]:
            begin_run()
            outputs.append(compiled(**step)[0].clone())
        found.append((outputs, hits_of(compiled)))
        kept = [t for s in stores(model) for b in s._branches.values() for slot in b.slots for t in slot.tensors]
        before = [t.clone() for t in kept]
        begin_run()
        assert all(map(torch.equal, before, kept))
        assert len(kept) > 10
    (expected, hits), (outputs, same) = found
    assert all(map(torch.equal, expected, outputs))
    assert hits == same != []


def test_without_copies_it_would_be(monkeypatch) -> None:
    """The stand-in does overwrite."""
    monkeypatch.setattr(backend, "uses_cuda_graphs", lambda *_: False)
    compiled = compile_cached(build("wan"), compiler="overwriting", residual_diff_threshold=1.0)
    outputs = []
    for step in walk("wan", 4):
        begin_run()
        outputs.append(compiled(**step)[0].clone())
    assert torch.isnan(outputs[-1]).any()


@pytest.mark.parametrize(
    ("name", "mode", "options", "expected"),
    [
        ("inductor", None, {}, False),
        ("inductor", "reduce-overhead", {}, True),
        ("inductor", "max-autotune", {}, True),
        ("inductor", "max-autotune-no-cudagraphs", {}, False),
        ("inductor", None, {"triton.cudagraphs": True}, True),
        ("inductor", "reduce-overhead", {"triton.cudagraphs": False}, False),
        ("cudagraphs", None, {}, True),
        ("eager", None, {}, False),
    ],
)
def test_who_uses_cuda_graphs(name: str, mode: str | None, options: dict, expected: bool) -> None:
    assert compiling.uses_cuda_graphs(name, mode, options) is expected


@needs_inductor
@pytest.mark.slow
def test_weights_are_not_copied_into_place(monkeypatch) -> None:
    """What Inductor is told of each piece's inputs: all weights lie where they lie, and nothing else does."""
    from torch._inductor import compile_fx

    told: list[list[int]] = []
    found = compile_fx.get_static_input_idxs

    def seen(num_fixed: int) -> list[int]:
        told.append(found(num_fixed))
        return told[-1]

    monkeypatch.setattr(compile_fx, "get_static_input_idxs", seen)
    pieces: list[list[int]] = []
    monkeypatch.setattr(backend, "inner_compiler", lambda *a: noted(compiling.inner_compiler(*a), pieces))
    model, steps = build("dit"), walk("dit", 2)
    expected = model(**steps[0])[0]
    options = {"compiler": "inductor", "mode": "reduce-overhead", "residual_diff_threshold": 0.0}
    compiled = compile_cached(model, **options)
    with fresh_cache():
        assert relative_error(expected, compiled(**steps[0])[0]) < 1e-5
    assert told == pieces
    assert any(pieces)


def noted(compiler: compiling.Compiler, pieces: list[list[int]]) -> compiling.Compiler:
    def compile_piece(piece: torch.fx.GraphModule, examples: list[Any]) -> Any:
        pieces.append([i for i, e in enumerate(examples) if isinstance(e, torch.nn.Parameter)])
        return compiler(piece, examples)

    return compile_piece
