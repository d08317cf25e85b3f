"""What keeping state costs a step: ``python benchmarks/overhead.py``, in microseconds on tiny models.

The plain model under ``torch.compile(backend="eager")`` and the same under ``dit_cache`` with ``compiler="eager"`` and
a policy that computes every step, call by call in turns, so that the two do the same work but for finding the
request, deciding, and keeping the probe and the residual. Medians of their differences.

Options:
    --json FILE  where the figures go
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import fx_cache
from tests.models import build, conditioning, walk
from tests.running import compile_cached

CALLS = 500
STEPS = 10

POLICIES = {
    "computes, not measured": {"residual_diff_threshold": 0.0},
    "computes, measured": {"residual_diff_threshold": 1e-9, "max_warmup_steps": 1},
}
"""What is in force, and the host does at each step: decides by itself, or reads the diff."""

NAMES: dict[str, Callable[[int], contextlib.AbstractContextManager[None]]] = {
    "found from the data": lambda _: contextlib.nullcontext(),
    "named": lambda _: fx_cache.session("request", branch="cond"),
    "named, with its step": lambda i: fx_cache.session("request", branch="cond", step=i),
}


def steps(kind: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The calls of requests of one prompt, one after another."""
    prompt = conditioning(kind)
    return itertools.cycle(enumerate(walk(kind, STEPS, conditioning=prompt)))


def cost(kind: str, policy: str, naming: str) -> dict[str, Any]:
    """The median difference between a cached and a plain call, and the median plain call."""
    torch._dynamo.reset()
    model = build(kind)
    plain = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
    cached = compile_cached(model, **POLICIES[policy])
    differences, plains = [], []
    for (i, step), number in zip(steps(kind), range(CALLS + 2 * STEPS), strict=False):
        begin = time.thread_time()
        plain(**step)
        between = time.thread_time()
        with NAMES[naming](i):
            cached(**step)
        end = time.thread_time()
        if number >= 2 * STEPS:
            differences.append(end - 2 * between + begin)
            plains.append(between - begin)
    weights = len(list(model.parameters()))
    quarters = statistics.quantiles(differences, n=4)
    row = {
        "model": type(model).__name__,
        "weights": weights,
        "policy": policy,
        "request": naming,
        "plain us": round(1e6 * statistics.median(plains), 1),
        "more us": round(1e6 * quarters[1], 1),
        "quartiles of that": [round(1e6 * quarters[0], 1), round(1e6 * quarters[2], 1)],
    }
    print(row, flush=True)
    return row


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        rows = [cost(k, p, n) for k in ("dit", "flux") for p in POLICIES for n in NAMES]
    record = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, 1 thread",
        "torch": torch.__version__,
        "calls": CALLS,
        "rows": rows,
    }
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
