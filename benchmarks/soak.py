"""Random requests from several threads on one compiled model, for a while: errors, leaks, wrong outputs.

    python benchmarks/soak.py --minutes 20 --json benchmarks/results/soak_DATE_cpu.json

Every request is one to three passes of a tiny Wan at one of two sizes, with a prompt of its own, named or not, ended,
abandoned on the way, or left to its prompt's end. Every 50th is run again alone, on a copy of the model of which
nothing is left, and has to be bit for bit the same. The memory of the process is read every five seconds; its slope is
that of a line through what was read from the second quarter of the time on.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import os
import platform
import random
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import numpy
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import fx_cache
from fx_cache.testing import Request, counted_hits, run
from tests.models import build, conditioning, walk
from tests.running import compile_cached

KIND = "wan"
STEPS = 12
CHECKED = 50
"""Of how many requests one is run again alone."""

OPTIONS = {"residual_diff_threshold": 0.6, "max_warmup_steps": 1}


class Soak:
    """What all threads share."""

    def __init__(self, minutes: float) -> None:
        self.until = time.monotonic() + 60 * minutes
        model = build(KIND)
        self.model, self.alone = (self._compiled(copy.deepcopy(model)) for _ in range(2))
        self.requests = self.calls = self.checked = 0
        self.errors: list[str] = []
        self._lock, self._checking = threading.Lock(), threading.Lock()

    def _compiled(self, model: torch.nn.Module) -> Any:
        compiled = compile_cached(model, **OPTIONS)
        for size in (0, 1):
            compiled(**walk(KIND, 1, size=size)[0])
        fx_cache.reset(model)
        return compiled

    def work(self, thread: int) -> None:
        """Runs requests until the time is over."""
        rng = random.Random(thread)
        with torch.no_grad():
            while time.monotonic() < self.until:
                with self._lock:
                    self.requests += 1
                    number = self.requests
                try:
                    self._one(number, rng)
                except Exception as error:
                    self.errors.append(f"request {number}: {error!r}")

    def _one(self, number: int, rng: random.Random) -> None:
        request = new_request(number, rng)
        outputs = run(self.model, request)
        if request.name is not None and rng.random() < 0.7:
            fx_cache.end(request.name)
        with self._lock:
            self.calls += len(request.calls)
        if number % CHECKED == 0:
            with self._checking:
                fx_cache.reset(self.alone)
                expected = run(self.alone, request)
                self.checked += 1
            for i, (a, b) in enumerate(zip(expected, outputs, strict=True)):
                if not all(map(torch.equal, a, b)):
                    self.errors.append(f"request {number}, call {i}: not what it gives alone")


def new_request(number: int, rng: random.Random) -> Request:
    """A request that may end on the way."""
    size, steps = rng.randrange(2), rng.choice((3, STEPS, STEPS))
    calls: list[list[tuple[str, dict[str, Any]]]] = []
    named = rng.random() < 0.5
    for k in range(rng.randint(1, 3)):
        prompt = conditioning(KIND, seed=rng.randrange(1 << 16), size=size)
        noise = walk(KIND, STEPS, seed=rng.randrange(1 << 16), size=size, conditioning=prompt)
        calls.append([(f"pass-{k}", step) for step in noise[:steps]])
    in_turns = [call for step in zip(*calls, strict=True) for call in step]
    return Request(in_turns, f"request-{number}" if named else None)


def resident() -> int:
    """Bytes of this process that lie in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--json", type=Path, help="where the figures go")
    args = parser.parse_args()
    warnings.simplefilter("ignore", fx_cache.CacheWarning)  # requests given up early, and their like
    torch.set_num_threads(1)
    with torch.no_grad():
        soak = Soak(args.minutes)
    threads = [threading.Thread(target=soak.work, args=(k,)) for k in range(args.threads)]
    begin, seen = time.monotonic(), []
    with counted_hits() as hits:
        for thread in threads:
            thread.start()
        while any(t.is_alive() for t in threads):
            seen.append((time.monotonic() - begin, resident()))
            time.sleep(min(5.0, args.minutes))
    late = [(t / 60, m / 1024) for t, m in seen if t > 15 * args.minutes]
    slope = float(numpy.polyfit(*zip(*late, strict=True), 1)[0])
    record = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {args.threads} threads",
        "torch": torch.__version__,
        "minutes": round(seen[-1][0] / 60, 1),
        "requests": soak.requests,
        "calls": soak.calls,
        "hits, at least": hits.count,
        "requests checked": soak.checked,
        "errors": soak.errors,
        "resident MiB at a quarter of the time and at the end": [round(m / 1024) for m in (late[0][1], late[-1][1])],
        "slope, KiB a minute": round(slope, 1),
        "slope, bytes a request": round(1024 * slope * seen[-1][0] / 60 / soak.requests, 1),
        "resident MiB, every minute": [round(m / 2**20, 1) for _, m in seen[::12]],
    }
    print(json.dumps(record, indent=1))
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(bool(soak.errors))


if __name__ == "__main__":
    main()
