"""The backend: find the stacks, rewrite the graph, hand the pieces to the inner compiler. Read this file first."""

from __future__ import annotations

import contextlib
import gc
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from fx_cache.compiling import compile_pieces, inner_compiler, uses_cuda_graphs, weights_stay
from fx_cache.config import CacheConfig, split_options
from fx_cache.errors import CacheWarning, Refusal
from fx_cache.passes import PIPELINE
from fx_cache.passes.dump import Dump
from fx_cache.passes.runner import PassRecord, RewriteContext, run_passes
from fx_cache.patterns.explanation import Explanation
from fx_cache.patterns.graph import hinted_shape, is_tensor, is_weight, storage_key, value_of, written_storages
from fx_cache.patterns.relays import read_facts
from fx_cache.patterns.samples import fewer_allowed
from fx_cache.patterns.spans import Plan
from fx_cache.regions import written_out
from fx_cache.runtime.forwards import Forward, surroundings
from fx_cache.runtime.relay import ObservedForward, Relays
from fx_cache.runtime.step import CachedForward
from fx_cache.versions import with_versions

_relays = Relays()


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
    config = replace(config, dump_dir=None)
    around = surroundings()
    broken = break_of(gm)
    marked, gm = gm, with_versions(written_out(gm))
    whole = broken is None and around.depth == 0
    refusal = refuse_gradients(gm)
    if refusal is None:
        # What a part of a forward is given is made anew at every step.
        rewritten = rewrite(gm, config if whole else replace(config, hoist_invariants=False), dump)
        refusal = rewritten.plan.refusal
        if dump is not None:
            dump.report(rewritten.gm, Explanation.of([rewritten.plan]), rewritten.records)
    facts = read_facts(gm, broken, refuse_gradients(gm), 0.0 if refusal is not None else _share(rewritten.plan))
    if refusal is not None:
        if whole:
            warnings.warn(f"dit_cache runs this graph uncached. {refusal}", CacheWarning, stacklevel=2)
            return compiler(marked, list(example_inputs))
        return ObservedForward(compiler(marked, list(example_inputs)), facts, config, _relays)
    plan = rewritten.plan
    spans = plan.spans
    # Before it is asked what was assumed of sizes: compilers may assume more.
    overwritten = uses_cuda_graphs(config.compiler, mode, inner_options)
    compiled = compile_pieces(rewritten.gm, weights_stay(compiler) if overwritten else compiler).forward
    return CachedForward(
        compiled,
        plan.roles,
        len(spans),
        facts.program,
        tuple((s.stacks, tuple(s.blocks.values()), tuple(lo.rule for lo in s.live_outs)) for s in spans),
        _anchor(gm, plan),
        *_guarded(gm, plan),
        config,
        facts,
        frozenset() if whole else _latents_given(gm, plan, around.forward),
        whole,
        _relays,
        all(fewer_allowed(s.samples) for s in spans),
        bool(plan.invariants.kept),
        overwritten,
    )


class Draft(fx.GraphModule):
    """A graph that is rewritten and read, not run: its code is not made anew at every change."""

    def recompile(self) -> Any:
        return None


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Puts the garbage collector off: each of its rounds looks through all that torch holds."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def rewrite(gm: fx.GraphModule, config: CacheConfig, dump: Dump | None = None) -> Rewritten:
    """Runs the pipeline over a copy of a captured graph, a `Draft`."""
    gm = with_versions(written_out(gm))
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    copied = Draft(gm, graph)
    context = RewriteContext(config)
    with no_garbage_collection():
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


def break_of(gm: fx.GraphModule) -> str | None:
    """Place and reason of the graph break that ends a capture: then the stack may be in a later graph."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return None
    at = reason.user_stack[-1] if reason.user_stack else None
    place = "" if at is None else f" at {os.path.basename(at.filename)}:{at.lineno} in {at.name}"
    return f"{reason.reason.strip().splitlines()[0]}{place}"


def _latents_given(gm: fx.GraphModule, plan: Plan, forward: Forward | None) -> frozenset[int]:
    """Which of the user's inputs are denoised, for a graph that is a part of a forward.

    Those whose tokens its latents hold, one each; failing that, those of an output's shape.
    """
    if forward is None:
        return frozenset()
    examples = _examples(gm)
    tokens = frozenset().union(*(forward.tokens_of(examples[i]) for i in plan.roles.latents))
    if 0 < len(tokens) <= len(plan.roles.latents):
        return tokens
    outputs = [value_of(n) for n in tree_leaves(next(iter(gm.graph.find_nodes(op="output"))).args[0])]
    return forward.latent_like({hinted_shape(v) for v in outputs if isinstance(v, torch.Tensor)})


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


def _share(plan: Plan) -> float:
    """The part of a graph's FLOPs that a hit saves."""
    return sum(s.share or 0.0 for s in plan.spans)


def _guarded(gm: fx.GraphModule, plan: Plan) -> tuple[list[int], list[int]]:
    """Positions of the weights that the graph does not write to: if one of them changes, somebody changed it.

    Apart from them the numbers that the module holds: with dynamic shapes they come as tensors, made at every call.
    """
    inputs = list(gm.graph.find_nodes(op="placeholder"))
    written = written_storages(gm.graph.nodes)
    held = [i for i in plan.roles.weights if is_tensor(inputs[i]) and storage_key(inputs[i]) not in written]
    numbers = [i for i in held if _is_number(value_of(inputs[i]))]
    return [i for i in held if i not in numbers], numbers


def _is_number(value: torch.Tensor) -> bool:
    return value.ndim == 0 and value.device.type == "cpu" and not isinstance(value, torch.nn.Parameter)


def _anchor(gm: fx.GraphModule, plan: Plan) -> int | None:
    """Position of the input by which the model is known: the first weight that it has."""
    inputs = list(gm.graph.find_nodes(op="placeholder"))
    parameters = [i for i in plan.roles.weights if isinstance(value_of(inputs[i]), torch.nn.Parameter)]
    return next(iter(parameters or [i for i in plan.roles.weights if is_weight(inputs[i])]), None)
