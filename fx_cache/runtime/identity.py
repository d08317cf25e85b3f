"""Who a tensor is: its storage held by a weak reference, and the view of it. Never a bare address."""

from __future__ import annotations

import marshal
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

SMALL = 64
"""Host tensors of up to this many elements are compared by value."""


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

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


class ContentHold(StorageHold):
    """The inputs themselves, with the content that they had: others may be the same though they were made anew.

    What can be written to and leaves no trace (tensors made in inference mode) is copied.
    """

    def __init__(self, inputs: Sequence[Any]) -> None:
        super().__init__(inputs)
        self._keys = identity_key(inputs)
        self._inputs = [v.clone() if isinstance(v, torch.Tensor) and v.is_inference() else v for v in inputs]
        self._unwritten = identity_key(self._inputs)

    def expired(self) -> bool:
        """Nobody has to come back with these very tensors."""
        return False

    @torch.no_grad()
    def aliases(self, inputs: Sequence[Any]) -> dict[Hashable, Hashable] | None:
        """If some inputs have bit for bit the content of those held: by the key of each, the key of the one held.

        Where tensors of a device have to be compared, this waits for it, once.
        """
        if len(inputs) != len(self._inputs) or identity_key(self._inputs) != self._unwritten:
            return None
        keys = identity_key(inputs)
        others = [
            pair
            for pair, key, own in zip(zip(inputs, self._inputs, strict=True), keys, self._keys, strict=True)
            if key != own
        ]
        if any(_by_value(a) or _by_value(b) or not _alike(a, b) for a, b in others):
            return None
        differ = [(_bits(a) != _bits(b)).any() for a, b in others]
        if differ and bool(torch.stack([d.to(differ[0].device) for d in differ]).any()):
            return None
        return dict(zip(keys, self._keys, strict=True))


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    plain = type(a) is type(b) is torch.Tensor and a.layout is b.layout is torch.strided
    return plain and (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


def _bits(value: torch.Tensor) -> torch.Tensor:
    """Integers of the same bits: NaN is itself then, and 0.0 is not -0.0."""
    if value.is_complex():
        value = torch.view_as_real(value.resolve_conj())
    return value.resolve_neg().view(_INTEGERS[value.element_size()])


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
