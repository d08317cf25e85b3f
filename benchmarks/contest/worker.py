"""One way and one model in a process of its own: ``python -m benchmarks.contest.worker MODEL WAY SIZE [WEIGHTS]``.

Takes commands as lines of JSON, and answers each with one.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import time
import warnings
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import counters

from benchmarks.contest.memory import peak_bytes
from benchmarks.contest.models import MODELS, Inputs, device_for
from benchmarks.contest.trace import record
from benchmarks.contest.waits import counted_waits
from benchmarks.contest.ways import HITS_IN_A_ROW, MORE_WAYS, PATTERN, STEPS, WARMUP, WAYS, Way

HIT, MISS = WARMUP + 1, WARMUP + HITS_IN_A_ROW
"""A step that reuses, behind others that did, and one that computes."""
SHORT = MISS + 1
"""Steps of a request in which everything happens once."""


class Worker:
    """Runs one way."""

    def __init__(self, model: str, way: str, size: str, weights: Path | None) -> None:
        self.device = device_for(size)
        self.model, self.size = MODELS[model], size
        if size == "tiny":  # whose code takes a minute to compile, and runs no faster
            torch._inductor.config.patch(**torch._inductor.list_mode_options("lite")).__enter__()
        self.module: nn.Module = self.model.build(size, self.device, weights)
        self.way: Way = {**WAYS, **MORE_WAYS}[way](self.module, self.model)
        self.graphs_at_first = 0
        if self.device == "cuda":  # what a way took out of the model is for others
            gc.collect()
            torch.cuda.empty_cache()

    def first(self) -> dict[str, Any]:
        """The first call, with all that is compiled for it."""
        (step,) = self.model.request(self.module, self.size, 1, seed=1)
        self.way.begin()
        seconds, _ = self._timed(0, step)
        self.graphs_at_first = counters["stats"]["unique_graphs"]
        return {"seconds": seconds, "graphs": self.graphs_at_first, "breaks": sum(counters["graph_break"].values())}

    def generation(self, seed: int, steps: int = STEPS) -> dict[str, Any]:
        """The seconds of each step of a request, and those until its call came back."""
        PATTERN.reused.clear()
        self.way.begin()
        timed = [self._timed(i, s) for i, s in enumerate(self._request(seed, steps))]
        return {"seconds": [s for s, _ in timed], "host": [h for _, h in timed], "reused": sorted(PATTERN.reused)}

    def request(self, seed: int) -> dict[str, Any]:
        """The seconds of a whole request, in which nobody waits between steps but who has to."""
        steps = self._request(seed, STEPS)
        self._wait()
        begin = time.perf_counter()
        self._run(steps)
        self._wait()
        return {"seconds": time.perf_counter() - begin}

    def report(self, steps: int = STEPS) -> dict[str, Any]:
        """What is counted, and not timed."""
        graphs = counters["stats"]["unique_graphs"]
        result: dict[str, Any] = {
            "graphs": graphs,
            "compiled after the first step": graphs - self.graphs_at_first,
            "breaks": sum(counters["graph_break"].values()),
            "reasons": {str(k)[:200]: v for k, v in list(counters["graph_break"].items())[:6]},
        }
        self.way.begin()
        waits: dict[str, list[str]] = {}
        with counted_waits() as seen:
            for i, step in enumerate(self._request(2, steps)):
                before = len(seen)
                self._call(i, step)
                waits[{HIT: "hit", MISS: "miss"}.get(i, "")] = seen[before:]
                self._wait()
        result["syncs"] = {kind: len(waits[kind]) for kind in ("hit", "miss")}
        result["waits"] = {kind: dict(Counter(waits[kind])) for kind in ("hit", "miss")}
        held = None if self.way.cached_bytes is None else self.way.cached_bytes()
        if self.device == "cuda":
            result["reserved bytes"] = torch.cuda.memory_reserved()
        return {**result, "peak bytes": self._peak(steps), "cached bytes": held}

    def profile(self, keep: str | None = None) -> dict[str, Any]:
        """What a computed and a reused step launch, and where the device is idle.

        Args:
            keep: where to write the trace of the reused one.
        """
        self.way.begin()
        found = {}
        for i, step in enumerate(self._request(4, SHORT)):
            self._wait()
            if i < WARMUP:
                self._call(i, step)
                continue
            # Those between are for the profiler to get ready.
            path = Path(keep) if keep is not None and i == HIT else None
            found[i] = record(partial(self._call, i, step), self.device == "cuda", path)
        return {"hit": found[HIT].summary(), "miss": found[MISS].summary()}

    def _run(self, steps: list[Inputs]) -> None:
        self.way.begin()
        for i, step in enumerate(steps):
            self._call(i, step)

    def _request(self, seed: int, steps: int) -> list[Inputs]:
        return self.model.request(self.module, self.size, STEPS, seed)[:steps]

    def _call(self, number: int, step: Inputs) -> None:
        PATTERN.step = number
        with self.way.within():
            self.way.call(**step)

    def _timed(self, number: int, step: Inputs) -> tuple[float, float]:
        """Seconds until the device was done, and until the call came back."""
        self._wait()
        begin = time.perf_counter()
        self._call(number, step)
        returned = time.perf_counter()
        self._wait()
        return time.perf_counter() - begin, returned - begin

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _peak(self, count: int) -> int:
        """Bytes allocated at the peak of a request of which nothing was there before."""
        steps = self._request(3, count)
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
