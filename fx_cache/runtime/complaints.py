"""What is said to the user when a request ends that reused nothing although it could have."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Hashable

from fx_cache.config import CacheConfig
from fx_cache.errors import CacheWarning
from fx_cache.runtime.clock import EITHER, REPEATED, RESTED, STEP_REPEATED
from fx_cache.runtime.slots import BranchRecord

ENOUGH = 8
"""Steps behind the warm-up that a request has at least, for its having no hit to be worth a word."""

MAX_BEGUN = 16
"""Calls in a row each of which began a request at another time than the one before, before that is worth a word."""

MAX_CHANGED = 8
"""Calls in a row before each of which the weights had changed, before that is worth a word."""

CHOSEN = {"threshold <= 0", "max_cached_steps", "max_continuous_cached_steps"}
"""Reasons of misses that the user has chosen."""

REMEDIES = {
    "diff >= threshold": "raise residual_diff_threshold",
    "probe not finite": "look at the model's inputs for NaN and Inf",
    "max_bytes": "raise max_bytes",
    **dict.fromkeys((REPEATED, RESTED, STEP_REPEATED, EITHER), "name it and its passes with fx_cache.session"),
}

NOT_APART = (
    "option 'batch_policy': got 'per_sample' for a span whose values do not have one row for each sample; expected "
    "such values throughout; all samples are decided together, as by 'all'."
)


_CHANGING = (
    f"the last {MAX_CHANGED} calls: got weights or tensors of the model that others were set in, or written to, before "
    "each; expected the same ones over the steps of a request; hand what changes to the forward as an input."
)


_RENEWED = (
    f"the last {MAX_BEGUN} calls of named branches: got other conditioning at each, and no later time, and none reused "
    "anything; expected prompt embeddings, masks and ids in the same tensors over the steps of a request, or a time "
    "that moves; keep them in the same tensors, or count the steps with fx_cache.session(..., step=i)."
)


class Complaints:
    """What there is to say of one model's requests. Only the first thing is said, and only once."""

    def __init__(self) -> None:
        self._text: str | None = None
        self._said = False
        self._begun = 0
        self._at: Hashable = None
        self._changed = 0

    def weights(self, changed: bool) -> None:
        """Whether the weights had changed before a call."""
        self._changed = self._changed + 1 if changed else 0
        if self._changed == MAX_CHANGED:
            self._note(_CHANGING)

    def not_gone_on(self, at: Hashable, apart: bool) -> None:
        """Nothing shows that a call goes on with a request, `at` this time: many may begin at one time, side by side.

        Args:
            at: the time.
            apart: whether numbers that may tell it were seen to move apart.
        """
        self._begun += at != self._at or not at
        self._at = at
        if self._begun == MAX_BEGUN:
            self._note(_moving_apart(self._begun) if apart else _one_step_each(self._begun))

    def renewed(self) -> None:
        """A named pass was given other conditioning at the time of its last call, or at an earlier one."""
        self._begun += 1
        if self._begun == MAX_BEGUN:
            self._note(_RENEWED)

    def went_on(self) -> None:
        """A call has gone on with a request."""
        self._begun = 0

    def too_many_passes(self, name: str, limit: int) -> None:
        """A pass of a named session had to go, since it has more than are kept."""
        self._note(
            f"session {name!r}: got more than {limit} passes that are known by their inputs alone, or inputs that are "
            f"others at every step; expected at most {limit} passes; name them: fx_cache.session(name, branch=...)."
        )

    def ended(self, record: BranchRecord, config: CacheConfig) -> None:
        """A request is over."""
        self._note(_without_hits(record, config))

    def lasts(self, record: BranchRecord, config: CacheConfig) -> None:
        """What a request is in doubt of lasts until it is over."""
        if self._text is None:
            self.ended(record, config)

    def not_apart(self) -> None:
        """Samples of a batch are to be decided one by one, and cannot be."""
        self._note(NOT_APART)

    def say(self) -> None:
        """Warns, where there is a reason."""
        if self._text is not None and not self._said:
            self._said = True
            warnings.warn(f"dit_cache: {self._text}", CacheWarning, stacklevel=2)

    def _note(self, text: str | None) -> None:
        self._text = self._text or text


def _without_hits(record: BranchRecord, config: CacheConfig) -> str | None:
    """What to say of a branch whose request is over; None if it had a hit, was short, or was not to reuse anything."""
    misses = Counter(r for slot in record.slots for r in slot.counters.misses.values() if r != "warm-up")
    if any(slot.reused for slot in record.slots) or misses.total() < ENOUGH * max(1, len(record.slots)):
        return None
    reason, count = misses.most_common(1)[0]
    if reason in CHOSEN:
        return None
    diffs = [d for slot in record.slots for d in slot.counters.diffs.values() if d >= 0.0]
    measured = ""
    if reason == "diff >= threshold" and diffs:
        measured = f", the least {min(diffs):.4f}, the threshold {config.residual_diff_threshold}"
    remedy = REMEDIES.get(reason, "see fx_cache.summary() and docs/sessions.md")
    return (
        f"a request of {record.step + 1} steps: got no step that reused anything ({count} times: {reason}"
        f"{measured}); expected some; {remedy}."
    )


def _moving_apart(count: int) -> str:
    """What to say when it is not known which of several numbers is the time."""
    return (
        f"the last {count} calls: got several numbers that may be the time and do not move together (guidance, the "
        "place of a window), and none reused anything; expected one that moves from step to step; name the request and "
        "its branch with fx_cache.session."
    )


def _one_step_each(count: int) -> str:
    """What to say when no call goes on with an earlier one."""
    return (
        f"the last {count} calls: got a request of its own from each, and none reused anything; expected calls of one "
        "request to be given the same conditioning objects; keep prompt embeddings, masks and ids in the same tensors "
        "over its steps, or name it with fx_cache.session."
    )
