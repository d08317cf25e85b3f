from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fx_cache.ops import check, cond, residual_diff, residual_sums
from fx_cache.passes.outline import (
    build,
    fake,
    inputs_of,
    live_outputs,
    mark,
    region_nodes,
    replace_by_call,
    size_inputs,
)
from fx_cache.passes.runner import RewriteContext
from fx_cache.patterns.graph import value_of, values_for
from fx_cache.patterns.joins import Carried
from fx_cache.patterns.samples import one_row_each, taken_by_sample
from fx_cache.patterns.spans import SpanPlan


def insert_conditionals(gm: fx.GraphModule, context: RewriteContext) -> int:
    """Puts each span behind a check, with a branch that computes it and one that reuses what is cached.

    Before::

        probe_0 = x1 - x0;  y = span(x1);  return tail(y)

    After::

        def forward(..., slot_0_gate, slot_0):
            probe_0 = x1 - x0
            hit_0 = check(slot_0_gate, self.measure_0, probe_0, slot_0)
            y, probe, cached_y = cond(hit_0, self.reuse_0, self.compute_0, (x1, ..., probe_0), slot_0)
            return (tail(y),), ((probe, cached_y),)

        compute_0(x1, ..., probe_0):                          y = span(x1);  return y, probe_0, y - x1
        reuse_0(x1, ..., probe_0, slot_0_probe, slot_0_y):    y = x1 + slot_0_y;  return y, slot_0_probe, slot_0_y

    For a batch whose samples may be decided one by one, ``check(..., samples=2, separable=True)``; where their number
    is a symbol, ``cond(..., by_sample=(True, ...))`` says which operands have a row for each. Where blocks have
    collectives, ``check(..., groups=("0",))`` names their process groups.

    Requires: `insert_probes`, `hoist_side_values`, `outline_blocks`.
    Ensures: the graph is a function of (inputs, slot state) that returns (outputs, new slot state).
    """
    assert context.plan is not None
    output = next(iter(gm.graph.find_nodes(op="output")))
    inputs = list(gm.graph.find_nodes(op="placeholder"))
    states: list[tuple[fx.Node, ...]] = []
    last_input = inputs[-1]
    for k, span in enumerate(context.plan.spans):
        last_input, state = _insert(gm, context, k, span, last_input)
        states.append(state)
    output.args = ((output.args[0], tuple(states)),)
    return len(states)


def _insert(
    gm: fx.GraphModule, context: RewriteContext, k: int, span: SpanPlan, last_input: fx.Node
) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    graph = gm.graph
    nodes = region_nodes(graph, 2 * k + 1)
    probe = context.probes[k]
    live_outs = live_outputs(nodes)
    live_ins = _live_ins(context, span, live_outs)
    inputs = inputs_of(gm, nodes)
    parts = dict.fromkeys(p for u in live_ins if u is not None for p in u.parts)
    inputs += [p for p in parts if p not in inputs]

    def new_input(name: str, value: Any) -> fx.Node:
        nonlocal last_input
        with graph.inserting_after(last_input):
            last_input = mark(graph.create_node("placeholder", name, name=name), None, value)
        return last_input

    gate = new_input(f"slot_{k}_gate", None)
    cached_values = [
        fake(torch.clone, o) if u is None else fake(operator.sub, o, u.value())
        for o, u in zip(live_outs, live_ins, strict=True)
    ]
    slot = new_input(f"slot_{k}", None)
    stored = {f"slot_{k}_probe": value_of(probe)}
    stored |= {f"slot_{k}_{o.name}": v for o, v in zip(live_outs, cached_values, strict=True)}
    operands = (*inputs, probe)
    operands += tuple(n for n in size_inputs(graph, (*operands, *live_outs)) if n not in operands)
    sizes = size_inputs(graph, [probe])
    samples = _number(span.samples, sizes)
    batch: dict[str, Any] = {}
    by_sample = None
    if samples != 1:
        rows = [*map(value_of, live_outs), *stored.values()]
        batch = {"samples": samples, "separable": one_row_each(rows, span.samples)}
        by_sample = taken_by_sample(map(value_of, operands), span.samples)

    compute = build(gm, nodes, operands, live_outs)
    _store(compute, operands, live_outs, live_ins, probe, cached_values)
    reuse = _reuse(operands, live_outs, live_ins, stored)
    groups = span.groups or context.config.process_groups
    if groups:
        batch["groups"] = groups
    gm.add_submodule(f"measure_{k}", _measure(probe, sizes, samples, residual_sums if groups else residual_diff))
    gm.add_submodule(f"compute_{k}", compute)
    gm.add_submodule(f"reuse_{k}", reuse)

    with graph.inserting_before(nodes[0]):
        measure = mark(graph.get_attr(f"measure_{k}"), 2 * k)
        seen = (gate, measure, probe, slot, *sizes)
        hit = graph.create_node("call_function", check, seen, batch, name=f"hit_{k}")
        mark(hit, 2 * k)
    with graph.inserting_after(nodes[-1]):
        call = graph.create_node("call_function", cond, (), name=f"cond_{k}")
    with graph.inserting_before(call):
        branches = [mark(graph.get_attr(f"{b}_{k}"), 2 * k + 1) for b in ("reuse", "compute")]
    call.args = (hit, *branches, operands, slot)
    call.kwargs = {} if by_sample is None else {"by_sample": by_sample}
    mark(call, 2 * k + 1, tuple(value_of(o) for o in live_outs))
    following = call.next
    replace_by_call(gm, nodes, live_outs, call)
    state = []
    for i, (name, value) in enumerate(stored.items(), len(live_outs)):
        with graph.inserting_before(following):
            item = graph.create_node("call_function", operator.getitem, (call, i), name=f"new_{name}")
        state.append(mark(item, 2 * k + 1, value))
    return last_input, tuple(state)


