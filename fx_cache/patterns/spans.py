"""Plans what is cached: which stacks, where head, span and tail are cut, what is stored for each live-out."""

from __future__ import annotations

import bisect
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import fx

from fx_cache.config import CacheConfig
from fx_cache.errors import Refusal
from fx_cache.patterns.candidates import Candidates, find_candidates
from fx_cache.patterns.chains import Chain, StackReport, read_stacks
from fx_cache.patterns.contexts import find_contexts
from fx_cache.patterns.forms import Form, is_heads, may_be_read
from fx_cache.patterns.graph import (
    draws_random,
    hinted_shape,
    is_scalar,
    is_tensor,
    operation,
    positions,
    same_shape,
    storage_key,
    value_of,
    written_inputs,
)
from fx_cache.patterns.groups import groups_of
from fx_cache.patterns.inputs import InputRoles, classify_inputs, with_controls
from fx_cache.patterns.invariants import Invariants, find_invariants, step_share
from fx_cache.patterns.joins import Carried, carried_from, parts_taken, place_in
from fx_cache.patterns.samples import count_samples
from fx_cache.patterns.sinking import find_side_values, find_sinks, forms_read, made_of
from fx_cache.patterns.work import Work

MIN_SHARE = 0.05
"""The part of a step's FLOPs that a span must hold to be worth a check at every step."""

MIN_OTHER_GAIN = 0.25
"""The part of what a hit still computes that another span must save to be worth a decision of its own."""

MIN_SUNK = 0.02
"""The part of a cached step's work that must be saved by moving it into a span: one more kind of block is compiled."""

Range = tuple[int, int]
Ranges = tuple[Range, Range, Range]


@dataclass(frozen=True)
class LiveOut:
    """A value made in a span and used behind it.

    Attributes:
        value: the node.
        continues: what of the live-ins it carries on: then the residual (out - in) is stored; None: the value is.
    """

    value: fx.Node
    continues: Carried | None

    @property
    def rule(self) -> Literal["residual", "value"]:
        return "value" if self.continues is None else "residual"


@dataclass(frozen=True)
class SpanPlan:
    """One span and its probe.

    Attributes:
        stacks: names of the stacks it lies in.
        head: nodes of the blocks that every step runs before it, from the first block's first node on.
        nodes: the nodes that a hit skips.
        taken: nodes behind them that take the parts of a joined stream that are read there: the span hands on these.
        sinks: nodes before them that only they use: a hit skips these too.
        side: those of them that are computed for others, of none of the streams: no hit skips them.
        probe: (value before the head's blocks, value after them) of the main stream.
        part: where in the second of them the stream lies, if it was joined to others in the head: an index.
        live_outs: what is used behind the span.
        blocks: for each stack, (head, span, tail) block ranges as (start, stop).
        share: the part of the graph's FLOPs that a hit saves; None where none were counted.
        samples: how many samples the probe's rows belong to, a number or a symbol.
        groups: the process groups whose ranks have a part of each sample.
    """

    stacks: tuple[str, ...]
    head: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    taken: tuple[fx.Node, ...]
    sinks: tuple[fx.Node, ...]
    side: frozenset[fx.Node]
    probe: tuple[fx.Node, fx.Node]
    part: tuple[slice, ...] | None
    live_outs: tuple[LiveOut, ...]
    blocks: dict[str, Ranges]
    share: float | None
    samples: Any
    groups: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """Everything the analysis says about one graph.

    Attributes:
        roles: the roles of the graph's inputs.
        stacks: every stack found.
        spans: what is cached, in graph order.
        refusal: why nothing is; None otherwise.
        reasons: for stacks that are not cached, by name, why, where there is more to say than that others are.
        invariants: what is computed once a request.
        estimated: names of the operations whose work is not known, but estimated.
    """

    roles: InputRoles
    stacks: tuple[StackReport, ...]
    spans: tuple[SpanPlan, ...]
    refusal: Refusal | None
    reasons: Mapping[str, Refusal]
    invariants: Invariants
    estimated: tuple[str, ...] = ()

    @classmethod
    def refused(cls, refusal: Refusal, roles: InputRoles | None = None, stacks: Sequence[StackReport] = ()) -> Plan:
        """The plan of a graph of which nothing is cached."""
        roles = InputRoles((), (), (), (), ()) if roles is None else roles
        return cls(roles, tuple(stacks), (), refusal, {}, Invariants())


