"""``--cache-backend dit_cache`` for vLLM-Omni.

Two ways to it, which do the same:

- installed beside the engine, this is found as a plugin (`fx_cache.integrations.plugin`);
- with no plugin, ``diffusion_model_runner_cls="fx_cache.integrations.vllm_omni.DitCacheRunner"``.

While the engine loads a model the runner hides the name of the backend: several of the engine's pipelines, and its step
mode, refuse every cache backend, since those that it knows hook into blocks and hold one request's state. What is named
here compiles whole transformers, and holds each request's state by its id.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import nn
from torch.distributed import distributed_c10d
from vllm.distributed import parallel_state
from vllm_omni.diffusion.cache import selector
from vllm_omni.diffusion.cache.base import CacheBackend
from vllm_omni.diffusion.data import DiffusionCacheConfig
from vllm_omni.diffusion.forward_context import get_forward_context, is_forward_context_available
from vllm_omni.diffusion.worker import diffusion_model_runner
from vllm_omni.diffusion.worker.diffusion_model_runner import DiffusionModelRunner
from vllm_omni.diffusion.worker.input_batch import InputBatch

import fx_cache
from fx_cache.config import OPTION_NAMES
from fx_cache.errors import OptionError
from fx_cache.integrations.pipelines import Enabled, denoisers, enable_modules
from fx_cache.integrations.plugin import NAME, logger
from fx_cache.profiles import recommended

DEFAULTS = {
    "Fn_compute_blocks": 1,
    "max_warmup_steps": 4,
    "residual_diff_threshold": 0.24,
    "max_continuous_cached_steps": 3,
}
"""Where the engine's defaults for cache-dit are other than cache-dit's own."""

_ELSEWHERE = {"scm_steps_mask_policy", "scm_steps_policy", "profiles", "num_inference_steps"}
"""Keys of the engine's that are read here, and are no options of the backend."""


class DitCacheBackend(CacheBackend):
    """The backend as the engine calls it: `enable` once, `refresh` at each request."""

    def __init__(self, config: Any = None) -> None:
        """
        Args:
            config: the engine's `DiffusionCacheConfig`, or its keys; those of cache-dit, and ``profiles``: options by
                patterns of class names (see :func:`fx_cache.enable`).

        Raises:
            OptionError: a key that no one here knows, or a wrong value.
        """
        super().__init__(
            config if isinstance(config, DiffusionCacheConfig) else DiffusionCacheConfig.from_dict(config or {})
        )
        self._options, self._profiles = read_config(self.config)
        self._steps: int | None = None
        self.handle: Enabled | None = None

    def enable(self, pipeline: Any) -> None:
        """Compiles every transformer of a pipeline whole, instead of what the engine has compiled of them."""
        modules = transformers(pipeline)
        self.handle = enable_modules(
            modules, self._options, type(pipeline), profile=self._profiles, fullgraph=False, dynamic=None
        )
        for module in modules.values():
            _leave_no_depth(module)
        _name_groups()
        self.enabled = True
        for name, options in self.handle.options.items():
            logger.info("dit_cache runs %s of %s with %s", name, type(pipeline).__name__, options)

    def refresh(self, pipeline: Any, num_inference_steps: int | None, verbose: bool = True) -> None:
        """A request begins. Nothing has to be forgotten for that: requests are told apart."""
        self._steps = num_inference_steps

    def disable(self, pipeline: Any) -> None:
        """Runs the transformers as they ran before."""
        if self.handle is not None:
            self.handle.disable()
        self.enabled = False

    def of_request(self, requests: int) -> dict[str, Any]:
        """The options of the present request, or of several that are run as one batch."""
        found: dict[str, Any] = {} if requests == 1 else {"batch_policy": "per_sample"}
        policy = self.config.scm_steps_mask_policy
        steps = self._steps
        if policy is not None and steps is not None and (steps >= 8 or steps in (4, 6)):
            import cache_dit

            found["steps_computation_mask"] = cache_dit.steps_mask(mask_policy=policy, total_steps=steps)
            found["steps_computation_policy"] = self.config.scm_steps_policy
        return found


