"""Which ranks work on one sample together: those whose collectives stand among the blocks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

_GROUP = ("group_name", "group")
"""What collectives call the argument that names a process group."""


def groups_of(nodes: Iterable[fx.Node]) -> tuple[str, ...]:
    """Names of the process groups of all collectives among some nodes, in the order of their first use."""
    found: dict[str, None] = {}
    for node in nodes:
        target = node.target
        if isinstance(target, torch._ops.OpOverloadPacket):
            target = getattr(target, target.overloads()[0])
        if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
            continue
        names = [argument.name for argument in target._schema.arguments]
        given = dict(zip(names, node.args, strict=False)) | node.kwargs
        found |= dict.fromkeys(str(given[name]) for name in _GROUP if isinstance(given.get(name), str))
    return tuple(found)
