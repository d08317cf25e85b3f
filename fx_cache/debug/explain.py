"""`explain`: what the backend sees in a model, without compiling anything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from fx_cache.backend import read_graph
from fx_cache.capturing import captured
from fx_cache.config import CacheConfig, split_options
from fx_cache.errors import Failure, Refusal
from fx_cache.patterns.explanation import Explanation
from fx_cache.patterns.spans import Plan
from fx_cache.runtime.registry import stores
from fx_cache.runtime.relay import ObservedForward, Relays

_OTHER_STACK = Refusal(
    "this graph",
    "a stack with less work than another one of the forward",
    "the stack with the most work, or nearly as much",
    "nothing is to be done",
)


def explain(model: torch.nn.Module, *args: Any, **kwargs: Any) -> Explanation:
    """Runs a forward once, uncached, and says what the backend finds in its graphs.

    Args:
        model: a module, or the result of ``torch.compile(module, backend="dit_cache", ...)``, whose options count.
            For a module as such, those count with which it has run; without any, the defaults.
        args, kwargs: inputs of its forward.

    Returns:
        An :class:`Explanation` with ``stacks``, ``reason`` and ``to_dict()``; ``str()`` of it is for people.
    """
    return explain_with(_config_of(model), model, *args, **kwargs)


def explain_with(config: CacheConfig, model: torch.nn.Module, *args: Any, **kwargs: Any) -> Explanation:
    """`explain` under a given configuration."""
    plans: list[Plan] = []
    programs: list[str] = []
    whole: list[bool] = []
    relays = Relays()
    names: list[dict[str, tuple[str, ...]]] = []

    def look(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        del example_inputs
        found = read_graph(gm, config)
        plan = found.plan if found.refusal is None else replace(found.plan, spans=(), refusal=found.refusal)
        plans.append(plan)
        names.append({} if found.rewritten is None else _names(found.rewritten.gm, plan))
        programs.append("" if found.facts is None else found.facts.program.wiring)
        whole.append(found.whole)
        if found.facts is None:
            return gm.forward
        return ObservedForward(gm.forward, found.facts, config, relays)

    with torch.no_grad():
        fullgraph = bool(getattr(getattr(model, "dynamo_ctx", None), "fullgraph", False))
        compiled = captured(model, look, fullgraph=fullgraph)
        compiled(*args, **kwargs)
    relay = relays.last
    if all(whole) or relay is None or relay.read() is None:
        return Explanation.of(plans, names[0] if names else None)
    refusal = _OTHER_STACK if relay.refusal is None else relay.refusal
    plans = [
        plan
        if program in relay.enabled or isinstance(plan.refusal, Failure)
        else replace(plan, spans=(), refusal=refusal)
        for plan, program in zip(plans, programs, strict=True)
    ]
    inputs = next((n for n, plan in zip(names, plans, strict=True) if plan.spans), None)
    return Explanation.of(plans, inputs, relay.plans)


def _names(gm: fx.GraphModule, plan: Plan) -> dict[str, tuple[str, ...]]:
    """The names of a graph's inputs by role."""
    inputs = [n.name for n in gm.graph.find_nodes(op="placeholder")]
    roles = ("latents", "schedule", "conditioning", "scalars")
    found = {role: tuple(inputs[i] for i in getattr(plan.roles, role)) for role in roles}
    return {**found, "controls": tuple(inputs[i] for i in plan.roles.controls)}


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
    found = stores(model) if isinstance(model, torch.nn.Module) else []
    return found[0].config if found else CacheConfig()
