"""Arguments are freed behind their last reader: what a cached model holds over a plain one is what it accounts for."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

import fx_cache
from benchmarks.contest.memory import peak_bytes
from fx_cache.boxing import TakesAList, taking_a_list
from tests.models import walk
from tests.running import compile_cached, last_branch, needs_inductor, shallow


def test_a_graph_that_takes_a_list_holds_on_to_nothing():
    seen = []

    def freed(y: torch.Tensor) -> torch.Tensor:
        seen.append(given() is None)
        return y

    graph = fx.Graph()
    x, unused = graph.placeholder("x"), graph.placeholder("unused")
    graph.set_codegen(TakesAList())
    graph.output(graph.call_function(freed, (graph.call_function(torch.neg, (x,)),)))
    operands = [torch.ones(3), torch.ones(4)]
    given = weakref.ref(operands[0])
    result = fx.GraphModule({}, graph)(operands)
    assert not operands and seen == [True]
    assert torch.equal(result, -torch.ones(3))
    assert unused.op == "placeholder"


@pytest.mark.parametrize("names", [(), ("x",), ("x", "y")])
def test_any_number_of_inputs(names):
    graph = fx.Graph()
    inputs = [graph.placeholder(n) for n in names]
    graph.set_codegen(TakesAList())
    graph.output(tuple(inputs))
    assert fx.GraphModule({}, graph)([*range(len(names))]) == tuple(range(len(names)))


@pytest.mark.parametrize(("compiler", "boxed"), [("aot_eager", True), ("eager", False)])
def test_what_compilers_make_is_called_with_a_list(compiler, boxed):
    found: list[Callable[..., Any]] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        found.append(torch._TorchCompileWrapper(compiler, None, {}, None)(gm, example_inputs))
        return found[0]

    x = torch.randn(3)
    torch.compile(lambda x: (x * 2 + 1,), backend=backend, dynamic=False)(x)
    inner = taking_a_list(found[0])
    assert (inner is not None) == boxed
    if inner is not None:
        given = [x]
        assert torch.equal(inner(given)[0], x * 2 + 1)
        assert not given


@needs_inductor
@pytest.mark.long
def test_peak_over_the_plain_model_is_what_is_accounted():
    model, steps = shallow("flux"), walk("flux", 4, size=2)
    plain = torch.compile(model, fullgraph=True)
    cached = compile_cached(model, compiler="inductor", residual_diff_threshold=0.0)

    def peak_of(compiled: torch.nn.Module) -> int:
        for step in steps:  # what is compiled is compiled
            compiled(**step)
        fx_cache.reset(model)
        return peak_bytes(lambda: [compiled(**step)[0].sum() for step in steps])

    without, with_cache = peak_of(plain), peak_of(cached)
    branch = last_branch(cached)
    accounted = branch["kept_bytes"] + sum(span["bytes"] for span in branch["spans"])
    assert 0 < with_cache - without <= 1.05 * accounted
