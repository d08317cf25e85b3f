"""The ways to make a transformer fast that are compared, and the same steps reused by all of them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import nn

import fx_cache
from benchmarks.contest.models import Model
from fx_cache.runtime import gate
from fx_cache.runtime.policy import Verdict

STEPS = 28
WARMUP = 4
HITS_IN_A_ROW = 3


class Pattern:
    """Which steps reuse, the same for everybody: four are computed, then three of four reuse."""

    def __init__(self) -> None:
        self.step = 0

    def hit(self) -> bool:
        """Whether the present step reuses."""
        return self.step >= WARMUP and (self.step - WARMUP) % (HITS_IN_A_ROW + 1) < HITS_IN_A_ROW


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


def _whole(module: nn.Module, model: Model) -> Way:
    return Way(module, torch.compile(module, fullgraph=True))


def _regional(module: nn.Module, model: Model) -> Way:
    module.compile_repeated_blocks(fullgraph=True)
    return Way(module, module)


def _truncated(module: nn.Module, model: Model) -> Way:
    return _whole(model.truncated(module), model)


def _dit_cache(module: nn.Module, model: Model, **options: Any) -> Way:
    judge = gate.judge

    def forced(config: Any, diff: float) -> Verdict:
        judge(config, diff)
        return Verdict(True) if PATTERN.hit() else Verdict(False, "forced")

    gate.judge = forced
    return _with_options(module, residual_diff_threshold=MEASURED, **options)


def _never(module: nn.Module, model: Model) -> Way:
    return _with_options(module, residual_diff_threshold=0.0)


def _with_options(module: nn.Module, **options: Any) -> Way:
    options = {"Fn_compute_blocks": 1, "max_warmup_steps": WARMUP, **options}
    compiled = torch.compile(module, backend="dit_cache", fullgraph=True, options=options)
    way = Way(module, compiled)
    way.cached_bytes = lambda: _bytes_of(compiled)
    return way


def _bytes_of(compiled: nn.Module) -> int:
    sessions = fx_cache.summary(compiled).to_dict()["sessions"]
    branches = [b for s in sessions for b in s["branches"]]
    return sum(b["kept_bytes"] + sum(span["bytes"] for span in b["spans"]) for b in branches)


def _cache_dit(module: nn.Module, model: Model, finish: Callable[[nn.Module], Callable[..., Any]]) -> Way:
    logging.disable(logging.WARNING)
    import cache_dit
    from cache_dit.caching.cache_contexts.cache_manager import CachedContextManager

    decide = CachedContextManager.can_cache

    @torch.compiler.disable
    def forced(self: Any, *args: Any, **kwargs: Any) -> bool:
        decide(self, *args, **kwargs)
        return PATTERN.hit() and not self.is_in_warmup()

    CachedContextManager.can_cache = forced
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        residual_diff_threshold=MEASURED,
        max_warmup_steps=WARMUP,
        enable_separate_cfg=False,
        num_inference_steps=STEPS,
    )
    cache_dit.enable_cache(module, cache_config=config)
    cache_dit.set_compile_configs()
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
        return self.state_manager.get_state().head_block_residual is None or not PATTERN.hit()

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
        return utils.get_first_hidden_states_residual() is not None and PATTERN.hit()

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


@contextlib.contextmanager
def counted_syncs() -> Iterator[list[str]]:
    """Counts how often the host reads a tensor: on a GPU, how often it waits."""
    seen: list[str] = []
    patches = []
    for name in ("item", "tolist", "cpu", "__bool__", "__float__", "__int__"):
        original = getattr(torch.Tensor, name)

        def counted(self: torch.Tensor, *args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
            seen.append(_name)
            return _original(self, *args, **kwargs)

        patches.append(mock.patch.object(torch.Tensor, name, counted))
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield seen
