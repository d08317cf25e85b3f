"""Runs transformers of the engine and reads what happened."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

OPTIONS = {"compiler": "eager", "Fn_compute_blocks": 1, "max_warmup_steps": 2}


def tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    found = output if isinstance(output, tuple | list) else getattr(output, "__dict__", {}).values()
    return [t.clone() for part in found for t in tensors(part)]


def hits(handle: Any, name: str) -> list[list[int]]:
    (session,) = handle.summary(name).sessions
    return [span["hits"] for branch in session["branches"] for span in branch["spans"]]


def same(expected: list[list[Tensor]], got: list[list[Tensor]]) -> bool:
    """Bit for bit, every output of every step."""
    pairs = [pair for x, y in zip(expected, got, strict=True) for pair in zip(x, y, strict=True)]
    return all(torch.equal(a, b) for a, b in pairs)
