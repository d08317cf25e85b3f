"""Where the stores of a model are found: by its weights, which are the same whatever graph or wrapper runs them."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from fx_cache.config import CacheConfig
from fx_cache.errors import FxCacheError
from fx_cache.runtime.contexts import listen
from fx_cache.runtime.sessions import Store

_by_weight: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""By weight [(what made it, store), ...]."""

_without_weight: weakref.WeakSet[Store] = weakref.WeakSet()


def store_of(anchor: torch.Tensor | None, config: CacheConfig, root: Any, compilation: Any) -> Store:
    """The store of the model that holds the weight `anchor`, for one compilation.

    Args:
        anchor: the weight; None: the model has none.
        config: the configuration that it was compiled with.
        root: what was compiled.
        compilation: what ``torch.compile`` made; None: that is not known, then one store serves a configuration.
    """
    if anchor is None:
        store = Store(config, listen(root))
        _without_weight.add(store)
        return store
    key = config if compilation is None else compilation
    known = _by_weight.setdefault(anchor, [])
    found = next((store for made_by, store in known if made_by() is key), None)
    if found is None:
        found = Store(config, listen(root))
        # Until another one comes, the statistics of one that is over can still be asked for.
        known[:] = [(made_by, store) for made_by, store in known if made_by() is not None]
        known.append((weakref.ref(key), found))
    return found


def stores(model: torch.nn.Module | None = None) -> Iterator[Store]:
    """The stores of a model (compiled or not), or of all models.

    Raises:
        FxCacheError: it is no module.
    """
    if model is not None and not isinstance(model, torch.nn.Module):
        raise FxCacheError(
            f"model: got {type(model).__name__}; expected a torch.nn.Module; pass the module that it calls, "
            "or nothing, which stands for all models."
        )
    if model is None:
        for known in list(_by_weight.values()):
            yield from [store for _, store in known]
        yield from _without_weight
        return
    for weight in [*model.parameters(), *model.buffers()]:
        yield from [store for _, store in _by_weight.get(weight, [])]
