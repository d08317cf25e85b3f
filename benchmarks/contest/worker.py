"""One way and one model in a process of its own: ``python -m benchmarks.contest.worker MODEL WAY SIZE [WEIGHTS]``.

Takes commands as lines of JSON, and answers each with one.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import counters

from benchmarks.contest.memory import peak_bytes
from benchmarks.contest.models import MODELS, Inputs
from benchmarks.contest.ways import PATTERN, STEPS, WARMUP, WAYS, Way, counted_syncs

HIT, MISS = WARMUP + 1, WARMUP + 3
"""A step that reuses, behind others that did, and one that computes."""


class Worker:
    """Runs one way."""

    def __init__(self, model: str, way: str, size: str, weights: Path | None) -> None:
        self.device = "cuda" if size == "gpu" else "cpu"
        self.model, self.size = MODELS[model], size
        self.module: nn.Module = self.model.build(size, self.device, weights)
        self.way: Way = WAYS[way](self.module, self.model)
        self.graphs_at_first = 0

    def first(self) -> dict[str, Any]:
        """The first call, with all that is compiled for it."""
        (step,) = self.model.request(self.module, self.size, 1, seed=1)
        self.way.begin()
        seconds = self._timed(0, step)
        self.graphs_at_first = counters["stats"]["unique_graphs"]
        return {"seconds": seconds, "graphs": self.graphs_at_first, "breaks": sum(counters["graph_break"].values())}

    def generation(self, seed: int) -> dict[str, Any]:
        """The seconds of each step of a request."""
        self.way.begin()
        return {"seconds": [self._timed(i, s) for i, s in enumerate(self._request(seed))]}

    def report(self) -> dict[str, Any]:
        """What is counted, and not timed."""
        graphs = counters["stats"]["unique_graphs"]
        result: dict[str, Any] = {
            "graphs": graphs,
            "compiled after the first step": graphs - self.graphs_at_first,
            "breaks": sum(counters["graph_break"].values()),
            "reasons": {str(k)[:200]: v for k, v in list(counters["graph_break"].items())[:6]},
        }
        self.way.begin()
        syncs: dict[str, int] = {}
        for i, step in enumerate(self._request(seed=2)):
            with counted_syncs() as seen:
                self._timed(i, step)
            if i in (HIT, MISS):
                syncs["hit" if i == HIT else "miss"] = len(seen)
        held = None if self.way.cached_bytes is None else self.way.cached_bytes()
        return {**result, "syncs": syncs, "peak bytes": self._peak(), "cached bytes": held}

    def _run(self, steps: list[Inputs]) -> None:
        self.way.begin()
        for i, step in enumerate(steps):
            self._timed(i, step)

    def _request(self, seed: int) -> list[Inputs]:
        return self.model.request(self.module, self.size, STEPS, seed)

    def _timed(self, number: int, step: Inputs) -> float:
        PATTERN.step = number
        self._wait()
        begin = time.perf_counter()
        with self.way.within():
            self.way.call(**step)
        self._wait()
        return time.perf_counter() - begin

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _peak(self) -> int:
        """Bytes allocated at the peak of a request of which nothing was there before."""
        steps = self._request(seed=3)
        if self.device == "cuda":
            held = self.way.cached_bytes() if self.way.cached_bytes is not None else 0
            before = torch.cuda.memory_allocated() - held
            torch.cuda.reset_peak_memory_stats()
            self._run(steps)
            return torch.cuda.max_memory_allocated() - before
        return peak_bytes(lambda: self._run(steps))


def main() -> None:
    """Answers commands until there are no more."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    # Ends with the one that gives the commands.
    ctypes.CDLL(None).prctl(1, 15)
    model, way, size = sys.argv[1:4]
    weights = Path(sys.argv[4]) if len(sys.argv) > 4 else None
    worker: Worker | None = None
    with torch.no_grad():
        for line in sys.stdin:
            command = json.loads(line)
            try:
                worker = worker or Worker(model, way, size, weights)
                answer = getattr(worker, command.pop("do"))(**command)
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
            print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main()