def _live_ins(context: RewriteContext, span: SpanPlan, live_outs: list[fx.Node]) -> list[Carried | None]:
    """For each live-out, what it carries on, of the nodes as they stand now that blocks are outlined."""
    now = context.templates.now
    planned = {now(lo.value) for lo in span.live_outs}
    beside = [o.name for o in live_outs if o not in planned]
    # Nobody has looked at how it goes on: a hit would hand on what an earlier step left.
    if beside:
        raise RuntimeError(f"span {' + '.join(span.stacks)} hands on {', '.join(beside)}, which is not planned")
    continued = {now(lo.value): lo.continues.with_parts(now) for lo in span.live_outs if lo.continues is not None}
    return [continued.get(out) for out in live_outs]


def _store(
    compute: fx.GraphModule,
    operands: tuple[fx.Node, ...],
    live_outs: list[fx.Node],
    live_ins: list[Carried | None],
    probe: fx.Node,
    cached_values: list[Any],
) -> None:
    """Lets the compute branch return, behind the live-outs, the probe and what is cached of each live-out."""
    graph = compute.graph
    env = dict(zip(operands, graph.find_nodes(op="placeholder"), strict=True))
    output = next(iter(graph.find_nodes(op="output")))
    results = list(output.args[0])
    cached = []
    with graph.inserting_before(output):
        for result, out, source, value in zip(results, live_outs, live_ins, cached_values, strict=True):
            if source is None:
                stored = graph.create_node("call_function", torch.clone, (result,), name=f"value_{out.name}")
            else:
                before = source.put_into(graph, env)
                stored = graph.create_node("call_function", operator.sub, (result, before), name=f"residual_{out.name}")
            cached.append(mark(stored, None, value))
    output.args = ((*results, env[probe], *cached),)


def _reuse(
    operands: tuple[fx.Node, ...], live_outs: list[fx.Node], live_ins: list[Carried | None], stored: dict[str, Any]
) -> fx.GraphModule:
    graph = fx.Graph()
    env = {n: mark(graph.placeholder(n.name), None, value_of(n)) for n in operands}
    slots = [mark(graph.placeholder(name), None, value) for name, value in stored.items()]
    results = []
    for out, source, slot in zip(live_outs, live_ins, slots[1:], strict=True):
        if source is None:
            # A copy: the tail, or the caller who gets it as an output, may write to it.
            result = graph.call_function(torch.clone, (slot,))
        else:
            result = graph.call_function(operator.add, (source.put_into(graph, env), slot))
        results.append(mark(result, None, value_of(out)))
    graph.output((*results, *slots))
    return fx.GraphModule({}, graph)


def _number(value: Any, sizes: list[fx.Node]) -> Any:
    """A number of samples as an argument: itself, or the one of `sizes` that it is; 1 if it is none."""
    if isinstance(value, int):
        return value
    return next((n for n in sizes if statically_known_true(value_of(n) == value)), 1)


def _measure(probe: fx.Node, sizes: list[fx.Node], samples: Any, measure: Callable[..., Any]) -> fx.GraphModule:
    """`residual_diff` or `residual_sums` as a graph."""
    graph = fx.Graph()
    previous, now = graph.placeholder("previous"), graph.placeholder("probe")
    for node in (previous, now):
        mark(node, None, value_of(probe))
    tracer = fx.proxy.GraphAppendingTracer(graph)
    numbers = {n: fx.Proxy(mark(graph.placeholder(n.name), None, value_of(n)), tracer) for n in sizes}
    count = numbers[samples] if isinstance(samples, fx.Node) else samples
    diff = measure(fx.Proxy(previous, tracer), fx.Proxy(now, tracer), count, value_of(probe).ndim)
    graph.output((diff.node,))
    made = fx.GraphModule({}, graph)
    values = values_for(made, [value_of(n) for n in graph.find_nodes(op="placeholder")])
    for node in graph.nodes:
        # Pieces with values alone are found again in AOTAutograd's cache on disk.
        mark(node, None, values[node])
    return made
