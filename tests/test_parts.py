"""Parts of a graph that make some of its outputs by themselves. Oracle: the same outputs of the whole graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from fx_cache.passes.parts import GraphParts
from fx_cache.patterns.work import Work
from fx_cache.versions import with_versions


def captured(function: Callable[..., Any], args: Sequence[Any]) -> fx.GraphModule:
    found: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, _: Sequence[Any]) -> Any:
        found.append(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(function, backend=keep, fullgraph=True)(*args)
    return with_versions(found[0])


def filled(x: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """Made by a write to a tensor of its own."""
    made = torch.zeros(2, 4)
    made[:, :2] = time[:, :2]
    made.mul_(3.0)
    return x * time, made


def seen_in_two_ways(x: Tensor, time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    made = time.sin()
    return x * made, made, made[:, 1:]


def cast(x: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """In a context within another one, and behind one."""
    with torch.autocast("cpu", torch.bfloat16):
        y = x @ time.T
        with torch.autocast("cpu", torch.float16):
            made = time @ time.T
        made = made + time @ time.T
    return y, made.float()


def given_the_form(x: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    return x + time, torch.ones_like(x) * time


def written_to_an_input(x: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    time.add_(1.0)
    return x * time, time * 2.0


def drawn(x: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    return x * time, time + torch.rand(2, 4)


def of_the_same(x: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    return x * time, x + time


@pytest.mark.parametrize(
    ("function", "outputs"),
    [
        (filled, (1,)),
        (seen_in_two_ways, (1, 2)),
        (seen_in_two_ways, (1,)),
        (cast, (1,)),
        (given_the_form, (1,)),
    ],
)
@torch.no_grad()
def test_it_makes_what_the_graph_makes(function: Callable[..., Any], outputs: tuple[int, ...]) -> None:
    args = [torch.randn(2, 4), torch.randn(2, 4)]
    gm = captured(function, args)
    names = [n.name for n in gm.graph.find_nodes(op="placeholder")]
    ordered = [args[0] if "x" in name else args[1] for name in names]
    parts = GraphParts(gm, Work(gm.graph))
    assert parts.work.keys() >= set(outputs)
    made, expected = parts.part(outputs)(ordered), function(*args)
    assert all(torch.equal(a, expected[k]) for a, k in zip(made, outputs, strict=True))


@pytest.mark.parametrize(("function", "others"), [(written_to_an_input, set()), (drawn, {0}), (of_the_same, set())])
@torch.no_grad()
def test_what_has_no_part(function: Callable[..., Any], others: set[int]) -> None:
    """A part would write, or draw numbers, a second time; of outputs that are all of the same, nobody asks for some."""
    gm = captured(function, [torch.randn(2, 4), torch.randn(2, 4)])
    assert GraphParts(gm, Work(gm.graph)).work.keys() == others
