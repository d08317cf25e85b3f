"""Who a tensor is: its storage held by a weak reference, and the view of it. Never a bare address."""

from __future__ import annotations

import marshal
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

SMALL = 64
"""Host tensors of up to this many elements are compared by value."""


_NO_REFERENCES = 2
"""The last version of marshal's format in which equal values are equal bytes."""


def identity_key(inputs: Sequence[Any]) -> tuple[Hashable, ...]:
    """The identity of some inputs at one call: equal as long as they are the same objects with the same content.

    In-place changes show in the version counter (tensors made in inference mode have none: changes to them cannot be
    seen). A key is to be compared only with keys whose tensors are held by `StorageHold`.
    """
    return tuple(map(_key, inputs))


class StorageHold:
    """Weak references to the storages behind a key.

    They keep each storage's control block, so that no other storage can get its address while this object lives.
    """

    def __init__(self, inputs: Sequence[Any]) -> None:
        self._references = [StorageWeakRef(t.untyped_storage()) for t in inputs if not _by_value(t)]

    def expired(self) -> bool:
        """Whether one of the tensors is gone: nobody can come back with it."""
        return any(reference.expired() for reference in self._references)


def _by_value(value: Any) -> bool:
    return not isinstance(value, torch.Tensor) or (value.is_cpu and value.numel() <= SMALL)


def _key(value: Any) -> Hashable:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__, value
    if _by_value(value):
        # Bit by bit: NaN differs from itself, 0.0 does not from -0.0.
        return value.shape, value.dtype, marshal.dumps(value.tolist(), _NO_REFERENCES)
    version = None if value.is_inference() else value._version
    where = value.untyped_storage()._cdata, value.storage_offset(), value.stride()
    return value.shape, value.dtype, value.device, where, version


def signature(inputs: Sequence[Any]) -> tuple[Hashable, ...]:
    """Shape, dtype and device of inputs: with any of them changed, nothing cached fits."""
    return tuple([(t.shape, t.dtype, t.device) for t in inputs if isinstance(t, torch.Tensor)])
