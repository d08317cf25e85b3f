"""The plugin of vLLM-Omni (entry point ``vllm_omni.general_plugins``): whatever happens here, the engine serves."""

from __future__ import annotations

import logging
from typing import Any

NAME = "dit_cache"

logger = logging.getLogger("vllm_omni.fx_cache")


def register() -> None:
    """Puts the backend where the engine looks for one. Where it cannot be loaded, the engine runs uncached."""
    try:
        from fx_cache.integrations import vllm_omni
    except Exception as error:
        _run_uncached(error)
    else:
        vllm_omni.register()


def _run_uncached(error: Exception) -> None:
    from vllm_omni.diffusion.cache import selector
    from vllm_omni.diffusion.worker import diffusion_model_runner

    usual = selector.get_cache_backend

    def get_cache_backend(name: str | None, config: Any) -> Any:
        if name != NAME:
            return usual(name, config)
        logger.error(
            "dit_cache is off, and the engine runs uncached: got %s: %s while its plugin was loaded; expected "
            "vLLM-Omni 0.30 with the versions that it asks for; install these, or leave --cache-backend out.",
            type(error).__name__,
            error,
        )
        return None

    selector.get_cache_backend = get_cache_backend
    diffusion_model_runner.get_cache_backend = get_cache_backend
