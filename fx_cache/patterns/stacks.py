"""Finds stacks: runs of sibling blocks executed one after another, from the module paths the capture recorded."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from torch import fx

from fx_cache.patterns.contexts import find_contexts, whole
from fx_cache.patterns.graph import is_part_of_weight, is_tensor, positions

MIN_BLOCKS = 2
MIN_SEQUENTIAL_NODES = 6
MIN_NUMBERED = 3
_NUMBER = re.compile(r"(.*?)(\d+)(\D*)")


@dataclass(frozen=True)
class Block:
    """One repeated sub-module's nodes: everything from `nodes[0]` to `nodes[-1]` in graph order, but parts of weights.

    Where all layers' weights are one tensor, a block's own is such a view, and like a weight no part of the block.
    """

    index: int
    nodes: tuple[fx.Node, ...]

    @classmethod
    def of(cls, index: int, nodes: Sequence[fx.Node]) -> Block:
        """The block that a run of nodes is."""
        return cls(index, tuple(n for n in nodes if not is_part_of_weight(n)))


@dataclass(frozen=True)
class Stack:
    """Sibling blocks, each reading what the one before it made."""

    name: str
    blocks: tuple[Block, ...]

    @property
    def nodes(self) -> list[fx.Node]:
        return [n for b in self.blocks for n in b.nodes]


@cache
def module_path(path: str) -> str:
    """``L['self'].__dict__['_modules']['blocks'].0.attn`` -> ``blocks.0.attn``."""
    path = re.sub(r"__dict__\['_modules'\]|_modules", "", path)
    path = re.sub(r"\['?([^'\]]*)'?\]", r".\1", path)
    parts = [p for p in path.split(".") if p]
    return ".".join(parts[2:] if parts[:1] == ["L"] else parts)


def find_stacks(graph: fx.Graph, keep: Callable[[Stack], bool] = lambda stack: True) -> list[Stack]:
    """The outermost stacks of at least two chained blocks, in the order in which they run.

    Args:
        graph: a captured graph.
        keep: whether what looks like a stack is one. If not, a list within it may be: ``[embed, blocks, head]``.
    """
    order = positions(graph)
    nodes = list(graph.nodes)
    contexts = find_contexts(graph)
    stacks: list[Stack] = []
    candidates = dict(_candidates(graph, order))
    called = {module_path(path) for n in nodes for path, _ in n.meta.get("nn_module_stack", {}).values()}

    def of_lists(name: str) -> bool:
        """Whether a list holds lists of blocks, and no blocks that are lists of parts: there are more of these."""
        inner = [candidates.get(f"{name}.{index}", []) for index, _, _ in candidates[name]]
        words = [{tuple(n.target for n in nodes[a : b + 1] if is_tensor(n)) for _, a, b in found} for found in inner]
        if all(len(found) == 1 for found in words):
            return True
        uncalled = not any(f"{name}.{index}" in called for index, _, _ in candidates[name])
        return uncalled and min(map(len, inner)) >= len(inner)

    for name, children in sorted(candidates.items(), key=lambda c: (c[1][0][1], -c[1][-1][2])):
        if of_lists(name):
            continue
        extents = whole([(first, last) for _, first, last in children], contexts)
        begin, end = extents[0][0], extents[-1][1]
        if any(order[s.nodes[0]] <= begin and end <= order[s.nodes[-1]] for s in stacks):
            continue  # nested in one already found
        numbers = (index for index, _, _ in children)
        blocks = tuple(Block.of(i, nodes[a : b + 1]) for i, (a, b) in zip(numbers, extents, strict=True))
        if all(b.nodes for b in blocks):
            stacks.extend(filter(keep, _chained(Stack(name, blocks))))
    return sorted(stacks, key=lambda s: order[s.nodes[0]])


def _candidates(graph: fx.Graph, order: dict[fx.Node, int]) -> Iterator[tuple[str, list[tuple[int, int, int]]]]:
    """(list name, [(child index, first position, last position)]) for children that run one after another."""
    runs: dict[str, list[list[int]]] = {}
    called: set[str] = set()
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method", "call_module"):
            continue
        paths = [module_path(path) for path, _ in node.meta.get("nn_module_stack", {}).values()]
        called.update(paths)
        for name, index in dict.fromkeys(child for path in paths for child in _children(path)):
            seen = runs.setdefault(name, [])
            if seen and seen[-1][0] == index:
                seen[-1][2] = order[node]
            else:
                seen.append([index, order[node], order[node]])
    for name, seen in runs.items():
        numbered = "*" in name
        if (name in called or numbered) and sum(b - a + 1 for _, a, b in seen) < MIN_SEQUENTIAL_NODES * len(seen):
            continue  # an MLP written as a Sequential, or a block's norm1, norm2 and norm3, and no stack of blocks
        start = 0
        for i in range(1, len(seen) + 1):
            # A child seen again starts another run of the same list: the stack is run twice in one forward.
            if i == len(seen) or seen[i][0] in {s[0] for s in seen[start:i]}:
                if i - start >= (MIN_NUMBERED if numbered else MIN_BLOCKS):
                    suffix = f"@{start}" if start else ""
                    yield name + suffix, [(a, b, c) for a, b, c in seen[start:i]]
                start = i


@cache
def _children(path: str) -> tuple[tuple[str, int], ...]:
    """The lists that a module is in, and its number in each: it or what holds it is a child.

    ``blocks.1.attn.to_out.0`` is in child 1 of ``blocks``, and child 0 of ``blocks.1.attn.to_out``. Modules that have
    a number in their name, keys of a dictionary among them, make up a list too: ``joint_3.attn`` is in ``joint_*``.
    """
    parts = path.split(".")
    found = []
    for i, part in enumerate(parts):
        match = _NUMBER.fullmatch(part)
        if match is not None:
            before, number, behind = match.groups()
            name = [f"{before}*{behind}"] if before or behind else []
            found.append((".".join(parts[:i] + name), int(number)))
    return tuple(found)


def _chained(stack: Stack) -> Iterator[Stack]:
    """The maximal stretches of blocks in which each block depends on the one before it."""
    stretch = [stack.blocks[0]]
    for block in stack.blocks[1:]:
        if not _feeds(stretch[-1], block):
            if len(stretch) >= MIN_BLOCKS:
                yield Stack(stack.name, tuple(stretch))
            stretch = []
        stretch.append(block)
    if len(stretch) >= MIN_BLOCKS:
        yield Stack(stack.name, tuple(stretch))


def _feeds(block: Block, following: Block) -> bool:
    reached = {n for n in block.nodes if is_tensor(n)}
    goal = set(following.nodes)
    node = block.nodes[-1].next
    last = following.nodes[-1]
    while True:
        if any(a in reached for a in node.all_input_nodes):
            if node in goal:
                return True
            reached.add(node)
        if node is last:
            return False
        node = node.next
