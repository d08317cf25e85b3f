"""Which tensors share memory. Oracle: the addresses of all elements."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from fx_cache.overlap import extent, overlap
from fx_cache.runtime.memory import ViewOf, laid_out, parts_of


def addresses(value: Tensor) -> set[int]:
    count = value.untyped_storage().nbytes() // value.element_size()
    places = torch.arange(count).as_strided(value.shape, value.stride(), value.storage_offset())
    return set(places.flatten().tolist())


def cut(draw: random.Random, value: Tensor) -> Tensor:
    """A part of a tensor, along no dimension, one or two."""
    for _ in range(draw.choice([0, 1, 1, 2])):
        dim = draw.randrange(value.ndim)
        begin = draw.randrange(value.shape[dim])
        value = value.narrow(dim, begin, draw.randint(1, value.shape[dim] - begin))
    return value


def pairs(count: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Tensors and two parts of each."""
    draw = random.Random(0)
    found = []
    for _ in range(count):
        whole = torch.zeros([draw.choice([1, 1, 2, 3, 4]) for _ in range(draw.choice([2, 3, 4]))])
        whole = whole.permute(draw.sample(range(whole.ndim), whole.ndim))
        found.append((whole, cut(draw, whole), cut(draw, whole)))
    return found


def test_parts_of_one_tensor_overlap_where_they_share_an_element() -> None:
    seen = set()
    for _, a, b in pairs(5000):
        assert overlap(a, b) == bool(addresses(a) & addresses(b)), (a.shape, a.stride(), b.shape, b.storage_offset())
        seen.add(overlap(a, b))
        assert extent(a) == max(addresses(a)) - min(addresses(a)) + 1
    assert seen == {False, True}


def test_other_strides_may_overlap() -> None:
    x = torch.zeros(4, 6)
    assert overlap(x, x.t())
    assert not overlap(x[:2], x[2:].t())


def test_an_output_is_a_part_of_another_or_is_torn_from_it() -> None:
    x, other = torch.zeros(1, 8, 4), torch.zeros(1, 8, 4)
    assert parts_of({0: x, 1: x[:, 2:], 2: other}, {0}, ()) == ({1: (0, (1, 6, 4), (32, 4, 1), 8)}, False)
    assert parts_of({0: x[:, :5], 1: x[:, 3:]}, (), ()) == ({}, True)  # neither is in the other one
    assert parts_of({0: x, 1: x[:, 2:]}, {0, 1}, ()) == ({}, True)  # two streams
    assert parts_of({0: x, 1: x[:, 2:]}, (), {0}) == ({}, True)  # one of them is made anew
    assert parts_of({0: x, 1: x[:, 2:]}, (), {0, 1}) == ({}, False)


def test_a_view_is_made_again_of_a_tensor_that_lies_alike() -> None:
    for whole, part, _ in pairs(200):
        view = ViewOf.made(whole, part)
        assert view is not None
        now = laid_out(torch.randn(whole.shape), whole.stride())
        again = view.of(now)
        assert again is not None
        expected = now.as_strided(part.shape, part.stride(), part.storage_offset() - whole.storage_offset())
        assert torch.equal(again, expected)
    assert ViewOf.made(whole, torch.zeros(3)) is None
    pair = torch.zeros(2, 3)
    assert ViewOf.made(pair, pair.view(torch.int32)).of(pair) is None  # type: ignore[union-attr]
