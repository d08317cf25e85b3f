"""Runs a model through the backend and reads what happened."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import fx_cache
from fx_cache.demo.sheet import default_compiler
from fx_cache.runtime import given
from tests.models import MODELS, build

REUSING = {"residual_diff_threshold": 0.6, "max_warmup_steps": 2}
"""A policy that reuses some of the steps that `tests.models.walk` makes, and not all."""

needs_inductor = pytest.mark.skipif(default_compiler() != "inductor", reason="Inductor needs a C++ compiler")


@dataclass(frozen=True)
class CachedRun:
    """Outputs of every step, and for each span the steps that reused it and the diffs."""

    outputs: list[torch.Tensor]
    hits: list[list[int]]
    diffs: list[dict[int, float]]
    compiled: nn.Module


def shallow(name: str, seed: int = 0) -> nn.Module:
    """A tiny model with three blocks a stack: for tests whose time would go into compiling."""
    model = build(name, seed)
    for stack in MODELS[name].stacks:
        del getattr(model, stack)[3:]
    return model


def compile_cached(model: nn.Module, **options) -> nn.Module:
    options = {"compiler": "eager", "Fn_compute_blocks": 1, "max_warmup_steps": 1, **options}
    return torch.compile(model, backend="dit_cache", fullgraph=True, options=options)


def run_cached(model: nn.Module, steps: list[dict], **options) -> CachedRun:
    compiled = compile_cached(model, **options)
    with fx_cache.session("request", branch="only"):  # as peers take it: whatever is called is one step on
        outputs = [compiled(**step)[0].clone() for step in steps]
    spans = last_branch(model)["spans"]
    return CachedRun(outputs, [s["hits"] for s in spans], [s["diffs"] for s in spans], compiled)


def last_branch(model: nn.Module) -> dict:
    return fx_cache.summary(model).to_dict()["sessions"][-1]["branches"][-1]


def hits_of(compiled: nn.Module) -> list[list[int]]:
    """The steps that were reused, of each span of each branch of each session that reused any."""
    sessions = fx_cache.summary(compiled).to_dict()["sessions"]
    hits = [span["hits"] for s in sessions for b in s["branches"] for span in b["spans"]]
    return [h for h in hits if h]


def layers(model: nn.Module, step: dict[str, Any]) -> int:
    """How many linear layers a call runs."""
    with profile(activities=[ProfilerActivity.CPU]) as record:
        model(**step)
    return sum(e.count for e in record.key_averages() if e.key == "aten::linear")


def schedule_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the schedule inputs look as if they lay on a device: their values come as a tensor."""
    read = given.read_schedule
    monkeypatch.setattr(
        given, "read_schedule", lambda inputs: [torch.tensor([read([t])], dtype=torch.float64) for t in inputs]
    )


def relative_error(reference: torch.Tensor, value: torch.Tensor) -> float:
    reference, value = reference.double(), value.double()
    return float((reference - value).norm() / reference.norm())
