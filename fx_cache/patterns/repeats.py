"""Finds stacks from the structure of a graph alone: no module path, no name, no stack trace is read.

1. *Cuts*: places where fewer tensors are alive than right before and right behind, as between two blocks, and between
   the attention and the feed-forward part of one. They divide the graph into atoms.
2. *Blocks*: a kind of atom that returns (a feed-forward part, say) marks a block each time. What lies between two
   marks may differ from block to block, but not much.
   A block that is two is divided, and blocks between which nothing is handed on belong to two stacks.
3. *Boundaries*: within the stretch of a cut, every block begins where the ones after it do.
"""

from __future__ import annotations

import bisect
import operator
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress, pairwise
from typing import Any

from torch import fx

from fx_cache.ops import version
from fx_cache.patterns.boundaries import GLUE, MIN_ATOM, Boundaries
from fx_cache.patterns.contexts import Range, boundary, find_contexts
from fx_cache.patterns.graph import is_tensor_sequence, is_weight
from fx_cache.patterns.operations import Ancestry, Life, Operations, find_cuts, within_blocks
from fx_cache.patterns.stacks import MIN_BLOCKS, Block, Stack

REFINEMENTS = 2
"""How often the cuts are made anew, knowing the stacks so far."""

REGULAR = 0.8
"""How alike blocks are on the average where some of them have more atoms than others."""

IN_TURNS = 0.95
"""The same for blocks that come in turns, each kind with itself."""

ALIKE = 0.5
"""Part of the operations of two neighbouring blocks, of those of both, that are the same."""

ALIKE_AT_END = 0.4
"""The same for a first or last block that has no mark in common with the others."""


def find_repeats(graph: fx.Graph) -> list[Stack]:
    """The stacks of a graph, in the order in which they run; blocks include the glue behind them."""
    operations = Operations(graph)
    if not operations.nodes:
        return []
    ops, letters = operations.nodes, operations.letters
    stacks = rough = _Reading(operations, operations.lives, rough=True).stacks()
    # What all blocks read dies somewhere in the last one, and a long skip in a later one: that is no end of a block.
    for _ in range(REFINEMENTS):
        before, stacks = stacks, _Reading(operations, within_blocks(operations.lives, stacks)).stacks()
        if stacks == before:
            break
    stacks = rough if _lost_some(rough, stacks) else stacks
    order = {n: i for i, n in enumerate(graph.nodes)}
    nodes = list(graph.nodes)
    contexts = find_contexts(graph)
    found: list[Stack] = []
    for places in stacks:
        passes = [*_passes(ops, places), len(places) - 1]
        words = [letters[a:b] for a, b in pairwise(places)]
        blocks = []
        for i, (a, word) in enumerate(zip(places, words, strict=False)):
            # What follows in this block only, behind all that another one has, is glue.
            core = min((w for w in words if word[: len(w)] == w), key=len)
            ends = [order[ops[a]], order[ops[a + len(core) - 1]] + 1]
            if len(core) == len(word) and i + 1 < len(words):
                ends[1] = order[ops[places[i + 1]]]
            while nodes[ends[1]].target is version:  # what was written last is of the block that wrote it
                ends[1] += 1
            first, behind = (_start(nodes, place, contexts) for place in ends)
            blocks.append(Block.of(i, nodes[first:behind]))
        for begin, end in pairwise(passes):
            part = blocks[begin:end]
            # What reads no weight is no layer: rotations that are made for every axis.
            layers = any(is_weight(a) for b in part for n in b.nodes for a in n.all_input_nodes)
            if layers and len(part) >= MIN_BLOCKS and all(b.nodes for b in part):
                found.append(Stack(f"repeat_{len(found)}", tuple(part)))
    return found


def _passes(ops: Sequence[fx.Node], places: list[int]) -> list[int]:
    """The numbers of the blocks from which on a stack runs, the first time and once more on the same weights."""
    weights = [{w for n in ops[a:b] for w in n.all_input_nodes if is_weight(w)} for a, b in pairwise(places)]
    if not weights[0] or weights[0] == weights[1]:
        return [0]
    return [i for i, w in enumerate(weights) if w == weights[0]]


