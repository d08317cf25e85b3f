"""Learns from a model's calls which inputs change from step to step, where its graph does not show it."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fx_cache.runtime.identity import SMALL, StorageHold

UNKNOWN_LATENT = "which input is denoised is not known: name the request and its branch with fx_cache.session"

HISTORY = 4
"""Calls whose inputs are compared with those of the next one."""


@dataclass(frozen=True)
class Moves:
    """Numbers of the inputs that change from step to step: those that are denoised, and the timestep and the like."""

    latents: frozenset[int] = frozenset()
    schedule: frozenset[int] = frozenset()


class Learner:
    """Compares what a model is given with the calls before, until it is clear what changes from step to step."""

    def __init__(self) -> None:
        self.moves: Moves | None = None
        self._history: deque[_Inputs] = deque(maxlen=HISTORY)

    def see(self, values: Sequence[Any], keys: Sequence[Hashable | None]) -> Moves | None:
        """Takes the inputs of one more call, and who they are (None: cannot be said); what is known then."""
        if self.moves is None:
            given = _Inputs(values, keys)
            found = {moves for before in self._history if (moves := given.moves_since(before)) is not None}
            self.moves = found.pop() if len(found) == 1 else None
            self._history.append(given)
        return self.moves


class _Inputs:
    """Who the inputs of one call were."""

    def __init__(self, values: Sequence[Any], keys: Sequence[Hashable | None]) -> None:
        known = [v if k is not None else None for v, k in zip(values, keys, strict=True)]
        self._keys = list(keys)
        tensors = {i: v for i, v in enumerate(known) if isinstance(v, torch.Tensor)}
        self._large = {i for i, v in tensors.items() if v.numel() > SMALL and v.is_floating_point()}
        self._small = {i for i, v in tensors.items() if v.numel() <= SMALL}
        self._small |= {i for i, v in enumerate(known) if isinstance(v, int | float) and not isinstance(v, bool)}
        self._hold = StorageHold(known)

    def moves_since(self, other: _Inputs) -> Moves | None:
        """What differs, if it looks like two steps of a request: one large tensor, and something small (a timestep)."""
        if len(self._keys) != len(other._keys):
            return None
        different = [i for i, (a, b) in enumerate(zip(self._keys, other._keys, strict=True)) if a != b]
        large = [i for i in different if i in self._large]
        small = [i for i in different if i in self._small]
        if len(large) != 1 or not small or len(different) > 1 + len(small):
            return None
        return Moves(frozenset(large), frozenset(small))
