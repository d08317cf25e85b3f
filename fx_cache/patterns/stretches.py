"""Finds blocks that were captured in graphs of their own, in the calls of one whole forward, and what they hand on.

What shows them is the order of the calls: code called again and again, each time on what came of the call before. A
call that every block makes once is found first; then the place in the round of calls where the blocks are cut, which
is where the model's own are, and where least is alive.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import pairwise, takewhile

from fx_cache.patterns.calls import UNKNOWN, Call, InputTrace, Origin, Place
from fx_cache.patterns.forms import Form, may_be_read
from fx_cache.patterns.stacks import MIN_BLOCKS


@dataclass(frozen=True)
class Point:
    """A call that every block makes.

    Attributes:
        family: the code that is called.
        before: calls of it in the forward before that of the first block.
        every: calls of it in a block.
    """

    family: Hashable
    before: int
    every: int = 1

    def number(self, block: int) -> int:
        """Which call of its family it is in a block, from 1."""
        return self.before + self.every * block + 1

    def is_call(self, family: Hashable, number: int, block: int) -> bool:
        """Whether it is, in a block, the call of that number of a family."""
        return self.family == family and self.number(block) == number

    def block(self, family: Hashable, number: int) -> int | None:
        """In which block it is the call of that number of a family; None: in none."""
        block, rest = divmod(number - 1 - self.before, self.every)
        return block if self.family == family and not rest else None


@dataclass(frozen=True)
class RelayStream:
    """A tensor handed on from block to block.

    Attributes:
        name: the input of the first call in a block that takes it.
        reader: that call.
        maker: the call that makes it.
        output: which of the tensors that this gives back it is.
        last: the same in the span's last block.
        form: shape and dtype.
        tokens: the user's inputs whose tokens it holds where it enters the first block, and `UNKNOWN` if it may hold
            others; none if nothing is known.
        others: how many tokens at its beginning and at its end are not handed on, but joined to it before every block.
        shown: the user's inputs that it depends on where it enters the first block, and `UNKNOWN` if it may depend on
            others.
    """

    name: str
    reader: Point
    maker: Point
    output: int
    last: int
    form: Form
    tokens: frozenset[int]
    others: tuple[int, int]
    shown: frozenset[int] = field(compare=False)


def ended_by(streams: Sequence[RelayStream], family: Hashable, number: int, last: int) -> dict[int, int]:
    """Which of the tensors that a call gives back end which of some streams, by number.

    Args:
        streams: of a span.
        family: the code that is called.
        number: the call's number among those of that code, from 1.
        last: the span's last block.
    """
    return {s.last: k for k, s in enumerate(streams) if s.maker.is_call(family, number, last)}


@dataclass(frozen=True)
class Stretch:
    """Blocks one after another.

    Attributes:
        name: module path of the block list.
        begin: the call with which a block begins.
        starts: these calls.
        streams: what is handed on, the main one first.
        end: the last call in which a stream ends.
    """

    name: str
    begin: Point
    starts: tuple[int, ...]
    streams: tuple[RelayStream, ...]
    end: int


def stretches(calls: Sequence[Call], at_end: bool, others: Collection[int]) -> Iterator[Stretch]:
    """Every run of calls of one family, each on what the one before led to.

    Args:
        calls: of one forward.
        at_end: whether a span ends with the last block: then only streams count that it gives back too.
        others: the user's inputs that are known not to be denoised; blocks that work on nothing else are left alone.
    """
    finder = _Finder(calls, frozenset(others))
    for run in finder.runs():
        for anchors in finder.uniform(run):
            for starts in finder.uniform(finder.cut(anchors)):
                for blocks in (starts, starts[:-1]):  # where the last one gives back nothing like what others do
                    found = finder.stretch(blocks, at_end) if len(blocks) >= MIN_BLOCKS else None
                    if found is not None:
                        yield found
                        break


_Link = tuple[tuple[Hashable, int, int], tuple[Hashable, int, str], bool]
"""Who makes a tensor in a block, and who takes it first in the next one: code, which call of it, which tensor.

