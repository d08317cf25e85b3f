"""Runs one step: finds the branch, hands its state to the rewritten graph, keeps the new state if all went well."""

from __future__ import annotations

import operator
import warnings
import weakref
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any

import torch

from fx_cache.config import CacheConfig
from fx_cache.errors import CacheWarning, guarded
from fx_cache.patterns.calls import GraphFacts
from fx_cache.patterns.inputs import InputRoles
from fx_cache.runtime.batches import Separation
from fx_cache.runtime.device import captured
from fx_cache.runtime.forwards import Forward, Surroundings, surroundings
from fx_cache.runtime.gate import SpanGate
from fx_cache.runtime.given import Given, Reader
from fx_cache.runtime.keep import Keep, keep_nothing
from fx_cache.runtime.named import named_session
from fx_cache.runtime.registry import store_of
from fx_cache.runtime.relay import Relays
from fx_cache.runtime.sessions import Store
from fx_cache.runtime.slots import Branch
from fx_cache.runtime.weights import CHANGED, holds

CAPTURED = (
    "dit_cache: got a call without a step while a CUDA graph is captured; expected its step to be given, since the "
    "device cannot be asked for it; it computes; call it within fx_cache.session(name, branch, step=i)."
)


class CachedForward:
    """A compiled graph with its cache: what the backend returns to Dynamo.

    The rewritten graph is a function of (inputs, slot state); everything that is remembered is remembered here.
    """

    def __init__(
        self,
        rewritten: Callable[..., Any],
        roles: InputRoles,
        spans: int,
        layout: Hashable,
        anchor: int | None,
        guarded: Sequence[int],
        numbers: Sequence[int],
        config: CacheConfig,
        facts: GraphFacts,
        latents: Collection[int],
        whole: bool,
        relays: Relays,
        fewer: bool,
        keeps: bool,
        overwritten: bool,
    ) -> None:
        """
        Args:
            rewritten: takes the graph's inputs, then, if it `keeps`, what keeps values for it, and for each span its
                gate and its state, [probe, cached values]; returns (outputs, new state of each span).
            roles: the roles of the graph's inputs.
            spans: how many spans there are.
            layout: what is cached where; state fits only a graph of the same layout.
            anchor: position of an input that is a weight of the model, or None.
            guarded: positions of the weights that the graph does not write to itself.
            numbers: positions of the numbers that the module holds, where they come as tensors.
            config: the configuration that the graph was compiled with.
            facts: what the graph is as a part of a forward.
            latents: where it is a part, which of the forward's inputs are denoised.
            whole: whether it is a whole forward.
            relays: where to look up the forward's other graphs.
            fewer: whether a span can be computed for fewer samples than there are in a batch.
            keeps: whether the graph computes something once a request.
            overwritten: whether the next run overwrites the tensors that one hands out; then copies are remembered.
        """
        self._rewritten = rewritten
        self._reader = Reader(roles, facts.written)
        self._spans = spans
        self._shown = roles.shown or ((),) * spans
        self._separations = [Separation(fewer) for _ in range(spans)]
        self._layout = layout
        self._wiring = facts.program.wiring, layout
        self._inputs = facts.program.wiring, facts.names  # a dynamic graph has others than a static one
        self._anchor = anchor
        # Of two or more a tuple; for large models this is faster than anything that runs in Python.
        self._weights = operator.itemgetter(*guarded) if len(guarded) > 1 else lambda args: [args[i] for i in guarded]
        self._numbers = numbers
        self._config = config
        self.facts = facts
        self._latents = latents
        self._whole = whole
        self._relays = relays
        self._keeps = keeps
        self._copied = _clone if overwritten else _same
        self._graph = object()
        self._failed = False
        self._last: tuple[weakref.ref[Any] | None, weakref.ref[Any] | None, Store] | None = None

    def __call__(self, *args: Any) -> Any:
        if captured() and not _step_is_said():
            warnings.warn(CAPTURED, CacheWarning, stacklevel=2)
            return self.compute(*args)
        # A graph that was a whole forward when it was compiled may serve as a part of another one.
        around = surroundings() if self._whole else None
        if around is not None and (around.compiled_call is None or around.depth <= 1):
            return self._run(args, around, lambda s: self._reader(args, lambda: s.learner(self._inputs)))[1]
        return self._relays.call(self, self._config, args)

    def step(self, forward: Forward, args: Sequence[Any]) -> Any:
        """One step as a part of a forward: requests and branches are told apart by what that was given."""
        begun, outputs = self._run(args, forward, lambda _: self._given(forward, args))
        if begun is not None:
            forward.branches[self.facts.program] = begun
        return outputs

    def _given(self, forward: Forward, args: Sequence[Any]) -> Given:
        front = forward.front.so_far(forward.time, forward.weights())
        return forward.given(self._latents, self._seen(forward, args), front)

    def _seen(self, forward: Forward, args: Sequence[Any]) -> list[frozenset[int]]:
        """For each span, the inputs of the forward that its probe depends on."""
        return [frozenset().union(*(forward.shown_by(args[i]) for i in of_span)) for of_span in self._shown]

    def compute(self, *args: Any) -> Any:
        """The outputs; nothing is reused, and nothing kept."""
        state: list[Any] = [keep_nothing] if self._keeps else []
        for _ in range(self._spans):
            state += [_never, []]
        return self._rewritten(*args, *state)[0]

    def _run(
        self, args: Sequence[Any], within: Surroundings | Forward, read: Callable[[Store], Given]
    ) -> tuple[tuple[Store, Branch] | None, Any]:
        """The branch that a call belonged to, and its outputs. Behind an error of ours no call belongs to any."""
        begun = None if self._failed else self._begin(args, within, read)
        if begun is None:
            return None, self.compute(*args)
        store, branch, given = begun
        try:
            with self._reader.writing(args):
                return (store, branch), self._compute_or_reuse(store, branch, given, args)
        finally:
            with guarded("release") as guard:
                store.release(branch)
            if guard.failure is not None:
                self._failed, branch.busy = True, False

    def _begin(
        self, args: Sequence[Any], within: Surroundings | Forward, read: Callable[[Store], Given]
    ) -> tuple[Store, Branch, Given] | None:
        with guarded("begin"):
            store = self._store(args, within)
            given = read(store)
            numbers = [args[i] for i in self._numbers]
            lost = CHANGED if store.changed(self._wiring, self._weights(args), numbers) else None
            return store, store.begin((self.facts.program.at(args), self._layout), self._spans, given, lost), given
        self._failed = True
        return None

    def _compute_or_reuse(self, store: Store, branch: Branch, given: Given, args: Sequence[Any]) -> Any:
        gates: list[SpanGate] = []
        state: list[Any] = []
        with guarded("load") as loading:
            gates = [
                SpanGate(store, branch, k, control, separation)
                for k, (control, separation) in enumerate(zip(given.controls, self._separations, strict=True))
            ]
            for slot in branch.slots:
                other = slot.behind(given.front)
                if other is not None:
                    slot.forget(other)
            state = [Keep(branch, self._graph, self._copied, given.known)] if self._keeps else []
            for gate, slot in zip(gates, branch.slots, strict=True):
                state += [gate, slot.load()]
        if loading.failure is not None:
            self._give_up(store, branch)
            return self.compute(*args)
        try:
            outputs, new_state = self._rewritten(*args, *state)
        except BaseException:
            store.failed(branch)
            raise
        with guarded("keep") as keeping:
            self._remember(branch, given, gates, outputs, new_state)
        if keeping.failure is not None or any(gate.failed for gate in gates):
            self._give_up(store, branch)
        return outputs

    def _remember(
        self, branch: Branch, given: Given, gates: Sequence[SpanGate], outputs: Any, new_state: Sequence[Any]
    ) -> None:
        """Keeps what a step has computed, once all of it went well."""
        if branch.look is not None:
            branch.look.came_out(outputs)
        if given.call is not None:
            given.call.came_out(outputs)
        for gate, slot, tensors in zip(gates, branch.slots, new_state, strict=True):
            if not gate.verdict.reuse:
                slot.tensors, slot.front = [self._copied(t) for t in tensors], given.front
                gate.remember_control()
            gate.record()

    def _give_up(self, store: Store, branch: Branch) -> None:
        """Behind an error of ours: nothing of the branch is reused, and from now on the graph computes."""
        self._failed = True
        store.discard(branch)

    def _store(self, args: Sequence[Any], within: Surroundings | Forward) -> Store:
        anchor = None if self._anchor is None else args[self._anchor]
        compilation, before = within.compilation, None
        if self._last is not None:
            weight, made, store = self._last
            if made is None or made() is compilation:
                if weight is None or weight() is anchor:
                    return store
                before = None if holds(within.root, weight()) else store
        store = store_of(anchor, self._config, within.root, compilation, before)
        self._last = (
            None if anchor is None else weakref.ref(anchor),
            None if compilation is None else weakref.ref(compilation),
            store,
        )
        return store


def _step_is_said() -> bool:
    """Whether request, pass and step are given, so that nothing has to be read to tell where a call belongs."""
    named = named_session()
    return named is not None and named.branch is not None and named.step is not None


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _clone(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone()


def _never(*_: Any) -> bool:
    """A gate that lets every span compute."""
    return False
