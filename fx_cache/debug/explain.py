"""`explain`: what the backend sees in a model, without compiling anything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from fx_cache.backend import refuse_gradients, rewrite
from fx_cache.config import CacheConfig, split_options
from fx_cache.patterns.explanation import Explanation
from fx_cache.patterns.spans import Plan
from fx_cache.runtime.registry import stores


def explain(model: torch.nn.Module, *args: Any, **kwargs: Any) -> Explanation:
    """Runs a forward once, uncached, and says what the backend finds in its graphs.

    Args:
        model: a module, or the result of ``torch.compile(module, backend="dit_cache", ...)``, whose options count.
            For a module as such, those count with which it has run; without any, the defaults.
        args, kwargs: inputs of its forward.

    Returns:
        An :class:`Explanation` with ``stacks``, ``reason`` and ``to_dict()``; ``str()`` of it is for people.
    """
    config = _config_of(model)
    plans: list[Plan] = []
    names: dict[str, list[str]] = {}

    def look(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        del example_inputs
        found = rewrite(gm, config)
        refusal = refuse_gradients(gm) or found.plan.refusal
        plan = replace(found.plan, spans=() if refusal else found.plan.spans, refusal=refusal)
        plans.append(plan)
        if plan.spans or len(plans) == 1:
            inputs = list(found.gm.graph.find_nodes(op="placeholder"))
            for role in ("latents", "schedule", "conditioning", "scalars"):
                names[role] = [inputs[i].name for i in getattr(plan.roles, role)]
            alone = {i for of_span in plan.roles.controls for i in of_span}
            names["controls"] = [inputs[i].name for i in sorted(alone)]
        return gm.forward

    target = getattr(model, "_orig_mod", model)
    if getattr(target, "_compiled_call_impl", None) is not None:
        target = target.forward  # compiled in place: its own call would go to that backend
    with torch.no_grad():
        fullgraph = bool(getattr(getattr(model, "dynamo_ctx", None), "fullgraph", False))
        torch.compile(target, backend=look, fullgraph=fullgraph)(*args, **kwargs)
    return Explanation.of(plans, {k: tuple(v) for k, v in names.items()})


def _config_of(model: torch.nn.Module) -> CacheConfig:
    """The configuration that a compiled model was given or has run with; the default one for a bare module."""
    callback = getattr(getattr(model, "dynamo_ctx", None), "callback", None)
    for _ in range(8):
        if callback is None:
            break
        options = getattr(callback, "kwargs", {}).get("options") if hasattr(callback, "compiler_fn") else None
        if options is not None:
            return split_options(options)[0]
        callback = getattr(callback, "_torchdynamo_orig_backend", None) or getattr(callback, "compiler_fn", None)
    store = next(iter(stores(model)), None)
    return CacheConfig() if store is None else store.config
