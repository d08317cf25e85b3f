"""Listens to diffusers pipelines: ``transformer.cache_context(name, step_index=...)`` says which pass a call is.

diffusers tells what is said there to every stateful hook in the model's hook registry. One such hook is put there, in
front of all others and beside the chain of forwards: it listens, and calls nothing. It can be copied and pickled with
the model, and be taken off.
"""

from __future__ import annotations

import importlib
import sys
import weakref
from functools import cache
from typing import Any

from torch import nn

_NAME = "fx_cache"
_HOOKS = "diffusers.hooks.hooks"


class Listener:
    """What a pipeline says about the present call, as soon as it has said anything at all."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._said: Any = None

    def begin(self) -> bool:
        """Begins to listen, if the model has a hook registry by now: what was said just before was not heard."""
        model = self._model()
        # Not made here: models look for it in their forward, and would be captured anew.
        registry = None if model is None else _registry(model)
        if model is None or registry is None:
            return False
        first = _NAME not in registry.hooks
        if first:
            _put_in_front(registry, model)
        self._said = registry.hooks[_NAME].said
        return first

    @property
    def branch(self) -> str | None:
        """Name of the pass ("cond", "uncond"), None if nothing is said."""
        return None if self._said is None else getattr(self._said._context, "name", None)

    @property
    def step(self) -> int | None:
        """Number of the step, None if that is not said."""
        return None if self._said is None else getattr(self._said._context, "step_index", None)


def listen(root: Any) -> Listener | None:
    """A listener for a compiled model; None for models that pipelines say nothing about."""
    model = getattr(root, "_orig_mod", root)
    if not isinstance(model, nn.Module) or not hasattr(type(model), "cache_context"):
        return None
    return Listener(model) if _HOOKS in sys.modules else None


def leave(model: nn.Module) -> None:
    """Takes the hook off a model, if it has one."""
    registry = _registry(model)
    hook = None if registry is None else registry.hooks.pop(_NAME, None)
    if registry is not None and hook is not None:
        registry._hook_order.remove(_NAME)
        registry._fn_refs = [ref for ref in registry._fn_refs if ref is not hook.fn_ref]


def _registry(model: nn.Module) -> Any:
    return model.__dict__.get("_diffusers_hook")


def _put_in_front(registry: Any, model: nn.Module) -> None:
    """Puts a hook where the registry looks for those to tell.

    `register_hook` would wrap the forward that has just been captured, and so have it captured anew. In front of the
    other hooks, with the model's own forward behind it, this one is in nobody's way when those are removed.
    """
    hooks: Any = sys.modules[_HOOKS]
    hook = _said()()
    hook.fn_ref = hooks.HookFunctionReference()
    behind = registry._fn_refs[0] if registry._fn_refs else None
    hook.fn_ref.forward = model.forward if behind is None else (behind.original_forward or behind.forward)
    registry.hooks[_NAME] = hook
    registry._hook_order.insert(0, _NAME)
    registry._fn_refs.insert(0, hook.fn_ref)


@cache
def _said() -> type:
    """The class of the hook. It is made where diffusers is there, and found by its name by whoever unpickles one."""
    hooks: Any = importlib.import_module(_HOOKS)

    class Said(hooks.ModelHook):
        _is_stateful = True

        def __init__(self) -> None:
            super().__init__()
            self.said = hooks.StateManager(hooks.BaseState)

        def reset_state(self, module: nn.Module) -> nn.Module:
            self.said.set_context(None)
            return module

    Said.__qualname__ = Said.__name__
    return Said


def __getattr__(name: str) -> Any:
    if name == "Said":
        return _said()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
