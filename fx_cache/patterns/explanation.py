"""What was found in a model's graphs, and why it is cached or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fx_cache.errors import Failure, Refusal
from fx_cache.patterns.chains import StackReport
from fx_cache.patterns.graph import value_of
from fx_cache.patterns.relays import RelayPlan
from fx_cache.patterns.spans import Plan

Range = tuple[int, int]


@dataclass(frozen=True)
class StreamExplanation:
    """A tensor at the boundaries of a stack.

    Attributes:
        role: ``"main"`` (carries the latent; its residual is the probe), ``"carried"``, ``"partial"`` (appears or
            ends inside the stack), ``"invariant"`` (read by every block) or ``"long skip"``.
        name: the graph's name of it where it enters the stack.
        shape: sizes, symbols where dynamic.
        dtype: its element type.
    """

    role: str
    name: str
    shape: tuple[str, ...]
    dtype: str


@dataclass(frozen=True)
class StackExplanation:
    """A stack and how it is cut.

    Attributes:
        name: module path of the block list.
        blocks: number of blocks.
        kinds: number of different kinds of blocks, each compiled once.
        pattern: cache-dit's patterns that look like it, and in words; ``custom n->m`` where none does.
        streams: what crosses its block boundaries.
        head, span, tail: block ranges (start, stop); None where the stack is not cached.
        graph: number of the captured graph that holds it; None where each block has graphs of its own.
        reason: why it is not cached; None where it is.
    """

    name: str
    blocks: int
    kinds: int
    pattern: str
    streams: tuple[StreamExplanation, ...]
    head: Range | None
    span: Range | None
    tail: Range | None
    graph: int | None
    reason: str | None


@dataclass(frozen=True)
class Explanation:
    """The answer of :func:`fx_cache.explain`; ``str()`` is for people.

    Attributes:
        stacks: every stack found, in order of execution.
        reason: None if something is cached, else why nothing is.
        spans: for each span, what is stored of each value that goes on behind it: (name, "residual" or "value").
        shares: for each span, the part of the FLOPs that a hit saves, of those of its graph, or of the whole forward
            where it lies over several graphs; None where none were counted.
        invariants: names of the values that are computed once a request.
        inputs: names of the graph's inputs by role, without weights.
        graphs: number of graphs that the forward was captured in.
        estimated: names of the operations whose FLOPs are an estimate.
    """

    stacks: tuple[StackExplanation, ...]
    reason: str | None
    spans: tuple[tuple[tuple[str, str], ...], ...]
    shares: tuple[float | None, ...]
    invariants: tuple[str, ...]
    inputs: dict[str, tuple[str, ...]]
    graphs: int
    estimated: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        plans: Sequence[Plan],
        inputs: dict[str, tuple[str, ...]] | None = None,
        relays: Sequence[RelayPlan] = (),
    ) -> Explanation:
        """Puts together what the analysis found in each of a forward's graphs, and over several of them."""
        stacks = [_stack(r, p, i) for i, p in enumerate(plans) for r in p.stacks] + list(map(_relay, relays))
        shares = (*(span.share for p in plans for span in p.spans), *(r.share for r in relays))
        spans = [tuple((lo.value.name, lo.rule) for lo in span.live_outs) for p in plans for span in p.spans]
        spans += [tuple((_argument(s.name), "residual") for s in r.streams) for r in relays]
        refusals = [p.refusal for p in plans if p.refusal is not None]
        # Of several graphs, one that failed tells most, then the one with a stack.
        told: list[Refusal] = [r for r in refusals if isinstance(r, Failure)]
        told = told or [p.refusal for p in plans if p.refusal is not None and p.stacks] or refusals
        reason = None if spans or not told else str(told[0])
        if not plans:
            reason = "the model: got no captured graph; expected a forward that Dynamo captures; look for graph breaks."
        invariants = tuple(n.name for p in plans for n in p.invariants.kept)
        estimated = tuple(sorted({name for p in plans for name in p.estimated}))
        return cls(tuple(stacks), reason, tuple(spans), shares, invariants, inputs or {}, len(plans), estimated)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.graphs} captured graph(s), {len(self.stacks)} stack(s), {len(self.spans)} span(s)"]
        for stack in self.stacks:
            lines.append(f"stack {stack.name}: {stack.blocks} blocks of {stack.kinds} kind(s), {stack.pattern}")
            if stack.span is not None:
                ranges = [f"{n} blocks[{r[0]}:{r[1]}]" for n in ("head", "span", "tail") if (r := getattr(stack, n))]
                lines.append(f"  {', '.join(ranges)}")
            else:
                lines.append(f"  not cached: {stack.reason}")
            lines += [f"  {s.role}: {s.name} {list(s.shape)} {s.dtype}".replace("'", "") for s in stack.streams]
        for k, span in enumerate(self.spans):
            share = self.shares[k]
            held = "" if share is None else f"holds {share:.1%} of the FLOPs and "
            lines.append(f"span {k} {held}stores " + ", ".join(f"the {rule} of {name}" for name, rule in span))
        if self.estimated:
            lines.append(f"FLOPs estimated by what is read and written: {', '.join(self.estimated)}")
        if self.invariants:
            lines.append(f"computed once a request: {', '.join(self.invariants)}")
        lines += [f"{role}: {', '.join(names)}" for role, names in self.inputs.items() if names]
        if self.inputs and self.reason is None and not self.inputs.get("schedule"):
            lines.append("schedule: none seen; what moves with the latents is learned from the calls")
        lines.append("cached" if self.reason is None else f"not cached: {self.reason}")
        return "\n".join(lines)


def _relay(plan: RelayPlan) -> StackExplanation:
    streams = tuple(
        StreamExplanation("carried" if i else "main", _argument(s.name), tuple(map(str, s.form[0])), str(s.form[1])[6:])
        for i, s in enumerate(plan.streams)
    )
    return StackExplanation(
        plan.name, plan.blocks, 1, "relay: each block in graphs of its own", streams, *plan.ranges, None, None
    )


def _argument(source: str) -> str:
    """``L['hidden_states']`` -> ``hidden_states``."""
    return source.removeprefix("L['").removesuffix("']")


def _stack(report: StackReport, plan: Plan, graph: int) -> StackExplanation:
    streams = report.streams
    described = []
    for i, stream in enumerate(streams.streams):
        node = next(v for v in stream.values if v is not None)
        role = "main" if i == report.main else "carried" if stream.carried else "partial"
        described.append(_value(role, node))
    described += [_value("invariant", n) for n in streams.invariants]
    described += [_value("long skip", n) for n in streams.long_skips]
    name = report.stack.name
    pattern = report.pattern
    text = (
        f"{'/'.join(pattern.cache_dit)}: {pattern.name}"
        if pattern is not None
        else "custom {}->{}".format(*(sum(s.values[i] is not None for s in streams.streams) for i in (0, -1)))
    )
    head, span, tail = next((s.blocks[name] for s in plan.spans if name in s.blocks), (None, None, None))
    reason = None
    if span is None:
        refusal = plan.reasons.get(name, plan.refusal)
        reason = "another stack is the one worth caching" if refusal is None else str(refusal)
    return StackExplanation(
        name, len(report.stack.blocks), len(set(streams.kinds)), text, tuple(described), head, span, tail, graph, reason
    )


def _value(role: str, node: Any) -> StreamExplanation:
    value = value_of(node)
    return StreamExplanation(role, node.name, tuple(map(str, value.shape)), str(value.dtype).removeprefix("torch."))
