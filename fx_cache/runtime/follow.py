"""Tells whether what is denoised follows from the call before by a scheduler's step.

Every scheduler makes the next latent out of the last one and of what the model returned for it. What is left of the
next one when it is put together of these two as well as possible is little then: nothing for Euler's and DDIM's steps,
a little where guidance or earlier steps come in, more where noise is added. Of a latent that begins elsewhere nearly
all is left. Some elements, spread over the tensor, tell.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from fx_cache.runtime.device import device_of, to_device

ELEMENTS = 4096
"""Elements of a tensor that are looked at, at most twice as many."""

HELPED = 3.0
"""How much less is left of a latent, at least, where what came out before is known than where it is not."""

STRAIGHT = 0.5
"""Cosine of the angle between two moves of a latent, at least, the second of which goes on with the first."""

SINGULAR = 1e-10
"""The part of its length that a direction must add to those before it."""


class Look:
    """What is remembered of one call: some elements of each latent, and of what came out for it."""

    def __init__(self, latents: Sequence[torch.Tensor]) -> None:
        """
        Args:
            latents: what is denoised; what holds no numbers to look at is left out.
        """
        shown = [t for t in latents if _can_be_looked_at(t)]
        self._shapes = [t.shape for t in shown]
        self._rows = [[_spread(t)] for t in shown]

    @torch.no_grad()
    def came_out(self, outputs: Sequence[object]) -> None:
        """Takes what the model returned. To a latent belongs the output of its shape; of several, each to one.

        Failing that one that differs in one dimension: it holds other channels too, or the tokens of other pictures.
        """
        free = [o for o in outputs if isinstance(o, torch.Tensor) and _can_be_looked_at(o)]
        for shape, rows in zip(self._shapes, self._rows, strict=True):
            own = next((o for o in free if o.shape == shape), None)
            if own is not None:
                free = [o for o in free if o is not own]
            parts = [own] if own is not None else next((p for o in free if (p := parts_like(o, shape))), [])
            rows[1:] = [_spread(part) for part in parts]

    def since(self, before: Look | None) -> torch.Tensor | None:
        """What `left_over` needs to know, shape [n]; None where these are no two calls of one kind.

        Nothing is waited for.
        """
        if before is None or not self._rows or self._shapes != before._shapes:
            return None
        grams = []
        with torch.no_grad():
            for rows, (now, *_) in zip(before._rows, self._rows, strict=True):
                compared = [*rows, now]
                if any(row.device != now.device for row in rows):  # a latent of the host, what came out on the device
                    device = device_of(compared) or now.device
                    compared = [to_device(row, device) for row in compared]
                stacked = torch.stack(compared)
                grams.append((stacked @ stacked.T).reshape(-1))
            return grams[0] if len(grams) == 1 else torch.cat([g.to(grams[0].device) for g in grams])

    def start(self) -> Look:
        """The latents alone, without what came out for them."""
        return self._with([rows[:1] for rows in self._rows])

    def beside(self, others: Sequence[Look]) -> Look:
        """The same with what came out at other calls for the same latents, as the passes of a step."""
        rows = [list(own) for own in self._rows]
        for other in others:
            for own, more in zip(rows, other._rows, strict=True):
                own += more[1:]
        return self._with(rows)

    def behind(self, earlier: Look | None) -> Look | None:
        """The latents alone, and before them those of an earlier call; None where these are no two calls of one kind.

        What `since` says of them is how the latents have moved, and go on (`straight`).
        """
        if earlier is None or self._shapes != earlier._shapes:
            return None
        return self._with([[*then[:1], *now[:1]] for then, now in zip(earlier._rows, self._rows, strict=True)])

    def _with(self, rows: list[list[torch.Tensor]]) -> Look:
        look = Look(())
        look._shapes, look._rows = self._shapes, rows
        return look

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All that is remembered."""
        return [row for rows in self._rows for row in rows]

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many vectors `since` of the next call compares, for each latent."""
        return tuple(len(rows) + 1 for rows in self._rows)


def strayed(numbers: Sequence[float], sizes: Sequence[int]) -> float:
    """The part of a latent that does not follow from the call before, 0.0 to 1.0; of several latents that of most.

    Args:
        numbers: what `Look.since` gives.
        sizes: of the look before.
    """
    return max((left_over(gram) for gram in _grams(numbers, sizes)), default=0.0)


def helped(numbers: Sequence[float], sizes: Sequence[int]) -> bool:
    """Whether latents follow from what came out of the call before, and not from its latents alone.

    Args:
        numbers: what `Look.since` gives.
        sizes: of the look before.
    """
    for gram in _grams(numbers, sizes):
        alone = [[row[0], row[-1]] for row in (gram[0], gram[-1])]
        if not HELPED * left_over(gram) <= left_over(alone):
            return False
    return bool(sizes)


def straight(numbers: Sequence[float], sizes: Sequence[int]) -> bool:
    """Whether latents go on in the direction in which they have come, and not back to what was before.

    Args:
        numbers: what `Look.since` gives, of a look before that knows the latents of two calls (`Look.behind`).
        sizes: of that look.
    """
    for (a, ab, an), (_, b, bn), (*_, n) in _grams(numbers, sizes):
        along, came, goes = bn - b - an + ab, a - 2 * ab + b, b - 2 * bn + n
        if not (came > 0.0 and goes > 0.0 and along >= STRAIGHT * math.sqrt(came * goes)):
            return False
    return bool(sizes)


def rests(numbers: Sequence[float], sizes: Sequence[int]) -> bool:
    """Whether latents are those of the call before: nothing of a scheduler's step lies between.

    Args:
        numbers: what `Look.since` gives.
        sizes: of the look before.
    """
    for (before, *_, both), *_, (*_, now) in _grams(numbers, sizes):
        if not before - 2 * both + now <= SINGULAR**1.2 * now:
            return False
    return bool(sizes)


def _grams(numbers: Sequence[float], sizes: Sequence[int]) -> Iterator[list[Sequence[float]]]:
    """The rows of each of some square matrices that lie one behind the other."""
    at = 0
    for size in sizes:
        yield [numbers[at + i * size : at + (i + 1) * size] for i in range(size)]
        at += size * size


def left_over(gram: Sequence[Sequence[float]]) -> float:
    """The length of the last of some vectors that no sum of multiples of the others makes up, as a part of its own.

    Args:
        gram: their inner products.
    """
    g = [list(row) for row in gram]
    whole = g[-1][-1]
    if not all(math.isfinite(v) for row in g for v in row):
        return math.inf
    if whole <= 0.0:
        return 0.0
    for i in range(len(g) - 1):
        pivot = g[i][i]
        if pivot <= SINGULAR * gram[i][i] or pivot <= 0.0:
            continue
        for j in range(i + 1, len(g)):
            factor = g[i][j] / pivot
            for k in range(j, len(g)):
                g[j][k] -= factor * g[i][k]
    return math.sqrt(max(0.0, g[-1][-1]) / whole)


def parts_like(output: torch.Tensor, shape: Sequence[int]) -> list[torch.Tensor]:
    """What of an output may belong to a latent of some shape; nothing if they differ in more than one dimension."""
    if output.ndim != len(shape):
        return []
    different = [d for d, (a, b) in enumerate(zip(output.shape, shape, strict=True)) if a != b]
    if len(different) != 1:
        return [] if different else [output]
    (dim,) = different
    has, asked = output.shape[dim], shape[dim]
    if has > asked:
        return [output.narrow(dim, 0, asked), output.narrow(dim, has - asked, asked)]
    filled = output.new_zeros(shape)
    filled.narrow(dim, 0, has).copy_(output)
    return [filled]


def _can_be_looked_at(value: torch.Tensor) -> bool:
    plain = type(value) in (torch.Tensor, torch.nn.Parameter) and value.layout is torch.strided
    return plain and value.is_floating_point() and value.numel() > 0


def _spread(tensor: torch.Tensor) -> torch.Tensor:
    """A copy, in float64."""
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // ELEMENTS) | 1].to(torch.float64, copy=True)
