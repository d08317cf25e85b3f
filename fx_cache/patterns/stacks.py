"""Finds stacks: runs of sibling blocks executed one after another, from the module paths the capture recorded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from fx_cache.patterns.graph import is_tensor, positions

MIN_BLOCKS = 2
MIN_SEQUENTIAL_NODES = 6
_CHILD = re.compile(r"^(?P<list>.*)\.(?P<index>\d+)$")


@dataclass(frozen=True)
class Block:
    """One repeated sub-module's nodes: everything from `nodes[0]` to `nodes[-1]` in graph order."""

    index: int
    nodes: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Stack:
    """Sibling blocks, each reading what the one before it made."""

    name: str
    blocks: tuple[Block, ...]

    @property
    def nodes(self) -> list[fx.Node]:
        return [n for b in self.blocks for n in b.nodes]


def module_path(path: str) -> str:
    """``L['self'].__dict__['_modules']['blocks'].0.attn`` -> ``blocks.0.attn``."""
    path = re.sub(r"__dict__\['_modules'\]|_modules", "", path)
    path = re.sub(r"\['?([^'\]]*)'?\]", r".\1", path)
    parts = [p for p in path.split(".") if p]
    return ".".join(parts[2:] if parts[:1] == ["L"] else parts)


def find_stacks(graph: fx.Graph) -> list[Stack]:
    """The outermost stacks of at least two chained blocks, in the order in which they run."""
    order = positions(graph)
    nodes = list(graph.nodes)
    stacks: list[Stack] = []
    for name, spans in sorted(_candidates(graph, order), key=lambda c: (c[1][0][1], -c[1][-1][2])):
        if any(order[s.nodes[0]] <= spans[0][1] and spans[-1][2] <= order[s.nodes[-1]] for s in stacks):
            continue  # nested in one already found
        blocks = tuple(Block(i, tuple(nodes[first : last + 1])) for i, first, last in spans)
        stacks.extend(_chained(Stack(name, blocks)))
    return sorted(stacks, key=lambda s: order[s.nodes[0]])


def _candidates(graph: fx.Graph, order: dict[fx.Node, int]) -> Iterator[tuple[str, list[tuple[int, int, int]]]]:
    """(list name, [(child index, first position, last position)]) for children that run one after another."""
    runs: dict[str, list[list[int]]] = {}
    sequential: set[str] = set()
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method", "call_module"):
            continue
        called = {path for path, _ in node.meta.get("nn_module_stack", {}).values()}
        for path in called:
            match = _CHILD.match(path)
            if match is None:
                continue
            name, index = module_path(match["list"]), int(match["index"])
            if match["list"] in called:
                sequential.add(name)
            seen = runs.setdefault(name, [])
            if seen and seen[-1][0] == index:
                seen[-1][2] = order[node]
            else:
                seen.append([index, order[node], order[node]])
    for name, seen in runs.items():
        if name in sequential and sum(last - first + 1 for _, first, last in seen) < MIN_SEQUENTIAL_NODES * len(seen):
            continue  # an MLP written as a Sequential, not a stack of blocks
        start = 0
        for i in range(1, len(seen) + 1):
            # A child seen again starts another run of the same list: the stack is run twice in one forward.
            if i == len(seen) or seen[i][0] in {s[0] for s in seen[start:i]}:
                if i - start >= MIN_BLOCKS:
                    suffix = f"@{start}" if start else ""
                    yield name + suffix, [(a, b, c) for a, b, c in seen[start:i]]
                start = i


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
