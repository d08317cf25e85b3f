"""Listens to diffusers pipelines: ``transformer.cache_context(name, step_index=...)`` says which pass a call is.

diffusers tells what is said there to every stateful hook in the model's hook registry. One such hook is put there, in
front of all others and beside the chain of forwards: it listens, and calls nothing.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

_NAME = "fx_cache"


class Listener:
    """What a pipeline says about the present call.

    Attributes:
        branch: name of the pass ("cond", "uncond"), None if nothing is said.
        step: number of the step, None if that is not said.
    """

    def __init__(self, state: Any) -> None:
        self._state = state

    @property
    def branch(self) -> str | None:
        return getattr(self._state._context, "name", None)

    @property
    def step(self) -> int | None:
        return getattr(self._state._context, "step_index", None)


def listen(root: Any) -> Listener | None:
    """A listener for a compiled model; None for models that pipelines say nothing about."""
    model = getattr(root, "_orig_mod", root)
    hooks = sys.modules.get("diffusers.hooks.hooks")
    if hooks is None or not isinstance(model, nn.Module) or not hasattr(type(model), "cache_context"):
        return None
    registry = hooks.HookRegistry.check_if_exists_or_initialize(model)
    if _NAME not in registry.hooks:
        _put_in_front(hooks, registry, model)
    return Listener(registry.hooks[_NAME].said)


def _put_in_front(hooks: Any, registry: Any, model: nn.Module) -> None:
    """Puts a hook where the registry looks for those to tell.

    `register_hook` would wrap the forward that has just been captured, and so have it captured anew. In front of the
    other hooks, with the model's own forward behind it, this one is in nobody's way when those are removed.
    """

    class Said(hooks.ModelHook):
        _is_stateful = True

        def __init__(self) -> None:
            super().__init__()
            self.said = hooks.StateManager(hooks.BaseState)

        def reset_state(self, module: nn.Module) -> nn.Module:
            self.said.set_context(None)
            return module

    hook = Said()
    hook.fn_ref = hooks.HookFunctionReference()
    behind = registry._fn_refs[0] if registry._fn_refs else None
    hook.fn_ref.forward = model.forward if behind is None else (behind.original_forward or behind.forward)
    registry.hooks[_NAME] = hook
    registry._hook_order.insert(0, _NAME)
    registry._fn_refs.insert(0, hook.fn_ref)
