"""The backend: find the stacks, rewrite the graph, hand the pieces to the inner compiler. Read this file first."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from fx_cache.compiling import Compiler, compile_pieces, inner_compiler, uses_cuda_graphs, weights_stay
from fx_cache.config import CacheConfig, split_options
from fx_cache.errors import Failure, Refusal, StageError, say_uncached, stage
from fx_cache.passes import PIPELINE
from fx_cache.passes.dump import Dump
from fx_cache.passes.parts import GraphParts
from fx_cache.passes.runner import PassRecord, RewriteContext, run_passes
from fx_cache.patterns.calls import GraphFacts, read_facts
from fx_cache.patterns.explanation import Explanation
from fx_cache.patterns.graph import hinted_shape, is_tensor, is_weight, storage_key, value_of, written_storages
from fx_cache.patterns.samples import fewer_allowed
from fx_cache.patterns.spans import Plan
from fx_cache.patterns.work import Work
from fx_cache.regions import written_out
from fx_cache.runtime.forwards import Forward, surroundings
from fx_cache.runtime.relay import RELAYS, ObservedForward
from fx_cache.runtime.step import CachedForward
from fx_cache.runtime.weights import is_number
from fx_cache.versions import with_versions


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
    overwritten = uses_cuda_graphs(config.compiler, mode, inner_options)
    reading = read_graph(gm, config)
    config = replace(config, dump_dir=None)
    refusal, facts = reading.refusal, reading.facts
    if refusal is None:
        try:
            with stage("compile_pieces"):
                return _cached_forward(reading, compiler, overwritten, config)
        except StageError as error:
            refusal = reading.failure(error)
            facts = None if facts is None else replace(facts, span_work=0)
    compiled = compiler(gm, list(example_inputs))
    if reading.whole or isinstance(refusal, Failure):
        say_uncached(refusal)
    if reading.whole or facts is None:
        return compiled
    return ObservedForward(compiled, facts, config, RELAYS)


@dataclass
class Reading:
    """What is found in a captured graph.

    Attributes:
        gm: the graph, with marked regions written out.
        whole: whether it is a whole forward.
        forward: the execution of the forward that it is a part of, if it is one.
        rewritten: what the pipeline made of it; None where it was not asked.
        refusal: why it is not cached; a `Failure` where an error of ours is the reason.
        facts: what it is as a part of a forward; None where they could not be read.
        dump: where it is written down, if anywhere.
    """

    gm: fx.GraphModule
    whole: bool = True
    forward: Forward | None = None
    rewritten: Rewritten | None = None
    refusal: Refusal | None = None
    facts: GraphFacts | None = None
    dump: Dump | None = None

    @property
    def plan(self) -> Plan:
        """What is cached, or why nothing is."""
        if self.rewritten is not None:
            return self.rewritten.plan
        assert self.refusal is not None
        return Plan.refused(self.refusal)

    def failure(self, error: StageError) -> Failure:
        """The refusal that an error is; it is written down with the graphs."""
        return _failure(error, self.dump)


def read_graph(gm: fx.GraphModule, config: CacheConfig) -> Reading:
    """Analyses and rewrites a captured graph; `gm` is left as it is. An error of ours becomes a refusal."""
    reading = Reading(gm)
    try:
        with stage("read_graph"):
            _read(reading, config)
    except StageError as error:
        reading.refusal = reading.failure(error)
    return reading


def _read(reading: Reading, config: CacheConfig) -> None:
    around = surroundings()
    broken = break_of(reading.gm)
    reading.whole, reading.forward = broken is None and around.depth == 0, around.forward
    with stage("dump_dir"):
        reading.dump = Dump.open(config.dump_dir)
    with stage("written_out"):
        gm = written_out(reading.gm)
    with stage("with_versions"):
        gm = reading.gm = with_versions(gm)
    gradients = reading.refusal = refuse_gradients(gm)
    share = 0.0
    if gradients is None:
        # What a part of a forward is given is made anew at every step.
        config = config if reading.whole else replace(config, hoist_invariants=False)
        reading.rewritten = found = rewrite(gm, config, reading.dump)
        reading.refusal = found.plan.refusal
        share = 0.0 if reading.refusal is not None else sum(s.share or 0.0 for s in found.plan.spans)
    with stage("read_facts"):
        work = Work(gm.graph)
        parts = GraphParts(None if reading.whole else gm, work)
        reading.facts = read_facts(gm, broken, gradients, share, work.total, parts)


def _cached_forward(reading: Reading, compiler: Compiler, overwritten: bool, config: CacheConfig) -> CachedForward:
    """Compiles a rewritten graph's pieces, and puts its cache around them."""
    rewritten, facts, gm, whole = reading.rewritten, reading.facts, reading.gm, reading.whole
    assert rewritten is not None and facts is not None
    plan = rewritten.plan
    spans = plan.spans
    # Before it is asked what was assumed of sizes: compilers may assume more.
    compiled = compile_pieces(rewritten.gm, weights_stay(compiler) if overwritten else compiler).forward
    return CachedForward(
        compiled,
        plan.roles,
        len(spans),
        tuple((s.stacks, tuple(s.blocks.values()), tuple(lo.rule for lo in s.live_outs)) for s in spans),
        _anchor(gm, plan),
        *_guarded(gm, plan),
        config,
        facts,
        frozenset() if whole else _latents_given(gm, plan, reading.forward),
        whole,
        RELAYS,
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
    """Runs the pipeline over a copy of a captured graph, a `Draft`. An error of ours becomes a plan that refuses.

    Where a pass refuses a span, the other stacks are tried without it.
    """
    gm = with_versions(written_out(gm))
    without: dict[str, Refusal] = {}
    while True:
        made = _rewritten(gm, RewriteContext(config, without), dump)
        refused = {n: r for n, r in made.plan.reasons.items() if r is made.plan.refusal and n not in without}
        if not made.plan.spans or not refused:
            return made
        without |= refused


def _rewritten(gm: fx.GraphModule, context: RewriteContext, dump: Dump | None) -> Rewritten:
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    copied = Draft(gm, graph)
    records: list[PassRecord] = []
    try:
        with no_garbage_collection(), stage("rewrite"):
            records = run_passes(copied, PIPELINE, context, None if dump is None else dump.graph)
            assert context.plan is not None
            if dump is not None:
                dump.report(copied, Explanation.of([context.plan]), records)
    except StageError as error:
        failure = _failure(error, dump)
        found = context.plan or Plan.refused(failure)
        context.plan = Plan.refused(failure, found.roles, found.stacks)
        copied = Draft(gm, gm.graph)
    return Rewritten(copied, context.plan, records)


def _failure(error: StageError, dump: Dump | None) -> Failure:
    failure = Failure.of(error, None if dump is None else dump.folder)
    if dump is not None:
        dump.failure(failure)
    return failure


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
    return forward.latent_like([hinted_shape(v) for v in outputs if isinstance(v, torch.Tensor)])


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


def _guarded(gm: fx.GraphModule, plan: Plan) -> tuple[list[int], list[int]]:
    """Positions of the weights that the graph does not write to: if one of them changes, somebody changed it.

    Apart from them the numbers that the module holds: with dynamic shapes they come as tensors, made at every call.
    """
    inputs = list(gm.graph.find_nodes(op="placeholder"))
    written = written_storages(gm.graph.nodes)
    held = [i for i in plan.roles.weights if is_tensor(inputs[i]) and storage_key(inputs[i]) not in written]
    numbers = [i for i in held if is_number(value_of(inputs[i]))]
    return [i for i in held if i not in numbers], numbers


def _anchor(gm: fx.GraphModule, plan: Plan) -> int | None:
    """Position of the input by which the model is known: the first weight that it has."""
    inputs = list(gm.graph.find_nodes(op="placeholder"))
    parameters = [i for i in plan.roles.weights if isinstance(value_of(inputs[i]), torch.nn.Parameter)]
    return next(iter(parameters or [i for i in plan.roles.weights if is_weight(inputs[i])]), None)
