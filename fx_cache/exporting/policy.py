"""The policy of `fx_cache.runtime.policy` in tensors: what a step does is known only where the program runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fx_cache.config import CacheConfig
from fx_cache.runtime.policy import ALWAYS_REUSE, UNMEASURED


@dataclass(frozen=True)
class Counts:
    """What the policy remembers of one span since its request began: tensors of no dimensions, on the host.

    Attributes:
        step: number of this step, int64.
        hits: steps that reused the span, int64.
        continuous: of these the last ones in a row, int64.
        accumulated: sum of the positive diffs, float64.
    """

    step: Tensor
    hits: Tensor
    continuous: Tensor
    accumulated: Tensor


@dataclass(frozen=True)
class Decision:
    """Whether a step reuses (bool), and its diff (float64; -1.0: not measured): without dimensions, on the host."""

    reuse: Tensor
    diff: Tensor

    def counted(self, counts: Counts) -> Counts:
        """What is remembered behind this step."""
        return Counts(
            counts.step + 1,
            counts.hits + self.reuse,
            torch.where(self.reuse, counts.continuous + 1, 0),
            torch.where(self.diff > 0.0, counts.accumulated + self.diff, counts.accumulated),
        )


def decide(config: CacheConfig, counts: Counts, changed: Tensor, measure: Callable[[Tensor], Tensor]) -> Decision:
    """Decides one span at one step; measures only where nothing else settles it.

    Args:
        config: its run-time options.
        counts: of the span.
        changed: whether an input that feeds only the span is another than at the step that is reused.
        measure: takes whether it is not needed, and gives the diff (float64, on the host), -1.0 if it is not.
    """
    computes, reuses = _settled(config, counts)
    reuses = reuses & ~computes & ~changed
    computes = computes | changed
    if config.residual_diff_threshold <= 0.0 or config.residual_diff_threshold >= ALWAYS_REUSE:
        return Decision(reuses, torch.full((), UNMEASURED, dtype=torch.float64, device="cpu"))
    diff = measure(computes | reuses)
    passes = torch.isfinite(diff) & (diff < config.residual_diff_threshold)
    return Decision(reuses | (~computes & passes), diff)


def _settled(config: CacheConfig, counts: Counts) -> tuple[Tensor, Tensor]:
    """Whether a step computes, or else reuses, without a look at the diff; in the order of `runtime.policy.decide`."""
    step = counts.step
    mask = config.steps_computation_mask
    warmup = config.max_warmup_steps
    if mask is not None:
        warmup = min(warmup, (*mask, 0).index(0))
    filled = step > 0  # the first step computes, and fills it
    computes = ~filled
    reuses = torch.zeros((), dtype=torch.bool, device="cpu")
    if warmup > 0:
        computes = computes | ((step < warmup) & (step % config.warmup_interval == 0))
    if mask is not None:
        known = step < len(mask)
        at = step.clamp(max=len(mask) - 1).reshape(1)  # as a tensor: torch 2.11 takes an index for a number
        one = torch.tensor(mask, dtype=torch.bool, device="cpu").index_select(0, at).reshape(())
        computes = computes | (known & one)
        if config.steps_computation_policy == "static":
            reuses = known & ~one & ~computes
    limited = torch.zeros((), dtype=torch.bool, device="cpu")
    if config.max_cached_steps >= 0:
        limited = limited | (counts.hits >= config.max_cached_steps)
    if config.max_continuous_cached_steps >= 0:
        limited = limited | (counts.continuous >= config.max_continuous_cached_steps)
    limit = config.max_accumulated_residual_diff_threshold
    if limit is not None and limit > 0.0:
        limited = limited | (counts.accumulated >= limit)
    if config.residual_diff_threshold <= 0.0:
        limited = torch.ones((), dtype=torch.bool, device="cpu")
    computes = computes | (limited & ~reuses)
    if config.residual_diff_threshold >= ALWAYS_REUSE:
        reuses = reuses | ~computes
    return computes, reuses
