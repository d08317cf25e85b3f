"""One line for a pipeline: finds its denoisers, and compiles them in place.

A pipeline is anything that has components: one of diffusers, or an object that holds modules. Nothing of diffusers is
imported: what its pipelines say at each call is heard in `fx_cache.runtime.contexts`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from fx_cache.capturing import RECOMPILES_APART
from fx_cache.config import CacheConfig, split_options
from fx_cache.control import configure, reset
from fx_cache.errors import OptionError
from fx_cache.profiles import Profiles, options_for
from fx_cache.runtime.contexts import leave
from fx_cache.runtime.named import session
from fx_cache.runtime.registry import stores
from fx_cache.runtime.sessions import Store
from fx_cache.runtime.summary import Summary, summarize

_TIME = ("t", "sigma", "sigmas")
"""Names of a timestep, beside those that have ``time`` in them."""

_OF_CONTROLS = "conditioning_scale"
"""An argument of what computes controls for a denoiser, to be scaled."""


@dataclass
class Enabled:
    """Denoisers that are compiled with the cache.

    Attributes:
        modules: by the name that the pipeline has for each; ``""`` for a module that was given itself.
        options: what each was compiled with.
    """

    modules: dict[str, nn.Module]
    options: dict[str, dict[str, Any]]
    _before: list[Callable[[], None]] = field(default_factory=list, repr=False)
    _ended: list[Store] = field(default_factory=list, repr=False)

    def disable(self) -> None:
        """Runs the denoisers as they ran before, compiled or not, and forgets what was cached. Once is enough."""
        self._ended += [store for module in self.modules.values() for store in stores(module)]
        while self._before:
            self._before.pop()()
        for module in self.modules.values():
            reset(module)
            leave(module)

    def summary(self, name: str | None = None) -> Summary:
        """What was cached (:func:`fx_cache.summary`), of all denoisers; in one session, or in all."""
        present = [store for module in self.modules.values() for store in stores(module)]
        found = summarize(self._ended or present)
        return Summary(tuple(s for s in found.sessions if name in (None, s["name"])))

    def session(self, name: str, branch: str | None = None, **said: Any) -> AbstractContextManager[None]:
        """Says to which request the calls inside belong: :func:`fx_cache.session`."""
        return session(name, branch, **said)

    def configure(self, **changes: Any) -> None:
        """Changes run-time options of every denoiser that has run: :func:`fx_cache.configure`."""
        for module in self.modules.values():
            if stores(module):
                configure(module, **changes)


def enable(
    target: Any,
    config: CacheConfig | Mapping[str, Any] | None = None,
    *,
    profile: Profiles | str | None = None,
    fullgraph: bool = False,
    dynamic: bool | None = None,
    **options: Any,
) -> Enabled:
    """Compiles the denoisers of a pipeline, or a module, in place with ``backend="dit_cache"``.

    Args:
        target: a pipeline or a module.
        config: options, as a :class:`fx_cache.CacheConfig` or by name.
        profile: options by patterns of class names, or ``"recommended"``; what `config` and `options` say goes first.
        fullgraph: whether a graph break is an error. Hooks that move weights break graphs.
        dynamic: as in ``torch.compile``.
        options: more options, which go before those of `config`; those that are not ours go to the inner compiler.

    Returns:
        A handle, to see what was cached and to take it off again.

    Raises:
        OptionError: nothing to compile, something that is compiled with this backend already or whose parts accelerate
            moves, or a wrong option.
    """
    if isinstance(config, CacheConfig):  # what it has by default it does not say
        config = {name: value for name, value in asdict(config).items() if value != getattr(CacheConfig, name)}
    given = {**(config or {}), **options}
    return enable_modules(denoisers(target), given, type(target), profile=profile, fullgraph=fullgraph, dynamic=dynamic)


def enable_modules(
    modules: Mapping[str, nn.Module],
    given: Mapping[str, Any],
    within: type,
    *,
    profile: Profiles | str | None,
    fullgraph: bool,
    dynamic: bool | None,
) -> Enabled:
    """Compiles modules in place; all of them or, after an error, none.

    Args:
        modules: by name.
        given: options.
        within: the class of the pipeline.
        profile: options by patterns of class names; those given go first.
        fullgraph: as in ``torch.compile``.
        dynamic: as in ``torch.compile``.
    """
    chosen = {}
    for name, module in modules.items():
        if getattr(module._compiled_call_impl, _MARK, False):
            raise OptionError(
                f"enable: got {type(module).__name__}, which runs with backend 'dit_cache' already; expected a module "
                "that does not; call disable() of its handle first."
            )
        moved = next((part for part, m in module.named_modules() if part and hasattr(m, "_hf_hook")), None)
        if moved is not None:
            raise OptionError(
                f"enable: got {type(module).__name__} with {moved!r}, which accelerate moves by itself (device map, "
                "sequential offload) and breaks the graph for; expected a module that is moved whole, or by diffusers' "
                "hooks; use reset_device_map() of the pipeline, enable_model_cpu_offload() or enable_group_offload()."
            )
        kinds = [kind.__name__ for kind in (*type(module).__mro__, within) if kind not in (object, nn.Module)]
        chosen[name] = {**options_for(kinds, profile), **given}
        split_options(chosen[name])
    enabled = Enabled(dict(modules), chosen)
    for name, module in modules.items():
        for part in module.modules():
            _take_off(part, enabled._before)
        module.compile(
            backend="dit_cache", options=chosen[name], fullgraph=fullgraph, dynamic=dynamic, **RECOMPILES_APART
        )
        setattr(module._compiled_call_impl, _MARK, True)
    return enabled


def denoisers(target: Any) -> dict[str, nn.Module]:
    """The denoisers of a pipeline by name: its modules that are told the time, but for those that make controls.

    Raises:
        OptionError: there is none.
    """
    components = getattr(target, "components", None)
    if not isinstance(components, Mapping):
        if isinstance(target, nn.Module):
            return {"": target}
        components = vars(target) if hasattr(target, "__dict__") else {}
    modules = {name: c for name, c in components.items() if isinstance(c, nn.Module)}
    found = {name: module for name, module in modules.items() if _denoises(module)}
    if not found:
        have = ", ".join(f"{name} ({type(module).__name__})" for name, module in modules.items()) or "no module"
        raise OptionError(
            f"enable: got {type(target).__name__} with {have}; expected a pipeline with a denoiser, which is a module "
            "whose forward takes a timestep, or a module; pass the transformer itself."
        )
    return found


_MARK = "__fx_cache_enabled__"


def _denoises(module: nn.Module) -> bool:
    names = list(inspect.signature(type(module).forward).parameters)
    return any("time" in name or name in _TIME for name in names) and _OF_CONTROLS not in names


def _take_off(part: nn.Module, before: list[Callable[[], None]]) -> None:
    """Runs a module uncompiled, and notes how to undo that: what is compiled in blocks is no graph of a transformer."""
    if part._compiled_call_impl is None:
        before.append(lambda: part.__dict__.pop("_compiled_call_impl", None))
    else:
        compiled = part._compiled_call_impl
        before.append(lambda: setattr(part, "_compiled_call_impl", compiled))
        part._compiled_call_impl = None
    forward = part.__dict__.get("forward")
    plain = getattr(forward, "_torchdynamo_orig_callable", None)
    if plain is not None:
        before.append(lambda: setattr(part, "forward", forward))
        part.forward = plain
