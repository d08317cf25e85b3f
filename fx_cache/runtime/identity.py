"""Who a tensor is: its storage held by a weak reference, and the view of it. Never a bare address."""

from __future__ import annotations

import marshal
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from fx_cache.runtime.device import Readback, captured

SMALL = 64
"""Host tensors of up to this many elements are compared by value."""


MAX_HELD = 1 << 30
"""Bytes of inputs beyond which they are known by nothing but who they are."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_NO_REFERENCES = 2
"""The last version of marshal's format in which equal values are equal bytes."""


class OwnWrites:
    """What a model's own forward writes in place: an input that nobody else has written to is the one that it was."""

    def __init__(self) -> None:
        self._versions: dict[int, tuple[StorageWeakRef, int, int]] = {}

    def origin(self, value: torch.Tensor, version: int | None = None) -> int:
        """The version that an input had before the forwards in a row that alone have written to it since.

        Args:
            value: the input.
            version: the one that it has, or had when the forward began.
        """
        version = value._version if version is None else version
        held, origin, after = self._versions.get(value.untyped_storage()._cdata, (None, 0, -1))
        return origin if held is not None and not held.expired() and after == version else version

    def wrote(self, values: Sequence[torch.Tensor], origins: Sequence[int]) -> None:
        """Takes inputs that a forward has written to, and what `origin` said of them before."""
        # In one piece: other threads do the same. What gets lost then is a change, and computes.
        known = {k: held for k, held in self._versions.copy().items() if not held[0].expired()}
        for value, origin in zip(values, origins, strict=True):
            storage = value.untyped_storage()
            known[storage._cdata] = StorageWeakRef(storage), origin, value._version
        self._versions = known


def identity_key(inputs: Sequence[Any], own: OwnWrites | None = None) -> tuple[Hashable, ...]:
    """The identity of some inputs at one call: equal as long as they are the same objects with the same content.

    In-place changes show in the version counter (tensors made in inference mode have none: changes to them cannot be
    seen). A key is to be compared only with keys whose tensors are held by `StorageHold`.

    Args:
        inputs: the inputs.
        own: writes that are no change.
    """
    return tuple([_key(value, own) for value in inputs])


class StorageHold:
    """Weak references to the storages behind a key.

    They keep each storage's control block, so that no other storage can get its address while this object lives.

    Attributes:
        identity: the key.
    """

    def __init__(self, inputs: Sequence[Any], identity: tuple[Hashable, ...] | None = None) -> None:
        self.identity = identity_key(inputs) if identity is None else identity
        tensors = {i: v for i, v in enumerate(inputs) if not _by_value(v) and v.layout is torch.strided}
        self._references = {i: StorageWeakRef(t.untyped_storage()) for i, t in tensors.items()}

    def expired(self) -> bool:
        """Whether one of the tensors is gone: nobody can come back with it."""
        return any(reference.expired() for reference in self._references.values())

    def same(self, inputs: Sequence[Any], keys: tuple[Hashable, ...]) -> bool:
        """Whether some inputs, which have these keys, are those held, with the same content."""
        return not self.expired() and self.identity == keys

    @property
    def bytes(self) -> int:
        """What it keeps alive."""
        return sum(copy.nbytes for copy in self.copies)

    @property
    def copies(self) -> Collection[torch.Tensor]:
        """Copies of the inputs, where there are any."""
        return ()


def any_of(found: Sequence[torch.Tensor]) -> bool:
    """Whether one of some tensors says so; waits for their device, once."""
    return any(Readback(found).take())


