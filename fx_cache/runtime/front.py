"""What a forward in several graphs has run before a span of it: a span may be reused behind the same alone."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from fx_cache.patterns.calls import GraphFacts, is_held
from fx_cache.runtime.identity import as_number, identity_key, memory_of, stored
from fx_cache.runtime.weights import CHANGED, Held, is_number

if TYPE_CHECKING:
    from fx_cache.runtime.forwards import Forward

OTHER_TENSORS = "code before the span was given another tensor that is held somewhere"
OTHER_CALLS = "other code was called before the span, or where it begins"


Lasting = dict[str, tuple[StorageWeakRef, Hashable]]
"""Tensors by name: their storage, and which view of it, in which version."""


class Before(Protocol):
    """A call before a span, as far as what comes behind it may depend on that."""

    def differs(self, now: Any) -> str | None:
        """Why another forward's call at its place may make something else; None: it does not."""

    def over(self) -> None:
        """The forward is over: what has not outlived it was made in it."""


@dataclass(eq=False)
class _Call:
    """One call in front of all spans, or between two.

    Attributes:
        computes: what its graph does.
        held: what it was given that is held outside the forward, but for weights.
        weights: these; None where somebody else looks at them.
        lasting: tensors that code between graphs has given it: those that outlive the forward.
    """

    computes: Hashable
    held: Held
    weights: Held | None
    lasting: Lasting

    def differs(self, now: Any) -> str | None:
        if not isinstance(now, _Call) or self.computes != now.computes:
            return OTHER_CALLS
        weights = self.weights is not None and now.weights is not None and not self.weights.equals(now.weights)
        if weights or not self.held.equals(now.held):
            return CHANGED
        return None if lasts(self.lasting, now.lasting) else OTHER_TENSORS

    def over(self) -> None:
        self.lasting = lasting_of(self.lasting)


class Front:
    """The calls before a span: of which code, what their graphs compute, and for what that is held outside the forward.

    What code between the graphs has made of the user's inputs is none of it, and neither are numbers that come from
    there, or that he gives.
    """

    def __init__(self, calls: Sequence[tuple[Hashable, Before]] = ()) -> None:
        self._calls = [*calls]

    def add(
        self, forward: Forward, facts: GraphFacts, family: Hashable, args: Sequence[Any], *, weights: bool = True
    ) -> None:
        """Takes notice of a call that is about to run.

        Args:
            forward: what it is a call of.
            facts: the graph.
            family: the code that it was captured from.
            args: what it is given.
            weights: whether to look at its weights; else somebody else does.
        """
        scalars = [i for i in facts.roles.scalars if is_held(facts.names[i])]
        held, own = held_by(forward, facts, args), weights_of_call(facts, args) if weights else []
        call = _Call(
            facts.program.at(args, scalars),
            _held(held),
            _held(own) if weights else None,
            strangers(forward, facts, args),
        )
        self.passed(family, call)

    def passed(self, family: Hashable, call: Before) -> None:
        """Takes notice of a call of which somebody else knows more."""
        self._calls.append((family, call))

    def over(self) -> None:
        """The forward is over."""
        for _, call in self._calls:
            call.over()

    def so_far(self) -> Front:
        """The calls until now."""
        return Front(self._calls)

    def differs(self, now: Front) -> str | None:
        """Why what comes behind the calls of another forward may be something else; None: they were the same."""
        if [family for family, _ in self._calls] != [family for family, _ in now._calls]:
            return OTHER_CALLS
        found = (before.differs(call) for (_, before), (_, call) in zip(self._calls, now._calls, strict=True))
        return next((why for why in found if why is not None), None)


def _held(values: Sequence[torch.Tensor]) -> Held:
    return Held(without_numbers(values), identity_key([a for a in values if is_number(a)]))


def lasts(lasting: Lasting, now: Lasting) -> bool:
    """Whether tensors that outlived a forward are those that another one is given by the same names."""
    return all(not s.expired() and name in now and now[name][1] == m for name, (s, m) in lasting.items())


def lasting_of(tensors: Lasting) -> Lasting:
    """Those of a forward's tensors that are still there when it is over."""
    return {name: kept for name, kept in tensors.items() if not kept[0].expired()}


def held_by(forward: Forward, facts: GraphFacts, args: Sequence[Any]) -> list[torch.Tensor]:
    """What a graph is given that is held outside the forward and that it does not write to itself, but for weights."""
    return [a for i in facts.held if isinstance(a := args[i], torch.Tensor) and not forward.knows(a)]


def weights_of_call(facts: GraphFacts, args: Sequence[Any]) -> list[torch.Tensor]:
    """The weights that a graph is given and does not write to itself."""
    return [a for i in facts.weights if isinstance(a := args[i], torch.Tensor)]


def without_numbers(held: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What is held, but for numbers: those are made at every call, and known by their value."""
    return [a for a in held if not is_number(a)]


def strangers(forward: Forward, facts: GraphFacts, args: Sequence[Any]) -> Lasting:
    """The tensors that neither the user nor a graph has made, but for weights and numbers."""
    given = ((facts.names[i], args[i]) for i in facts.given)
    return {
        name: (StorageWeakRef(a.untyped_storage()), memory_of(a))
        for name, a in given
        if stored(a) and not (forward.knows(a) or is_held(name) or as_number(a) is not None)
    }
