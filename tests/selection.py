"""Which tests run by themselves, in half an hour; ``FX_CACHE_TESTS=all`` runs all of them.

Left out are those marked as ``long``, which others nearly stand for, and of tests with three parameters or more what
is not needed for every pair of values; of those marked ``singly``, what is not needed for every value. What goes
wrong hangs on one or two of them, hardly ever on three: Kuhn, Wallace and Gallo, "Software Fault Interactions and
Implications for Software Testing", IEEE Transactions on Software Engineering 30(6), 2004.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest
from allpairspy import AllPairs


def few(values: Iterable[Any], count: int) -> list[Any]:
    """Values of a parameter, or of several together, of which those behind the first ones are ``long``."""
    every = [v if isinstance(v, tuple) else (v,) for v in values]
    return [pytest.param(*v, marks=pytest.mark.long if i >= count else ()) for i, v in enumerate(every)]


def every(step: int, values: Iterable[Any]) -> list[Any]:
    """Values of a parameter of which neighbours are kin; all but one in `step` are ``long``."""
    return [pytest.param(v, marks=pytest.mark.long if i % step else ()) for i, v in enumerate(values)]


def selected(items: list[pytest.Item]) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """Those that run by themselves, and the others."""
    run: list[pytest.Item] = []
    others: list[pytest.Item] = []
    for _, group in itertools.groupby(items, lambda item: (item.path, getattr(item, "originalname", item.name))):
        members = list(group)
        axes = [range(len(mark.args[1])) for mark in members[0].iter_markers("parametrize")]
        product = list(itertools.product(*axes))
        singly = members[0].get_closest_marker("singly") is not None
        if (len(axes) > 2 or singly) and len(product) == len(members):  # else some were asked for by name
            if singly:
                places = {tuple(i % len(axis) for axis in axes) for i in range(max(map(len, axes)))}
            else:
                places = {tuple(pair) for pair in AllPairs([list(axis) for axis in axes])}
            for item, place in zip(members, product, strict=True):
                (run if place in places else others).append(item)
        else:
            run += members
    if len(items) == 1:  # asked for by name
        return run, others
    long = [item for item in run if item.get_closest_marker("long")]
    return [item for item in run if not item.get_closest_marker("long")], others + long