def plan_spans(graph: fx.Graph, config: CacheConfig, without: Mapping[str, Refusal] | None = None) -> Plan:
    """Reads a graph and says what to cache, or why nothing can be.

    Args:
        graph: a captured forward.
        config: how it is cached.
        without: stacks that are left alone, by name, and why.
    """
    roles = classify_inputs(graph)
    reports = read_stacks(graph, roles)
    if not reports:
        return Plan.refused(_no_stack(graph), roles)
    work = Work(graph)
    candidates = find_candidates(graph, roles, reports, work, without or {})
    roles = candidates.roles
    hoists = config.hoist_invariants and bool(roles.latents)
    step = step_share(graph, roles, work) if hoists else 1.0
    spans, reasons = _choose(graph, candidates, config, work, step)
    if not spans:
        return Plan(roles, tuple(reports), (), next(iter(reasons.values())), reasons, Invariants())
    order = positions(graph)
    spans.sort(key=lambda s: order[s.nodes[0]])
    roles = with_controls(roles, graph, [s.nodes for s in spans], [s.probe[1] for s in spans])
    spans = _with_sinks(graph, spans, work)
    cached = 1.0 - sum(s.share or 0.0 for s in spans)
    skipped = {n for s in spans for n in (*s.nodes, *s.sinks) if n not in s.side}
    invariants = find_invariants(graph, roles, reports, work, skipped, cached) if hoists else Invariants()
    return Plan(roles, tuple(reports), tuple(spans), None, reasons, invariants, tuple(sorted(work.estimated)))


def _choose(
    graph: fx.Graph, candidates: Candidates, config: CacheConfig, work: Work, step: float
) -> tuple[list[SpanPlan], dict[str, Refusal]]:
    """The spans worth a decision each, and for stacks in none of them, by name, why.

    Args:
        graph: a captured forward.
        candidates: its stacks.
        config: how it is cached.
        work: its work.
        step: the part of it that is not done once a request.
    """
    spans: list[SpanPlan] = []
    reasons: dict[str, Refusal] = {}
    order = positions(graph)
    for chain in candidates.chains:
        for group in _groups(chain, config):
            if any(r.stack.name in s.stacks for r in group for s in spans):
                continue
            # In the scope "stack" each stack of the main chain has a decision of its own, as asked for.
            asked = not spans or config.scope == "stack"
            plan = _plan_group(graph, group, config, work)
            if isinstance(plan, SpanPlan):
                plan = _worth_a_decision(plan, spans if not asked else (), candidates, order, step)
            if isinstance(plan, SpanPlan):
                spans.append(plan)
            else:
                reasons |= {r.stack.name: plan for r in group if r.stack.name not in reasons}
    cached = {name for s in spans for name in s.stacks}
    return spans, {n: r for n, r in (reasons | dict(candidates.reasons)).items() if n not in cached}


def _groups(chain: Chain, config: CacheConfig) -> Iterator[Chain]:
    """Stacks that may share a span: all of a chain, and should that be refused ever fewer of them."""
    longest = len(chain) if config.scope == "model" else 1
    for count in range(longest, 0, -1):
        for i in range(len(chain) - count + 1):
            yield chain[i : i + count]


def least_gain(step: float, others: Sequence[float]) -> float:
    """The work that a span must save to be worth a decision, beside others that save this much of a step's."""
    return MIN_OTHER_GAIN * (step - sum(others)) if others else MIN_SHARE * step


