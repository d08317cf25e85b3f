"""Computes what is the same at every step of a request once, and whenever its inputs are others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fx_cache.runtime.identity import StorageHold, identity_key, is_one
from fx_cache.runtime.moves import may_tell_time
from fx_cache.runtime.named import named_session
from fx_cache.runtime.slots import Branch, Kept


class Keep:
    """What one branch keeps, at one step."""

    def __init__(
        self, branch: Branch, graph: object, copied: Callable[[torch.Tensor], torch.Tensor], known: bool
    ) -> None:
        """
        Args:
            branch: at its present step.
            graph: who asks; graphs of one program may keep different things.
            copied: what to keep of a tensor that is computed.
            known: whether the graph shows what is denoised, and a time.
        """
        self._record = branch.record
        self._aliases = branch.aliases
        self._graph = graph
        self._copied = copied
        self._known = known
        self._goes_on = not branch.pending and branch.clock.doubt is None and branch.clock.moves > 1

    def __call__(
        self, compute: Callable[..., tuple[Any, ...]], operands: tuple[Any, ...], told_by: tuple[int, ...]
    ) -> tuple[Any, ...]:
        told = [operands[i] for i in told_by]
        identity = (self._graph, *(self._aliases.get(key, key) for key in identity_key(told)))
        kept = self._record.kept
        # A request that begins may have been given something else in the same memory.
        begins = not self._goes_on and any(map(_leaves_no_trace, told))
        if kept is None or kept.identity != identity or begins:
            self._record.kept = None
            tensors = tuple(map(self._copied, compute(*operands)))
            if not any(map(self._may_change_unseen, told)):
                self._record.kept = Kept(identity, StorageHold(told), tensors)
            return tensors
        return kept.tensors

    def _may_change_unseen(self, value: Any) -> bool:
        """Whether somebody may write to an input and leave no trace.

        Who names a request does not, but to what is denoised, or tells the time. Where a pass is named, and no step,
        nothing but the time shows that another request begins.
        """
        if not _leaves_no_trace(value):
            return False
        named = named_session()
        if named is None or (named.branch is not None and named.step is None):
            return True
        return not self._known or may_tell_time(value)


def _leaves_no_trace(value: Any) -> bool:
    """Whether writes to an input cannot be seen."""
    return isinstance(value, torch.Tensor) and value.is_inference() and is_one(value)


def keep_nothing(
    compute: Callable[..., tuple[Any, ...]], operands: tuple[Any, ...], told_by: tuple[int, ...]
) -> tuple[Any, ...]:
    """Computes."""
    return compute(*operands)
