"""What a forward is given, leaf by leaf."""

from __future__ import annotations

from enum import Enum
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

PLAIN = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device, Enum)
"""Types of inputs that are compared by value."""

MAX_DEPTH = 4
"""How deep the inputs of a forward are looked into, in objects within objects."""


def contents(value: Any, depth: int = 0) -> list[Any]:
    """The leaves of a value, with what plain objects in it hold (a KV cache, say) in their place."""
    found: list[Any] = []
    for leaf in tree_leaves(value):
        held = getattr(leaf, "__dict__", None)
        opaque = isinstance(leaf, (*PLAIN, torch.Tensor, torch.nn.Module)) or callable(leaf)
        if opaque or not isinstance(held, dict) or depth >= MAX_DEPTH:
            found.append(leaf)
        else:
            found += [type(leaf).__name__, *contents(held, depth + 1)]
    return found
