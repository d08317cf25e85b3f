"""What shape and dtype of a tensor say of it."""

from __future__ import annotations

import math

import torch

Form = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of a tensor."""


def may_be_read(value: Form) -> bool:
    """Whether a tensor holds more than one number: it may be the picture, or a part of it."""
    return math.prod(value[0]) > 1


def is_heads(value: Form, stream: Form) -> bool:
    """Whether a tensor has the form of keys and values of attention beside a stream, and not that of a map of it.

    These have the stream's channels in two dimensions; a map has its tokens in the last two.
    """
    if len(value[0]) != 4 or len(stream[0]) != 3:
        return False
    _, first, second, last = value[0]
    tokens, channels = stream[0][1:]
    return channels in (first * last, second * last) and second * last != tokens