def _leave_no_depth(module: nn.Module) -> None:
    """Puts the engine's count of nested shards back after each call.

    Some transformers count up at each call and never down. The captured code depends on the count: it would be captured
    anew at every step, and after a few steps not at all.
    """
    compiled = module._compiled_call_impl
    assert compiled is not None

    @functools.wraps(compiled)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not is_forward_context_available():
            return compiled(*args, **kwargs)
        context = get_forward_context()
        depth = context._sp_shard_depth
        try:
            return compiled(*args, **kwargs)
        finally:
            context._sp_shard_depth = depth

    module._compiled_call_impl = call


def _name_groups() -> None:
    """Lets torch know the engine's process groups by the names that its collectives have for them."""
    for name, reference in parallel_state._groups.items():
        group = reference()
        if group is None:
            continue
        try:
            distributed_c10d._resolve_process_group(name)
        except (RuntimeError, ValueError, KeyError):
            distributed_c10d._register_process_group(name, group.device_group)


def read_config(config: DiffusionCacheConfig) -> tuple[dict[str, Any], Any]:
    """Our options among the engine's, and the profiles.

    Options that are as the engine has them by default count as not given: a profile goes before those.

    Raises:
        OptionError: a key of another cache backend, one that nobody knows, or something that is not supported.
    """
    usual = DiffusionCacheConfig()
    names = [f.name for f in fields(usual) if not f.name.startswith("_")]
    given = {name: getattr(config, name) for name in names if getattr(config, name) != getattr(usual, name)}
    given |= config._extra_params
    if given.pop("enable_taylorseer", False):
        raise OptionError(
            "option 'enable_taylorseer': got True; expected False, since dit_cache reuses residuals and does not "
            "extrapolate them; remove it, or use --cache-backend cache_dit."
        )
    given.pop("taylorseer_order", None)
    for name in [*given]:
        if name not in OPTION_NAMES and name not in _ELSEWHERE:
            raise OptionError(
                f"cache_config key {name!r}: got a key that is none of dit_cache's; expected those of cache_dit, of "
                "fx_cache.CacheConfig, or 'profiles'; remove it, or use the cache backend that it belongs to."
            )
    profiles = {"*": DEFAULTS, **recommended(), **(given.get("profiles") or {})}
    return {name: value for name, value in given.items() if name not in _ELSEWHERE}, profiles


def transformers(pipeline: Any) -> dict[str, nn.Module]:
    """The transformers of one of the engine's pipelines, by their names, dotted ones too.

    Raises:
        OptionError: there is none.
    """
    wrapped = getattr(pipeline, "_pipeline", None)
    if wrapped is not None:  # one of diffusers
        return denoisers(wrapped)
    names = getattr(pipeline, "_dit_modules", None) or ("transformer", "transformer_2")
    found: dict[str, nn.Module] = {}
    for name in names:
        part: Any = pipeline
        for attribute in name.split("."):
            part = getattr(part, attribute, None)
        if isinstance(part, nn.Module):
            found[name] = part
    if not found:
        raise OptionError(
            f"dit_cache: got {type(pipeline).__name__} with no module at {', '.join(names)}; expected a pipeline that "
            "names its denoisers in _dit_modules; name them there, or run it without --cache-backend."
        )
    return found


