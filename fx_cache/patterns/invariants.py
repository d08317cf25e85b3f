"""Finds what is the same at every step of a request: text projections, rotary tables, keys and values of the text."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from fx_cache.patterns.chains import StackReport
from fx_cache.patterns.contexts import within_contexts
from fx_cache.patterns.graph import (
    ancestors,
    descendants,
    draws_random,
    hinted_shape,
    is_scalar,
    is_tensor,
    is_tensor_sequence,
    is_weight,
    positions,
    storage_key,
    touches,
    value_of,
    written_inputs,
    written_storages,
)
from fx_cache.patterns.groups import groups_of
from fx_cache.patterns.inputs import InputRoles
from fx_cache.patterns.stacks import Block
from fx_cache.patterns.work import MOVED, Work

MIN_GAIN = 5e-3
"""The part of a step's work that must be saved: of a cached step's, or of a computed one's by what only that uses."""

MIN_APART = 0.02
"""The part of a cached step's work that what only some of like blocks have must save: it makes them unlike."""

MAX_BYTES = 1 << 30
"""Bytes that are kept of one branch; what saves most for its size comes first."""


@dataclass(frozen=True)
class Invariants:
    """What can be computed once, and used at every step.

    Attributes:
        kept: the values that others use, in graph order.
        nodes: what computes them, in graph order.
        bytes: what they take up.
    """

    kept: tuple[fx.Node, ...] = ()
    nodes: tuple[fx.Node, ...] = ()
    bytes: int = 0


def find_invariants(
    graph: fx.Graph,
    roles: InputRoles,
    stacks: Sequence[StackReport],
    work: Work,
    skipped: Collection[fx.Node],
    cached: float,
) -> Invariants:
    """Values that depend on conditioning and weights alone, where keeping them saves work.

    Left where they are: tensors that are written to in place, and what reads them, unless they are made here, filled
    with what is the same at every step, and read behind the last write only; what shares storage with an output, what
    draws random numbers, collectives, and what stands within a context such as autocast.

    Args:
        graph: a captured forward.
        roles: of its inputs.
        stacks: like blocks of which stay alike, if little is lost by it.
        work: of its operations.
        skipped: what a cached step does not run.
        cached: the part of the work that it runs.
    """

    def worth(nodes: Iterable[fx.Node]) -> int:
        return sum(work.of(n) + MOVED * _moved(n) for n in nodes)

    same = _same_at_every_step(graph, roles)
    apart = _apart(stacks, same)
    if worth(apart) < MIN_APART * cached * work.total:
        same = _without_unfinished(graph, _without(apart, same))
    # Not the many views of a table or a key, but what they show; what is written to only as it is behind all writes.
    written = written_storages(same)
    whole: dict[int | None, fx.Node] = {}
    for node in filter(is_tensor, same):
        whole.setdefault(storage_key(node), node)
    given = {a for n in same for a in n.all_input_nodes if a.op == "placeholder" and is_tensor(a) and not is_weight(a)}
    reached = descendants(graph, given)  # what is made of nothing is little, and fused with what reads it
    readers: dict[fx.Node, list[fx.Node]] = {}
    for node in filter(is_tensor, same):
        base = node if storage_key(node) in written else whole[storage_key(node)]
        if base in reached:
            readers.setdefault(base, []).extend(u for u in node.users if u not in same)
    cones = {n: {a for a in ancestors(n) if a in same} for n, users in readers.items() if users}

    def union(values: Iterable[fx.Node]) -> set[fx.Node]:
        return set().union(*(cones[n] for n in values))

    always = [n for n in cones if any(u not in skipped for u in readers[n])]
    computing = [n for n in cones if n not in always]
    parts = ((always, cached * work.total), (computing, work.total))
    chosen = [n for values, step in parts if worth(union(values)) >= MIN_GAIN * step for n in values]
    made = union(chosen)
    chosen += [n for n in cones if n in made and n not in chosen]  # on the way to others
    kept: set[fx.Node] = set()
    total = 0
    for node in sorted(chosen, key=lambda n: -worth(cones[n]) / max(1, _bytes(n))):
        if worth(cones[node]) and total + _bytes(node) <= MAX_BYTES:
            kept.add(node)
            total += _bytes(node)
    order = positions(graph)
    nodes = sorted(union(kept), key=order.__getitem__)
    return Invariants(tuple(sorted(kept, key=order.__getitem__)), tuple(nodes), total)


