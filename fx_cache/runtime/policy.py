"""The decision, in cache-dit's order (its ``can_cache``), on host numbers only."""

from __future__ import annotations

from dataclasses import dataclass, field

from fx_cache.config import CacheConfig

ALWAYS_REUSE = 1.0
"""A threshold from which on a step reuses without measuring."""

UNMEASURED = -1.0
"""The diff that is recorded for a step that reused without measuring."""


@dataclass
class Counters:
    """What the policy remembers of one branch at one span, since its request began.

    Attributes:
        hits: steps that reused the span.
        misses: steps that computed it, with the reason.
        diffs: the measured residual diff of a step; -1.0 where a step reused without measuring.
        continuous: reused steps in a row up to the last step.
        accumulated: sum of the positive diffs.
    """

    hits: list[int] = field(default_factory=list)
    misses: dict[int, str] = field(default_factory=dict)
    diffs: dict[int, float] = field(default_factory=dict)
    continuous: int = 0
    accumulated: float = 0.0

    def record(self, step: int, reason: str | None) -> None:
        """Notes that `step` is over: a hit where `reason` is None, else a miss."""
        if reason is None:
            self.hits.append(step)
            self.continuous += 1
        else:
            self.misses[step] = reason
            self.continuous = 0

    def computed_after_all(self, step: int, reason: str) -> None:
        """Notes that `step` is a miss, whatever was decided."""
        if self.hits[-1:] == [step]:
            self.hits.pop()
        self.record(step, reason)

    def measured(self, step: int, diff: float) -> None:
        self.diffs[step] = diff
        if diff > 0.0:
            self.accumulated += diff


@dataclass(frozen=True)
class Verdict:
    """What the policy says of a step before any tensor is looked at.

    Attributes:
        reuse: True or False where it is settled, None where the diff decides.
        reason: why it computes; None otherwise.
        spent: whether it does so for the rest of the request; then the host has to know whether the next one has begun.
    """

    reuse: bool | None
    reason: str | None = None
    spent: bool = False


def decide(config: CacheConfig, counters: Counters, step: int, *, filled: bool) -> Verdict:
    """Settles a step as far as possible without data.

    Args:
        step: number of the step within the request, from 0.
        filled: whether the slot holds a probe and what was computed with it.
    """
    mask = config.steps_computation_mask
    warmup = config.max_warmup_steps
    if mask is not None:
        warmup = min(warmup, (*mask, 0).index(0))
    if step in range(0, warmup, config.warmup_interval):
        return Verdict(False, "warm-up")
    if mask is not None and step < len(mask):
        if mask[step]:
            return Verdict(False, "steps_computation_mask")
        if config.steps_computation_policy == "static":
            return Verdict(True) if filled else Verdict(False, "nothing cached")
    if 0 <= config.max_cached_steps <= len(counters.hits):
        return Verdict(False, "max_cached_steps", spent=True)
    if 0 <= config.max_continuous_cached_steps <= counters.continuous:
        return Verdict(False, "max_continuous_cached_steps")
    limit = config.max_accumulated_residual_diff_threshold
    if limit is not None and 0.0 < limit <= counters.accumulated:
        return Verdict(False, "max_accumulated_residual_diff_threshold", spent=True)
    if config.residual_diff_threshold <= 0.0:
        return Verdict(False, "threshold <= 0")
    if not filled:
        return Verdict(False, "nothing cached")
    if config.residual_diff_threshold >= ALWAYS_REUSE:
        return Verdict(True)
    return Verdict(None)


def judge(config: CacheConfig, diff: float) -> Verdict:
    """Settles a step by its measured diff; a diff that is no finite number is never a hit."""
    if not diff < float("inf") or diff != diff:
        return Verdict(False, "probe not finite")
    if diff < config.residual_diff_threshold:
        return Verdict(True)
    return Verdict(False, "diff >= threshold")
