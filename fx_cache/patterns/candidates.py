"""Which stacks the denoised input goes through, and in which order they are tried: no other is worth a decision.

A text encoder within the forward computes the same at every step, and a side network that sees only the timestep shows
nothing of the latent, however much work they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from fx_cache.errors import Refusal
from fx_cache.patterns.chains import Chain, StackReport, chains
from fx_cache.patterns.graph import value_of
from fx_cache.patterns.inputs import InputRoles, with_latents_from
from fx_cache.patterns.values import form_inputs
from fx_cache.patterns.work import Work


class Influence:
    """Which of some inputs the value of each node depends on, as the bits of a number."""

    def __init__(self, graph: fx.Graph, inputs: Sequence[fx.Node]) -> None:
        self._bits = {n: 1 << i for i, n in enumerate(inputs)}
        for node in graph.nodes:
            if node.op == "placeholder":
                continue
            form = form_inputs(node)
            found = 0
            for a in node.all_input_nodes:
                found |= 0 if a in form else self._bits.get(a, 0)
            if found:
                self._bits[node] = found

    def of(self, node: fx.Node | None) -> int:
        """The inputs that a node's value is made from; 0: none of them."""
        return 0 if node is None else self._bits.get(node, 0)

    def of_stack(self, report: StackReport) -> int:
        """The inputs that what a stack hands on is made from, of its main stream if it has one."""
        streams = report.streams.streams if report.main is None else [report.streams.streams[report.main]]
        ends = [next((v for v in reversed(s.values) if v is not None), None) for s in streams]
        found = 0
        for node in ends or report.stack.blocks[-1].nodes:
            found |= self.of(node)
        return found


@dataclass(frozen=True)
class Candidates:
    """The stacks that may be cached.

    Attributes:
        roles: the roles of the graph's inputs, with latents that only the stacks show.
        chains: adjacent stacks, in the order in which they are tried.
        influence: what depends on inputs that are or may be denoised; None where no input may be.
        reasons: for every other stack, by name, why not.
    """

    roles: InputRoles
    chains: tuple[Chain, ...]
    influence: Influence | None
    reasons: Mapping[str, Refusal]


def find_candidates(
    graph: fx.Graph, roles: InputRoles, reports: Sequence[StackReport], work: Work, without: Mapping[str, Refusal]
) -> Candidates:
    """Those stacks that depend on a latent, or where none is known on what may be one, most work first.

    Where it is in doubt which input is denoised, first the chains that see all of what others see and more: a text
    encoder does not see the image, but the blocks that it works for see both.

    Args:
        graph: a captured forward.
        roles: the roles of its inputs.
        reports: its stacks.
        work: its work.
        without: stacks that are not to be tried, by name, and why.
    """
    inputs = list(graph.find_nodes(op="placeholder"))
    latents, rivals = _latents_and_rivals(inputs, roles)
    influence = Influence(graph, latents + rivals)
    left = [r for r in reports if r.stack.name not in without]
    if not latents + rivals:
        return Candidates(roles, tuple(chains(graph, left, work)), None, without)
    ordered = chains(graph, [r for r in left if influence.of_stack(r)], work)
    if rivals:
        seen = [_seen(influence, c) for c in ordered]
        partial = [any(mine != other and mine & other == mine for other in seen) for mine in seen]
        whole = [c for c, part in zip(ordered, partial, strict=True) if not part]
        ordered = whole + [c for c, part in zip(ordered, partial, strict=True) if part]
        roles = next((r for c in whole if (r := _with_latents(roles, graph, c)).latents), roles)
    # What depends on no latent may be computed once a request: there would be nothing left of a span.
    known = Influence(graph, [inputs[i] for i in roles.latents]) if roles.latents else influence
    ordered = [kept for c in ordered if (kept := [r for r in c if known.of_stack(r)])]
    chosen = {r.stack.name for c in ordered for r in c}
    names = ", ".join(inputs[i].name for i in roles.latents) or "any input that may be denoised"
    apart = {r.stack.name: _apart(r.stack.name, names) for r in left if not known.of_stack(r)}
    reasons = {**without, **{name: reason for name, reason in apart.items() if name not in chosen}}
    return Candidates(roles, tuple(ordered), influence if latents else known, reasons)


def _latents_and_rivals(inputs: Sequence[fx.Node], roles: InputRoles) -> tuple[list[fx.Node], list[fx.Node]]:
    """The latents as far as the graph shows them, and other inputs that may be denoised instead.

    These are the ones of a latent's shape; where no latent is known, all that hold numbers with a fraction, or failing
    that any numbers.
    """
    latents = [inputs[i] for i in roles.latents]
    others = [inputs[i] for i in roles.conditioning]
    floating = [n for n in others if value_of(n).is_floating_point()]
    if not latents:
        return [], floating or others
    shapes = {_shape(n) for n in latents}
    return latents, [n for n in floating if _shape(n) in shapes]


def _shape(node: fx.Node) -> tuple[str, ...]:
    return tuple(map(str, value_of(node).shape))


def _seen(influence: Influence, chain: Chain) -> int:
    found = 0
    for report in chain:
        found |= influence.of_stack(report)
    return found


def _with_latents(roles: InputRoles, graph: fx.Graph, chain: Chain) -> InputRoles:
    streams = [r.streams.streams[r.main].values[0] for r in chain if r.main is not None]
    return with_latents_from(roles, graph, [s for s in streams[:1] if s is not None])


def _apart(name: str, latents: str) -> Refusal:
    return Refusal(
        f"stack {name}",
        f"blocks that do not depend on {latents}",
        "blocks that what is denoised goes through",
        "nothing is to be done: what depends on the conditioning alone is computed once a request",
    )
