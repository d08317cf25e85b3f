"""Single parts of analysis and rewriting on graphs small enough to print."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx

from fx_cache.config import CacheConfig
from fx_cache.passes.name_inputs import readable
from fx_cache.passes.runner import RewriteContext, run_passes
from fx_cache.passes.separate_sequences import separate_sequences
from fx_cache.patterns.graph import structure, written_inputs
from fx_cache.patterns.programs import Program
from fx_cache.patterns.stacks import module_path


def graph_of(*calls: tuple) -> fx.Graph:
    """Inputs x and y, then (op, target, args, kwargs) each; strings in args name nodes."""
    graph = fx.Graph()
    nodes = {name: graph.placeholder(name) for name in ("x", "y")}
    for i, (op, target, args, kwargs) in enumerate(calls):
        args = tuple(nodes.get(a, a) if isinstance(a, str) else a for a in args)
        kwargs = {k: nodes.get(v, v) if isinstance(v, str) else v for k, v in kwargs.items()}
        nodes[f"n{i}"] = graph.create_node(op, target, args, kwargs)
    graph.output(tuple(nodes.values()))
    return graph


@pytest.mark.parametrize(
    ("call", "written"),
    [
        (("call_method", "add_", ("x", "y"), {}), ["x"]),
        (("call_method", "add", ("x", "y"), {}), []),
        (("call_method", "__setitem__", ("x", 0, "y"), {}), ["x"]),
        (("call_function", operator.iadd, ("x", "y"), {}), ["x"]),
        (("call_function", operator.add, ("x", "y"), {}), []),
        (("call_function", operator.and_, ("x", "y"), {}), []),
        (("call_function", operator.iand, ("x", "y"), {}), ["x"]),
        (("call_function", operator.setitem, ("x", 0, "y"), {}), ["x"]),
        (("call_function", operator.getitem, ("x", 0), {}), []),
        (("call_function", torch.relu_, ("x",), {}), ["x"]),
        (("call_function", torch.nn.functional.silu, ("x",), {"inplace": True}), ["x"]),
        (("call_function", torch.nn.functional.silu, ("x",), {"inplace": False}), []),
        (("call_function", torch.nn.functional.relu, ("x", True), {}), ["x"]),
        (("call_function", torch.nn.functional.relu, ("x", False), {}), []),
        (("call_function", torch.add, ("x", "x"), {"out": "y"}), ["y"]),
        (("call_function", torch.ops.aten.add_.Tensor, ("x", "y"), {}), ["x"]),
        (("call_function", torch.ops.aten.add.Tensor, ("x", "y"), {}), []),
        (("call_function", torch.ops.aten.copy_.default, ("y", "x"), {}), ["y"]),
    ],
)
def test_writes_in_place_are_seen(call: tuple, written: list[str]) -> None:
    node = list(graph_of(call).nodes)[2]
    assert [n.name for n in written_inputs(node)] == written


def test_a_tuple_is_taken_apart_where_it_is_made() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = torch.zeros(4, 2)
    parts = graph.call_method("chunk", (x, 2))
    parts.meta["example_value"] = torch.zeros(4, 2).chunk(2)
    doubled = graph.call_function(operator.mul, (x, 2.0))
    last = graph.call_function(operator.getitem, (parts, -1))
    whole = graph.call_function(torch.cat, (parts,))
    again = graph.call_function(operator.getitem, (parts, 1))
    graph.output((doubled, last, whole, again))
    gm = fx.GraphModule({}, graph)
    value = torch.randn(4, 2)
    expected = gm(value)
    assert separate_sequences(gm, RewriteContext(CacheConfig())) > 0
    gm.graph.lint()
    gm.recompile()
    assert all(torch.equal(a, b) for a, b in zip(expected, gm(value), strict=True))
    assert [str(n) for n in gm.graph.nodes] == [
        "x", "chunk", "getitem", "getitem_2", "mul", "cat", "output"
    ]  # fmt: skip
    assert {n.target for n in parts.users} == {operator.getitem}


def test_the_runner_times_observes_and_stops() -> None:
    seen: list[str] = []

    def nothing(gm, context):
        return 0

    def something(gm, context):
        return 2

    gm = fx.symbolic_trace(torch.nn.Linear(2, 2))
    records = run_passes(gm, (nothing, something), RewriteContext(CacheConfig()), lambda name, _: seen.append(name))
    assert [(r.name, r.rewrites) for r in records] == [("nothing", 0), ("something", 2)]
    assert all(r.seconds >= 0.0 for r in records)
    assert seen == ["captured", "something"]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("L['hidden_states']", "hidden_states"),
        ("L['kwargs']['hidden_states']", "hidden_states"),
        ("L['args'][0]", "args_0"),
        ("L['x'].size()[1]", "x_size_1"),
        ("L['self']._modules['blocks']._modules['0']._parameters['weight']", "blocks_0_weight"),
        ("L['self'].__dict__['_modules']['norm']._buffers['scale']", "norm_scale"),
    ],
)
def test_inputs_get_readable_names(source: str, name: str) -> None:
    assert readable(source) == name


def test_module_paths() -> None:
    assert module_path("L['self'].__dict__['_modules']['blocks'].0.attn") == "blocks.0.attn"
    assert module_path("L['self'].blocks.11") == "blocks.11"
    assert module_path("L['fn'].model.layers.2") == "model.layers.2"


def test_structure_knows_equal_runs_from_others() -> None:
    calls = [("call_function", operator.mul, ("x", k), {}) for k in (2.0, 2.0, 3.0)]
    graph = graph_of(*calls)
    x, _, first, second, third, _ = graph.nodes
    keys = [structure([n], [x]) for n in (first, second, third)]
    assert keys[0] == keys[1] != keys[2]
    assert Program.of(graph_of(calls[0])).at(()) == Program.of(graph_of(calls[1])).at(())
    assert Program.of(graph_of(calls[0])).at(()) != Program.of(graph_of(calls[2])).at(())
    index = [("call_function", operator.getitem, ("x", k), {}) for k in (0, 1)]
    assert Program.of(graph_of(index[0])).at(()) != Program.of(graph_of(index[1])).at(())
