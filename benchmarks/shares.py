"""What a hit skips of every transformer class of diffusers: ``python benchmarks/shares.py --json FILE``.

For each class and variant of the zoo two figures, with one block as the head: what ``explain`` says of its spans, and
what is counted. The second needs no part of the analysis: the floating-point operations of a reused step against those
of a computed one, by torch's own formulas. ``--before FILE`` sets an earlier record beside what is measured
and says where less is skipped.

Options:
    --json FILE     where the figures go; with --only, those of other classes that stand there stay
    --before FILE   a record to compare with
    --table         only compare: FILE of ``--json`` is read, not written
    --only PATTERN  classes by shell pattern; may be given several times
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import logging
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import fx_cache
from benchmarks.zoo import ZOO, compile_zoo, fresh
from tests.counting import flops
from tests.models import walk

STEPS = 4
"""Of the request that is counted."""

LEARNING = 12
"""Of the request before it: where nothing but the calls shows what is denoised, it takes some until that is known."""

TOLERANCE = 0.002
"""Of the work of a step: less than that is no difference."""


@dataclass(frozen=True)
class Share:
    """What a hit skips of one model.

    Attributes:
        explained: what `explain` says of its spans together; None where no work was counted or nothing is cached.
        counted: 1 - operations of a reused step / operations of a computed one; 0 where no step was reused.
        spans: number of spans, each with a decision.
        cached: block lists with blocks in a span: (name, blocks skipped, blocks).
        left: block lists that are computed at every step.
        reason: why nothing is cached.
    """

    explained: float | None
    counted: float
    spans: int
    cached: tuple[tuple[str, int, int], ...]
    left: tuple[str, ...]
    reason: str | None


def measure(name: str) -> Share:
    """The figures of one model."""
    fresh()
    steps = walk(name, LEARNING)
    compiled = compile_zoo(name, compiler="counting_flops", residual_diff_threshold=2.0)
    found = fx_cache.explain(compiled, **steps[0])
    shares = [s for s in found.shares if s is not None]
    return Share(
        explained=sum(shares) if shares else None,
        counted=_counted(compiled, steps),
        spans=len(found.spans),
        cached=tuple((s.name, s.span[1] - s.span[0], s.blocks) for s in found.stacks if s.span is not None),
        left=tuple(s.name for s in found.stacks if s.span is None),
        reason=found.reason,
    )


def _counted(compiled: torch.nn.Module, steps: list[dict[str, Any]]) -> float:
    """What the cheapest step of a request saves of the first one's operations, once it is known what is denoised."""
    for name, count in (("compiles", LEARNING), ("counts", STEPS)):
        with fx_cache.session(name, branch="only"):
            counts = [flops(lambda step=step: compiled(**step))[1] for step in steps[:count]]
    return 1 - min(counts) / counts[0]


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """A Markdown table of two records, and below it what got less."""
    lines = ["| class | before | now | spans before | spans now |", "|---|---|---|---|---|"]
    less = []
    for name in sorted(before.keys() | after.keys()):
        rows = [record.get(name) for record in (before, after)]
        cells = [f"{row['counted']:.1%}" if row else "" for row in rows]
        lines.append(f"| {name} | {' | '.join(cells)} | {' | '.join(str(r['spans']) if r else '' for r in rows)} |")
        if all(rows) and rows[1]["counted"] < rows[0]["counted"] - TOLERANCE:
            less.append(f"less: {name}: {cells[0]} -> {cells[1]}")
    totals = [sum(r["counted"] for r in record.values()) / max(len(record), 1) for record in (before, after)]
    return [*lines, "", f"mean {totals[0]:.1%} -> {totals[1]:.1%}", *(less or ["nowhere less"])]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--only", action="append")
    args = parser.parse_args()
    kept = args.json is not None and args.json.exists() and (args.table or args.only)
    record: dict[str, Any] = json.loads(args.json.read_text()) if kept else {}
    if not args.table:
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        torch.set_num_threads(1)
        with torch.no_grad():
            _measure_all(args, record)
    if args.before:
        print("\n".join(compare(json.loads(args.before.read_text()), record)))


def _measure_all(args: argparse.Namespace, record: dict[str, Any]) -> None:
    for name in ZOO:
        if not any(fnmatch.fnmatch(name, pattern) for pattern in args.only or ["*"]):
            continue
        begin = time.perf_counter()
        share = measure(name)
        record[name] = asdict(share)
        explained = "nothing" if share.explained is None else f"{share.explained:.1%}"
        print(
            f"{name}: {share.counted:.1%} counted, {explained} explained, {share.spans} span(s), "
            f"left {list(share.left)} [{time.perf_counter() - begin:.0f} s]",
            flush=True,
        )
        if args.json:
            args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
