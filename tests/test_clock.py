"""Whether a call goes on with a request: each row says what is called, and what must come of it.

Oracle: the table. Host and device show the same signs, so that one table holds for both.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch

from fx_cache.runtime.clock import (
    BOTH_WAYS,
    EITHER,
    FIRST_MOVE,
    PARTS,
    REPEATED,
    RESTED,
    STEP_REPEATED,
    Clock,
    Move,
    Sign,
    directions,
    read_schedule,
)
from fx_cache.runtime.follow import Look, left_over, strayed

START, FIRST, NEXT, REPEAT, LATE = Move.START, Move.FIRST, Move.NEXT, Move.REPEAT, Move.LATE


def at(
    *times: float, left: float | None = None, back: float | None = None, turn: float | None = None, **told: object
) -> Sign:
    """A call at some times, of whose latent `left` is left over, and `back` of that of the request's first call.

    `turn` is the cosine of the angle between the move that leads to its latent and the one before.
    """
    values = tuple(v for t in times for v in (t, t, 0.0))
    if left is None:
        return Sign(values, **told)
    path = None if turn is None else turned(turn)
    return Sign(values, grams(left), (2,), back=() if back is None else (grams(back),), path=path, **told)


def turned(cosine: float) -> tuple[float, ...]:
    """Inner products of three points, the second at 0: one moves from the first to it, and on to the third."""
    return 1.0, 0.0, -cosine, 0.0, 0.0, 0.0, -cosine, 0.0, 1.0


def grams(sine: float) -> tuple[float, ...]:
    """Inner products of two vectors of length 1 at an angle."""
    cosine = (1.0 - sine**2) ** 0.5
    return 1.0, cosine, cosine, 1.0


@dataclass(frozen=True)
class Row:
    calls: list[Sign]
    moves: list[Move]
    doubts: list[str | None] = field(default_factory=list)


ROWS = {
    "a request": Row([at(9), at(8), at(7)], [START, FIRST, NEXT], [None, FIRST_MOVE, None]),
    "upwards": Row([at(1), at(2), at(3)], [START, FIRST, NEXT]),
    "guidance rests": Row([at(9, 3.5), *(at(t, 3.5, left=0.1, turn=1) for t in (8, 7))], [START, FIRST, NEXT]),
    "the time is learned on the way": Row(
        [*(at(3.5, t, left=0.1) for t in (9, 8)), *(at(3.5, t, left=0.1, times=(1,)) for t in (7, 6))],
        [START, FIRST, NEXT, NEXT],
    ),
    "goes on from where it began, and straight": Row(
        [at(9, 3.5), *(at(t, 3.5, left=0.1, back=0.5, turn=1) for t in (8, 7))], [START, FIRST, NEXT]
    ),
    "several numbers that move together": Row(
        [at(9, 3.5), at(8, 3.0, together=True), at(7, 2.5, together=True), at(6, 2.5, together=True)],
        [START, FIRST, NEXT, REPEAT],
    ),
    "guidance changes on the way": Row(
        [at(9, 3.5), *(at(t, w, left=0.1, turn=1) for t, w in ((8, 3.5), (7, 3.5), (6, 4.0)))],
        [START, FIRST, NEXT, START],
    ),
    "time goes back": Row([at(9), at(8), at(7), at(9), at(8)], [START, FIRST, NEXT, START, FIRST]),
    "given up at its first call": Row(
        [at(5), at(9), at(8), at(7)], [START, FIRST, LATE, NEXT], [None, FIRST_MOVE, FIRST_MOVE, None]
    ),
    "given up, and the latent shows it": Row([at(5), at(9, left=0.99), at(8, left=0.1)], [START, START, FIRST]),
    "a second sampler below the first": Row(
        [at(9), at(8, left=0.05), at(7, left=0.04), at(5, left=0.5), at(4, left=0.05)],
        [START, FIRST, NEXT, START, FIRST],
    ),
    "a second sampler at the second call": Row(
        [at(9), at(5, left=0.6), at(4, left=0.05), at(3, left=0.05)], [START, FIRST, LATE, NEXT]
    ),
    "a sampler that adds noise": Row(
        [at(9), at(8, left=0.7), at(7, left=0.6), at(6, left=0.4)], [START, FIRST, NEXT, NEXT]
    ),
    "one of several numbers moves, and the latent goes on": Row(
        [at(9, 3.5), at(8, 3.5, left=0.5), at(7, 3.5, left=0.3, turn=0.9), at(6, 3.5, left=0.4, turn=0.6)],
        [START, FIRST, NEXT, NEXT],
    ),
    "one of several numbers moves, and the latent turns back": Row(
        [at(9, 1), *(at(t, w, left=0.1, turn=-0.5) for t, w in ((9, 3), (9, 5), (9, 7), (8, 1), (8, 3), (7, 3)))],
        [START, FIRST, LATE, LATE, LATE, LATE, LATE],
    ),
    "one of several numbers moves, and nothing is known of the latent": Row(
        [at(9, 3.5), at(8, 3.5), at(7, 3.5)], [START, FIRST, LATE]
    ),
    "several numbers move": Row([at(9, 3.5), at(8, 3.0, left=0.7), at(7, 2.5, left=0.6)], [START, FIRST, NEXT]),
    "one of several numbers moves, and the step is said": Row(
        [at(9, 3.5, said=0), at(8, 3.5, left=0.7, said=1), at(7, 3.5, left=0.6, said=2)], [START, NEXT, NEXT]
    ),
    "no time, and the latent goes on": Row(
        [at(named=True), *(at(left=left, turn=turn, named=True) for left, turn in ((0.2, 0), (0.1, 1), (0.1, -1)))],
        [START, FIRST, NEXT, START],
    ),
    "no time, and the same latent": Row([at(named=True), at(left=0.0, named=True)], [START, START]),
    "no time, and the pass is named": Row([at(named=True, apart=True), at(named=True, apart=True)], [START, NEXT]),
    "a latent that is no number": Row(
        [at(9), at(8, left=0.1), Sign((7.0, 7.0, 0.0), (float("nan"),) * 4, (2,))], [START, FIRST, START]
    ),
    "tried once": Row([at(9), at(9), at(8), at(7)], [START, START, FIRST, NEXT], [None, None, FIRST_MOVE, None]),
    "twice at one time": Row(
        [at(9), at(8), at(8), at(7), at(6)],
        [START, FIRST, REPEAT, NEXT, NEXT],
        [None, FIRST_MOVE, REPEATED, REPEATED, REPEATED],
    ),
    "windows, named": Row(
        [at(9, named=True), at(9, named=True), at(8, named=True), at(8, named=True), at(7, named=True)],
        [START, START, FIRST, REPEAT, NEXT],
        [None, None, FIRST_MOVE, REPEATED, REPEATED],
    ),
    "named": Row([at(9, named=True), at(8, named=True)], [START, NEXT], [None, None]),
    "named, another latent": Row([at(9, named=True), at(8, named=True, left=0.99)], [START, START]),
    "a named pass": Row(
        [at(9, named=True, apart=True), at(9, named=True, apart=True), at(8, named=True, apart=True)],
        [START, NEXT, NEXT],
        [None, None, None],
    ),
    "the step is said": Row([at(9, said=0), at(8, said=1)], [START, NEXT], [None, None]),
    "the step is said twice": Row(
        [at(9, said=0), at(8, said=1), at(8, said=1), at(7, said=2)],
        [START, NEXT, REPEAT, NEXT],
        [None, None, STEP_REPEATED, STEP_REPEATED],
    ),
    "the first step is said twice": Row(
        [at(9, said=0), at(9, said=0), at(8, said=1)], [START, START, FIRST], [None, None, FIRST_MOVE]
    ),
    "the step goes back": Row([at(9, said=3), at(8, said=4), at(7, said=0)], [START, NEXT, START]),
    "steps alone, of a pass": Row(
        [
            Sign(said=0, named=True, apart=True),
            Sign(said=1, named=True, apart=True),
            Sign(said=1, named=True, apart=True),
        ],
        [START, NEXT, REPEAT],
        [None, None, STEP_REPEATED],
    ),
    "another pass at one time, by guidance": Row(
        [at(9, 3.5, times=(0,)), at(9, 1.0, times=(0,)), at(8, 3.5, times=(0,)), at(8, 1.0, times=(0,))],
        [START, START, FIRST, REPEAT],
        [None, None, FIRST_MOVE, RESTED],
    ),
    "another pass with one latent, by guidance": Row(
        [at(9, 3.5, named=True), at(9, 1.0, left=0.0, named=True), at(8, 1.0, left=0.1, named=True)],
        [START, START, FIRST],
        [None, None, FIRST_MOVE],
    ),
    "the latent that it began with": Row(
        [at(9), at(8, left=0.05), at(7, left=0.04, back=0.3), at(6, left=0.04, back=0.0)], [START, FIRST, NEXT, START]
    ),
    "the first call of a request": Row([at(9), at(8), at(7, begins=True), at(6)], [START, FIRST, START, FIRST]),
    "another number of inputs": Row([at(9), at(8), at(7, 3.5)], [START, FIRST, START]),
    "frames end one after another": Row(
        [Sign((0.5, 0.9, 0.0)), Sign((0.4, 0.8, 0.0)), Sign((0.0, 0.7, 0.0)), Sign((0.0, 0.6, 0.0))],
        [START, FIRST, NEXT, NEXT],
    ),
    "one frame begins while others go on": Row(
        [Sign((0.5, 0.9, 0.0)), Sign((0.4, 0.8, 0.0)), Sign((0.3, 1.0, 0.0))], [START, FIRST, START]
    ),
    "one that comes back in a leap": Row(
        [at(9), at(8), at(7), at(6), at(5), at(9), at(8), at(4)],
        [START, FIRST, NEXT, NEXT, NEXT, START, FIRST, Move.EITHER],
        [*[None, FIRST_MOVE, None, None, None], *[None, FIRST_MOVE, EITHER]],
    ),
}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("name", ROWS)
def test_what_a_call_shows(name: str, late: bool) -> None:
    row, clock = ROWS[name], Clock()
    moves, doubts = [], []
    for sign in row.calls:
        if late:  # what lay on a device is read, and shows the same
            grams, path, *back = (
                None if part is None else torch.tensor(part, dtype=torch.float64)
                for part in (sign.grams, sign.path, *sign.back)
            )
            values = torch.tensor(sign.values, dtype=torch.float64).reshape(-1, 1, PARTS)
            there = replace(sign, values=list(values), grams=grams, path=path, back=tuple(back))
            sign = there.read(iter([v for part in there.late for v in part.reshape(-1).tolist()]))
        moves.append(clock.move(sign))
        doubts.append(clock.doubt)
    assert moves == row.moves
    assert doubts == (row.doubts or doubts)


def test_directions_know_nothing_of_width() -> None:
    assert read_schedule([torch.tensor([0.5])]) == read_schedule([torch.full((3,), 0.5)]) == (0.5, 0.5, 0.0)
    read = read_schedule([torch.tensor(7), torch.tensor([0.25, 0.75])])
    assert read[:5] == (7.0, 7.0, 0.0, 0.25, 0.75)
    assert read != read_schedule([torch.tensor(7), torch.tensor([0.75, 0.25])])
    assert directions((9.0, 9.0, 0.0, 0.0, 1.0, 0.3), (8.0, 8.0, 0.0, 0.0, 0.5, 0.3)) == (-1, -1)


def test_elements_that_change_places_while_the_extremes_rest_go_no_way() -> None:
    mask, other = torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.tensor([0.0, 1.0, 1.0, 0.0])
    assert directions(read_schedule([mask]), read_schedule([other])) == (BOTH_WAYS,)
    assert directions(read_schedule([mask]), read_schedule([mask.clone()])) == (0,)


def steps_of(noise: float, seed: int = 0) -> list[float]:
    """What is left over along a way that a sampler goes, with as much noise at each step."""
    generator = torch.Generator().manual_seed(seed)
    x, drawn, before = torch.randn(1, 4, 16, 16, generator=generator), [], None
    for _ in range(6):
        look = Look([x])
        if before is not None:
            numbers = look.since(before)
            assert numbers is not None
            drawn.append(strayed(numbers.tolist(), before.sizes))
        output = torch.tanh(x.flip(-1)) + 0.3 * torch.randn(x.shape, generator=generator)
        look.came_out([torch.zeros(3), output])
        before = look
        x = 0.97 * x - 0.2 * output + noise * torch.randn(x.shape, generator=generator)
    return drawn


def test_a_scheduler_step_leaves_nothing_over() -> None:
    assert max(steps_of(0.0)) < 1e-6
    assert min(steps_of(0.3)) > 0.2 and max(steps_of(0.3)) < 0.4


@pytest.mark.parametrize("shape", [(1, 32, 16), (1, 16, 24), (1, 16, 8), (2, 3)])
def test_outputs_of_other_shapes(shape: tuple[int, ...]) -> None:
    """With other pictures' tokens behind or before, with more or fewer channels, or nothing like it."""
    x, output = torch.randn(1, 16, 16), torch.randn(shape)
    before = Look([x])
    before.came_out([output])
    moved = x.clone()
    if len(shape) == 3:
        tokens, channels = min(16, shape[1]), min(16, shape[2])
        moved[:, :tokens, :channels] += 0.5 * output[:, -tokens:, :channels]
    numbers = Look([moved]).since(before)
    assert numbers is not None and strayed(numbers.tolist(), before.sizes) < 1e-6


def test_what_is_left_over_is_what_least_squares_leave() -> None:
    generator = torch.Generator().manual_seed(1)
    for count in (1, 2, 3):
        vectors = torch.randn(count + 1, 50, generator=generator, dtype=torch.float64)
        basis, target = vectors[:-1].T, vectors[-1]
        expected = (target - basis @ torch.linalg.lstsq(basis, target).solution).norm() / target.norm()
        assert left_over((vectors @ vectors.T).tolist()) == pytest.approx(float(expected), rel=1e-9)
