"""Notices that a model's weights are not those that the cached tensors were computed with."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fx_cache.runtime.device import Origin, Readback, captured

CHANGED = "weights changed"

SAMPLED = 8
"""Elements of a weight that are compared where it has moved to other storage."""

_version = operator.attrgetter("_version")


class Weights:
    """The weights of a graph as they were at its last call.

    A weight has changed if it is another object, if it was written to (its version), or if it lies elsewhere and holds
    something else there: hooks that offload weights move them back and forth, which is no change. What is written
    through ``.data`` to the same storage leaves no trace.
    """

    def __init__(self, weights: Sequence[torch.Tensor], numbers: Sequence[torch.Tensor]) -> None:
        """
        Args:
            weights: parameters and buffers.
            numbers: what the model holds as Python numbers, as tensors of no dimensions; made anew for every call.
        """
        self._numbers = _values(numbers)
        # With a weight dies the certainty that its id is nobody else's.
        self._gone = False
        self._references = [weakref.ref(w, self._lose) for w in weights]
        self._ids = list(map(id, weights))
        self._versions = _versions(weights)
        self._places = _places(weights)
        self._samples = Samples(weights)
        self._origin = Origin(weights)

    def same(self, weights: Sequence[torch.Tensor], numbers: Sequence[torch.Tensor]) -> bool:
        """Whether nothing has changed since the last call."""
        if numbers and _values(numbers) != self._numbers:
            return False
        if self._gone or list(map(id, weights)) != self._ids:
            return False
        if _versions(weights) != self._versions:
            return False
        places = _places(weights)
        if places == self._places:
            return True
        moved = [i for i, (a, b) in enumerate(zip(places, self._places, strict=True)) if a != b]
        self._places = places
        if captured():
            return False
        self._origin.reached()
        return Samples([weights[i] for i in moved]).are(self._samples, moved)

    def _lose(self, _: object) -> None:
        self._gone = True


class Held:
    """What is held outside a forward that a graph was given at one call: whether another one is given the same."""

    def __init__(self, weights: Sequence[torch.Tensor], numbers: Hashable = ()) -> None:
        """
        Args:
            weights: known by who they are, and their versions.
            numbers: what the model holds beside them, known by value.
        """
        self._references = [weakref.ref(w) for w in weights]
        self._versions = _versions(weights)
        self._numbers = numbers

    def same(self, weights: Sequence[torch.Tensor]) -> bool:
        """Whether those of another call are these."""
        own = [reference() for reference in self._references]
        same = len(own) == len(weights) and all(map(operator.is_, own, weights))
        return same and _versions(weights) == self._versions

    def equals(self, other: Held) -> bool:
        """Whether another call was given these, as they were."""
        pairs = [(a(), b()) for a, b in zip(self._references, other._references, strict=False)]
        same = len(self._references) == len(other._references) and all(a is b is not None for a, b in pairs)
        return same and (self._versions, self._numbers) == (other._versions, other._numbers)

    def different(self, other: Held) -> frozenset[int] | None:
        """Which of these, by number, another call was not given as they were; None: it was given more, or less."""
        own, others = self._known(), other._known()
        if own == others and None not in own:
            return frozenset()
        if len(own) != len(others):
            return None
        return frozenset(i for i, (a, b) in enumerate(zip(own, others, strict=True)) if a != b or a is None)

    def _known(self) -> list[tuple[int, Any] | None]:
        held = [reference() for reference in self._references]
        return [None if w is None else (id(w), v) for w, v in zip(held, self._versions, strict=True)]


def weights_of(root: Any) -> list[torch.Tensor]:
    """All parameters and buffers of a module; of anything else none."""
    if not isinstance(root, torch.nn.Module):
        return []
    held = (t for m in root.modules() for t in (*m._parameters.values(), *m._buffers.values()))
    return list({id(t): t for t in held if t is not None}.values())


def holds(root: Any, weight: torch.Tensor | None) -> bool:
    """Whether what was compiled holds a weight, as far as can be told: a module does not hold what it once held."""
    if weight is None or not isinstance(root, torch.nn.Module):
        return weight is not None
    return any(w is weight for w in weights_of(root))


def is_number(weight: torch.Tensor) -> bool:
    """Whether it is a number that the model holds: with dynamic shapes those come as tensors, made at every call."""
    return weight.ndim == 0 and weight.device.type == "cpu" and not isinstance(weight, torch.nn.Parameter)


def _values(numbers: Sequence[torch.Tensor]) -> list[Any]:
    return [number.tolist() for number in numbers]


def _versions(weights: Sequence[torch.Tensor]) -> list[Any]:
    try:
        return list(map(_version, weights))
    except RuntimeError:  # tensors made in inference mode have none
        return [None if w.is_inference() else w._version for w in weights]


def _places(weights: Sequence[torch.Tensor]) -> list[Any]:
    try:
        places: list[Any] = list(map(torch.Tensor.data_ptr, weights))
    except RuntimeError:  # some have no storage of their own
        return list(map(_place, weights))
    if 0 in places:  # so say some of these, and those that hold nothing
        places = [place or _place(weight) for place, weight in zip(places, weights, strict=True)]
    return places


def _place(weight: torch.Tensor) -> Any:
    """Where a weight lies; of one without storage of its own, where its parts lie, and what was written to them."""
    try:
        place = weight.data_ptr()
    except RuntimeError:
        place = 0
    return place or tuple((_place(part), *_versions([part])) for part in _parts(weight))


def _parts(weight: torch.Tensor) -> list[torch.Tensor]:
    """What a weight without storage of its own is made of; of some layouts that cannot be told."""
    if is_traceable_wrapper_subclass(weight):
        return [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]
    if weight.layout is torch.sparse_coo:
        return [weight._indices(), weight._values()]
    if weight.layout in (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc):
        return [weight.values()]
    return []


class Samples:
    """Some elements of each of some weights, spread over it: copied where the weights lie, and read to be compared."""

    def __init__(self, weights: Sequence[torch.Tensor]) -> None:
        self._unread: list[tuple[list[tuple[int, int]], torch.Tensor]] = []
        self._known: dict[int, Any] = {}
        alike: dict[Hashable, list[tuple[int, torch.Tensor]]] = {}
        for i, weight in enumerate(weights):
            sample = _sample(weight)
            if isinstance(sample, torch.Tensor):
                alike.setdefault((sample.device, sample.dtype), []).append((i, sample))
            else:
                self._known[i] = sample
        for samples in alike.values():
            copied = torch.cat([s for _, s in samples])
            self._unread.append(([(i, s.nbytes) for i, s in samples], copied.view(torch.uint8)))

    def are(self, others: Samples, numbers: Sequence[int]) -> bool:
        """Whether these are those of others that have these numbers.

        Waits for the device, once.
        """
        read = iter(Readback([copied for _, copied in (*self._unread, *others._unread)]).take())
        for samples in (self, others):
            for sizes, _ in samples._unread:
                samples._known.update((i, [next(read) for _ in range(size)]) for i, size in sizes)
            samples._unread = []
        pairs = ((self._known.get(k), others._known.get(i)) for k, i in enumerate(numbers))
        return all(own is not None and own == other for own, other in pairs)


@torch.no_grad()
def _sample(weight: torch.Tensor) -> Any:
    """Some elements, spread over a weight: a view, or numbers where it has no memory of its own, or None."""
    try:
        flat = weight.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // SAMPLED)][:SAMPLED]
        if type(sample) is not torch.Tensor or sample.is_meta:
            return sample.tolist()
        return sample.view(torch.uint8) if sample.element_size() == 1 else sample
    except (RuntimeError, NotImplementedError, TypeError):
        return None
