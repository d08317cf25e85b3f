"""Where blocks begin, to the operation: one place out of each cut between them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from fx_cache.patterns.operations import Cut, Form, Operations

GLUE = 8
"""Operations between two stacks that may lie within one cut."""

MIN_ATOM = 3
"""Operations that an atom has at least: less is glue."""


class Boundaries:
    """The boundaries of stacks in one sequence of operations."""

    def __init__(self, operations: Operations) -> None:
        self._operations = operations
        self._letters = operations.letters

    def places(self, cuts: Sequence[Cut]) -> list[int]:
        """One place out of each cut: as early as all blocks, seen from where they use their stream, begin alike."""
        first, *others = cuts[:-1]
        stretches = [self._letters[c.first : c.last] for c in others]
        # Before the first block other streams may still be apart, and the cut be shorter.
        stretches.append(self._letters[max(0, first.last - max(map(len, stretches))) : first.last])
        lead = 0
        while all(len(s) > lead for s in stretches) and len({s[-1 - lead] for s in stretches}) == 1:
            lead += 1
        lead = self._even_lead(cuts, self._lead_in(cuts, lead))
        places = [c.last - lead for c in cuts[:-1]]
        places[0] = self._behind_preparation(places[0], places[1])
        if len(places) > 2:
            # A first or last block just like its neighbour is whole: what else the cut holds belongs to no block.
            size = places[2] - places[1]
            if size <= places[1] and self._operations.equal(places[1] - size, places[1], size):
                places[0] = places[1] - size
        size = places[-1] - places[-2]
        if self._operations.equal(places[-2], places[-1], size):
            return self._with_more(places)
        glue = stretches[-2][: len(stretches[-2]) - lead]
        end = cuts[-1]
        place = self._behind(end.first, cuts[-2].first)
        for letter in self._letters[place : end.last]:
            if letter not in glue:
                break
            glue = glue[glue.index(letter) + 1 :]
            place += 1
        return self._with_more([*places, place + self._missing(places, place)])

    def _with_more(self, places: list[int]) -> list[int]:
        """The same with more blocks just like the last one.

        Where from then on ever fewer tensors are alive, no cut shows them.
        """
        size = places[-1] - places[-2]
        while size and self._operations.equal(places[-1] - size, places[-1], size):
            places.append(places[-1] + size)
        return places

    def _missing(self, places: Sequence[int], end: int) -> int:
        """Operations behind the last block that the one before ends with: it lacks what nobody reads any more."""
        if len(places) < 2:
            return 0
        before, last = self._letters[places[-2] : places[-1]], self._letters[places[-1] : end]
        for size in range(len(before) - len(last), MIN_ATOM - 1, -1):
            rest = before[:-size]
            if before[-size:] == self._letters[end : end + size] and not Counter(last) - Counter(rest):
                return size if len(rest) - len(last) <= MIN_ATOM else 0
        return 0

    def _behind_preparation(self, place: int, following: int) -> int:
        """Where the first block begins as the one at `following` does, behind operations that prepare what all read."""
        for p in range(place, following):
            if self._letters[p] == self._letters[following]:
                return p
            if self._operations.varies[p]:
                break
        return place

    def _even_lead(self, cuts: Sequence[Cut], lead: int) -> int:
        """The greatest lead, up to one, with which the first blocks read the same, and least that is theirs alone."""
        starts = [c.last for c in cuts[:4]]
        best: tuple[int, int] | None = None
        for less in range(lead, -1, -1):
            reads = [self._reads(a - less, b - less) for a, b in pairwise(starts)]
            if Counter(form for _, form in reads[0]) != Counter(form for _, form in reads[1]):
                continue
            own = sum(number < starts[0] - less for number, _ in reads[1] - reads[-1])
            if best is None or own < best[0]:
                best = own, less
        return lead if best is None else best[1]

    def _reads(self, a: int, b: int) -> set[tuple[int, Form]]:
        """What is made before a stretch of operations and read in it."""
        return {(number, form) for j in range(a, b) for number, form in self._operations.reads(j) if number < a}

    def _lead_in(self, cuts: Sequence[Cut], lead: int) -> int:
        """How far before their cuts the blocks begin: a step back where the last block does not end as the others.

        Streams that are joined where a block begins make the cut there narrower than the boundary before it.
        """
        starts = [c.last for c in cuts[:-1]]
        end = cuts[-1]
        behind = self._letters[end.first - 1 : end.last]
        for more in range(lead, lead + GLUE):
            if min(starts) <= more or len({self._letters[s - more] for s in starts} if more > lead else {0}) > 1:
                break
            if self._letters[starts[-1] - more - 1] in behind:
                return more
        return lead

    def _behind(self, place: int, pattern: int) -> int:
        """The end of a block, at `place` or shortly before it, where it ends as the block before `pattern` does."""
        last = self._letters[pattern - MIN_ATOM : pattern]
        for p in range(place, max(place - GLUE, 0), -1):
            if self._letters[p - MIN_ATOM : p] == last:
                return p
        return place
