"""What a forward in several graphs has run before a span of it: a span may be reused behind the same alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from fx_cache.patterns.calls import GraphFacts, is_held
from fx_cache.runtime.identity import as_number, identity_key, memory_of, stored
from fx_cache.runtime.weights import CHANGED, Given, is_number

if TYPE_CHECKING:
    from fx_cache.runtime.forwards import Forward

OTHER_TENSORS = "code before the span was given another tensor that is held somewhere"
OTHER_CALLS = "other code was called before the span, or where it begins"


Lasting = dict[str, tuple[StorageWeakRef, Hashable]]
"""Tensors by name: their storage, and which view of it, in which version."""


@dataclass(eq=False)
class _Before:
    """One call before a span.

    Attributes:
        computes: what its graph does; None: it is in a span.
        held: what it was given that is held outside the forward; None where somebody else looks at that.
        lasting: tensors that code between graphs has given it: those that outlive the forward.
    """

    computes: Hashable
    held: Given | None = None
    lasting: Lasting = field(default_factory=dict)

    def differs(self, now: _Before) -> str | None:
        if self.computes != now.computes:
            return OTHER_CALLS
        if self.held is not None and now.held is not None and not self.held.equals(now.held):
            return CHANGED
        lasting = self.lasting  # once: the forward that it is of may be over meanwhile
        given = now.lasting
        same = all(not s.expired() and name in given and given[name][1] == m for name, (s, m) in lasting.items())
        return None if same else OTHER_TENSORS


class Front:
    """The calls before a span: of which code, what their graphs compute, and for what that is held outside the forward.

    What code between the graphs has made of the user's inputs is none of it, and neither are numbers that he gives.
    """

    def __init__(self) -> None:
        self._counts: Counter[Hashable] = Counter()
        self._calls: dict[Hashable, _Before] = {}

    def add(
        self, forward: Forward, facts: GraphFacts, family: Hashable, args: Sequence[Any], *, weights: bool = True
    ) -> None:
        """Takes notice of a call.

        Args:
            forward: what it is a call of.
            facts: the graph.
            family: the code that it was captured from.
            args: what it is given.
            weights: whether to look at what is held; else somebody else does.
        """
        scalars = [i for i in facts.roles.scalars if args[i] not in forward.counts]
        before = _Before(facts.program.at(args, scalars), lasting=strangers(forward, facts, args))
        if weights:
            held = held_by(forward, facts, args)
            before.held = Given(without_numbers(held), identity_key([a for a in held if is_number(a)]))
        self._add(family, before)

    def passed(self, family: Hashable) -> None:
        """Takes notice of a call in a span, of which more is looked at there."""
        self._add(family, _Before(None))

    def _add(self, family: Hashable, before: _Before) -> None:
        self._counts[family] += 1
        self._calls[family, self._counts[family]] = before

    def over(self) -> None:
        """The forward is over: what has not outlived it was made in it."""
        for call in self._calls.values():
            call.lasting = {name: kept for name, kept in call.lasting.items() if not kept[0].expired()}

    def so_far(self) -> Front:
        """The calls until now."""
        copy = Front()
        copy._calls = dict(self._calls)
        return copy

    def differs(self, now: Front) -> str | None:
        """Why what comes behind the calls of another forward may be something else; None: they were the same."""
        if self._calls.keys() != now._calls.keys():
            return OTHER_CALLS
        found = (before.differs(now._calls[call]) for call, before in self._calls.items())
        return next((why for why in found if why is not None), None)


def held_by(forward: Forward, facts: GraphFacts, args: Sequence[Any]) -> list[torch.Tensor]:
    """The weights that a graph is given and does not write to itself, and other tensors that are held outside the
    forward, in the order of their names."""
    held = {i for i, name in enumerate(facts.names) if is_held(name) and not forward.knows(args[i])}
    kept = sorted(held.union(facts.roles.weights).difference(facts.written), key=facts.names.__getitem__)
    return [a for i in kept if isinstance(a := args[i], torch.Tensor)]


def without_numbers(held: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What is held, but for numbers: those are made at every call, and known by their value."""
    return [a for a in held if not is_number(a)]


def strangers(forward: Forward, facts: GraphFacts, args: Sequence[Any]) -> Lasting:
    """The tensors that neither the user nor a graph has made, but for weights and numbers."""
    given = ((facts.names[i], a) for i, a in enumerate(args) if i not in facts.roles.weights)
    return {
        name: (StorageWeakRef(a.untyped_storage()), memory_of(a))
        for name, a in given
        if stored(a) and not (forward.knows(a) or is_held(name) or as_number(a) is not None)
    }
