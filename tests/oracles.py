"""Peers as oracles: cache-dit's DBCache and diffusers' First Block Cache, run eagerly on copies of a model.

Every runner takes a model and a walk (see ``tests.models``), works on a deep copy, and reports what the peer decided at
each step. Nothing depends on timing, and no state is left in the model, so one model serves any number of runs.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

Walk = Sequence[Mapping[str, Any]]

# Smaller than any difference that is not exactly zero: the probe is compared and its difference recorded at every step
# after the warm-up, but nothing is reused. (At a threshold of 0 cache-dit does not compare at all.)
MEASURE_ONLY = 1e-12

# First Block Cache treats the whole model as one list.
WHOLE_MODEL = "model"


@dataclass
class OracleRun:
    """What a runner saw.

    Attributes:
        outputs: The sample of each step.
        hits: For each block list the steps (from 0) at which the peer reused.
        diffs: For each block list the relative difference of the probe at each step at which the peer compared; no
            entry where it did not (warm-up, a limit, no earlier probe). cache-dit records -1 where a threshold of 1 or
            more made it reuse without looking, and -2 where shapes differ.
        num_blocks: For each block list the number of blocks the peer counts in it.
    """

    outputs: list[Tensor]
    hits: dict[str, list[int]]
    diffs: dict[str, dict[int, float]] = field(default_factory=dict)
    num_blocks: dict[str, int] = field(default_factory=dict)

    def computed(self, name: str) -> list[int]:
        """The steps at which list ``name`` was computed."""
        return [step for step in range(len(self.outputs)) if step not in self.hits[name]]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide logging up to warnings: cache-dit reports every list it wraps, with its own handlers on its own loggers."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)


def tensors(output: Any) -> list[Tensor]:
    """The tensors of a model's output, in order: of a tuple, an output class, or lists of tensors."""
    leaves = tree_leaves(output.to_tuple() if hasattr(output, "to_tuple") else output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _sample(output: Any) -> Tensor:
    return tensors(output)[0]


def run_eager(model: nn.Module, walk: Walk) -> OracleRun:
    """The plain model through ``walk``."""
    with torch.no_grad():
        return OracleRun([_sample(model(**kwargs)) for kwargs in walk], {})


# Lists of blocks as (name, forward pattern), in the order they run.
_Lists = tuple[tuple[str, str], ...]

# cache-dit finds a registration by a prefix of the class name. It registers SD3 for the pipeline's name
# (StableDiffusion3Pipeline), which the transformer's name does not begin with: the same lists, spelled out.
_UNREGISTERED_LISTS: dict[str, _Lists] = {"SD3Transformer2DModel": (("transformer_blocks", "Pattern_1"),)}

# The lists that the registration merges (Flux: one list of all blocks) or leaves out (AuraFlow: the joint blocks always
# run), as lists with a context each.
_SEPARATE_LISTS: dict[str, _Lists] = {
    "FluxTransformer2DModel": (("transformer_blocks", "Pattern_1"), ("single_transformer_blocks", "Pattern_1")),
    "AuraFlowTransformer2DModel": (
        ("joint_transformer_blocks", "Pattern_1"),
        ("single_transformer_blocks", "Pattern_3"),
    ),
}


def run_cache_dit(
    model: nn.Module,
    walk: Walk,
    *,
    Fn: int,
    Bn: int,
    threshold: float,
    max_warmup_steps: int,
    warmup_interval: int = 1,
    max_cached_steps: int = -1,
    max_continuous_cached_steps: int = -1,
    max_accumulated_residual_diff_threshold: float | None = None,
    num_inference_steps: int | None = None,
    separate_lists: bool = False,
    calibrator_config: Any = None,
    **config: Any,
) -> OracleRun:
    """``model`` under cache-dit 1.5.3 in its transformer-only mode, one branch (no CFG separation).

    ``Fn`` and ``Bn`` hold for each list of blocks that cache-dit wraps. These are the lists of its registration; with
    ``separate_lists`` Flux and AuraFlow get a context for each of their two lists instead, each with its own probe,
    residuals and decision. ``config`` goes to ``DBCacheConfig`` as it is (``steps_computation_mask`` ...).

    A copy is wrapped for each run, so the context is always fresh: with ``num_inference_steps`` cache-dit itself renews
    it one call too late, and a second walk on one wrapped model would start in the first one's state.
    """
    transformer = copy.deepcopy(model)
    with _quiet(), torch.no_grad():
        # Imported late: importing cache-dit is slow and registers attention backends with diffusers.
        import cache_dit

        cache_config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=Fn,
            Bn_compute_blocks=Bn,
            residual_diff_threshold=threshold,
            max_warmup_steps=max_warmup_steps,
            warmup_interval=warmup_interval,
            max_cached_steps=max_cached_steps,
            max_continuous_cached_steps=max_continuous_cached_steps,
            max_accumulated_residual_diff_threshold=max_accumulated_residual_diff_threshold,
            # None would let the registration of the class turn it on (Wan, QwenImage).
            enable_separate_cfg=config.pop("enable_separate_cfg", False),
            num_inference_steps=num_inference_steps,
            **config,
        )
        target: Any = transformer
        class_name = type(model).__name__
        lists = _UNREGISTERED_LISTS.get(class_name)
        if separate_lists:
            lists = _SEPARATE_LISTS.get(class_name, lists)
        if lists is not None:
            target = cache_dit.BlockAdapter(
                transformer=transformer,
                blocks=[getattr(transformer, name) for name, _ in lists],
                blocks_name=[name for name, _ in lists],
                forward_pattern=[cache_dit.ForwardPattern[pattern] for _, pattern in lists],
                check_forward_pattern=True,
            )
        cache_dit.enable_cache(target, cache_config=cache_config, calibrator_config=calibrator_config)
        outputs = [_sample(transformer(**kwargs)) for kwargs in walk]

    hits: dict[str, list[int]] = {}
    diffs: dict[str, dict[int, float]] = {}
    for unique_name in transformer._context_names:
        # A context is called after its list and the identity of the list.
        name = unique_name.rsplit("_", 1)[0]
        context = transformer._context_manager.get_context(unique_name)
        hits[name] = list(context.get_cached_steps())
        diffs[name] = {int(step): float(diff) for step, diff in context.get_residual_diffs().items()}
    return OracleRun(outputs, hits, diffs, {name: _num_blocks(transformer, name, hits) for name in hits})