class DitCacheRunner(DiffusionModelRunner):
    """The engine's runner; with ``cache_backend="dit_cache"`` every request is a session of its id."""

    _dit_cache: DitCacheBackend | None = None
    _steps: ByRequest | None = None

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        wanted = self.od_config.cache_backend == NAME
        if wanted:
            self.od_config.cache_backend = "none"
        super().load_model(*args, **kwargs)
        if not wanted:
            return
        try:
            backend = DitCacheBackend(self.od_config.cache_config)
            backend.enable(self.pipeline)
        except Exception as error:
            logger.error("dit_cache is off, and %s runs uncached: %s", type(self.pipeline).__name__, error)
            return
        self._dit_cache = self.cache_backend = backend
        if hasattr(self.pipeline, "denoise_step"):
            self._steps = ByRequest(self.pipeline, backend)

    def _execute_request_list(self, reqs: list[Any], **kwargs: Any) -> Any:
        backend = self._dit_cache
        if backend is None:
            return super()._execute_request_list(reqs, **kwargs)
        name = "+".join(req.request_id for req in reqs)
        params = reqs[0].sampling_params
        given = params.num_inference_steps or getattr(self.pipeline, "default_num_inference_steps", None)
        backend.refresh(self.pipeline, given)
        try:
            with fx_cache.session(name, config=backend.of_request(len(reqs))):
                outputs = super()._execute_request_list(reqs, **kwargs)
        finally:
            fx_cache.end(name)
        self._say(backend, name)
        return outputs

    def _say(self, backend: DitCacheBackend, name: str) -> None:
        """A request is over."""
        if self.od_config.enable_cache_dit_summary and backend.handle is not None:
            logger.info("dit_cache, request %s:\n%s", name, backend.handle.summary(name))

    def _refresh_cache_for_requests(self, reqs: list[Any], **kwargs: Any) -> None:
        if self._dit_cache is None:
            super()._refresh_cache_for_requests(reqs, **kwargs)

    def execute_stepwise(self, scheduler_output: Any) -> Any:
        outputs = super().execute_stepwise(scheduler_output)
        if self._dit_cache is not None and self._steps is not None:
            finished = {made.request_id for made in outputs.runner_outputs if made.finished}
            for name in self._steps.forget_all_but(self.state_cache.keys() - finished):
                self._say(self._dit_cache, name)
        return outputs


class ByRequest:
    """A pipeline's step, one request after another, so that what one gets depends on no other.

    Who is in a batch changes from step to step, and with it how far prompts are padded. So every request has a batch of
    its own, made before it meets others, whose tensors stay the same ones: by them its passes are told apart.
    """

    def __init__(self, pipeline: Any, backend: DitCacheBackend) -> None:
        self._prepare_encode = pipeline.prepare_encode
        self._denoise_step = pipeline.denoise_step
        self._backend = backend
        self._batches: dict[str, InputBatch] = {}
        pipeline.prepare_encode = self.prepare_encode
        pipeline.denoise_step = self

    def prepare_encode(self, state: Any, *args: Any, **kwargs: Any) -> Any:
        """A request begins."""
        result = self._prepare_encode(state, *args, **kwargs)
        self._batches[state.request_id] = InputBatch.make_batch([state])
        return result

    def __call__(self, input_batch: InputBatch, states: Sequence[Any] = (), **kwargs: Any) -> Any:
        made = []
        for state in states:
            batch = InputBatch.make_batch([state], cached_batch=self._batches.get(state.request_id))
            self._batches[state.request_id] = batch
            self._backend.refresh(None, None if state.timesteps is None else len(state.timesteps))
            options = self._backend.of_request(1)
            # Not by number: a chunk of a video begins afresh, and its steps are counted on.
            with fx_cache.session(state.request_id, config=options):
                made.append(self._denoise_step(batch, states=[state], **kwargs))
        return None if any(m is None for m in made) else torch.cat(made)

    def forget_all_but(self, running: Collection[str]) -> list[str]:
        """All other requests are over: finished, failed or aborted. Returns those that now are."""
        over = [request for request in self._batches if request not in running]
        for request in over:
            del self._batches[request]
            fx_cache.end(request)
        return over


def get_cache_backend(name: str | None, config: Any) -> CacheBackend | None:
    """The engine's selector, which knows this backend too."""
    return DitCacheBackend(config) if name == NAME else _get_cache_backend(name, config)


_get_cache_backend = selector.get_cache_backend


def register() -> None:
    """Puts this backend where the engine looks for one, and this runner for its own."""
    selector.get_cache_backend = get_cache_backend
    diffusion_model_runner.get_cache_backend = get_cache_backend
    diffusion_model_runner.DiffusionModelRunner = DitCacheRunner