class ContentHold(StorageHold):
    """Copies of the inputs: others may be the same though they were made anew.

    Of inputs that come back as they were, copies are held no longer than until they do.

    Attributes:
        inputs: the copies, by the inputs' numbers.
    """

    def __init__(self, inputs: Sequence[Any], identity: tuple[Hashable, ...] | None = None) -> None:
        super().__init__(inputs, identity)
        large = sum(v.nbytes for v in inputs if isinstance(v, torch.Tensor)) > MAX_HELD
        tensors = {} if large else {i: inputs[i] for i in self._references}
        self.inputs = {i: t.detach().clone() for i, t in tensors.items()}
        self._compared: tuple[tuple[Hashable, ...], list[torch.Tensor]] | None = None

    def expired(self) -> bool:
        """Whether an input is gone of which there is no copy."""
        return any(reference.expired() for i, reference in self._references.items() if i not in self.inputs)

    def same(self, inputs: Sequence[Any], keys: tuple[Hashable, ...]) -> bool:
        """Whether some inputs, which have these keys, have the content of those held, bit for bit."""
        same = self.aliases(inputs, keys) is not None
        if same:
            self.let_go(keys)
        return same

    def let_go(self, keys: tuple[Hashable, ...]) -> None:
        """Of inputs that came back as they were, by these keys of all, copies are needed no longer."""
        self.inputs = {i: copy for i, copy in self.inputs.items() if keys[i] != self.identity[i]}

    @property
    def copies(self) -> Collection[torch.Tensor]:
        return self.inputs.values()

    def aliases(
        self,
        inputs: Sequence[Any],
        keys: tuple[Hashable, ...],
        any_of: Callable[[Sequence[torch.Tensor]], bool] = any_of,
    ) -> dict[Hashable, Hashable] | None:
        """If some inputs have bit for bit the content of those held: by the key of each, the key of the one held.

        Where tensors of a device have to be compared, this waits for it, once.

        Args:
            inputs: the inputs.
            keys: who they are.
            any_of: says whether one of some tensors of no dimensions is true.
        """
        different = self.different(inputs, keys)
        if different is None or (different and (captured() or any_of(different))):
            return None
        return dict(zip(keys, self.identity, strict=True))

    @torch.no_grad()
    def different(self, inputs: Sequence[Any], keys: tuple[Hashable, ...]) -> list[torch.Tensor] | None:
        """Of each input that was made anew whether it differs, on its device; None: they cannot be those held.

        What is asked for twice, of the same inputs, is the same tensors.
        """
        if len(keys) != len(self.identity):
            return None
        anew = [i for i, (key, own) in enumerate(zip(keys, self.identity, strict=True)) if key != own]
        if not all(i in self.inputs and _alike(inputs[i], self.inputs[i]) for i in anew):
            return None
        if self._compared is None or self._compared[0] is not keys:
            self._compared = keys, [differs(inputs[i], self.inputs[i]) for i in anew]
        return self._compared[1]


def _alike(a: Any, b: Any) -> bool:
    """Whether two inputs may differ in nothing but the numbers they hold, and these are not compared already."""
    if type(a) is not torch.Tensor or type(b) is not torch.Tensor or _by_value(a):
        return False
    return a.layout is b.layout is torch.strided and (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


def differs(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Whether two tensors of one form hold other bits: on their device, so that nothing is waited for."""
    return (_bits(a) != _bits(b)).any()


def _bits(value: torch.Tensor) -> torch.Tensor:
    """Integers of the same bits: NaN is itself then, and 0.0 is not -0.0."""
    if value.is_complex():
        value = torch.view_as_real(value.resolve_conj())
    return value.resolve_neg().view(_INTEGERS[value.element_size()])


def is_one(value: Any) -> bool:
    """Whether an input is known by its storage: no other one, however equal, is taken for it."""
    return isinstance(value, torch.Tensor) and value.layout is torch.strided and not _by_value(value)


def _by_value(value: Any) -> bool:
    if not isinstance(value, torch.Tensor):
        return True
    return value.is_cpu and value.layout is torch.strided and value.numel() <= SMALL


def _key(value: Any, own: OwnWrites | None = None) -> Hashable:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__, value
    if value.layout is not torch.strided:
        return object()  # what it holds cannot be told: it is another one at every call
    if _by_value(value):
        # Bit by bit: NaN differs from itself, 0.0 does not from -0.0.
        return value.shape, value.dtype, marshal.dumps(value.tolist(), _NO_REFERENCES)
    version = None if value.is_inference() else value._version if own is None else own.origin(value)
    where = value.untyped_storage()._cdata, value.storage_offset(), value.stride()
    return value.shape, value.dtype, value.device, where, version


def signature(inputs: Sequence[Any]) -> tuple[Hashable, ...]:
    """Shape, dtype and device of inputs: with any of them changed, nothing cached fits."""
    return tuple([(t.shape, t.dtype, t.device) for t in inputs if isinstance(t, torch.Tensor)])


def as_number(value: Any) -> float | None:
    """A number, also in the form in which a graph is given one of the host."""
    if isinstance(value, torch.Tensor):
        wrapped = type(value) is torch.Tensor and value.ndim == 0 and value.is_cpu and value.dtype is torch.float64
        return float(value) if wrapped else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def memory_of(value: torch.Tensor) -> Hashable:
    """What tensors have in common that are one: the same view of the same memory."""
    return value.untyped_storage()._cdata, view_of(value)


def lies_in(value: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether a tensor lies within the memory from the first to the last element of another one of its storage."""
    if value is other:
        return True
    (begin, end), (first, last) = _extent(value), _extent(other)
    return first <= begin and end <= last


def _extent(value: torch.Tensor) -> tuple[int, int]:
    """Where in its storage a tensor begins and ends, in bytes."""
    begin, size = int(value.storage_offset()), value.element_size()
    count: int = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True)) if value.numel() else 0
    return begin * size, (begin + count) * size


def stored(value: Any) -> bool:
    """Whether it is a tensor with memory of its own."""
    return isinstance(value, torch.Tensor) and value.layout is torch.strided


def view_of(value: torch.Tensor) -> tuple[Any, ...]:
    """Which part of its storage a tensor is, in which version."""
    version = None if value.is_inference() else value._version
    return value.storage_offset(), tuple(value.shape), value.stride(), value.dtype, version
