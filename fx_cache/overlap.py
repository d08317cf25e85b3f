"""Which elements of memory tensors reach over, and whether two have some in common."""

from __future__ import annotations

import torch


def extent(value: torch.Tensor) -> int:
    """How many elements of memory a tensor reaches over."""
    if not value.numel():
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))


def overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors on one storage may have elements in common: no, if they are parts beside each other."""
    numbers = (*a.shape, *b.shape, *a.stride(), *b.stride(), a.storage_offset(), b.storage_offset())
    if a.dtype != b.dtype or not all(isinstance(n, int) for n in numbers):
        return True
    distance = int(b.storage_offset() - a.storage_offset())
    if distance >= extent(a) or -distance >= extent(b):
        return False
    if a.stride() != b.stride():
        return True
    return _meet(distance, sorted(zip(a.stride(), a.shape, b.shape, strict=True), reverse=True))


def _meet(distance: int, dims: list[tuple[int, int, int]]) -> bool:
    """Whether indices i < m and j < n of each dimension (stride, m, n) exist with sum((i - j) * stride) = distance."""
    if not dims:
        return distance == 0
    (stride, m, n), *rest = dims
    if stride == 0:
        return _meet(distance, rest)
    above, below = (sum((size[k] - 1) * size[0] for size in rest) for k in (1, 2))
    # What the smaller strides cannot make up for, this one has to.
    low = max(1 - n, -((above - distance) // stride))
    high = min(m - 1, (distance + below) // stride)
    return any(_meet(distance - k * stride, rest) for k in range(low, high + 1))
