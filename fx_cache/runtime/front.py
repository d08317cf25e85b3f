"""What a forward in several graphs has run before a span of it: a span may be reused behind the same alone."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
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
OTHER_NUMBERS = "code before the span was given another number, or weights changed, and not at every step"


class Strangers:
    """The tensors that a call was given and that neither the user nor a graph has made, but for weights and numbers.

    Code between graphs has made them at this forward, or somebody holds them: then they are looked at. Somebody does if
    they outlive the forward, or if by that name another forward was given the very same.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """
        Args:
            tensors: by name.
        """
        self._given = {name: (StorageWeakRef(t.untyped_storage()), memory_of(t)) for name, t in tensors.items()}
        self._kept = self._given
        self._held: frozenset[str] = frozenset()

    def same(self, now: Strangers) -> bool:
        """Whether another forward's call is given those that are looked at; to be asked when this forward is over.

        Each then knows what this one knows to be held.
        """
        kept = self._kept
        same = all(not s.expired() and n in now._given and now._given[n][1] == m for n, (s, m) in kept.items())
        if same:
            self._held |= kept.keys()
        now._held |= self._held
        return same and self._given.keys() == now._given.keys()

    def over(self) -> None:
        """The forward has returned: what has not outlived it was made in it."""
        self._kept = {n: of for n, of in self._given.items() if n in self._held or not of[0].expired()}


Numbers = Mapping[tuple[int, str], float]
"""Numbers that calls were given: the call, and the name."""


class Before(Protocol):
    """A call before a span, as far as what comes behind it may depend on that."""

    def differs(self, now: Any) -> str | None:
        """Why another forward's call at its place may make something else; None: it does not."""

    def over(self) -> None:
        """The forward that made the call has returned: what has not outlived it was made in it."""


@dataclass(eq=False)
class _Call:
    """One call before a span, or the one whose graph holds it.

    Attributes:
        computes: what its graph does.
        held: what it was given that is held outside the forward, weights among it.
        strangers: what code between graphs has given it.
    """

    computes: Hashable
    held: Held
    strangers: Strangers

    def differs(self, now: Any) -> str | None:
        if not isinstance(now, _Call):
            return OTHER_CALLS
        same = self.strangers.same(now.strangers)
        if self.computes != now.computes:
            return OTHER_CALLS
        if not self.held.equals(now.held):
            return CHANGED
        return None if same else OTHER_TENSORS

    def over(self) -> None:
        self.strangers.over()


class Front:
    """The calls before a span: of which code, what their graphs compute, and for what that is held outside the forward.

    What code between the graphs has made of the user's inputs is none of it, and neither is what he gives.

    Attributes:
        time: who the inputs are that tell it.
    """

    def __init__(
        self,
        calls: Sequence[tuple[Hashable, Before]] = (),
        numbers: Numbers | None = None,
        time: tuple[Hashable, ...] = (),
        weights: Sequence[torch.Tensor] = (),
    ) -> None:
        """
        Args:
            calls: of which code, and what is known of each.
            numbers: those that code between graphs has given to them.
            time: see above.
            weights: those of the model, also of code between graphs, as they are now.
        """
        self.time = time
        self._calls = [*calls]
        self._numbers = dict(numbers or {})
        self._weights = Held(weights)
        self._made: list[Before] = []

    def add(self, forward: Forward, facts: GraphFacts, family: Hashable, args: Sequence[Any]) -> None:
        """Takes notice of a call that is about to run.

        Args:
            forward: what it is a call of.
            facts: the graph.
            family: the code that it was captured from.
            args: what it is given.
        """
        scalars = [i for i in facts.roles.scalars if is_held(facts.names[i])]
        held = weights_of_call(facts, args) + held_by(forward, facts, args)
        self._numbers |= {(len(self._calls), name): n for name, n in strange_numbers(forward, facts, args).items()}
        self.passed(family, _Call(facts.program.at(args, scalars), _held(held), strangers(forward, facts, args)))

    def passed(self, family: Hashable, call: Before, *, reused: bool = False) -> None:
        """Takes notice of a call of which somebody else knows more; `reused`: it is one of another forward."""
        self._calls.append((family, call))
        self._made += [] if reused else [call]

    def over(self) -> None:
        """The forward has returned."""
        for call in self._made:
            call.over()

    def so_far(self, time: tuple[Hashable, ...], weights: Sequence[torch.Tensor] = ()) -> Front:
        """The calls until now, at this time, for these weights of the model, where nobody else looks at them."""
        return Front(self._calls, self._numbers, time, weights)

    def moved(self, now: Front) -> frozenset[Hashable] | None:
        """What is another number, or weight, than in front of another forward's span; None: not as many weights."""
        then, weights = self._numbers, self._weights.different(now._weights)
        if weights is None:
            return None
        numbers = (name for name in {*then, *now._numbers} if then.get(name) != now._numbers.get(name))
        return frozenset(numbers) | weights

    def differs(self, now: Front) -> str | None:
        """Why what comes behind another forward's calls may be something else, but for what has `moved`; None: not."""
        if [family for family, _ in self._calls] != [family for family, _ in now._calls]:
            return OTHER_CALLS
        # All of them, since each tells the other one what it knows.
        found = [before.differs(call) for (_, before), (_, call) in zip(self._calls, now._calls, strict=True)]
        return next((why for why in found if why is not None), None)


