"""The known forward patterns, as data, and the match of a stack's streams against them.

cache-dit names six patterns by what a block takes and returns. In a graph the order of returned values does not show
and does not matter, so that its six are four here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ForwardPattern:
    """A kind of stack.

    Attributes:
        name: what the blocks carry.
        cache_dit: cache-dit's patterns that look like this in a graph.
        streams: streams carried through all blocks.
        partial: streams that appear or disappear inside the stack.
        conditioned: whether every block reads a step-invariant token sequence (cross-attention); None: either.
    """

    name: str
    cache_dit: tuple[str, ...]
    streams: int
    partial: int
    conditioned: bool | None


FORWARD_PATTERNS = (
    ForwardPattern("one stream", ("Pattern_3",), streams=1, partial=0, conditioned=False),
    ForwardPattern("one stream, conditioned", ("Pattern_2",), streams=1, partial=0, conditioned=True),
    ForwardPattern("two streams", ("Pattern_0", "Pattern_1"), streams=2, partial=0, conditioned=None),
    ForwardPattern("one stream and one that appears or ends", ("Pattern_4", "Pattern_5"), 1, 1, None),
)


def match_pattern(streams: int, partial: int, conditioned: bool) -> ForwardPattern | None:
    """The first known pattern that fits the counts, or None: the general rule serves the stack without one."""
    for pattern in FORWARD_PATTERNS:
        if (pattern.streams, pattern.partial) == (streams, partial) and pattern.conditioned in (None, conditioned):
            return pattern
    return None
