"""What keeping state costs a step: ``python benchmarks/overhead.py``, in microseconds on tiny models.

The plain model under ``torch.compile(backend="eager")`` and the same under ``dit_cache`` with ``compiler="eager"`` and
a policy that computes every step, request by request in turns, so that the two do the same work but for finding the
request, deciding, and keeping the probe and the residual. Medians of their differences in time of this thread.

Options:
    --json FILE  where the figures go
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import fx_cache
from fx_cache.runtime import forwards
from fx_cache.runtime.gate import SpanGate
from fx_cache.runtime.step import CachedForward
from tests.models import build, walk
from tests.running import compile_cached

REQUESTS = 50
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


def timed(call: Callable[[int, dict[str, Any]], None], steps: list[dict[str, Any]]) -> list[float]:
    """Seconds of this thread that each call of a request takes, but for the first.

    Both models are captured from one code object: who was not called last has its guards looked at second.
    """
    seconds = []
    for i, step in enumerate(steps):
        begin = time.thread_time()
        call(i, step)
        seconds.append(time.thread_time() - begin)
    return seconds[1:]


class Meter:
    """Measures what a cached call does beside running the rewritten graph: finding the request, deciding, keeping."""

    def __init__(self) -> None:
        self._spent: dict[str, float] = {}
        self.calls: list[float] = []

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        make, call, decide = CachedForward.__init__, CachedForward.__call__, SpanGate.__call__

        def timed_make(forward: CachedForward, rewritten: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
            make(forward, self._timed("graph", rewritten), *args, **kwargs)

        def timed_decide(gate: SpanGate, measure: Callable[[], torch.Tensor], *args: Any) -> Any:
            return self._timed("gate", decide)(gate, self._timed("measure", measure), *args)

        def timed_call(forward: CachedForward, *args: Any) -> Any:
            self._spent = {}
            result = self._timed("call", call)(forward, *args)
            spent = self._spent
            self.calls.append(spent["call"] - spent["graph"] + spent.get("gate", 0.0) - spent.get("measure", 0.0))
            return result

        with (
            # What is put between here is not user code, by which a part of a forward is told from a whole one.
            mock.patch.object(forwards, "_MACHINERY", (*forwards._MACHINERY, __file__)),
            mock.patch.object(CachedForward, "__init__", timed_make),
            mock.patch.object(CachedForward, "__call__", timed_call),
            mock.patch.object(SpanGate, "__call__", timed_decide),
        ):
            yield

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            begin = time.thread_time()
            result = function(*args)
            self._spent[name] = self._spent.get(name, 0.0) + time.thread_time() - begin
            return result

        return run


def state(kind: str, policy: str, naming: str) -> float:
    """The median of what a call takes beside the rewritten graph, in seconds."""
    torch._dynamo.reset()
    meter = Meter()
    with meter():
        cached = compile_cached(build(kind), **POLICIES[policy])
        for number in range(REQUESTS):
            for i, step in enumerate(walk(kind, STEPS, seed=number)):
                with NAMES[naming](i):
                    cached(**step)
    return statistics.median(meter.calls[2 * STEPS :])


def cost(kind: str, policy: str, naming: str) -> dict[str, Any]:
    """The median difference between a cached and a plain call, and the median plain call."""
    torch._dynamo.reset()
    model = build(kind)
    plain = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
    cached = compile_cached(model, **POLICIES[policy])
    differences, plains = [], []

    def call_plain(i: int, step: dict[str, Any]) -> None:
        plain(**step)

    def call_cached(i: int, step: dict[str, Any]) -> None:
        with NAMES[naming](i):
            cached(**step)

    for number in range(REQUESTS + 2):
        request = walk(kind, STEPS, seed=number)
        ours, theirs = timed(call_cached, request), timed(call_plain, request)
        if number >= 2:
            differences += [a - b for a, b in zip(ours, theirs, strict=True)]
            plains += theirs
    weights = len(list(model.parameters()))
    quarters = statistics.quantiles(differences, n=4)
    row = {
        "model": type(model).__name__,
        "weights": weights,
        "policy": policy,
        "request": naming,
        "plain us": round(1e6 * statistics.median(plains), 1),
        "more us": round(1e6 * quarters[1], 1),
        "of that, beside the graph us": round(1e6 * state(kind, policy, naming), 1),
        "quartiles of more": [round(1e6 * quarters[0], 1), round(1e6 * quarters[2], 1)],
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
        "requests": REQUESTS,
        "steps": STEPS,
        "rows": rows,
    }
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