class Paces:
    """Which numbers that code between graphs has made are the time, or made of it: those that move whenever that does.

    So may what is set anew in front of every step, or counts calls, a weight of the model as well; whoever reads that
    reads something else at every step anyway. The first move is no evidence.
    """

    def __init__(self) -> None:
        self._last: Front | None = None
        self._moving: frozenset[Hashable] | None = None

    def changed(self, then: Front, now: Front) -> bool:
        """Whether anything else is another one than at another step of the request; to be asked before `went_on`."""
        changed = then.moved(now)
        moved = None if self._last is None else self._last.moved(now)
        if not changed or moved is None or self._moving is None:
            return changed is None or bool(changed)
        return not changed <= (self._moving & moved if self._time_moves(now) else self._moving - moved)

    def went_on(self, now: Front) -> None:
        """Another step of the request had this in front of its span."""
        if self._last is not None and self._time_moves(now):
            moved = self._last.moved(now)
            self._moving = moved if moved is None or self._moving is None else self._moving & moved
        self._last = now

    def _time_moves(self, now: Front) -> bool:
        """Whether it is another time than at the last step; where none is known, it is."""
        return not now.time or self._last is None or now.time != self._last.time


def _held(values: Sequence[torch.Tensor]) -> Held:
    return Held(without_numbers(values), identity_key([a for a in values if is_number(a)]))


def held_by(forward: Forward, facts: GraphFacts, args: Sequence[Any]) -> list[torch.Tensor]:
    """What a graph is given that is held outside the forward and that it does not write to itself, but for weights."""
    return [a for i in facts.held if isinstance(a := args[i], torch.Tensor) and not forward.knows(a)]


def weights_of_call(facts: GraphFacts, args: Sequence[Any]) -> list[torch.Tensor]:
    """The weights that a graph is given and does not write to itself."""
    return [a for i in facts.weights if isinstance(a := args[i], torch.Tensor)]


def without_numbers(held: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What is held, but for numbers: those are made at every call, and known by their value."""
    return [a for a in held if not is_number(a)]


def strangers(forward: Forward, facts: GraphFacts, args: Sequence[Any]) -> Strangers:
    """Those of a call that is about to run."""
    given = ((facts.names[i], args[i]) for i in facts.given)
    return Strangers(
        {n: a for n, a in given if stored(a) and not (forward.knows(a) or is_held(n) or as_number(a) is not None)}
    )


def strange_numbers(forward: Forward, facts: GraphFacts, args: Sequence[Any]) -> dict[str, float]:
    """The numbers, by name, that are not the time as the user gives it, and that no object or global holds."""
    given = ((facts.names[i], as_number(args[i])) for i in facts.given)
    return {n: number for n, number in given if not (number is None or is_held(n) or forward.is_time(number))}
