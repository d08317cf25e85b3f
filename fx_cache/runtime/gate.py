"""The policy, bound to one span of one branch at one step."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property

import torch

from fx_cache.errors import guarded
from fx_cache.runtime.batches import MixedHit, Separation
from fx_cache.runtime.device import Readback, captured
from fx_cache.runtime.given import Control
from fx_cache.runtime.identity import ContentHold, StorageHold
from fx_cache.runtime.policy import UNMEASURED, Counters, Verdict, decide, judge
from fx_cache.runtime.ranks import agree
from fx_cache.runtime.sessions import Store
from fx_cache.runtime.slots import Branch

NOT_REACHED = Verdict(False, "not reached")
CAPTURED = Verdict(False, "a graph is captured: nothing can be read from the device")
NOT_MEASURED = Verdict(False, "not measured")
FAILED = Verdict(False, "an error of dit_cache")


class SpanGate:
    """The policy, bound to one span of one branch at one step.

    Attributes:
        failed: whether an error of ours has ended it; then the span computes.
    """

    def __init__(
        self,
        store: Store,
        branch: Branch,
        span: int,
        control: Control,
        separation: Separation,
    ) -> None:
        """
        Args:
            store: where the branch is kept.
            branch: the branch.
            span: number of the span in the graph.
            control: the inputs that feed only the span.
            separation: how some samples of a batch are computed by themselves.
        """
        self._store = store
        self._control = control
        self._branch = branch
        self._span = span
        self._separation = separation
        self._verdicts = [NOT_REACHED]
        self.failed = False

    def __call__(
        self,
        measure: Callable[[], torch.Tensor],
        samples: int = 1,
        separable: bool = False,
        ranks: tuple[tuple[str, ...], torch.device] | None = None,
    ) -> bool | MixedHit:
        """Whether the span, or which samples of it, are reused; arguments as `decide` takes them."""
        with guarded("decide"):
            return self.decide(measure, samples, separable, ranks)
        self.failed, self._verdicts = True, [FAILED]
        return False

    def decide(
        self,
        measure: Callable[[], torch.Tensor],
        samples: int,
        separable: bool,
        ranks: tuple[tuple[str, ...], torch.device] | None,
    ) -> bool | MixedHit:
        """Decides. The host waits for the device at most once, and not where the policy settles the step alone.

        Args:
            measure: the diff of each sample; with `ranks` the sums that it is made of.
            samples: their number.
            separable: whether each may be decided by itself.
            ranks: the process groups that decide together, and where the probe is; None: this rank alone.
        """
        diffs: list[float] | None
        verdicts = self._settle(samples, separable)
        if captured():
            known = ranks is None and not self._branch.pending
            verdicts = [v if v.reuse is False or (known and v.reuse) else CAPTURED for v in verdicts]
            diffs = []
        elif ranks is not None:
            if self._branch.pending:
                self._store.read_pending(self._branch)
                verdicts = self._settle(samples, separable)
            sums = measure() if any(v.reuse is None for v in verdicts) else None
            verdicts, diffs = agree(verdicts, samples, sums, *ranks)
        elif self._branch.pending and any(v.reuse is not False or v.spent for v in verdicts):
            diff = measure() if any(v.reuse is None for v in verdicts) else None
            diffs = self._store.read_pending(self._branch, diff)
            verdicts = self._settle(samples, separable)
        else:
            diffs = Readback([measure()]).take() if any(v.reuse is None for v in verdicts) else []
        if any(v.reuse is None for v in verdicts):
            verdicts = self._judge(verdicts, diffs)
        self._verdicts = verdicts
        misses = tuple(i for i, v in enumerate(verdicts) if not v.reuse)
        for counters, verdict in self._decided():
            if verdict.reuse and self._step not in counters.diffs:
                counters.measured(self._step, UNMEASURED)
        if 0 < len(misses) < len(verdicts):
            return MixedHit(misses, self._separation)
        return not misses

    @property
    def verdict(self) -> Verdict:
        """That of the first sample that computes, if any does."""
        return next((v for v in self._verdicts if not v.reuse), self._verdicts[0])

    def remember_control(self) -> None:
        """Notes what the span was computed from: nothing that is known, if that was written to meanwhile."""
        slot = self._branch.slots[self._span]
        if self._times is not None:
            slot.times.computed(self._times)
        if self._control.written:
            slot.control = None
        elif slot.control is None or self._others_changed:  # none: meanwhile it was seen that a request begins here
            slot.control = self._control.hold(self._branch.owner is not None and slot.made_anew is not False)

    @cached_property
    def _control_changed(self) -> bool:
        """Whether the span was computed from other inputs, as far as these feed nothing else."""
        times = self._branch.slots[self._span].times
        return self._others_changed or (self._times is not None and times.changed(self._times, self._control.asked))

    @cached_property
    def _others_changed(self) -> bool:
        """The same but for what looks like the time."""
        slot = self._branch.slots[self._span]
        changed = slot.control is None or not slot.control.same(self._control.inputs, self._control.identity)
        if isinstance(slot.control, ContentHold):
            slot.made_anew = bool(slot.control.inputs) and not changed
        return changed

    @cached_property
    def _times(self) -> StorageHold | None:
        """Inputs of the present step that look like the time."""
        return None if self._control.times is None else self._control.times.hold(by_content=False)

    def record(self) -> None:
        """Notes that the step is over."""
        if self._times is not None:
            self._branch.slots[self._span].times.over(self._times)
        for counters, verdict in self._decided():
            counters.record(self._step, verdict.reason)

    def _decided(self) -> list[tuple[Counters, Verdict]]:
        """What was decided of the whole step, and of each sample that is decided by itself."""
        slot = self._branch.slots[self._span]
        apart = len(slot.samples) == len(self._verdicts)
        return [(slot.counters, self.verdict), *zip(slot.samples if apart else (), self._verdicts, strict=False)]

    @property
    def _step(self) -> int:
        return self._branch.record.step

    def _settle(self, samples: int, separable: bool) -> list[Verdict]:
        """What the policy says without the diff: of each sample, or of all together."""
        apart = samples > 1 and self._branch.config.batch_policy == "per_sample"
        if apart and not separable:
            self._store.not_apart()
        slot = self._branch.slots[self._span]
        slot.separate(samples if apart and separable else 1)
        return [self._settled(counters) for counters in slot.samples or [slot.counters]]

    def _settled(self, counters: Counters) -> Verdict:
        branch, slot = self._branch, self._branch.slots[self._span]
        steps = self._step - branch.record.began
        verdict = decide(branch.config, counters, steps, filled=bool(slot.tensors))
        if verdict.reason == "nothing cached" and slot.lost is not None:
            return Verdict(False, slot.lost)
        if verdict.reuse is not False and branch.doubt is not None:
            return Verdict(False, branch.doubt)
        if verdict.reuse is not False and self._control_changed:
            return Verdict(False, self._control.doubt or "an input that feeds only the span changed")
        return verdict

    def _judge(self, verdicts: list[Verdict], diffs: list[float] | None) -> list[Verdict]:
        """The same with the diffs, one for each sample; None: they were not measured."""
        if diffs is None:
            return [v if v.reuse is not None else NOT_MEASURED for v in verdicts]
        slot, config = self._branch.slots[self._span], self._branch.config
        together = _best(diffs) if config.batch_policy == "any" else _worst(diffs)
        slot.counters.measured(self._step, together)
        if not slot.samples:
            return [judge(config, together)]
        judged = []
        for verdict, counters, diff in zip(verdicts, slot.samples, diffs, strict=True):
            if verdict.reuse is None:
                counters.measured(self._step, diff)
                verdict = judge(config, diff)
            judged.append(verdict)
        return judged


def _worst(diffs: list[float]) -> float:
    return next((d for d in diffs if not math.isfinite(d)), max(diffs, default=math.nan))


def _best(diffs: list[float]) -> float:
    return min((d for d in diffs if math.isfinite(d)), default=math.nan)
