"""Caching for diffusion transformers as a torch.compile backend: ``torch.compile(model, backend="dit_cache")``."""

from fx_cache.config import CacheConfig
from fx_cache.control import configure, end, offload, reset
from fx_cache.debug.explain import explain
from fx_cache.errors import CacheWarning, ExportError, FxCacheError, OptionError, SessionError
from fx_cache.exporting.program import export
from fx_cache.integrations.pipelines import enable
from fx_cache.runtime.named import session
from fx_cache.runtime.summary import summary

__all__ = [
    "CacheConfig",
    "CacheWarning",
    "ExportError",
    "FxCacheError",
    "OptionError",
    "SessionError",
    "configure",
    "enable",
    "end",
    "explain",
    "export",
    "offload",
    "reset",
    "session",
    "summary",
]
