"""The backend: find the stacks, rewrite the graph, hand the pieces to the inner compiler. Read this file first."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from fx_cache.compiling import compile_pieces, inner_compiler
from fx_cache.config import CacheConfig, split_options
from fx_cache.errors import CacheWarning, Refusal
from fx_cache.passes import PIPELINE
from fx_cache.passes.dump import Dump
from fx_cache.passes.runner import PassRecord, RewriteContext, run_passes
from fx_cache.patterns.explanation import Explanation
from fx_cache.patterns.graph import is_weight, program_signature, value_of, writes_too
from fx_cache.patterns.inputs import classify_inputs, token_sources
from fx_cache.patterns.spans import Plan
from fx_cache.runtime.origins import ObservedForward, Source, origins
from fx_cache.runtime.step import CachedForward


@dataclass(frozen=True)
class Rewritten:
    """A graph after the pipeline: `gm` is a copy, rewritten if the plan does not refuse."""

    gm: fx.GraphModule
    plan: Plan
    records: list[PassRecord]


def dit_cache(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """The Dynamo backend: ``torch.compile(transformer, backend="dit_cache", options={...})``.

    Args:
        gm: the forward as Dynamo captured it.
        example_inputs: its inputs.
        mode: handed to the inner compiler. ``torch.compile`` takes either it or options; ``options={"mode": ...}``
            gives both.
        options: fields of :class:`fx_cache.CacheConfig`; all others are handed to the inner compiler.

    Returns:
        The compiled forward. A graph that cannot be cached is compiled as it is, with one warning that says why.

    Raises:
        OptionError: an option is unknown, out of range, or contradicts another one.
    """
    config, inner_options = split_options(options)
    if config.dump_dir is None and os.environ.get("FX_CACHE_DUMP_DIR"):
        config = replace(config, dump_dir=os.environ["FX_CACHE_DUMP_DIR"])
    mode = inner_options.pop("mode", mode)
    compiler = inner_compiler(config.compiler, mode, inner_options)
    dump = Dump.open(config.dump_dir)
    refusal = refuse_gradients(gm)
    if refusal is None:
        rewritten = rewrite(gm, config, dump)
        refusal = rewritten.plan.refusal
        if dump is not None:
            dump.report(rewritten.gm, Explanation.of([rewritten.plan]), rewritten.records)
    program = program_signature(gm.graph)
    if refusal is not None:
        if not _broken_off(gm):
            warnings.warn(f"dit_cache runs this graph uncached. {refusal}", CacheWarning, stacklevel=2)
        return _observed(compiler(gm, list(example_inputs)), gm, program)
    plan = rewritten.plan
    spans = plan.spans
    return CachedForward(
        compile_pieces(rewritten.gm, compiler).forward,
        plan.roles,
        _outer_latents(gm, plan),
        _state_sizes(rewritten.gm),
        program,
        tuple((s.stacks, tuple(s.blocks.values()), tuple(lo.rule for lo in s.live_outs)) for s in spans),
        _anchor(gm, plan),
        replace(config, dump_dir=None),
    )


def rewrite(gm: fx.GraphModule, config: CacheConfig, dump: Dump | None = None) -> Rewritten:
    """Runs the pipeline over a copy of a captured graph."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    copied = fx.GraphModule(gm, graph)
    context = RewriteContext(config)
    records = run_passes(copied, PIPELINE, context, None if dump is None else dump.graph)
    assert context.plan is not None
    return Rewritten(copied, context.plan, records)


def refuse_gradients(gm: fx.GraphModule) -> Refusal | None:
    """Reusing an activation would cut the graph of derivatives."""
    if not torch.is_grad_enabled():
        return None
    for node in gm.graph.find_nodes(op="placeholder"):
        value = value_of(node)
        if isinstance(value, torch.Tensor) and value.requires_grad:
            return Refusal(
                "the captured graph",
                f"gradients enabled and input {node.name} requiring one",
                "inference",
                "call the model under torch.no_grad() or torch.inference_mode()",
            )
    return None


def _broken_off(gm: fx.GraphModule) -> bool:
    """Whether the capture ended at a graph break: then the stack may be in a later graph."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    return reason is not None and reason.graph_break


def _observed(compiled: Callable[..., Any], gm: fx.GraphModule, program: str) -> ObservedForward:
    """A graph that is not cached; later graphs of the same forward learn from it what came from outside."""
    roles = classify_inputs(gm.graph)
    roles = replace(roles, latents=(), conditioning=(*roles.latents, *roles.conditioning))
    inputs = list(gm.graph.find_nodes(op="placeholder"))
    reads = writes_too(gm.graph)
    outputs = next(iter(gm.graph.find_nodes(op="output"))).args[0]
    tokens = []
    for output in outputs:
        sources = token_sources(output, reads) if isinstance(output, fx.Node) else set()
        tokens.append([i for i in roles.conditioning if inputs[i] in sources])
    return ObservedForward(compiled, program, roles, tokens)


def _outer_latents(gm: fx.GraphModule, plan: Plan) -> frozenset[Source]:
    """The inputs of earlier graphs of the same forward that are denoised.

    Those whose tokens the latents of this graph hold, one each; failing that, those of an output's shape.
    """
    notes = {i: origins.of(v) for i, v in enumerate(_examples(gm))}
    tokens = {s for i in plan.roles.latents if (note := notes.get(i)) is not None for s in note.tokens}
    if 0 < len(tokens) <= len(plan.roles.latents):
        return frozenset(tokens)
    outputs = [value_of(n) for n in tree_leaves(next(iter(gm.graph.find_nodes(op="output"))).args[0])]
    shapes = {tuple(map(str, v.shape)) for v in outputs if isinstance(v, torch.Tensor)}
    outer = {o.source: o for note in notes.values() if note is not None for o in note.outer if o.schedule is None}
    found: set[Source] = set()
    for shape in shapes:
        fitting = [s for s, o in outer.items() if o.has_shape(shape) and (not tokens or s in tokens)]
        found |= set(fitting) if len(fitting) == 1 else set()  # of two that fit, one may be a reference image
    return frozenset(found)


def _examples(gm: fx.GraphModule) -> list[Any]:
    """The tensors that a graph was captured with."""
    found = []
    for node in gm.graph.find_nodes(op="placeholder"):
        arg = node.meta.get("grapharg")
        try:
            found.append(None if arg is None else arg.example)
        except AssertionError:  # it is gone already
            found.append(None)
    return found


def _state_sizes(gm: fx.GraphModule) -> list[int]:
    """For each span, how many tensors its new state has: the second result of a rewritten graph."""
    output = next(iter(gm.graph.find_nodes(op="output")))
    return [len(state) for state in output.args[0][1]]


def _anchor(gm: fx.GraphModule, plan: Plan) -> int | None:
    """Position of the input by which the model is known: the first weight that it has."""
    inputs = list(gm.graph.find_nodes(op="placeholder"))
    parameters = [i for i in plan.roles.weights if isinstance(value_of(inputs[i]), torch.nn.Parameter)]
    return next(iter(parameters or [i for i in plan.roles.weights if is_weight(inputs[i])]), None)
