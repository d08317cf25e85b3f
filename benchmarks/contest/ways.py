"""The ways to make a transformer fast that are compared, and the same steps reused by all of them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

import fx_cache
from benchmarks.contest.models import Model
from fx_cache.runtime import gate
from fx_cache.runtime.policy import Verdict
from fx_cache.runtime.summary import Summary

STEPS = 28
WARMUP = 4
HITS_IN_A_ROW = 3


class Pattern:
    """Which steps reuse, the same for everybody: four are computed, then three of four reuse."""

    def __init__(self) -> None:
        self.step = 0
        self.reused: set[int] = set()

    def hit(self) -> bool:
        """Whether the present step reuses."""
        return self.step >= WARMUP and (self.step - WARMUP) % (HITS_IN_A_ROW + 1) < HITS_IN_A_ROW

    def decide(self, can: bool = True) -> bool:
        """The same, noting that somebody does so.

        Args:
            can: whether there is something to reuse.
        """
        reuses = can and self.hit()
        if reuses:
            self.reused.add(self.step)
        return reuses


PATTERN = Pattern()
MEASURED = 0.5
"""A threshold at which everybody measures, whatever is decided then."""


class Way:
    """How a transformer is made fast.

    Attributes:
        call: what is called at each step.
        begin: to be called before each generation.
        within: the context of each call.
    """

    def __init__(self, module: nn.Module, call: Callable[..., Any]) -> None:
        self.call = call
        named = getattr(module, "cache_context", None)
        self.begin: Callable[[], Any] = lambda: None
        self.within: Callable[[], contextlib.AbstractContextManager[Any]] = (
            (lambda: named("cond")) if named is not None else contextlib.nullcontext
        )
        self.cached_bytes: Callable[[], int] | None = None


def _plain(module: nn.Module, model: Model) -> Way:
    return Way(module, module)


def _whole(module: nn.Module, model: Model, mode: str | None = None) -> Way:
    return Way(module, torch.compile(module, fullgraph=True, mode=mode))


def _with_settings(module: nn.Module, model: Model, way: Callable[[nn.Module, Model], Way]) -> Way:
    import cache_dit

    cache_dit.set_compile_configs()
    return way(module, model)


def _regional(module: nn.Module, model: Model) -> Way:
    module.compile_repeated_blocks(fullgraph=True)
    return Way(module, module)


def _truncated(module: nn.Module, model: Model) -> Way:
    return _whole(model.truncated(module), model)


class _Replayed:
    """A compiled model whose call is one CUDA graph: what it is called with is copied to where the graph reads it."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call
        self._graph: torch.cuda.CUDAGraph | None = None
        self._given: dict[str, Any] = {}
        self._static: dict[str, Any] = {}
        self._result: Any = None

    def __call__(self, **given: Any) -> Any:
        if self._graph is None:
            self._capture(given)
        for name, value in given.items():
            if isinstance(value, torch.Tensor) and value is not self._given[name]:
                self._static[name].copy_(value)
        self._given = given
        assert self._graph is not None
        self._graph.replay()
        return self._result

    def _capture(self, given: dict[str, Any]) -> None:
        self._given = given
        self._static = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in given.items()}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._call(**self._static)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._result = self._call(**self._static)


def _graphed(module: nn.Module, model: Model) -> Way:
    if not torch.cuda.is_available():
        raise RuntimeError("no CUDA")
    return Way(module, _Replayed(_truncated(module, model).call))


def _dit_cache(module: nn.Module, model: Model, **options: Any) -> Way:
    _overrule()
    return _with_options(module, residual_diff_threshold=MEASURED, **options)


def _enabled(module: nn.Module, model: Model) -> Way:
    _overrule()
    options = {"Fn_compute_blocks": 1, "max_warmup_steps": WARMUP, "residual_diff_threshold": MEASURED}
    enabled = fx_cache.enable(module, options, fullgraph=True)
    way = Way(module, module)
    way.cached_bytes = lambda: _bytes_of(enabled.summary())
    return way


def _overrule() -> None:
    judge = gate.judge

    def forced(config: Any, diff: float) -> Verdict:
        judge(config, diff)
        return Verdict(True) if PATTERN.decide() else Verdict(False, "forced")

    gate.judge = forced


def _never(module: nn.Module, model: Model) -> Way:
    return _with_options(module, residual_diff_threshold=0.0)


def _with_options(module: nn.Module, **options: Any) -> Way:
    options = {"Fn_compute_blocks": 1, "max_warmup_steps": WARMUP, **options}
    compiled = torch.compile(module, backend="dit_cache", fullgraph=True, options=options)
    way = Way(module, compiled)
    way.cached_bytes = lambda: _bytes_of(fx_cache.summary(compiled))
    return way


def _bytes_of(summary: Summary) -> int:
    branches = [b for s in summary.to_dict()["sessions"] for b in s["branches"]]
    return sum(b["kept_bytes"] + sum(span["bytes"] for span in b["spans"]) for b in branches)


_UNKNOWN_TO_CACHE_DIT = {"SD3Transformer2DModel": "Pattern_1"}
"""Classes that it knows by their pipelines alone, and the pattern that it has for them there."""


