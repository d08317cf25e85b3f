"""What a call was given: its conditioning, shapes and timestep. Requests and branches are told apart by that."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from fx_cache.errors import guarded
from fx_cache.patterns.inputs import InputRoles
from fx_cache.runtime.clock import Values, read_schedule
from fx_cache.runtime.device import captured, on_host
from fx_cache.runtime.follow import Look
from fx_cache.runtime.front import Front
from fx_cache.runtime.identity import ContentHold, OwnWrites, StorageHold, identity_key, signature
from fx_cache.runtime.moves import UNKNOWN_LATENT, UNKNOWN_TIME, Call, Learner, Moves
from fx_cache.runtime.named import named_pass


@dataclass(frozen=True)
class Control:
    """Inputs of a call that reach a span, and not its probe.

    Attributes:
        inputs: these.
        identity: who they are.
        own: numbers of those among them that the forward writes to itself.
        doubt: what is not known of them, or None.
        times: all inputs that look like a time or may tell it otherwise, if some of the former are among these.
        asked: the numbers of those.
    """

    inputs: Sequence[Any]
    identity: tuple[Hashable, ...]
    own: frozenset[int] = frozenset()
    doubt: str | None = None
    times: Control | None = None
    asked: frozenset[int] = frozenset()

    @property
    def written(self) -> bool:
        """Whether they were written to meanwhile, by other code than the forward."""
        pairs = enumerate(zip(identity_key(self.inputs), self.identity, strict=True))
        own = any(now != then for i, (now, then) in pairs if i not in self.own)
        return own or (self.times is not None and self.times.written)

    def hold(self, by_content: bool) -> StorageHold:
        """What remembers them.

        Args:
            by_content: whether others may be the same though they were made anew.
        """
        return (ContentHold if by_content else StorageHold)(self.inputs, self.identity)


@dataclass(frozen=True)
class Given:
    """What a forward was given, as far as requests and branches are told apart by it.

    Attributes:
        identity: who its conditioning is, but for what feeds nothing but spans.
        of_requests: the same without values that make the forward another program.
        controls: for each span, the inputs that reach it, and not its probe.
        beside: who those of the inputs are that feed nothing but spans.
        form: shapes, dtypes and devices of everything.
        schedule: timestep and the like.
        fixed: the inputs that the identity is of.
        doubt: why a request cannot be told from another one by this, or None.
        latents: what is denoised, as far as that is known.
        times: numbers of those of the schedule that are known to tell the time, beside others.
        together: whether all of these move at every step, and not some of them.
        known: whether the graph itself shows what is denoised, and what tells the time.
        call: what is still to be told of the call, where something is learned from it.
        front: what the forward has run before, where it is one of several graphs.
    """

    identity: tuple[Hashable, ...]
    of_requests: tuple[Hashable, ...]
    controls: tuple[Control, ...]
    beside: tuple[Hashable, ...]
    form: Hashable
    schedule: list[torch.Tensor]
    fixed: Sequence[Any]
    doubt: str | None = None
    latents: tuple[torch.Tensor, ...] = ()
    times: tuple[int, ...] = ()
    together: bool = False
    known: bool = False
    call: Call | None = None
    front: Front | None = None

    @property
    def flags(self) -> tuple[Hashable, ...]:
        """The values that make the forward another program, where no graph has them built in."""
        return tuple(k for k in self.identity if k not in self.of_requests)

    @cached_property
    def shown(self) -> Values | list[Values | torch.Tensor]:
        """What its schedule inputs are known by (`read_schedule`)."""
        return read_schedule(self.schedule) if self.schedule else ()

    @property
    def late(self) -> list[torch.Tensor]:
        """What of that lies on a device."""
        return [v for v in self.shown if isinstance(v, torch.Tensor)]

    @cached_property
    def look(self) -> Look:
        """Its latents, to be remembered."""
        return Look(self.latents)

    @property
    def one_time(self) -> bool:
        """Whether it is known of one number, or of several together, that they tell the time."""
        return self.together or len(self.times or self.schedule) == 1


class Reader:
    """Reads the inputs of a graph that is a whole forward.

    Where the graph does not show which of them are denoised, or tell the time, that is learned from its calls; while it
    is not known what is denoised, there is doubt.
    """

    def __init__(self, roles: InputRoles, written: Sequence[int] = ()) -> None:
        """
        Args:
            roles: of the graph's inputs.
            written: those that the graph writes to in place.
        """
        self._roles = roles
        self._own = _Own([i for i in written if i in roles.conditioning])
        self._known = roles.certain and bool(roles.timed)
        self._positions = _Positions(roles, self._own, self._known)
        self._learned: dict[Moves, _Positions] = {}
        self._told = {*roles.latents, *roles.conditioning, *roles.scalars, *roles.schedule}

    def __call__(self, args: Sequence[Any], learner: Callable[[], Learner]) -> Given:
        """What a call was given.

        Args:
            args: the graph's inputs.
            learner: what is learned of the graph.
        """
        if self._known:
            return self._positions.read(args)
        known = learner()
        call = None if known.settled or captured() else self._call(args)
        moves = known.moves if call is None else known.see(call)
        if moves is None:
            doubt = None if self._roles.certain else UNKNOWN_LATENT
            if doubt is None and self._roles.schedule:
                doubt = UNKNOWN_TIME
            return replace(self._positions.read(args, doubt), call=call)
        if moves not in self._learned:
            self._learned[moves] = _Positions(_with_moves(self._roles, moves), self._own, known=False)
        return replace(self._learned[moves].read(args), together=not self._roles.timed, call=call)

    def writing(self, args: Sequence[Any]) -> contextlib.AbstractContextManager[None]:
        """While the graph runs: what it writes to itself makes nobody another one."""
        return self._own.writing(args)

    def _call(self, args: Sequence[Any]) -> Call:
        return Call(
            [a if i in self._told else None for i, a in enumerate(args)],
            [identity_key([a], self._own.writes) if i in self._told else None for i, a in enumerate(args)],
            latents=self._roles.latents if self._roles.certain else (),
            schedule=self._roles.schedule,
            timed=self._roles.timed,
            of=named_pass(),
        )


class _Own:
    """The inputs that a graph writes to itself."""

    def __init__(self, positions: Sequence[int]) -> None:
        self.positions = positions
        self.writes = OwnWrites() if positions else None

    @contextlib.contextmanager
    def writing(self, args: Sequence[Any]) -> Iterator[None]:
        """While the graph runs."""
        if self.writes is None:
            yield
            return
        values: list[torch.Tensor] = []
        origins: list[int] = []
        with guarded("writes"):
            values = [args[i] for i in self.positions if not args[i].is_inference()]
            origins = [self.writes.origin(v) for v in values]
        yield
        with guarded("writes"):
            self.writes.wrote(values[: len(origins)], origins)


class _Positions:
    """Where a graph's inputs stand, by what they are read for."""

    def __init__(self, roles: InputRoles, own: _Own, known: bool) -> None:
        self._own = own
        self._fixed = [i for i in (*roles.conditioning, *roles.scalars) if i not in roles.controls]
        self._controls = roles.controls
        self._unseen = roles.unseen
        self._form = sorted((*roles.latents, *roles.schedule, *roles.conditioning))
        self._schedule = roles.schedule
        self._times = tuple(k for k, i in enumerate(roles.schedule) if i in roles.timed)
        self._latents = roles.latents
        self._known = known

    def read(self, args: Sequence[Any], doubt: str | None = None) -> Given:
        fixed = [args[i] for i in self._fixed]
        identity = identity_key(fixed, self._own.writes)
        return Given(
            identity,
            identity,
            tuple([self._control(args, of_span) for of_span in self._unseen]),
            identity_key([args[i] for i in self._controls]),
            signature([args[i] for i in self._form]),
            [on_host(args[i]) for i in self._schedule],
            fixed,
            doubt,
            tuple([args[i] for i in self._latents]),
            self._times,
            known=self._known,
        )

    def _control(self, args: Sequence[Any], of_span: Sequence[int]) -> Control:
        asked = frozenset(k for k, i in enumerate(self._schedule) if i in of_span)
        others = Control(*self._asked(args, [i for i in of_span if i not in self._schedule]))
        if not asked:
            return others
        # What is given beside these: the time may be among it, as the embedding that the caller made of it.
        return replace(others, times=Control(*self._asked(args, (*self._schedule, *self._fixed))), asked=asked)

    def _asked(
        self, args: Sequence[Any], positions: Sequence[int]
    ) -> tuple[Sequence[Any], tuple[Hashable, ...], frozenset[int]]:
        inputs = [args[i] for i in positions]
        own = frozenset(k for k, i in enumerate(positions) if i in self._own.positions)
        return inputs, identity_key(inputs, self._own.writes), own


def _with_moves(roles: InputRoles, moves: Moves) -> InputRoles:
    moving = moves.latents | moves.schedule
    return replace(
        roles,
        latents=tuple(sorted(moves.latents)),
        schedule=tuple(sorted(moves.schedule)),
        timed=roles.timed or tuple(sorted(moves.times)),
        conditioning=tuple(sorted({*roles.conditioning, *roles.latents} - moving)),
        scalars=tuple(i for i in roles.scalars if i not in moving),
    )