def _worth_a_decision(
    plan: SpanPlan, others: Sequence[SpanPlan], candidates: Candidates, order: Mapping[fx.Node, int], step: float
) -> SpanPlan | Refusal:
    """A span as planned if its probe shows what is denoised, and if it saves enough beside the others."""
    where = f"stack {' + '.join(plan.stacks)}"
    begin, end = order[plan.head[0]], order[plan.nodes[-1]]
    left = step - sum(s.share or 0.0 for s in others)
    if candidates.influence is not None and not candidates.influence.of(plan.probe[1]):
        got, expected = (
            "first blocks that do not depend on what is denoised",
            "a head that shows how far that has moved",
        )
        return Refusal(where, got, expected, "choose a larger Fn_compute_blocks")
    unseen = _unseen_stream(plan)
    if unseen is not None:
        return Refusal(
            where,
            f"{unseen.name}, made by its blocks and used behind them, which carries on nothing that they begin with",
            "blocks that carry on what is denoised in one shape",
            "choose Fn_compute_blocks and Bn_compute_blocks so that shapes are equal between them, or run it uncached",
        )
    if any(begin <= order[s.nodes[-1]] and order[s.head[0]] <= end for s in others):
        got, expected = "blocks that run among those of another stack", "one stack after another"
        return Refusal(where, got, expected, "nothing is to be done")
    if plan.share is not None and plan.share < least_gain(step, [s.share or 0.0 for s in others]):
        return Refusal(
            where,
            f"{plan.share:.1%} of the forward's FLOPs in the blocks that a hit would skip, of {left:.1%} without them",
            f"at least {MIN_OTHER_GAIN if others else MIN_SHARE:.0%} of that",
            "choose a smaller Fn_compute_blocks or Bn_compute_blocks, or leave it computed",
        )
    return plan


def _unseen_stream(plan: SpanPlan) -> fx.Node | None:
    """What a span hands on by value that may be the picture, or go into it: it would be what it was.

    Left are keys and values of attention, of which nothing is computed behind the span, beside what is carried on.
    """
    skipped = {*plan.nodes, *plan.taken}
    stream = _form(plan.probe[1])
    carries_on = any(lo.continues is not None for lo in plan.live_outs)
    for node in (lo.value for lo in plan.live_outs if lo.continues is None):
        kept = carries_on and is_heads(_form(node), stream) and not _computed_on(node, skipped)
        if may_be_read(_form(node)) and not kept:
            return node
    return None


def _form(node: fx.Node) -> Form:
    value = value_of(node)
    return hinted_shape(value), value.dtype


_HANDED = {"getitem", "view", "reshape", "transpose", "permute", "flatten", "unflatten", "squeeze", "unsqueeze", "to"}
_HANDED |= {"contiguous", "clone", "detach", "stack", "cat", "concat", "chunk", "split", "unbind", "float"}
"""Operations that hand a value out, and compute nothing of it."""


def _computed_on(value: fx.Node, skipped: Collection[fx.Node]) -> bool:
    """Whether anything is computed of a value behind the nodes that a hit skips."""
    todo, seen = [value], set[fx.Node]()
    while todo:
        for user in todo.pop().users:
            if user in seen or user in skipped:
                continue
            if user.op != "output" and operation(user) not in _HANDED:
                return True
            seen.add(user)
            todo.append(user)
    return False


def _with_sinks(graph: fx.Graph, spans: list[SpanPlan], work: Work) -> list[SpanPlan]:
    nodes = list(graph.nodes)
    order = positions(graph)
    least = MIN_SUNK * (1.0 - sum(s.share or 0.0 for s in spans))
    begin = 0
    found = []
    for span in spans:
        before = nodes[begin : order[span.nodes[0]]]
        begin = order[span.nodes[-1]] + 1
        needed = {*span.probe, *(p for lo in span.live_outs if lo.continues is not None for p in lo.continues.parts)}
        sinks = find_sinks(graph, before, set(span.nodes) - span.side, needed)
        saved = work.share(sinks)
        found.append(replace(span, sinks=sinks, share=(span.share or 0.0) + saved) if saved > least else span)
    return found


def _no_stack(graph: fx.Graph) -> Refusal:
    count = sum(1 for n in graph.nodes if n.op in ("call_function", "call_method"))
    return Refusal(
        "the captured graph",
        f"no stack of repeated blocks among its {count} operations",
        "two or more sibling blocks run one after another in one graph",
        "compile the whole transformer with torch.compile(transformer, backend='dit_cache') instead of single blocks "
        "(regional compile), and look for graph breaks between its blocks",
    )


