"""The policy, bound to one span of one branch at one step."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch

from fx_cache.runtime.given import Control
from fx_cache.runtime.policy import UNMEASURED, Counters, Verdict, decide, judge
from fx_cache.runtime.sessions import Store
from fx_cache.runtime.slots import Branch


class SpanGate:
    """The policy, bound to one span of one branch at one step."""

    def __init__(self, store: Store, branch: Branch, program: Hashable, span: int, control: Control) -> None:
        self._store = store
        self.control = control
        self._branch = branch
        self._program = program
        self._span = span
        self.reason: str | None = "not reached"

    def __call__(self, measure: Callable[[], torch.Tensor]) -> bool:
        """Decides. The host waits for the device at most once, and not where the policy settles the step alone."""
        verdict = self._settle()
        if verdict.reuse is not False and self._branch.pending:
            diff = measure() if verdict.reuse is None else None
            number = self._store.read_pending(self._branch, self._program, diff)
            verdict = self._settle()
            if verdict.reuse is None and number is not None:
                verdict = self._judge(number)
            elif verdict.reuse is None:
                verdict = Verdict(False, "not measured")
        elif verdict.reuse is None:
            verdict = self._judge(float(measure()))
        if verdict.reuse and self._step not in self._counters.diffs:
            self._counters.measured(self._step, UNMEASURED)
        self.reason = verdict.reason
        return bool(verdict.reuse)

    @property
    def _counters(self) -> Counters:
        return self._branch.slots[self._span].counters

    @property
    def _step(self) -> int:
        return self._branch.record.step

    def _settle(self) -> Verdict:
        branch, slot = self._branch, self._branch.slots[self._span]
        verdict = decide(self._branch.config, slot.counters, self._step, filled=slot.tensors is not None)
        if verdict.reason == "nothing cached" and slot.lost is not None:
            return Verdict(False, slot.lost)
        if verdict.reuse is not False and branch.doubt is not None:
            return Verdict(False, branch.doubt)
        if verdict.reuse is not False and not self.control.same(slot.control):
            return Verdict(False, "an input that feeds only the span changed")
        if verdict.reuse and not branch.blind:
            return Verdict(False, "direction of the timestep not known yet")
        return verdict

    def _judge(self, diff: float) -> Verdict:
        self._counters.measured(self._step, diff)
        return judge(self._branch.config, diff)
