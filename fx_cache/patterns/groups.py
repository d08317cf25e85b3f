"""Which ranks work on one sample together: those whose collectives stand among the blocks, or whose tensors do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from fx_cache.patterns.graph import value_of

_GROUP = ("group_name", "group")
"""What collectives call the argument that names a process group."""


def groups_of(nodes: Iterable[fx.Node]) -> tuple[str, ...]:
    """Names of the process groups of some nodes, in the order of their first use.

    Those that collectives are given; and those over which a DTensor is divided, whose collectives no graph shows.
    """
    found: dict[str, None] = {}
    for node in nodes:
        found |= dict.fromkeys(
            name for value in (node, *node.all_input_nodes) for name in _divided_over(value_of(value))
        )
        target = node.target
        if isinstance(target, torch._ops.OpOverloadPacket):
            target = getattr(target, target.overloads()[0])
        if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
            continue
        names = [argument.name for argument in target._schema.arguments]
        given = dict(zip(names, node.args, strict=False)) | node.kwargs
        found |= dict.fromkeys(str(given[name]) for name in _GROUP if isinstance(given.get(name), str))
    return tuple(found)


def _divided_over(value: Any) -> list[str]:
    """The process groups whose ranks have a part each of a tensor."""
    mesh, placements = getattr(value, "device_mesh", None), getattr(value, "placements", ())
    if mesh is None:
        return []
    return [mesh.get_group(dim).group_name for dim, place in enumerate(placements) if not place.is_replicate()]