def _plan_group(graph: fx.Graph, group: Sequence[StackReport], config: CacheConfig, work: Work) -> SpanPlan | Refusal:
    order = positions(graph)
    nodes = list(graph.nodes)
    where = " + ".join(r.stack.name for r in group)
    total = sum(len(r.stack.blocks) for r in group)
    fn, bn = config.Fn_compute_blocks, config.Bn_compute_blocks
    if fn + bn >= total:
        return Refusal(
            f"stack {where}",
            f"Fn_compute_blocks={fn} and Bn_compute_blocks={bn} for {total} blocks",
            f"Fn_compute_blocks + Bn_compute_blocks <= {total - 1}",
            f"set options={{'Fn_compute_blocks': 1}} or another number below {total - bn}",
        )
    start_at, end_at = _boundary(group, fn, from_end=False), _boundary(group, total - bn, from_end=True)
    start = group[start_at[0]].streams.starts[start_at[1]]
    end = group[end_at[0]].streams.end(end_at[1])
    first = group[0].streams.starts[0]
    head, span = tuple(nodes[first:start]), tuple(nodes[start:end])

    probe = _probe(graph, group, start_at)
    if isinstance(probe, Refusal):
        return probe
    cuts = [order[b.nodes[0]] for r in group for b in r.stack.blocks]
    cuts += [order[b.nodes[-1]] + 1 for r in group for b in r.stack.blocks]
    split = _split_context(graph, (first, start, end, *cuts), where)
    if split is not None:
        return split
    random = next((n for n in span if draws_random(n)), None)
    if random is not None:
        return random_refusal(where, random.name)
    parted = _parted(nodes, (first, start, end, *cuts), where)
    if parted is not None:
        return parted
    # What else is handed on from block to block, and is made of the main stream nowhere, may be made of the time.
    varying = made_of(graph, probe[0][0])
    live = [n for n in span if is_tensor(n) and n in varying and any(order[u] >= end for u in n.users)]
    live_outs, taken = [], []
    for node in live:
        continued = _carried_on(graph, group, node, start_at, end_at)
        parts = parts_taken(nodes, node, end) if continued is not None and continued.form is not None else []
        taken += parts
        handed = [n for n in parts if is_tensor(n)]
        live_outs += [LiveOut(n, _carried_on(graph, group, n, start_at, end_at)) for n in handed]
        live_outs += [] if handed else [LiveOut(node, continued)]
    if not live_outs:
        return Refusal(f"stack {where}", "no value that is used behind the blocks", "a stream that goes on", "nothing")
    written = _outer_writes(nodes, start, end, where)
    if written is not None:
        return written
    side = find_side_values((*span, *taken), {lo.value for lo in live_outs}, varying)
    unlike = next((f for _, f in forms_read(side, varying) if not is_tensor(f) or not same_shape(f, probe[0][1])), None)
    if unlike is not None:
        return Refusal(
            f"stack {where}",
            f"a value made inside blocks, of none of their streams, in the form of {unlike.name}, and used behind them",
            "values in the form of what the blocks begin with",
            "compute it before the blocks",
        )
    share = work.share(n for n in span if n not in side) if work.total else None
    blocks = _ranges(group, fn, total - bn)
    samples = count_samples(graph, probe[0][1])
    names = tuple(r.stack.name for r in group)
    groups = groups_of((*head, *span))
    return SpanPlan(
        names, head, span, tuple(taken), (), frozenset(side), *probe, tuple(live_outs), blocks, share, samples, groups
    )


def _carried_on(
    graph: fx.Graph, group: Sequence[StackReport], value: fx.Node, start_at: tuple[int, int], end_at: tuple[int, int]
) -> Carried | None:
    """What a value carries on of what a span begins with, behind it or behind a block within; None: of nothing."""
    found = carried_from(graph, group, end_at, value, start_at)
    if found is not None:
        return found
    within = (
        carried_from(graph, group, (k, boundary), on_its_way, start_at)
        for k, report in enumerate(group)
        for stream in report.streams.streams
        for boundary, on_its_way in enumerate(stream.values)
        if on_its_way is not None
        and start_at < (k, boundary) <= end_at
        and value in (on_its_way, report.streams.given(boundary, stream))
    )
    return next(within, None)


def _boundary(group: Sequence[StackReport], blocks: int, *, from_end: bool) -> tuple[int, int]:
    """(stack of the group, boundary in it) behind `blocks` blocks; at a joint, the side with the glue in the span."""
    for k, report in enumerate(group):
        count = len(report.stack.blocks)
        if blocks < count or (blocks == count and (k == len(group) - 1 or not from_end)):
            return k, blocks
        blocks -= count
    raise AssertionError("more blocks than the group has")


