"""The spec of the rewritten graph, checked after every pass in tests and with ``FX_CACHE_CHECK=1``."""

from __future__ import annotations

from torch import fx

from fx_cache.ops import check, cond, once
from fx_cache.passes.outline import REGION


def check_rewritten(gm: fx.GraphModule) -> None:
    """Asserts what must hold between any two passes.

    - Regions are numbered along the graph and never go back.
    - A conditional takes one check, and two branches with the same inputs, but for the slot, and equally many outputs.
    - What is computed once takes as many operands as its sub-module has inputs.
    - Whatever a call of a sub-module gets, the sub-module has an input for.
    - Inputs come first; there is one output.
    """
    gm.graph.lint()
    region = 0
    body = False
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            assert not body, f"input {node} stands behind an operation"
            continue
        body = body or node.op != "get_attr"
        if REGION in node.meta:
            assert node.meta[REGION] >= region, f"{node} of region {node.meta[REGION]} stands behind region {region}"
            region = node.meta[REGION]
        if node.op == "call_module":
            inputs = list(getattr(gm, str(node.target)).graph.find_nodes(op="placeholder"))
            assert len(inputs) == len(node.args), f"{node} hands over {len(node.args)} values, {len(inputs)} expected"
        if node.target is once:
            module = getattr(gm, str(node.args[1].target))
            assert len(node.args[2]) == len(list(module.graph.find_nodes(op="placeholder"))), f"{node}: operands"
            check_rewritten(module)
        if node.target is cond:
            _check_cond(gm, node)
    assert len(list(gm.graph.find_nodes(op="output"))) == 1


def _check_cond(gm: fx.GraphModule, node: fx.Node) -> None:
    hit, reuse, compute, operands, _ = node.args
    by_sample = node.kwargs.get("by_sample")
    if by_sample is not None:
        assert isinstance(operands, tuple) and isinstance(by_sample, tuple)
        assert len(by_sample) == len(operands), f"{node}: {len(operands)} operands, {len(by_sample)} said to have rows"
    assert isinstance(hit, fx.Node) and hit.target is check, f"{node} is not decided by a check"
    names, results = [], []
    for branch in (reuse, compute):
        assert isinstance(branch, fx.Node) and isinstance(operands, tuple)
        module = getattr(gm, str(branch.target))
        names.append([n.name for n in module.graph.find_nodes(op="placeholder")])
        results.append(len(next(iter(module.graph.find_nodes(op="output"))).args[0]))
        check_rewritten(module)
    assert isinstance(operands, tuple)
    for_reuse, for_compute = names
    assert len(for_compute) == len(operands), f"{node}: {len(for_compute)} inputs, {len(operands)} operands"
    assert for_reuse[: len(operands)] == for_compute, f"{node}: branches take {for_reuse} and {for_compute}"
    assert results[0] == results[1], f"{node}: branches return {results[0]} and {results[1]} values"