def _cache_dit(
    module: nn.Module, model: Model, finish: Callable[[nn.Module], Callable[..., Any]], tuned: bool = True
) -> Way:
    logging.disable(logging.WARNING)
    import cache_dit
    from cache_dit.caching.cache_contexts.cache_manager import CachedContextManager

    decide = CachedContextManager.can_cache

    @torch.compiler.disable
    def forced(self: Any, *args: Any, **kwargs: Any) -> bool:
        decide(self, *args, **kwargs)
        return PATTERN.decide(not self.is_in_warmup())

    CachedContextManager.can_cache = forced
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        residual_diff_threshold=MEASURED,
        max_warmup_steps=WARMUP,
        enable_separate_cfg=False,
        num_inference_steps=STEPS,
    )
    target: Any = module
    if type(module).__name__ in _UNKNOWN_TO_CACHE_DIT:
        target = cache_dit.BlockAdapter(
            transformer=module,
            blocks=[getattr(module, name) for name in model.stacks],
            blocks_name=list(model.stacks),
            forward_pattern=[cache_dit.ForwardPattern[_UNKNOWN_TO_CACHE_DIT[type(module).__name__]]],
            check_forward_pattern=True,
        )
    cache_dit.enable_cache(target, cache_config=config)
    cache_dit.set_compile_configs(descent_tuning=tuned)
    way = Way(module, finish(module))
    way.begin = lambda: cache_dit.refresh_context(module, num_inference_steps=STEPS)
    return way


def _first_block(module: nn.Module, model: Model, finish: Callable[[nn.Module], Callable[..., Any]]) -> Way:
    from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache
    from diffusers.hooks.first_block_cache import FBCHeadBlockHook
    from diffusers.hooks.hooks import CacheContext, HookRegistry, _set_cache_context

    decide = FBCHeadBlockHook._should_compute_remaining_blocks

    @torch.compiler.disable
    def forced(self: Any, residual: torch.Tensor) -> bool:
        decide(self, residual)
        return not PATTERN.decide(self.state_manager.get_state().head_block_residual is not None)

    FBCHeadBlockHook._should_compute_remaining_blocks = forced
    apply_first_block_cache(module, FirstBlockCacheConfig(threshold=MEASURED))
    way = Way(module, finish(module))

    @contextlib.contextmanager
    def within() -> Iterator[None]:
        _set_cache_context(module, CacheContext("cond"))
        yield
        _set_cache_context(module, None)

    way.within = within
    way.begin = lambda: HookRegistry.check_if_exists_or_initialize(module).reset_stateful_hooks()
    return way


def _para_attention(module: nn.Module, model: Model, finish: Callable[[nn.Module], Callable[..., Any]]) -> Way:
    import importlib

    from para_attn.first_block_cache import utils

    decide = utils.get_can_use_cache

    @torch.compiler.disable
    def forced(*args: Any, **kwargs: Any) -> bool:
        decide(*args, **kwargs)
        return PATTERN.decide(utils.get_first_hidden_states_residual() is not None)

    utils.get_can_use_cache = forced
    name = {"FluxTransformer2DModel": "flux", "WanTransformer3DModel": "wan"}[type(module).__name__]
    adapter = importlib.import_module(f"para_attn.first_block_cache.diffusers_adapters.{name}")
    adapter.apply_cache_on_transformer(module)
    way = Way(module, finish(module))
    way.begin = lambda: utils.set_current_cache_context(
        utils.create_cache_context(residual_diff_threshold=MEASURED, num_inference_steps=STEPS)
    )
    return way


def _compiled(module: nn.Module) -> Callable[..., Any]:
    return torch.compile(module)


def _regionally(module: nn.Module) -> Callable[..., Any]:
    module.compile_repeated_blocks()
    return module


def _as_it_is(module: nn.Module) -> Callable[..., Any]:
    return module


_TUNED = "max-autotune-no-cudagraphs"

WAYS: dict[str, Callable[[nn.Module, Model], Way]] = {
    "eager": _plain,
    "compile": _whole,
    "compile, regional": _regional,
    "first block and tail alone, compile": _truncated,
    "dit_cache": _dit_cache,
    "dit_cache, never reusing": _never,
    "dit_cache, hoist_invariants=False": lambda m, model: _dit_cache(m, model, hoist_invariants=False),
    "cache-dit": lambda m, model: _cache_dit(m, model, _as_it_is),
    "cache-dit + compile": lambda m, model: _cache_dit(m, model, _compiled),
    "cache-dit + compile, regional": lambda m, model: _cache_dit(m, model, _regionally),
    "FirstBlockCache + compile": lambda m, model: _first_block(m, model, _compiled),
    "FirstBlockCache + compile, regional": lambda m, model: _first_block(m, model, _regionally),
    "ParaAttention + compile": lambda m, model: _para_attention(m, model, _compiled),
}
"""By name, as it stands in the results."""

MORE_WAYS: dict[str, Callable[[nn.Module, Model], Way]] = {
    "first block and tail alone, CUDA graph": _graphed,
    "compile, reduce-overhead": lambda m, model: _whole(m, model, "reduce-overhead"),
    "compile, max-autotune": lambda m, model: _whole(m, model, _TUNED),
    "compile, cache-dit's settings": lambda m, model: _with_settings(m, model, _whole),
    "dit_cache, enable": _enabled,
    "dit_cache, reduce-overhead": lambda m, model: _dit_cache(m, model, mode="reduce-overhead"),
    "dit_cache, max-autotune": lambda m, model: _dit_cache(m, model, mode=_TUNED),
    "dit_cache, cache-dit's settings": lambda m, model: _with_settings(m, model, _dit_cache),
    "cache-dit + compile, torch's settings": lambda m, model: _cache_dit(m, model, _compiled, tuned=False),
}
"""Those that make a difference on a GPU; "max-autotune" is without CUDA graphs."""