def _ranges(group: Sequence[StackReport], start: int, end: int) -> dict[str, Ranges]:
    """For each stack, the blocks of head, span and tail, for a span from block `start` to block `end` of the group."""
    ranges: dict[str, Ranges] = {}
    offset = 0
    for report in group:
        count = len(report.stack.blocks)
        a, b = (min(max(x - offset, 0), count) for x in (start, end))
        ranges[report.stack.name] = ((0, a), (a, b), (b, count))
        offset += count
    return ranges


def _probe(
    graph: fx.Graph, group: Sequence[StackReport], at: tuple[int, int]
) -> tuple[tuple[fx.Node, fx.Node], tuple[slice, ...] | None] | Refusal:
    """The main stream's values before and after the head's blocks, and where in the latter it lies if it was joined."""
    main, first = _main(group[at[0]], at[1]), _main(group[0], 0)
    before = None if main is None else carried_from(graph, group, at, main, (0, 0))
    part = None if before is None or first is None else place_in(before, first)
    if main is None or before is None or first is None or (before.form is not None and part is None):
        return Refusal(
            f"stack {group[0].stack.name}",
            "no tensor of one shape carried through its first blocks",
            "a stream that keeps its shape from block to block",
            "choose another Fn_compute_blocks, or leave this model uncached",
        )
    return (before.parts[0] if part is None else first, main), part


def _main(report: StackReport, boundary: int) -> fx.Node | None:
    return None if report.main is None else report.streams.streams[report.main].values[boundary]


def _split_context(graph: fx.Graph, cuts: tuple[int, ...], where: str) -> Refusal | None:
    """A context manager entered on one side of a cut and left on the other."""
    for first, last in find_contexts(graph):
        if any(first < cut <= last for cut in cuts):
            return Refusal(
                f"stack {where}",
                f"a context ({list(graph.nodes)[first].name}) entered before and left after a cut",
                "contexts such as autocast entered and left within one block, or around the whole model call",
                "move the context around the call of the compiled model",
            )
    return None


def random_refusal(where: str, name: str) -> Refusal:
    """A span that draws random numbers: a hit would draw none, and shift all that are drawn behind it."""
    return Refusal(
        f"stack {where}",
        f"{name}, which draws random numbers in the blocks",
        "blocks that compute the same from the same inputs",
        "switch dropout off by model.eval(), or hand the random numbers in",
    )


def _parted(nodes: list[fx.Node], cuts: tuple[int, ...], where: str) -> Refusal | None:
    """A value that can neither be handed over a cut nor be computed again behind it."""
    order = {n: i for i, n in enumerate(nodes)}
    at = sorted(set(cuts))
    for node in nodes:
        if node.op not in ("call_function", "call_method") or is_tensor(node) or is_scalar(node) or not node.users:
            continue
        last = max(order[u] for u in node.users)
        if bisect.bisect_right(at, order[node]) != bisect.bisect_right(at, last):
            return Refusal(
                f"stack {where}",
                f"{node.name}, a value of type {type(value_of(node)).__name__}, made before a cut and used behind it",
                "tensors and numbers",
                "keep such values within one block, or make them of tensors",
            )
    return None


def _outer_writes(nodes: list[fx.Node], start: int, end: int, where: str) -> Refusal | None:
    """A span that writes in place to what somebody outside it sees, beyond a stream it takes over.

    And one that hands on two views of one tensor, to which somebody writes behind it: from a cache they come apart.
    """
    order = {n: i for i, n in enumerate(nodes)}
    holders: dict[int, list[fx.Node]] = {}
    for node in nodes:
        key = storage_key(node)
        if key is not None:
            holders.setdefault(key, []).append(node)
    for node in nodes[start:]:
        for target in written_inputs(node):
            held = holders.get(storage_key(target) or -1, [])
            if order[node] < end:
                seen = [o for o in held if o.op in ("placeholder", "get_attr")]
            else:
                crossing = [o for o in held if order[o] < end and any(order[u] >= end for u in o.users)]
                inside = any(order[o] >= start for o in crossing)
                seen = crossing if inside and len(crossing) > 1 else []
            if seen:
                return Refusal(
                    f"stack {where}",
                    f"a write in place ({node.format_node()}) to {seen[0].name}, which is seen outside the span",
                    "blocks that write only to tensors of their own",
                    "replace the write in place by an operation that returns a new tensor",
                )
    return None