def _lost_some(rough: list[list[int]], fine: list[list[int]]) -> bool:
    """Whether the finer reading is the rough one with blocks missing."""
    before = [p for places in rough for p in places]
    after = [p for places in fine for p in places]
    return len(before) > len(after) and all(any(abs(a - b) <= GLUE for b in before) for a in after)


def _start(nodes: list[fx.Node], place: int, contexts: list[Range]) -> int:
    """Where a block begins, or ends, whose first operation stands at `place`, or behind it.

    A tuple and its elements stay together, and a context that a block enters belongs to it.
    """
    if place < len(nodes) and nodes[place].target is operator.getitem:
        source = nodes[place].args[0]
        if isinstance(source, fx.Node) and is_tensor_sequence(source) and source.op != "placeholder":
            place = nodes.index(source, max(0, place - len(source.users) - 1))
    return boundary(place, nodes, contexts)


@dataclass(frozen=True)
class _Run:
    """Cuts between the blocks of a stack, as indices into the list of cuts."""

    cuts: tuple[int, ...]
    operations: int
    regular: bool


class _Reading:
    """The search for blocks in one sequence of operations, divided at its cuts."""

    def __init__(self, operations: Operations, lives: list[Life], *, rough: bool = False) -> None:
        """
        Args:
            operations: the graph.
            lives: its tensors, each as long as it counts as alive here.
            rough: take also stacks within whose blocks less is alive than between them.
        """
        self.operations = operations
        self.letters = operations.letters
        self.lives = lives
        self.rough = rough
        self._complete_of: dict[tuple[tuple[int, ...], int, int], list[int]] = {}
        self._ancestries: dict[tuple[int, int], Ancestry] = {}
        self._words: dict[tuple[int, int], list[int]] = {}
        self._by_birth = sorted(lives, key=lambda life: life.born)
        self._whole_by_birth = sorted(operations.lives, key=lambda life: life.born)
        self.cuts = find_cuts(len(self.letters), lives)
        self.atoms = [tuple(self.letters[a.last : b.first]) for a, b in pairwise(self.cuts)]

    def stacks(self) -> list[list[int]]:
        """For each stack the places of its boundaries: the stack that covers most operations is taken first."""
        free = [(0, len(self.atoms))]
        runs = []
        while free:
            low, high = free.pop()
            run = self._best_run(low, high)
            if run is not None:
                runs.append(run)
                # The last block may end where the tensors alive grow fewer, which is no cut.
                end = self._places(run)[-1]
                behind = next((c for c in range(run.cuts[-1], high) if self.cuts[c].last >= end), high)
                free += [(low, run.cuts[0]), (behind, high)]
        runs.sort(key=lambda r: r.cuts)
        for i in range(len(runs) - 1):
            runs[i : i + 2] = self._shared_out(*runs[i : i + 2])
        found = [self._places(run) for run in runs]
        for places, following in pairwise(found):
            while len(places) > 1 and places[-2] >= following[0] - GLUE:
                places.pop()
            places[-1] = min(places[-1], following[0])
        return found

    def _places(self, run: _Run) -> list[int]:
        return Boundaries(self.operations).places([self.cuts[c] for c in run.cuts])

    def _word(self, a: int, b: int) -> list[int]:
        """The operations from cut `a` to cut `b` that have to do with a stream."""
        if (a, b) not in self._words:
            begin, end = self.cuts[a].last, self.cuts[b].first
            self._words[a, b] = list(compress(self.letters[begin:end], self.operations.varies[begin:end]))
        return self._words[a, b]

    def _best_run(self, low: int, high: int) -> _Run | None:
        marks: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for j in range(low, high):
            if len(self.atoms[j]) >= MIN_ATOM:
                marks[self.atoms[j]].append(j)
        best: _Run | None = None
        for places in marks.values():
            for run in self._split(places):
                bounds = self._complete(run, low, high)
                if bounds is None or (best is not None and not _better(self._run(bounds), best)):
                    continue
                for part in self._chained(bounds):
                    candidate = self._run(part)
                    if best is None or _better(candidate, best):
                        best = candidate
        return best

    def _shared_out(self, run: _Run, following: _Run) -> tuple[_Run, _Run]:
        """Two stacks that follow each other: a block at the end of one that is more like the other's goes there."""
        if run.cuts[-1] != following.cuts[0] or len(run.cuts) <= MIN_BLOCKS + 1:
            return run, following
        last = self._word(*run.cuts[-2:])
        here, there = self._word(*run.cuts[-3:-1]), self._word(*following.cuts[:2])
        if alike(last, there) <= alike(last, here):
            return run, following
        return self._run(list(run.cuts[:-1])), self._run([run.cuts[-2], *following.cuts])

    def _run(self, bounds: list[int]) -> _Run:
        return _Run(tuple(bounds), self.cuts[bounds[-1]].first - self.cuts[bounds[0]].last, self._regular(bounds))

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

    def _complete(self, marks: list[int], low: int, high: int) -> list[int] | None:
        """The cuts between the blocks that some marks show, the first and the last one of them whole."""
        step = min(b - a for a, b in pairwise(marks))
        front = 0
        while front < step - 1 and marks[0] - front > low and self._same(marks[0] - front - 1, marks[1] - front - 1):
            if not self._leads_to(marks[0] - front - 1, marks[0] - front, (marks[0], marks[1])):
                break
            front += 1
        # The first block may begin otherwise than the others; then what these have in common is no whole block.
        for less in range(front, -1, -1):
            bounds = self._bounds(marks, less, high)
            streams = self._carried(bounds[-2], bounds[-1]) if len(bounds) > MIN_BLOCKS else None
            if streams and (self.rough or self._narrow(bounds)):
                # The marks of one stack, an attention and a feed-forward part, show the same blocks.
                key = (tuple(bounds), low, high)
                if key not in self._complete_of:
                    self._complete_of[key] = self._merged(
                        self._extended(self._divided(bounds, streams), streams, low, high)
                    )
                found = self._complete_of[key]
                # If a part of a block stands before the first one, it is these that have begun too late.
                if less == front or not self._ends_alike(found[0], found[1]):
                    return list(found)
        return None

    def _bounds(self, marks: list[int], front: int, high: int) -> list[int]:
        """The cuts between blocks of which each begins `front` atoms before its mark."""
        back, room = 0, min(b - a for a, b in pairwise(marks)) - 1 - front
        while back < room and marks[-1] + back + 1 < high and self._same(marks[-1] + back + 1, marks[-2] + back + 1):
            back += 1
        bounds = [self._begin(m, marks[1], front) for m in marks]
        if back == room:
            bounds.append(marks[-1] + back + 1)
        return bounds

    def _extended(self, bounds: list[int], streams: set[Any], low: int, high: int) -> list[int]:
        """The same with blocks before and behind that are just like these, and a first or last one of another kind."""
        longest = 2 * max(b - a for a, b in pairwise(bounds))
        words = self._distinct(bounds)
        while True:
            after = [(bounds[-1], e) for e in range(bounds[-1] + 1, bounds[-1] + longest)]
            end = self._like(words, after, bounds, high)
            if end is None or not self._carried(bounds[-1], end[1]) & streams:
                break
            bounds.append(end[1])
            if not end[0]:
                break
        while True:
            before = [(b, bounds[0]) for b in range(max(low, bounds[0] - longest), bounds[0])]
            begin = self._like(words, before, bounds, high)
            if begin is None or not self._carried(begin[1], bounds[0]) & self._given(low, begin[1]) & streams:
                break
            bounds.insert(0, begin[1])
            if not begin[0]:
                break
        return bounds

    def _begin(self, mark: int, other: int, front: int) -> int:
        """The cut where the block of a mark begins, which lies `front` atoms before another mark."""
        place, begin = self.cuts[other].last, self.cuts[other - front].last
        here = self.cuts[mark].last
        if self.operations.equal(begin, here - (place - begin), place - begin):
            # In the last block more cuts may show, for there what all blocks read dies.
            exact = bisect.bisect_left(self.cuts, here - (place - begin), key=lambda c: c.last)
            if self.cuts[exact].last == here - (place - begin):
                return exact
        return mark - front

    def _divided(self, bounds: list[int], streams: set[Any]) -> list[int]:
        """The same with blocks divided that are two: at cuts within them that are as narrow as those between them.

        Most blocks have no such cut, or every block has one behind which it begins anew, with a part or all of itself.
        """
        words = [self._word(a, b) for a, b in pairwise(bounds)]
        parts = []
        for (a, b), word in zip(pairwise(bounds), words, strict=True):
            # Where much glue follows the block, its end is the narrower one.
            glued = any(len(w) < len(word) and word[: len(w)] == w for w in words)
            width = self.cuts[a].width if glued else min(self.cuts[a].width, self.cuts[b].width)
            inner = [c for c in range(a + 1, b) if self.cuts[c].width <= width and self._carried(a, c) & streams]
            parts.append([a, *inner, b])
        if 2 * sum(len(p) == 2 for p in parts) > len(parts):
            whole = [w for p, w in zip(parts, words, strict=True) if len(p) == 2]
            kept = [p if self._has_part(p, whole) else [p[0], p[-1]] for p in parts]
            found = [*(c for p in kept for c in p[:-1]), bounds[-1]]
            # What is like no block is none: it follows the last one.
            behind = self._word(*found[-2:])
            return found[:-1] if max((alike(behind, w) for w in whole), default=1.0) < ALIKE_AT_END else found
        pieces = [[self._word(a, b) for a, b in pairwise(p)] for p in parts]
        for at in range(1, len(pieces[0]) - 1):
            if all(len(p) > at + 1 and _begins_anew(p, at) for p in pieces):
                return [*(c for p in parts for c in (p[0], p[at])), bounds[-1]]
        return bounds

    def _merged(self, bounds: list[int]) -> list[int]:
        """The same with blocks made one that are parts of one: unlike each other, and in turns."""
        words = [self._word(a, b) for a, b in pairwise(bounds)]
        # One that goes on as the other has ended is the same, with glue behind it.
        if any(alike(a, b) >= REGULAR or a[: len(b)] == b[: len(a)] for a, b in pairwise(words)):
            return bounds
        for turn in range(2, len(words) // 2 + 1):
            if len(words) % turn == 0 and _likeness(words, turn) >= IN_TURNS:
                return bounds[::turn]
        return bounds

    def _has_part(self, part: list[int], whole: list[list[int]]) -> bool:
        """Whether what stands between two of these cuts is a block like those."""
        return any(alike(self._word(a, b), w) >= REGULAR for a, b in pairwise(part) for w in whole)

    def _regular(self, bounds: list[int]) -> bool:
        """Whether no block looks like a part of the next one: one atom, and then two."""
        if min(b - a for a, b in pairwise(bounds)) > 1:
            return True
        return _likeness([self._word(a, b) for a, b in pairwise(bounds)], 1) >= REGULAR

    def _narrow(self, bounds: list[int]) -> bool:
        """Whether less is alive between the blocks than within them; in the last one what all blocks read dies."""
        for a, b in list(pairwise(bounds))[:-1]:
            if any(self.cuts[c].width < self.cuts[b].width for c in range(a + 1, b)):
                return False
        return True

    def _chained(self, bounds: list[int]) -> list[list[int]]:
        """The stretches of blocks each of which makes what it hands on out of what the one before it made."""
        places = [self.cuts[c].last for c in bounds]
        end = len(self.letters) + 2
        linked = True
        stretches = [[bounds[-1]]]
        for i in range(len(bounds) - 2, -1, -1):
            stretches[-1].append(bounds[i])
            if i:
                a, b, c = places[i - 1 : i + 2]
                # What the last block of a stretch makes may be for much later.
                d = end if not linked or i + 2 == len(places) else places[i + 2]
                linked = self._hands_on(a, b, c, d)
                if not linked:
                    stretches.append([bounds[i]])
        return [s[::-1] for s in stretches[::-1] if len(s) > MIN_BLOCKS]

    def _hands_on(self, a: int, b: int, c: int, d: int) -> bool:
        """Whether operations `b` to `c` make something for those up to `d` out of what those from `a` on made."""
        reached = {i for j in range(b, c) for i in self.operations.uses[j] if a <= self.lives[i].born < b}
        for j in range(b, c):
            if not reached.isdisjoint(self.operations.uses[j]):
                reached.update(self.operations.makes[j])
        return any(b <= self.lives[i].born and any(c <= u < d for u in self.lives[i].uses) for i in reached)

    def _leads_to(self, a: int, b: int, block: tuple[int, int]) -> bool:
        """Whether most of what stands from cut `a` to cut `b` has a part in what a block hands on to the next one."""
        begin, end = self.cuts[a].last, self.cuts[b].last
        if block not in self._ancestries:
            at = self.cuts[block[1]].last
            self._ancestries[block] = Ancestry(self.operations, at, 2 * at - self.cuts[block[0]].last)
        return 4 * self._ancestries[block].count(begin, end) >= 3 * (end - begin)

    def _ends_alike(self, a: int, b: int) -> bool:
        """Whether more than glue stands before cut `a` as it does before cut `b`."""
        a, b = self.cuts[a].last, self.cuts[b].last
        return a > GLUE and self.operations.equal(a - GLUE - 1, b - GLUE - 1, GLUE + 1)

    def _same(self, a: int, b: int) -> bool:
        return alike(self.atoms[a], self.atoms[b]) >= ALIKE

    def _distinct(self, bounds: list[int]) -> list[list[int]]:
        """The kinds of blocks between cuts."""
        return [list(w) for w in dict.fromkeys(tuple(self._word(a, b)) for a, b in pairwise(bounds))]

    def _like(
        self, words: list[list[int]], candidates: list[tuple[int, int]], bounds: list[int], high: int
    ) -> tuple[bool, int] | None:
        """The stretch that is most like a block, if one is like it; first of all one between equally narrow cuts.

        Returns whether it is just like a block, and the cut that bounds it.
        """
        best: tuple[bool, bool, float, int, int] | None = None
        for a, b in candidates:
            if b > high:
                continue
            cut = a if b == bounds[0] else b
            word = self._word(a, b)
            # What is much longer than a block, or much shorter, is not like it.
            fitting = [w for w in words if min(len(w), len(word)) >= ALIKE_AT_END * max(len(w), len(word))]
            likeness = max((alike(word, w) for w in fitting), default=0.0)
            scored = (likeness == 1.0, self.cuts[cut].width <= self.cuts[bounds[1]].width, likeness, b - a, cut)
            if likeness < ALIKE_AT_END or (best is not None and scored <= best):
                continue
            # Before the first block may stand the end of another stack.
            if b != bounds[0] or self._leads_to(a, b, (bounds[0], bounds[1])):
                best = scored
        return None if best is None else (best[0], best[-1])

    def _carried(self, a: int, b: int) -> set[Any]:
        """The forms of the tensors made between two cuts and used behind the second."""
        return self._made(self._by_birth, a, b)

    def _given(self, a: int, b: int) -> set[Any]:
        """The same, where what a stack begins with may be read by all its blocks."""
        return self._made(self._whole_by_birth, a, b)

    def _made(self, by_birth: list[Life], a: int, b: int) -> set[Any]:
        begin, end = self.cuts[a].last, self.cuts[b].first
        first, last = (bisect.bisect_left(by_birth, place, key=lambda life: life.born) for place in (begin, end))
        return {life.form for life in by_birth[first:last] if life.dies >= end}


def _likeness(words: Sequence[list[int]], apart: int) -> float:
    """How alike blocks are on the average that stand so many blocks apart."""
    found = [alike(a, b) for a, b in zip(words, words[apart:], strict=False)]
    return sum(found) / len(found)


def _begins_anew(words: list[list[int]], at: int) -> bool:
    """Whether the parts from number `at` on begin as those before it do: one attention and one feed-forward, say."""
    first = [x for word in words[:2] for x in word]
    return at > 1 and [x for word in words[at:] for x in word][: len(first)] == first


def _better(a: _Run, b: _Run) -> bool:
    """Which reading of a stretch is meant: the one that explains more of it, or the finer one."""
    if a.regular != b.regular:
        return a.regular
    if abs(a.operations - b.operations) * 10 > max(a.operations, b.operations):
        return a.operations > b.operations
    return (len(a.cuts), a.operations) > (len(b.cuts), b.operations)


def alike(a: Sequence[Any], b: Sequence[Any]) -> float:
    """The common part of two bags of operations, of all that is in them: 0.0 to 1.0."""
    left, right = Counter(a), Counter(b)
    common = sum(min(count, right[x]) for x, count in left.items() if x in right) if a != b else len(a)
    union = len(a) + len(b) - common
    return common / union if union else 1.0
