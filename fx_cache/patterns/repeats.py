"""Finds stacks from the structure of a graph alone: no module path, no name, no stack trace is read.

1. *Cuts*: places where fewer tensors are alive than right before and right behind, as between two blocks, and between
   the attention and the feed-forward part of one. They divide the graph into atoms.
2. *Blocks*: a kind of atom that returns (a feed-forward part, say) marks a block each time. What lies between two
   marks may differ from block to block, but not much.
3. *Boundaries*: within the stretch of a cut, every block begins where the ones after it do.
"""

from __future__ import annotations

import bisect
import operator
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils._pytree import tree_leaves

from fx_cache.patterns.graph import callee, descendants, is_tensor, is_tensor_sequence, is_weight, storage_key, value_of
from fx_cache.patterns.inputs import classify_inputs
from fx_cache.patterns.stacks import MIN_BLOCKS, Block, Stack

MIN_ATOM = 3
"""Operations that an atom has at least: less is glue."""

REFINEMENTS = 2
"""How often the cuts are made anew, knowing the stacks so far."""

REGULAR = 0.8
"""How alike blocks are on the average where some of them have more atoms than others."""

GLUE = 8
"""Operations between two stacks that may lie within one cut."""

ALIKE = 0.5
"""Part of the operations of two neighbouring blocks, of those of both, that are the same."""

ALIKE_AT_END = 0.4
"""The same for a first or last block that has no mark in common with the others."""


@dataclass(frozen=True)
class Cut:
    """A stretch of places, each before the operation of that number, with the same least number of tensors alive."""

    first: int
    last: int
    width: int


def find_repeats(graph: fx.Graph) -> list[Stack]:
    """The stacks of a graph, in the order in which they run; blocks include the glue behind them."""
    ops = [n for n in graph.nodes if n.op in ("call_function", "call_method", "call_module") and is_tensor(n)]
    if not ops:
        return []
    letters = _kinds(ops)
    lives = _lives(ops)
    varies = _varies(graph, ops)
    stacks = rough = _Reading(letters, varies, lives).stacks(rough=True)
    # What all blocks read dies somewhere in the last one, and a long skip in a later one: that is no end of a block.
    for _ in range(REFINEMENTS):
        stacks = _Reading(letters, varies, _within_blocks(lives, stacks)).stacks()
    stacks = rough if _lost_some(rough, stacks) else stacks
    order = {n: i for i, n in enumerate(graph.nodes)}
    nodes = list(graph.nodes)
    found: list[Stack] = []
    for places in stacks:
        words = [letters[a:b] for a, b in pairwise(places)]
        blocks = []
        for i, (a, word) in enumerate(zip(places, words, strict=False)):
            # What follows in this block only, behind all that another one has, is glue.
            core = min((w for w in words if word[: len(w)] == w), key=len)
            begin, end = _start(nodes, order[ops[a]]), _start(nodes, order[ops[a + len(core) - 1]] + 1)
            if len(core) == len(word) and i + 1 < len(words):
                end = _start(nodes, order[ops[places[i + 1]]])
            blocks.append(Block(i, tuple(nodes[begin:end])))
        if all(b.nodes for b in blocks):
            found.append(Stack(f"repeat_{len(found)}", tuple(blocks)))
    return found


def _lost_some(rough: list[list[int]], fine: list[list[int]]) -> bool:
    """Whether the finer reading is the rough one with blocks missing."""
    before = [p for places in rough for p in places]
    after = [p for places in fine for p in places]
    return len(before) > len(after) > 0 and all(any(abs(a - b) <= GLUE for b in before) for a in after)


def _start(nodes: list[fx.Node], place: int) -> int:
    """Where a block begins, or ends, whose first operation stands at `place`, or behind it.

    A tuple and its elements stay together, and a context that a block enters belongs to it.
    """
    if place < len(nodes) and nodes[place].target is operator.getitem:
        source = nodes[place].args[0]
        if isinstance(source, fx.Node) and is_tensor_sequence(source) and source.op != "placeholder":
            place = nodes.index(source, max(0, place - len(source.users) - 1))
    while place > 0 and "enter" in str(nodes[place - 1].target) and nodes[place - 1].op == "call_function":
        place -= 1
    return place


def _varies(graph: fx.Graph, ops: Sequence[fx.Node]) -> list[bool]:
    """Whether an operation depends on what is denoised."""
    inputs = list(graph.find_nodes(op="placeholder"))
    latents = classify_inputs(graph).latents
    reached = descendants(graph, [inputs[i] for i in latents])
    return [n in reached or not latents for n in ops]


@dataclass(frozen=True)
class Life:
    """A tensor's storage: made by operation `born`, used by `uses`, last by `dies`; `form` is what it holds."""

    born: int
    dies: int
    form: tuple[Any, ...]
    uses: frozenset[int]


