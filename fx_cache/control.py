"""Changing a compiled model: its run-time options, and what it remembers."""

from __future__ import annotations

from typing import Any

import torch

from fx_cache.errors import SessionError
from fx_cache.runtime.named import check_name
from fx_cache.runtime.registry import stores
from fx_cache.runtime.relay import RELAYS


def configure(model: torch.nn.Module, **changes: Any) -> None:
    """Changes run-time options of a compiled model. Nothing is recompiled; the next step follows them.

    Args:
        model: the compiled model or the module in it; it must have run once.
        changes: run-time fields of :class:`fx_cache.CacheConfig`.

    Raises:
        OptionError: an unknown option, a value out of range, or an option that is fixed at compile time.
        SessionError: the model has not run with this backend.
    """
    found = stores(model)
    if not found:
        raise SessionError(
            f"configure: got {type(model).__name__}, which has not run with backend 'dit_cache'; expected a compiled "
            "model after its first call; set its first options in torch.compile(options=...)."
        )
    configs = [store.config.changed(changes) for store in found]
    for store, config in zip(found, configs, strict=True):
        store.config = config


def reset(model: torch.nn.Module | None = None) -> None:
    """Drops everything cached of a model, or of all models: requests are over, and the next call of each begins one.

    A request that is under way has to be begun again. Statistics stay.
    """
    RELAYS.reset(model)
    for store in stores(model):
        store.reset()


def end(name: str) -> None:
    """Ends a named session in every model: what was cached of it is freed. Statistics stay.

    A call under the name that is running goes on, and keeps nothing; a later one starts the session afresh. A name
    that no call was made under is no error: a request may be aborted before its first step.

    Raises:
        SessionError: a name that is no non-empty string.
    """
    check_name("name", name)
    RELAYS.end(name)
    for store in stores():
        store.end(name)


def offload(name: str) -> None:
    """Moves what is cached of a named session to the host, in every model; its next step brings it back.

    A branch at whose step a call is, and a span over several graphs, stay where they are. A name that no call was made
    under is no error.

    Raises:
        SessionError: a name that is no non-empty string.
    """
    check_name("name", name)
    for store in stores():
        store.offload(name)
