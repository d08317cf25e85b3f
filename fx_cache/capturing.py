"""Lets Dynamo capture a forward for somebody who looks at it, and leaves the user's own compiling alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

Backend = Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]

RECOMPILES_APART = (
    {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}
)
"""Newer versions of torch can count how often a function was compiled for each that compiles it."""


def captured(model: Any, backend: Backend, *, fullgraph: bool, dynamic: bool | None = None) -> Callable[..., Any]:
    """The forward of a model, compiled by `backend`, however often; not by what the model is compiled with in place.

    Args:
        model: a module, or the result of ``torch.compile(module)``.
        backend: is given every graph.
        fullgraph: whether a graph break is an error.
        dynamic: as ``torch.compile`` takes it.
    """
    target = getattr(model, "_orig_mod", model)
    if getattr(target, "_compiled_call_impl", None) is not None:
        target = target.forward
    compiled: Callable[..., Any] = torch.compile(
        target,
        backend=backend,
        fullgraph=fullgraph,
        dynamic=dynamic,
        **RECOMPILES_APART,  # type: ignore[call-overload]
    )
    return compiled
