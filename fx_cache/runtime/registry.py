"""Where the stores of a model are found: by its weights, which are the same whatever graph or wrapper runs them."""

from __future__ import annotations

import threading
import weakref
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

_lock = threading.RLock()


def store_of(
    anchor: torch.Tensor | None, config: CacheConfig, root: Any, compilation: Any, before: Store | None = None
) -> Store:
    """The store of the model that holds the weight `anchor`, for one compilation.

    Args:
        anchor: the weight; None: the model has none.
        config: the configuration that it was compiled with.
        root: what was compiled.
        compilation: what ``torch.compile`` made; None: that is not known, then one store serves a configuration.
        before: the one that it had by a weight that the model no longer holds.
    """
    with _lock:
        if anchor is None:
            store = before or Store(config, listen(root))
            _without_weight.add(store)
            return store
        key = config if compilation is None else compilation
        known = _by_weight.setdefault(anchor, [])
        found = next((store for made_by, store in known if made_by() is key), None)
        if found is None:
            found = before or Store(config, listen(root))
            # Until another one comes, the statistics of one that is over can still be asked for.
            known[:] = [(made_by, store) for made_by, store in known if made_by() is not None]
            known.append((weakref.ref(key), found))
        return found


def stores(model: torch.nn.Module | None = None) -> list[Store]:
    """The stores of a model (compiled or not), or of all models.

    Raises:
        FxCacheError: it is no module.
    """
    if model is not None and not isinstance(model, torch.nn.Module):
        raise FxCacheError(
            f"model: got {type(model).__name__}; expected a torch.nn.Module; pass the module that it calls, "
            "or nothing, which stands for all models."
        )
    with _lock:
        if model is None:
            known, others = list(_by_weight.values()), list(_without_weight)
        else:
            known, others = [_by_weight.get(w, []) for w in (*model.parameters(), *model.buffers())], []
        found = [store for of_weight in known for _, store in of_weight] + others
    return list({id(store): store for store in found}.values())
