"""What a call was given: its conditioning, shapes and timestep. Requests and branches are told apart by that."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fx_cache.patterns.inputs import InputRoles
from fx_cache.runtime.identity import StorageHold, identity_key, signature
from fx_cache.runtime.moves import UNKNOWN_LATENT, Learner


@dataclass(frozen=True)
class Control:
    """Who some inputs are that feed only a span."""

    identity: Hashable
    hold: StorageHold

    @classmethod
    def of(cls, inputs: Sequence[Any]) -> Control:
        return cls(identity_key(inputs), StorageHold(inputs))

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
        doubt: why a request cannot be told from another one by this, or None.
    """

    identity: Hashable
    controls: tuple[Control, ...]
    form: Hashable
    schedule: list[torch.Tensor]
    hold: Callable[[], StorageHold]
    doubt: str | None = None


def read_given(roles: InputRoles, args: Sequence[Any], doubt: str | None = None) -> Given:
    """Reads the inputs of a graph that is a whole forward."""
    alone = {i for of_span in roles.controls for i in of_span}
    fixed = [args[i] for i in (*roles.conditioning, *roles.scalars) if i not in alone]
    return Given(
        identity_key(fixed),
        tuple(Control.of([args[i] for i in of_span]) for of_span in roles.controls),
        signature([args[i] for i in sorted((*roles.latents, *roles.schedule, *roles.conditioning))]),
        [torch.as_tensor(args[i]) for i in roles.schedule],
        lambda: StorageHold(fixed),
        doubt,
    )


def read_learned(roles: InputRoles, args: Sequence[Any], learner: Learner) -> Given:
    """The same for a graph that does not show which input is denoised: learned from the calls, in doubt until then."""
    moves = learner.moves
    if moves is None:
        told = {*roles.conditioning, *roles.scalars, *roles.schedule}
        moves = learner.see(
            [a if i in told else None for i, a in enumerate(args)],
            [identity_key([a]) if i in told else None for i, a in enumerate(args)],
        )
    if moves is None:
        return read_given(roles, args, UNKNOWN_LATENT)
    moving = moves.latents | moves.schedule
    learned = replace(
        roles,
        latents=tuple(sorted(moves.latents)),
        schedule=tuple(sorted({*roles.schedule, *moves.schedule})),
        conditioning=tuple(i for i in roles.conditioning if i not in moving),
        scalars=tuple(i for i in roles.scalars if i not in moving),
    )
    return read_given(learned, args)