And whether code between graphs has made of the one what is the other, as far as can be seen.
"""


class _Finder:
    """The calls of a forward, with what is asked of them again and again."""

    def __init__(self, calls: Sequence[Call], others: frozenset[int]) -> None:
        self._calls = calls
        self._others = others
        self._places: dict[Hashable, list[int]] = {}
        for i, call in enumerate(calls):
            self._places.setdefault(call.family, []).append(i)
        self._paths = [c.owner.split(".") if c.owner else None for c in calls]
        self._taken: dict[Place, int] = {}
        """Of each tensor the last call that takes it."""
        for i, call in enumerate(calls):
            self._taken |= {t.made_by: i for t in call.inputs.values() if t.made_by is not None}
        self._still: list[bool] = []
        """Of each call whether nothing that is denoised can have come into it."""
        for call in calls:
            self._still.append(all(map(self._is_still, call.inputs.values())))

    def _is_still(self, value: InputTrace) -> bool:
        """Whether nothing that is denoised can have come into what a call is given, so far as is known of its maker."""
        if value.made_by is not None:
            return self._still[value.made_by[0]]
        return value.memory is None and bool(value.tokens) and value.tokens <= self._others

    def runs(self) -> Iterator[list[int]]:
        """Calls of one family, each on what the one before led to."""
        for places in self._places.values():
            run, carried = places[:1], set[tuple[str, Hashable, int]]()
            for a, b in pairwise(places):
                links = self._handed_on(a, b)
                common = links & carried
                if len(run) > 1 and not common:
                    yield run
                    run = [a]
                run = [*run, b] if links else [b]
                carried = common or links
            yield run

    def _handed_on(self, a: int, b: int) -> set[tuple[str, Hashable, int]]:
        """Inputs of call b that were made since call a, by code called once, and have the form that they had there."""
        found = set()
        for name, traced in self._calls[b].inputs.items():
            before, made = self._calls[a].inputs.get(name), traced.made_by
            if made is None and traced.unseen:
                made = self._left(a, b, traced)
            if before is not None and before.form == traced.form and made is not None and a <= made[0] < b:
                family = self._calls[made[0]].family
                if self._count(family, a, b) == 1:
                    found.add((name, family, self._tensor(made)))
        return found

    def uniform(self, starts: Sequence[int]) -> Iterator[Sequence[int]]:
        """The blocks that begin with these calls, divided where one hands on something else than the one before."""
        first, same = 0, None
        for block in range(1, len(starts)):
            found = [link for link in self._links(starts, block) if not self._still[self._maker(starts, block, link)]]
            links = {(*link[:2], self._is_odd(starts, block, link)) for link in found}
            # In another list code between graphs may hand on another stream.
            moved = any(link[-1] for link in found) and self._list_of(starts, block) != self._list_of(starts, block - 1)
            if moved or (same is not None and links != same):
                yield starts[first:block]
                first = block
            same = links if first < block else None
        yield starts[first:]

    def _is_odd(self, starts: Sequence[int], block: int, link: _Link) -> bool:
        """Whether only here code between graphs has made what a block takes: of something else than before, perhaps."""
        beside = (b for b in (block - 1, block + 1) if 0 < b < len(starts))
        return link[-1] and not any(link in self._links(starts, b) for b in beside)

    def _list_of(self, starts: Sequence[int], block: int) -> tuple[str, ...]:
        """Module path of the list that a block is in."""
        end = starts[block + 1] if block + 1 < len(starts) else starts[block] + starts[block] - starts[block - 1]
        path = _common([p for p in self._paths[starts[block] : end] if p is not None])
        return tuple(takewhile(lambda part: not any(c.isdigit() for c in part), path))

    def cut(self, anchors: Sequence[int]) -> Sequence[int]:
        """Where the blocks begin that make these calls: where the model's own do, and where least is alive."""
        if len(anchors) < MIN_BLOCKS:
            return anchors
        least = min(b - a for a, b in pairwise(anchors))
        backs = [0]
        for back in range(1, min(least, anchors[0] + 1)):
            if len({self._calls[i - back].family for i in anchors}) > 1:
                break
            if self._point([i - back for i in anchors], anchors[0] - back) is not None:
                backs.append(back)

        def badness(back: int) -> tuple[int, int, int]:
            first, second = (i - back for i in anchors[:2])
            path = _common([p for p in self._paths[first:second] if p is not None])
            alive = sum(first <= made[0] < second <= last for made, last in self._taken.items())
            return -len(path), alive, back

        back = min(backs, key=badness)
        return [i - back for i in anchors]

    def stretch(self, starts: Sequence[int], at_end: bool) -> Stretch | None:
        """The blocks that begin with these calls, if they hand something on."""
        begin, found = self._point(starts, starts[0]), self._streams(starts, at_end)
        if begin is None or found is None:
            return None
        streams, end = found
        return Stretch(self._name(starts, end), begin, tuple(starts), streams, end)

    def _streams(self, starts: Sequence[int], at_end: bool) -> tuple[tuple[RelayStream, ...], int] | None:
        """What blocks that begin with these calls hand on, and the last call in which one of them ends."""
        found: dict[RelayStream, Place] = {}
        given_back = False
        for (maker, reader, name), output in self._common_links(starts):
            last_call = self._in_last(starts, maker)
            if last_call is None:
                continue
            of_first = self._at(maker, 0)
            last = _same_output(self._calls[of_first], self._calls[last_call], output)
            given_back = given_back or last is not None
            last = last if at_end else output
            if last is None:
                continue
            traced = [self._calls[self._at(reader, b)].inputs[name] for b in range(len(starts))]
            others = {t.others for t in traced[1:]}
            joined = others.pop() if len(others) == 1 else (0, 0)
            first = traced[0]
            stream = RelayStream(name, reader, maker, output, last, first.form, first.tokens, joined, first.shown)
            found[stream] = last_call, last
        if not given_back or not found:
            return None
        if all(self._still[self._at(s.maker, 0)] for s in found):
            return None
        # First what is not known to hold nothing that is denoised, is changed, shows what may be that, and goes on.
        end = max(i for i, _ in found.values())

        def order(stream: RelayStream) -> tuple[bool, bool, bool, bool, bool, int]:
            through, read = self._is_through(found[stream]), self._read_behind(found[stream], end)
            shows = bool(stream.shown - self._others)
            size = math.prod(stream.form[0])
            return self._is_other(stream), through, not self._shows(stream), not shows, not read, -size

        streams = tuple(sorted(found, key=order))
        return None if self._hands_on_unseen(starts, streams, end) else (streams, end)

    def _hands_on_unseen(self, starts: Sequence[int], streams: Sequence[RelayStream], end: int) -> bool:
        """Whether code between graphs may hand on a stream that is none of these: it would be given back as it was.

        What a block begins with is handed on; so is what it takes later, if the block before leaves something as large
        to that code, and this one has left it nothing of which it may have made that.
        """
        if self._is_other(streams[0]):
            return True
        # Heads of attention have four dimensions, and are handed on by nobody.
        handed = min(self._at(s.maker, 0) for s in streams)
        made = {
            form
            for i in range(starts[0], starts[1])
            for form in self._calls[i].outputs
            if form is not None and (i >= handed or len(form[0]) != 4)
        }
        unknown = not self._shows(streams[0])
        least = min(3, len(streams[0].form[0]))  # less is not handed on by token
        begin = self._calls[starts[0]].family
        seen = {s.name for s in streams if s.reader.family == begin}
        ends = {(self._at(s.maker, b), s.output) for s in streams for b in range(len(starts) - 1)}

        def is_known(origin: Origin) -> bool:
            """Whether a tensor is none that code between the blocks has made, and given to several calls."""
            return origin.known and all(output >= 0 or call < starts[0] for call, output in origin.of)

        def is_left(value: InputTrace, block: int) -> bool:
            """Whether code between graphs has made something of what an earlier block makes, and no stream is."""
            made = value.made_by
            before = made is not None and not value.whole and starts[0] <= made[0] < block
            return before and made is not None and (made[0], self._tensor(made)) not in ends

        def is_own(value: InputTrace, block: int, i: int) -> bool:
            """Whether code between graphs has made it of what its block has made, as far as can be seen."""
            size, before = math.prod(value.form[0]), starts[bisect_left(starts, block) - 1]
            return i > block and bool(self._leaves(block, i, size) or not self._leaves(before, block, size))

        for block, i in ((b, i) for b, n in zip(starts[1:], [*starts[2:], end + 1], strict=True) for i in range(b, n)):
            for name, t in self._calls[i].inputs.items():
                large = len(t.form[0]) >= least and t.form[1].is_floating_point
                if not large or is_known(t.origin) or (i == block and name in seen):
                    continue
                if t.form not in made:  # it may be handed on all the same, and be the picture, in other forms
                    found = unknown and t.unseen and not self._leaves(block, i)
                else:
                    found = is_left(t, block) or (t.unseen and not is_own(t, block, i))
                if found:
                    return True
        return False

    def _shows(self, stream: RelayStream) -> bool:
        """Whether a stream is known to depend on what may be denoised."""
        return bool(self._others) and bool(stream.shown - self._others - {UNKNOWN})

    def _is_other(self, stream: RelayStream) -> bool:
        """Whether a stream is known to hold tokens of nothing that is denoised."""
        return bool(stream.tokens) and stream.tokens <= self._others

    def _common_links(self, starts: Sequence[int]) -> list[tuple[tuple[Point, Point, str], int]]:
        """What every block takes of the one before: the calls that make and take it, name and number of the tensor."""
        links = [{link[:2]: None for link in self._links(starts, b)} for b in range(1, len(starts))]
        common = reduce(lambda a, b: {link: None for link in a if link in b}, links)
        found = []
        for (maker, made, output), (reader, taken, name) in common:
            points = []
            for family, number in ((maker, made), (reader, taken)):
                begin, end = (bisect_left(self._places[family], s) for s in starts[:2])
                points.append(
                    self._point(starts, self._places[family][begin + number]) if begin + number < end else None
                )
            if points[0] is not None and points[1] is not None:
                found.append(((points[0], points[1], name), output))
        return sorted(found, key=lambda f: (self._at(f[0][1], 0), f[0][2]))

    def _links(self, starts: Sequence[int], block: int) -> dict[_Link, None]:
        """What a block takes of the one before that has the form of what that took in its place.

        Masks and indices are none of it: blocks add nothing to them.
        """
        before, begin = starts[block - 1], starts[block]
        end = starts[block + 1] if block + 1 < len(starts) else len(self._calls)
        found: dict[tuple[Hashable, int, int], tuple[tuple[Hashable, int, str], bool]] = {}
        for i in range(begin, end):
            family = self._calls[i].family
            number = self._count(family, begin, i)
            first = bisect_left(self._places[family], before) + number
            same = self._places[family][first]
            for name, traced in self._calls[i].inputs.items():
                then = self._calls[same].inputs.get(name) if same < begin else None
                made = traced.made_by
                if made is None and traced.unseen and i == begin:
                    made = self._left(before, begin, traced)
                if made is None or not before <= made[0] < begin or then is None or then.form != traced.form:
                    continue
                numbers = traced.form[1].is_floating_point or traced.form[1].is_complex
                if numbers and (traced.whole or i == begin):
                    maker = self._calls[made[0]].family
                    key = maker, self._count(maker, before, made[0]), self._tensor(made)
                    found.setdefault(key, ((family, number, name), traced.made_by is None))
        return {(maker, *taken): None for maker, taken in found.items()}

    def _left(self, begin: int, end: int, value: InputTrace) -> Place | None:
        """What some calls leave to code between graphs that a value may be made of: the one of its form, if it is one.

        Not what that code has added to a stream of its own, or put in other places.
        """
        form = value.form
        left = [(i, k) for i, k in self._leaves(begin, end, math.prod(form[0])) if self._calls[i].outputs[k] == form]
        return left[0] if len(left) == 1 and len(form[0]) >= 3 and left[0] not in value.added else None

    def _leaves(self, begin: int, end: int, size: int | None = None) -> list[Place]:
        """What some calls make, with so many elements or with any that may be read, and no graph takes."""
        return [
            (i, k)
            for i in range(begin, end)
            for k, made in enumerate(self._calls[i].outputs)
            if made is not None and (i, k) not in self._taken
            if (may_be_read(made) if size is None else math.prod(made[0]) == size)
        ]

    def _maker(self, starts: Sequence[int], block: int, link: _Link) -> int:
        """The call that makes, in the block before, what a block takes."""
        (family, number, _), *_ = link
        return self._places[family][bisect_left(self._places[family], starts[block - 1]) + number]

    def _point(self, starts: Sequence[int], i: int) -> Point | None:
        """A call of the first block as one of every block; None if that does not call its code as often as others."""
        family = self._calls[i].family
        counts = {self._count(family, a, b) for a, b in pairwise(starts)}
        return Point(family, self._count(family, 0, i), counts.pop()) if len(counts) == 1 else None

    def _at(self, point: Point, block: int) -> int:
        return self._places[point.family][point.number(block) - 1]

    def _in_last(self, starts: Sequence[int], point: Point) -> int | None:
        """Its call in the last block, which is known by what is called before it if others are of the same code."""
        places, number = self._places[point.family], point.number(len(starts) - 1)
        if number > len(places):
            return None
        first, last = self._at(point, 0), places[number - 1]
        ways = ([c.family for c in self._calls[a : b + 1]] for a, b in ((starts[0], first), (starts[-1], last)))
        return last if last >= starts[-1] and (point.every == 1 or next(ways) == next(ways)) else None

    def _is_through(self, place: Place) -> bool:
        """Whether the last block hands through what ends a stream."""
        call, tensor = place
        tensors = self._calls[call].tensors
        return tensor < len(tensors) and tensors[tensor] in self._calls[call].through

    def _read_behind(self, place: Place, end: int) -> bool:
        """Whether a later graph reads what the last block makes of a stream."""
        call, tensor = place
        tensors = self._calls[call].tensors
        return self._taken.get((call, tensors[tensor]), -1) > end if tensor < len(tensors) else False

    def _name(self, starts: Sequence[int], end: int) -> str:
        """What the weights of all blocks begin with: the path of the block list."""
        return ".".join(_common([p for p in self._paths[starts[0] : end + 1] if p is not None])) or "the blocks"

    def _count(self, family: Hashable, begin: int, end: int) -> int:
        """How many of the calls from `begin` on, up to `end`, are of a family."""
        places = self._places[family]
        return bisect_left(places, end) - bisect_left(places, begin)

    def _tensor(self, place: Place) -> int:
        """Which of the tensors that a call gives back an output is."""
        return sum(form is not None for form in self._calls[place[0]].outputs[: place[1]])


def _common(paths: Sequence[Sequence[str]]) -> list[str]:
    return [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))]


def _same_output(regular: Call, last: Call, output: int) -> int | None:
    """Which tensor that the last block gives back is the one that the others give back as number `output`."""
    tensors = [f for f in regular.outputs if f is not None]
    ends = [f for f in last.outputs if f is not None]
    if len(ends) == len(tensors):
        return output if ends[output] == tensors[output] else None
    alike = [i for i, form in enumerate(ends) if form == tensors[output]]
    return alike[0] if len(alike) == 1 else None