def _num_blocks(transformer: nn.Module, name: str, hits: Mapping[str, Any]) -> int:
    blocks = len(getattr(transformer, name))
    if type(transformer).__name__ == "FluxTransformer2DModel" and len(hits) == 1:
        blocks += len(transformer.single_transformer_blocks)
    return blocks


def run_first_block_cache(model: nn.Module, walk: Walk, *, threshold: float) -> OracleRun | None:
    """``model`` under diffusers' First Block Cache, or None where diffusers does not support the class.

    The decision is the head block's own, read after each call; ``diffs`` are computed from the very tensors that it
    compares. Support ends either at applying (the block's class is not registered) or in the first forward (SD3: the
    last block returns no text stream, and the hook subtracts from it).
    """
    from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache
    from diffusers.hooks.first_block_cache import _FBC_LEADER_BLOCK_HOOK
    from diffusers.hooks.hooks import CacheContext, _set_cache_context

    transformer = copy.deepcopy(model)
    try:
        apply_first_block_cache(transformer, FirstBlockCacheConfig(threshold=threshold))
    except ValueError:
        return None
    hooks = [
        registry.hooks[_FBC_LEADER_BLOCK_HOOK]
        for module in transformer.modules()
        if (registry := getattr(module, "_diffusers_hook", None)) and _FBC_LEADER_BLOCK_HOOK in registry.hooks
    ]
    (head,) = hooks

    step = 0
    hits: list[int] = []
    diffs: dict[int, float] = {}
    decide = head._should_compute_remaining_blocks

    def observed(probe: Tensor) -> bool:
        previous = head.state_manager.get_state().head_block_residual
        if previous is not None:
            diffs[step] = ((probe - previous).abs().mean() / previous.abs().mean()).item()
        compute = decide(probe)
        if not compute:
            hits.append(step)
        return compute

    head._should_compute_remaining_blocks = observed

    outputs: list[Tensor] = []
    with _quiet(), torch.no_grad():
        for step, kwargs in enumerate(walk):  # ``observed`` reads ``step``.
            # What model.cache_context("cond") does; DiT, PixArt and others have no such method.
            _set_cache_context(transformer, CacheContext("cond"))
            try:
                outputs.append(_sample(transformer(**kwargs)))
            except TypeError:
                if step == 0:
                    return None
                raise
            finally:
                _set_cache_context(transformer, None)
    blocks = sum(
        any(name.startswith("fbc_") for name in module._diffusers_hook.hooks)
        for module in transformer.modules()
        if getattr(module, "_diffusers_hook", None) is not None
    )
    return OracleRun(outputs, {WHOLE_MODEL: hits}, {WHOLE_MODEL: diffs}, {WHOLE_MODEL: blocks})


def thresholds_with_both(diffs: Mapping[str, Mapping[int, float]]) -> float:
    """A threshold between the measured differences of as many lists as possible.

    ``diffs`` are those of a run that reused nothing (``threshold=MEASURE_ONLY``). Up to the first hit a run under the
    returned threshold makes the very same comparisons, so each list with values on both sides has at least one hit, and
    a miss before it or (nearly always, as the distance to the last computed step grows) after it. Of the gaps that
    rounding cannot bridge the threshold lies in the one nearest the median, and below 1, where cache-dit would reuse
    without looking.
    """
    per_list = [sorted(value for value in values.values() if 0 < value < 1) for values in diffs.values()]
    pooled = sorted(value for values in per_list for value in values)
    gaps = [(low, high) for low, high in pairwise(pooled) if low < high]
    if not gaps:
        raise ValueError(f"no two different positive differences to put a threshold between: {diffs}")

    def quality(gap: tuple[float, float]) -> tuple[int, bool, int, float]:
        low, high = gap
        both = sum(bool(values) and values[0] <= low and values[-1] >= high for values in per_list)
        below = sum(value <= low for value in pooled)
        return both, high / low > 1.01, min(below, len(pooled) - below), high / low

    low, high = max(gaps, key=quality)
    return (low + high) / 2
