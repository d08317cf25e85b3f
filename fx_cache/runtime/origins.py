"""Where the inputs of a graph come from, in a forward that was captured in several graphs.

After a graph break, what one graph made is the input of the next, and is a new tensor at every call, whatever it holds.
So each graph without a stack leaves a note on its outputs: what came into the forward from outside, from which they
were made. The graph with the stack tells requests and branches apart by that.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from fx_cache.patterns.inputs import InputRoles, differs_in_channels
from fx_cache.runtime.identity import StorageHold, identity_key, signature

Source = tuple[str, int]
"""An input from outside: the digest of the graph that took it, and its position there."""


@dataclass(frozen=True)
class Outer:
    """What came into a forward from outside, as one input of one of its graphs.

    Attributes:
        source: which input it is; the same at every call.
        identity: who it is at this call.
        form: its shape, dtype and device.
        hold: keeps the identity meaningful.
        schedule: the tensor itself if it is a timestep or the like, else None.
        call: number of the call that took it; larger for later ones.
    """

    source: Source
    identity: Hashable
    form: tuple[Any, ...]
    hold: StorageHold
    schedule: torch.Tensor | None
    call: int

    def has_shape(self, shape: Sequence[str]) -> bool:
        """Whether it is a tensor of that shape, or differs from it in channels only."""
        mine = [str(size) for size in self.form[0][0]] if self.form else []
        return mine == list(shape) or differs_in_channels(mine, shape)


@dataclass(frozen=True)
class Note:
    """What is known of one tensor between two graphs.

    Attributes:
        outer: everything from outside that its graph had.
        tokens: the inputs from outside whose tokens it holds.
    """

    outer: tuple[Outer, ...]
    tokens: frozenset[Source]


_NOTHING: tuple[None, int, None] = (None, 0, None)


class Origins:
    """The notes on all tensors that are on their way from one graph to the next."""

    def __init__(self) -> None:
        self._notes: dict[int, tuple[StorageWeakRef, int, Note]] = {}

    def of(self, value: Any) -> Note | None:
        """The note on a tensor, if it was made by an earlier graph and nobody wrote to it since."""
        if not self._notes or not isinstance(value, torch.Tensor) or value.is_inference():
            return None
        reference, version, note = self._notes.get(value.untyped_storage()._cdata, _NOTHING)
        return None if reference is None or reference.expired() or value._version != version else note

    def put(self, value: torch.Tensor, note: Note) -> None:
        """Notes where a tensor comes from; not in inference mode, where writes to it could not be seen."""
        if not value.is_inference():
            storage = value.untyped_storage()
            self._notes[storage._cdata] = (StorageWeakRef(storage), value._version, note)

    def purge(self) -> None:
        """Forgets tensors that are gone."""
        for key in [k for k, (reference, _, _) in self._notes.items() if reference.expired()]:
            del self._notes[key]


origins = Origins()
_calls = itertools.count()


@dataclass(frozen=True)
class Control:
    """Who some inputs are that feed only a span."""

    identity: Hashable
    hold: StorageHold

    def same(self, other: Control | None) -> bool:
        """Whether these are the inputs `other` was, with the same content."""
        return other is not None and not other.hold.expired() and self.identity == other.identity


@dataclass(frozen=True)
class Given:
    """What a forward was given, as far as requests and branches are told apart by it.

    Attributes:
        identity: who its conditioning is, but for what feeds only spans.
        controls: for each span, who the inputs are that feed only it, and what keeps that meaningful.
        form: shapes, dtypes and devices of everything.
        schedule: timestep and the like.
        hold: makes what keeps the identity meaningful.
    """

    identity: Hashable
    controls: tuple[Control, ...]
    form: Hashable
    schedule: list[torch.Tensor]
    hold: Callable[[], StorageHold]


def read_given(program: str, roles: InputRoles, latents: Collection[Source], args: Sequence[Any]) -> Given:
    """Reads the inputs of a call.

    Args:
        program: digest of the graph that is called.
        roles: the roles of `args`.
        latents: inputs of earlier graphs of the forward that are denoised.
        args: the graph's inputs.
    """
    form = signature([args[i] for i in (*roles.latents, *roles.schedule, *roles.conditioning)])
    alone = {i for of_span in roles.controls for i in of_span}
    if not any(origins.of(args[i]) for i in (*roles.latents, *roles.schedule, *roles.conditioning)):
        fixed = [args[i] for i in (*roles.conditioning, *roles.scalars) if i not in alone]
        controls = tuple(_control([args[i] for i in of_span]) for of_span in roles.controls)
        schedule = [args[i] for i in roles.schedule]
        return Given(identity_key(fixed), controls, form, schedule, lambda: StorageHold(fixed))
    outer = outer_inputs(program, roles, args)
    held = [o for o in outer if o.schedule is None and o.source not in latents]
    return Given(
        tuple((o.source, o.identity) for o in held),
        tuple(_control([]) for _ in roles.controls),
        (form, tuple((o.source, o.form) for o in outer)),
        [o.schedule for o in outer if o.schedule is not None],
        lambda: StorageHold((), [o.hold for o in held]),
    )


def _control(inputs: Sequence[Any]) -> Control:
    return Control(identity_key(inputs), StorageHold(inputs))


def outer_inputs(program: str, roles: InputRoles, args: Sequence[Any]) -> list[Outer]:
    """What a call was given from outside, directly or through earlier graphs; without its own latents."""
    positions = (*roles.latents, *roles.schedule, *roles.conditioning, *roles.scalars)
    notes = {i: note for i in positions if (note := origins.of(args[i])) is not None}
    found: dict[Source, Outer] = {}
    for note in notes.values():
        for outer in note.outer:
            if outer.source not in found or outer.call > found[outer.source].call:
                found[outer.source] = outer
    # What a model keeps from an earlier call, a table say, tells nothing of this one: it counts as itself.
    kept = {i for i, note in notes.items() if any(o.call < found[o.source].call for o in note.outer)}
    call = next(_calls)
    for i in positions:
        if i in kept or (i not in notes and i not in roles.latents):
            timed = args[i] if i in roles.schedule else None
            hold = StorageHold([args[i]])
            found[program, i] = Outer((program, i), identity_key([args[i]]), signature([args[i]]), hold, timed, call)
    return list(found.values())


class ObservedForward:
    """A compiled graph that caches nothing, and leaves notes on what it makes."""

    def __init__(
        self, compiled: Callable[..., Any], program: str, roles: InputRoles, tokens: Sequence[Collection[int]]
    ) -> None:
        """
        Args:
            compiled: the graph.
            program: its digest.
            roles: the roles of its inputs, none of them a latent: what is denoised only the end of the forward shows.
            tokens: for each output, the inputs whose tokens it holds.
        """
        self._compiled = compiled
        self._program = program
        self._roles = roles
        self._tokens = tokens

    def __call__(self, *args: Any) -> Any:
        origins.purge()
        outer = tuple(outer_inputs(self._program, self._roles, args))
        tokens = [self._tokens_of(sources, args) for sources in self._tokens]
        outputs = self._compiled(*args)
        for output, held in zip(outputs, tokens, strict=True):
            if isinstance(output, torch.Tensor):
                origins.put(output, Note(outer, held))
        return outputs

    def _tokens_of(self, sources: Collection[int], args: Sequence[Any]) -> frozenset[Source]:
        found: set[Source] = set()
        for i in sources:
            note = origins.of(args[i])
            found |= {(self._program, i)} if note is None else note.tokens
        return frozenset(found)