def step_share(graph: fx.Graph, roles: InputRoles, work: Work) -> float:
    """The part of a graph's work that a step other than a request's first one does at most."""
    return 1.0 - work.share(_same_at_every_step(graph, roles))


def _same_at_every_step(graph: fx.Graph, roles: InputRoles) -> dict[fx.Node, None]:
    inputs = list(graph.find_nodes(op="placeholder"))
    alone = roles.controls
    given = {inputs[i] for i in (*roles.conditioning, *roles.scalars, *roles.weights) if i not in alone}
    # Sizes are the same as long as the shapes of a branch are.
    given |= {n for n in inputs if isinstance(value_of(n), torch.SymInt)}
    outputs = [a for n in graph.find_nodes(op="output") for a in tree_leaves(n.args) if is_tensor(a)]
    # What came from outside is as others left it, and what goes there may be written to by them.
    open_ = {storage_key(a) for a in (*outputs, *inputs, *graph.find_nodes(op="get_attr"))} - {None}
    written = written_storages(graph.nodes) & open_
    returned = {storage_key(a) for a in outputs} - {None}
    contexts = within_contexts(graph)
    same: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if node.op == "get_attr" and is_tensor(node):
            given.add(node)
        if node.op not in ("call_function", "call_method") or node in contexts or draws_random(node):
            continue
        if groups_of([node]):  # all ranks have to come to it, and one may have lost what it kept
            continue
        writes = written_inputs(node)
        known = is_tensor(node) or is_tensor_sequence(node) or is_scalar(node) or writes
        free = storage_key(node) not in returned and not touches(node, written)
        free = free and all(storage_key(a) is not None for a in writes)
        if known and free and all(a in same or a in given for a in node.all_input_nodes):
            same[node] = None
    return _without_unfinished(graph, same)


def _without_unfinished(graph: fx.Graph, same: dict[fx.Node, None]) -> dict[fx.Node, None]:
    """The same but for tensors that others write to as well, or read before the last write.

    Requires: versions (see `fx_cache.versions`), by which a reader behind a write depends on it.
    """
    writes: dict[int | None, list[fx.Node]] = {}
    for node in graph.nodes:
        for key in {storage_key(a) for a in written_inputs(node)} - {None}:
            writes.setdefault(key, []).append(node)
    while True:
        unfinished = {key for key, made_by in writes.items() if key is not None and any(w not in same for w in made_by)}
        for node in same:
            key = storage_key(node)
            if key is not None and key in writes and key not in unfinished and any(u not in same for u in node.users):
                behind = ancestors(node)
                if any(w is not node and w not in behind for w in writes[key]):
                    unfinished.add(key)
        touching = [n for n in same if touches(n, unfinished)]
        if not touching:
            return same
        same = _without(touching, same)


def _apart(stacks: Sequence[StackReport], same: Collection[fx.Node]) -> set[fx.Node]:
    """What is the same at every step in some blocks of a kind, and in others is not."""
    found: set[fx.Node] = set()
    for report in stacks:
        kinds: dict[int, list[Block]] = {}
        for block, kind in zip(report.stack.blocks, report.streams.kinds, strict=True):
            kinds.setdefault(kind, []).append(block)
        for blocks in kinds.values():
            for alike in zip(*(b.nodes for b in blocks), strict=True):
                inside = [n for n in alike if n in same]
                found.update(inside if len(inside) < len(alike) else ())
    return found


def _without(apart: Collection[fx.Node], same: dict[fx.Node, None]) -> dict[fx.Node, None]:
    """The same but for some nodes, and what depends on them."""
    left: dict[fx.Node, None] = {}
    for node in same:
        if node not in apart and all(a in left or a not in same for a in node.all_input_nodes):
            left[node] = None
    return left


def _moved(node: fx.Node) -> int:
    """Elements that an operation writes; 0 for one that only looks at its inputs in another way."""
    if not is_tensor(node) or any(storage_key(node) == storage_key(a) for a in node.all_input_nodes):
        return 0
    return torch.Size(hinted_shape(value_of(node))).numel()


def _bytes(node: fx.Node) -> int:
    value = value_of(node)
    return torch.Size(hinted_shape(value)).numel() * int(value.element_size())
