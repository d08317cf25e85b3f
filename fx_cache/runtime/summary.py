"""What happened: steps, hits, the reason of every miss, diffs and bytes, for each session, branch and span."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fx_cache.runtime.policy import Counters
from fx_cache.runtime.registry import stores
from fx_cache.runtime.sessions import Store
from fx_cache.runtime.slots import BranchRecord, Slot


@dataclass(frozen=True)
class Summary:
    """Statistics of one model or of all; ``str()`` is a table."""

    sessions: tuple[dict[str, Any], ...]

    def to_dict(self) -> dict[str, Any]:
        """``{"sessions": [{"name", "branches": [{"name", "spans": [span, ...], "kept_bytes"}]}]}``

        with span = ``{"steps", "hits": [step, ...], "misses": {step: reason}, "diffs": {step: float}, "bytes"}``.
        A diff of -1.0 stands for a step that reused without measuring. With ``batch_policy="per_sample"`` a span has
        ``"samples"`` too: the same of each sample, but for the bytes; its own hits are the steps that all reused.
        ``"kept_bytes"`` are those of what is the same at every step: computed once, or held since it is made anew.
        """
        return {"sessions": list(self.sessions)}

    def __str__(self) -> str:
        table = Table("session", "branch", "span", "steps", "hits", "diff P50", "P95", "max", "most misses", "bytes")
        for s in self.sessions:
            for b in s["branches"]:
                for k, span in enumerate(b["spans"]):
                    table.add_row(s["name"], b["name"], str(k), *_row(span))
        out = io.StringIO()
        Console(file=out, width=140).print(table)
        return out.getvalue()


def _row(span: dict[str, Any]) -> list[str]:
    diffs = torch.tensor([d for d in span["diffs"].values() if d >= 0.0], dtype=torch.float64)
    shown = ["-"] * 3
    if len(diffs):
        shown = [f"{float(torch.quantile(diffs, q)):.4f}" for q in (0.5, 0.95, 1.0)]
    reasons = list(span["misses"].values())
    most = max(set(reasons), key=reasons.count) if reasons else "-"
    return [str(span["steps"]), str(len(span["hits"])), *shown, most, str(span["bytes"])]


def summarize(found: Iterable[Store]) -> Summary:
    """The statistics of some stores."""
    sessions = []
    for store in found:
        for record in store.records():
            branches = [_branch(b) for b in record.branches]
            sessions.append({"name": record.name, "branches": branches})
    return Summary(tuple(sessions))


def _branch(record: BranchRecord) -> dict[str, Any]:
    spans = [_span(slot) for slot in record.slots]
    return {"name": record.name, "spans": spans, "kept_bytes": record.kept_bytes}


def _span(slot: Slot) -> dict[str, Any]:
    samples = {"samples": [_counted(c) for c in slot.samples]} if slot.samples else {}
    return {**_counted(slot.counters), "bytes": slot.bytes, **samples}


def _counted(counters: Counters) -> dict[str, Any]:
    return {
        "steps": len(counters.hits) + len(counters.misses),
        "hits": list(counters.hits),
        "misses": dict(counters.misses),
        "diffs": dict(counters.diffs),
    }


def summary(model: torch.nn.Module | None = None) -> Summary:
    """What was cached, for each session, branch and span.

    Args:
        model: a model, compiled or not; None: every model that ran.
    """
    return summarize(stores(model))
