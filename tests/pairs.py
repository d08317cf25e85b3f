"""Of a test with three parameters or more, as much of their product as holds every pair of values.

What goes wrong hangs on one or two of them, hardly ever on three: Kuhn, Wallace and Gallo, "Software Fault Interactions
and Implications for Software Testing", IEEE Transactions on Software Engineering 30(6), 2004.
"""

from __future__ import annotations

import itertools

import pytest
from allpairspy import AllPairs


def in_pairs(items: list[pytest.Item]) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """Those to run, and the others."""
    run: list[pytest.Item] = []
    others: list[pytest.Item] = []
    for _, group in itertools.groupby(items, lambda item: (item.path, getattr(item, "originalname", item.name))):
        members = list(group)
        axes = [range(len(mark.args[1])) for mark in members[0].iter_markers("parametrize")]
        product = list(itertools.product(*axes))
        if len(axes) > 2 and len(product) == len(members):  # else some were asked for by name
            pairs = {tuple(pair) for pair in AllPairs([list(axis) for axis in axes])}
            for item, place in zip(members, product, strict=True):
                (run if place in pairs else others).append(item)
        else:
            run += members
    return run, others