def _lives(ops: Sequence[fx.Node]) -> list[Life]:
    number = {n: i for i, n in enumerate(ops)}
    inputs = [n for n in ops[0].graph.find_nodes(op="placeholder") if is_tensor(n) and not is_weight(n)]
    holders: dict[int, list[tuple[int, fx.Node]]] = defaultdict(list)
    for i, node in [*((-1, n) for n in inputs), *enumerate(ops)]:
        key = storage_key(node)
        if key is not None:
            holders[key].append((i, node))
    found = []
    for held in holders.values():
        born, first = held[0]
        # What a block hands out beside its stream (keys and values for a cache) is not carried through the others.
        uses = {number.get(u, i) for i, n in held for u in n.users if u.op != "output"} or {len(ops) + 1}
        found.append(Life(born, max(uses | {i for i, _ in held}), _form(first), frozenset(uses)))
    return found


def _within_blocks(lives: list[Life], stacks: list[list[int]]) -> list[Life]:
    """The same without what goes through a stack beside its streams: values all blocks read, and long skips."""
    found = []
    for life in lives:
        dies = life.dies
        for places in stacks:
            if life.born < places[1] and life.dies > places[2]:
                if life.born >= places[0] or life.dies <= places[-1]:
                    dies = life.born
            elif places[1] <= life.born < places[-1]:
                crossed = [p for p in places if life.born < p <= life.dies]
                if len(crossed) > 1:
                    dies = min(dies, (crossed[0] + crossed[1]) // 2)
        found.append(replace(life, dies=dies))
    return found


def _kinds(ops: Sequence[fx.Node]) -> list[int]:
    """For each operation a number that is the same for like operations on weights of like shapes."""
    numbers: dict[Any, int] = {}
    found = []
    for node in ops:
        weights = tuple(_form(a) for a in node.all_input_nodes if is_weight(a))
        constants = tuple(
            repr(a) for a in tree_leaves((node.args, node.kwargs)) if not isinstance(a, fx.Node) and a is not None
        )
        if node.op == "call_function" and constants and _counts_up(node):
            constants = ()
        found.append(numbers.setdefault((node.op, callee(node), constants, _form(node), weights), len(numbers)))
    return found


def _counts_up(node: fx.Node) -> bool:
    """Whether the constants may be a block's number: an element taken out of a tensor that all blocks share."""
    return getattr(node.target, "__name__", "") == "getitem"


def _form(node: fx.Node) -> tuple[Any, ...]:
    value = value_of(node)
    if not isinstance(value, torch.Tensor):
        return (type(value).__name__,)
    shape = tuple("?" if _unbacked(s) else str(s) for s in value.shape)
    return shape, str(value.dtype)


def _unbacked(size: Any) -> bool:
    return isinstance(size, torch.SymInt) and bool(free_unbacked_symbols(size))


def _cuts(count: int, lives: list[Life]) -> list[Cut]:
    """Where the number of tensors alive is least, for stretches of equal number; the ends of the graph are cuts too."""
    change = [0] * (count + 3)
    for life in lives:
        if life.dies > life.born:
            change[life.born + 1] += 1
            change[life.dies + 1] -= 1
    alive = list(accumulate(change))[: count + 1]
    cuts: list[Cut] = []
    first = 0
    for i in range(1, count + 2):
        if i <= count and alive[i] == alive[first]:
            continue
        falls = first == 0 or alive[first - 1] > alive[first]
        rises = i > count or alive[i] > alive[first]
        if first == 0 or (falls and rises):
            cuts.append(Cut(first, i - 1, alive[first]))
        first = i
    if cuts[-1].last < count:
        cuts.append(Cut(count, count, alive[count]))
    return cuts


@dataclass(frozen=True)
class _Run:
    """Cuts between the blocks of a stack, as indices into the list of cuts."""

    cuts: tuple[int, ...]
    operations: int
    regular: bool


class _Reading:
    """The search for blocks in one sequence of operations, divided at its cuts."""

    def __init__(self, letters: list[int], varies: list[bool], lives: list[Life]) -> None:
        self.letters = letters
        self.lives = lives
        self.varies = varies
        self.rough = False
        self.cuts = _cuts(len(letters), lives)
        self.atoms = [tuple(letters[a.last : b.first]) for a, b in pairwise(self.cuts)]

    def stacks(self, rough: bool = False) -> list[list[int]]:
        """For each stack the places of its boundaries: the stack that covers most operations is taken first.

        Args:
            rough: take also stacks within whose blocks less is alive than between them.
        """
        self.rough = rough
        free = [(0, len(self.atoms))]
        found = []
        while free:
            low, high = free.pop()
            run = self._best_run(low, high)
            if run is not None:
                places = self._places(run)
                found.append(places)
                # The last block may end where the tensors alive grow fewer, which is no cut.
                behind = next((c for c in range(run.cuts[-1], high) if self.cuts[c].last >= places[-1]), high)
                free += [(low, run.cuts[0]), (behind, high)]
        found.sort()
        for places, following in pairwise(found):
            places[-1] = min(places[-1], following[0])
        return found

    def _word(self, a: int, b: int) -> list[int]:
        """The operations from cut `a` to cut `b` that have to do with a stream."""
        begin, end = self.cuts[a].last, self.cuts[b].first
        return [x for x, varies in zip(self.letters[begin:end], self.varies[begin:end], strict=True) if varies]

    def _best_run(self, low: int, high: int) -> _Run | None:
        marks: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for j in range(low, high):
            if len(self.atoms[j]) >= MIN_ATOM:
                marks[self.atoms[j]].append(j)
        best: _Run | None = None
        for places in marks.values():
            for run in self._split(places):
                candidate = self._complete(run, low, high)
                if candidate is not None and (best is None or _better(candidate, best)):
                    best = candidate
        return best

    def _split(self, marks: list[int]) -> list[list[int]]:
        """The stretches of marks between which blocks are alike."""
        runs = [[marks[0]]]
        steps = [b - a for a, b in pairwise(marks)]
        for i, mark in enumerate(marks[1:]):
            first = len(runs[-1]) == 1
            if first or steps[i] == steps[i - 1] or self._like_before(marks, i):
                runs[-1].append(mark)
            else:
                runs.append([marks[i], mark])
        return [r for r in runs if len(r) >= MIN_BLOCKS]

    def _like_before(self, marks: list[int], i: int) -> bool:
        return alike(self._word(marks[i], marks[i + 1]), self._word(marks[i - 1], marks[i])) >= ALIKE

    def _complete(self, marks: list[int], low: int, high: int) -> _Run | None:
        """Adds what belongs to the first and the last block, and a first or last block of another kind."""
        step = min(b - a for a, b in pairwise(marks))
        front = 0
        while front < step - 1 and marks[0] - front > low and self._same(marks[0] - front - 1, marks[1] - front - 1):
            front += 1
        back, room = 0, step - 1 - front
        while back < room and marks[-1] + back + 1 < high and self._same(marks[-1] + back + 1, marks[-2] + back + 1):
            back += 1
        bounds = [m - front for m in marks]
        if back == room:
            bounds.append(marks[-1] + back + 1)
        if len(bounds) <= MIN_BLOCKS:
            return None
        streams = self._carried(bounds[-2], bounds[-1])
        if not streams or not (self.rough or self._narrow(bounds)) or not self._chained(bounds):
            return None
        longest = 2 * max(b - a for a, b in pairwise(bounds))
        end = self._like(bounds[-2:], [(bounds[-1], e) for e in range(bounds[-1] + 1, bounds[-1] + longest)], high)
        if end is not None and self._carried(*end) & streams:
            bounds.append(end[1])
        before = [(b, bounds[0]) for b in range(max(low, bounds[0] - longest), bounds[0])]
        begin = self._like(bounds[:2], before, high)
        if begin is not None and self._carried(*begin) & streams and self._carried(low, begin[0]) & streams:
            bounds.insert(0, begin[0])
        return _Run(tuple(bounds), self.cuts[bounds[-1]].first - self.cuts[bounds[0]].last, self._regular(bounds))

    def _regular(self, bounds: list[int]) -> bool:
        """Whether no block looks like a part of the next one: one atom, and then two."""
        if min(b - a for a, b in pairwise(bounds)) > 1:
            return True
        words = [self._word(a, b) for a, b in pairwise(bounds)]
        likeness = [alike(a, b) for a, b in pairwise(words)]
        return sum(likeness) >= REGULAR * len(likeness)

    def _narrow(self, bounds: list[int]) -> bool:
        """Whether less is alive between the blocks than within them; in the last one what all blocks read dies."""
        for a, b in list(pairwise(bounds))[:-1]:
            if any(self.cuts[c].width < self.cuts[b].width for c in range(a + 1, b)):
                return False
        return True

    def _chained(self, bounds: list[int]) -> bool:
        """Whether every block reads something that the one before it made."""
        places = [self.cuts[c].last for c in bounds]
        return all(
            any(a <= life.born < b and any(b <= u < c for u in life.uses) for life in self.lives)
            for a, b, c in zip(places, places[1:], places[2:], strict=False)
        )

    def _same(self, a: int, b: int) -> bool:
        return alike(self.atoms[a], self.atoms[b]) >= ALIKE

    def _like(self, block: Sequence[int], candidates: list[tuple[int, int]], high: int) -> tuple[int, int] | None:
        """The stretch that is most like a block, if one is like it."""
        word = self._word(block[0], block[1])
        scored = [(alike(word, self._word(*c)), c) for c in candidates if c[1] <= high]
        if not scored:
            return None
        best = max(scored)
        return best[1] if best[0] >= ALIKE_AT_END else None

    def _carried(self, a: int, b: int) -> set[Any]:
        """The forms of the tensors made between two cuts and used behind the second."""
        begin, end = self.cuts[a].last, self.cuts[b].first
        return {life.form for life in self.lives if begin <= life.born < end <= life.dies}

    def _places(self, run: _Run) -> list[int]:
        """One place out of each cut: as early as all blocks, seen from where they use their stream, begin alike."""
        first, *others = run.cuts[:-1]
        stretches = [self.letters[self.cuts[c].first : self.cuts[c].last] for c in others]
        # Before the first block other streams may still be apart, and the cut be shorter.
        stretches.append(self.letters[max(0, self.cuts[first].last - max(map(len, stretches))) : self.cuts[first].last])
        lead = 0
        while all(len(s) > lead for s in stretches) and len({s[-1 - lead] for s in stretches}) == 1:
            lead += 1
        lead = self._lead_in(run, lead)
        places = [self.cuts[c].last - lead for c in run.cuts[:-1]]
        if len(places) > 2:
            # A first or last block just like its neighbour is whole: what else the cut holds belongs to no block.
            size = places[2] - places[1]
            if size <= places[1] and self._equal(places[1] - size, places[1], size):
                places[0] = places[1] - size
        size = places[-1] - places[-2]
        if self._equal(places[-2], places[-1], size):
            # So may more blocks behind it: where from then on ever fewer tensors are alive, no cut shows the last one.
            while self._equal(places[-2], places[-1], places[-1] - places[-2]):
                places.append(2 * places[-1] - places[-2])
            return places
        glue = stretches[-2][: len(stretches[-2]) - lead]
        end = self.cuts[run.cuts[-1]]
        place = self._behind(end.first, self.cuts[run.cuts[-2]].first)
        for letter in self.letters[place : end.last]:
            if letter not in glue:
                break
            glue = glue[glue.index(letter) + 1 :]
            place += 1
        return [*places, place]

    def _equal(self, a: int, b: int, size: int) -> bool:
        """Whether the same operations stand at two places, as many as asked for."""
        return b + size <= len(self.letters) and self.letters[a : a + size] == self.letters[b : b + size]

    def _lead_in(self, run: _Run, lead: int) -> int:
        """How far before their cuts the blocks begin: a step back where the last block does not end as the others.

        Streams that are joined where a block begins make the cut there narrower than the boundary before it.
        """
        starts = [self.cuts[c].last for c in run.cuts[:-1]]
        end = self.cuts[run.cuts[-1]]
        behind = self.letters[end.first - 1 : end.last]
        for more in range(lead, lead + GLUE):
            if min(starts) <= more or len({self.letters[s - more] for s in starts} if more > lead else {0}) > 1:
                break
            if self.letters[starts[-1] - more - 1] in behind:
                return more
        return lead

    def _behind(self, place: int, pattern: int) -> int:
        """The end of a block, at `place` or shortly before it, where it ends as the block before `pattern` does."""
        last = self.letters[pattern - MIN_ATOM : pattern]
        for p in range(place, max(place - GLUE, 0), -1):
            if self.letters[p - MIN_ATOM : p] == last:
                return p
        return place


def _better(a: _Run, b: _Run) -> bool:
    """Which reading of a stretch is meant: the one that explains more of it, or the finer one."""
    if a.regular != b.regular:
        return a.regular
    if abs(a.operations - b.operations) * 10 > max(a.operations, b.operations):
        return a.operations > b.operations
    return (len(a.cuts), a.operations) > (len(b.cuts), b.operations)


def alike(a: Iterable[Any], b: Iterable[Any]) -> float:
    """The common part of two bags of operations, of all that is in them: 0.0 to 1.0."""
    left, right = Counter(a), Counter(b)
    union = (left | right).total()
    return (left & right).total() / union if union else 1.0


def same_boundaries(graph: fx.Graph, one: Sequence[Stack], other: Sequence[Stack]) -> bool:
    """Whether two readings of a graph cut it at the same places, however they group the blocks into stacks."""
    return _places(graph, one) == _places(graph, other)


def _places(graph: fx.Graph, stacks: Sequence[Stack]) -> list[int]:
    ops = [i for i, n in enumerate(graph.nodes) if n.op.startswith("call") and is_tensor(n)]
    order = {n: i for i, n in enumerate(graph.nodes)}
    places = set()
    for stack in stacks:
        for block in stack.blocks:
            places.add(bisect.bisect_left(ops, order[block.nodes[0]]))
        places.add(bisect.bisect_right(ops, order[stack.blocks[-1].nodes[-1]]))
    return sorted(places)
