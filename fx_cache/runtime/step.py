"""Runs one step: finds the branch, hands its state to the rewritten graph, keeps the new state if all went well."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any

import torch

from fx_cache.config import CacheConfig
from fx_cache.patterns.inputs import InputRoles
from fx_cache.runtime.origins import Control, Source, read_given
from fx_cache.runtime.policy import UNMEASURED, Counters, Verdict, decide, judge
from fx_cache.runtime.registry import store_of
from fx_cache.runtime.sessions import Branch, Store


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
        verdict = decide(self._store.config, slot.counters, self._step, filled=slot.tensors is not None)
        if verdict.reuse is not False and branch.doubt is not None:
            return Verdict(False, branch.doubt)
        if verdict.reuse is not False and not self.control.same(slot.control):
            return Verdict(False, "an input that feeds only the span changed")
        if verdict.reuse and not branch.blind:
            return Verdict(False, "direction of the timestep not known yet")
        return verdict

    def _judge(self, diff: float) -> Verdict:
        self._counters.measured(self._step, diff)
        return judge(self._store.config, diff)


class CachedForward:
    """A compiled graph with its cache: what the backend returns to Dynamo.

    The rewritten graph is a function of (inputs, slot state); everything that is remembered is remembered here.
    """

    def __init__(
        self,
        rewritten: Callable[..., Any],
        roles: InputRoles,
        latents: Collection[Source],
        state_sizes: Sequence[int],
        program: str,
        layout: Hashable,
        anchor: int | None,
        config: CacheConfig,
    ) -> None:
        """
        Args:
            rewritten: takes the graph's inputs, then for each span its gate, the previous probe and the cached values;
                returns (outputs, state of each span).
            roles: the roles of the graph's inputs.
            latents: inputs of earlier graphs of the same forward that are denoised.
            state_sizes: for each span, how many tensors its state has.
            program: digest of what the graph computes, but for its sizes.
            layout: what is cached where; state fits only a graph of the same layout.
            anchor: position of an input that is a weight of the model, or None.
            config: the configuration that the graph was compiled with.
        """
        self._rewritten = rewritten
        self._roles = roles
        self._latents = latents
        self._sizes = tuple(state_sizes)
        self._program = (program, layout)
        self._anchor = anchor
        self._config = config
        self._last: tuple[weakref.ref[Any] | None, Store] | None = None

    def __call__(self, *args: Any) -> Any:
        store = self._store(args)
        given = read_given(self._program[0], self._roles, self._latents, args)
        branch = store.begin(self._program, len(self._sizes), given)
        gates = [SpanGate(store, branch, self._program, k, control) for k, control in enumerate(given.controls)]
        state: list[Any] = []
        for gate, slot, size in zip(gates, branch.slots, self._sizes, strict=True):
            state += [gate, *(slot.tensors if slot.tensors is not None else [None] * size)]
        try:
            outputs, new_state = self._rewritten(*args, *state)
        except BaseException:
            store.discard(branch)
            raise
        for gate, slot, tensors in zip(gates, branch.slots, new_state, strict=True):
            slot.tensors = tensors
            if gate.reason is not None:
                slot.control = gate.control
            slot.counters.record(branch.record.step, gate.reason)
        return outputs

    def _store(self, args: Sequence[Any]) -> Store:
        anchor = None if self._anchor is None else args[self._anchor]
        if self._last is not None and (self._last[0] is None or self._last[0]() is anchor):
            return self._last[1]
        store = store_of(anchor, self._config)
        self._last = (None if anchor is None else weakref.ref(anchor), store)
        return store
