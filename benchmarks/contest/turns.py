"""Ways to run one model, each in a process of its own, that take turns."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.contest.models import device_for
from benchmarks.contest.ways import PATTERN, STEPS, WARMUP

ROOT = Path(__file__).parents[2]
OUT_OF_TIME = "out of time"


@dataclass
class Process:
    """One way of running a model, alive.

    Attributes:
        way: its name.
        running: the process.
        log: what it says by the way.
    """

    way: str
    running: subprocess.Popen[str]
    log: Path

    @classmethod
    def start(cls, model: str, way: str, size: str, caches: Path, weights: Path | None = None) -> Process:
        command = [sys.executable, "-m", "benchmarks.contest.worker", model, way, size]
        command += [] if weights is None else [str(weights)]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(caches), "PYTHONPATH": path}
        environment.pop("TRITON_CACHE_DIR", None)  # beside Inductor's
        if size == "tiny":  # threads that wait for each other must not spin: others wait for the same cores
            environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        pipe, log = subprocess.PIPE, caches.with_suffix(".log")
        with log.open("a") as errors:
            running = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=errors, text=True, env=environment, cwd=ROOT
            )
        return cls(way, running, log)

    def ask(self, do: str, within: float | None = None, **arguments: Any) -> dict[str, Any]:
        """What the process answers; ``{"error": ...}`` where it cannot.

        Args:
            do: what.
            within: seconds; then it is out of time, and ended.
            arguments: of what it shall do.
        """
        assert self.running.stdin is not None
        assert self.running.stdout is not None
        try:
            self.running.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.running.stdin.flush()
        except BrokenPipeError:
            return {"error": self._last_words()}
        if within is not None and not select.select([self.running.stdout], [], [], max(0.0, within))[0]:
            self.running.kill()
            self.running.wait()
            return {"error": OUT_OF_TIME}
        line = self.running.stdout.readline()
        return json.loads(line) if line else {"error": self._last_words()}

    def end(self) -> None:
        assert self.running.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.running.stdin.close()
        try:
            self.running.wait(20)
        except subprocess.TimeoutExpired:
            self.running.kill()
            self.running.wait()

    def _last_words(self) -> str:
        said = self.log.read_text(errors="replace").strip().splitlines() if self.log.exists() else []
        return f"the process has ended: {said[-1][:200] if said else 'it said nothing'}"


@dataclass
class Turns:
    """The ways to run one model that are alive, and a row of results for each that there was.

    Attributes:
        model: its name.
        size: its size.
        folder: for caches of compilers, one for each way.
        weights: a file that they lie in.
        steps: of a request that is timed.
        short: of others.
        flow: whether to time requests in which nobody waits between steps, too.
        deadline: of `time.perf_counter`; what is not reached by then is out of time.
        changed: called whenever there is something new in the rows.
        ahead: whether the next process may start while one compiles.
    """

    model: str
    size: str
    folder: Path
    weights: Path | None = None
    steps: int = STEPS
    short: int = STEPS
    flow: bool = False
    deadline: float | None = None
    changed: Callable[[], None] = lambda: None
    ahead: bool = False
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    alive: list[Process] = field(default_factory=list)
    _answers: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def prepare(self, ways: list[str], once: Collection[str] = ()) -> None:
        """Starts each way twice, with no caches and with those of the first time, and lets it run a request.

        Args:
            ways: which.
            once: ways to be started once, with whatever caches there are.
        """
        self.rows |= {way: {"model": self.model, "way": way, "not run": OUT_OF_TIME} for way in ways}
        self.changed()
        plan = [(way, last) for way in ways for last in ((True,) if way in once else (False, True))]
        started: dict[int, Process] = {}
        for i, (way, last) in enumerate(plan):
            process = started.pop(i, None)
            left = self._left(self._needed(turns=1))
            if self.rows[way]["not run"] != OUT_OF_TIME or (left is not None and left <= 0):
                if process is not None:
                    process.end()
                continue
            process = process or self._start(way)
            if self.ahead and i + 1 < len(plan):
                started[i + 1] = self._start(plan[i + 1][0])
            answer = process.ask("first", left)
            row = self.rows[way]
            if "error" in answer:
                row["not run"] = answer["error"]
            elif not last:
                row |= {"cold": answer["seconds"], "graphs": answer["graphs"]}
            else:
                row |= {"first call" if way in once else "second process": answer["seconds"]}
                self._warm_up(process)
            if process not in self.alive:
                process.end()
            self.changed()

    def take_turns(self, rounds: int) -> None:
        """Lets all run requests, one after the other; as many as there is time for, but one."""
        took = 0.0
        for number in range(1, rounds + 1):
            begin = time.perf_counter()
            left = self._left(self._needed(turns=0) + took)
            if number > 1 and left is not None and left <= 0:
                return
            for process in self.alive if number % 2 else self.alive[::-1]:
                self._generation(process, 10 + number)
                self.changed()
            took = time.perf_counter() - begin
            self.alive = [p for p in self.alive if "not run" not in self.rows[p.way]]

    def report(self, profile: bool = False, traces: Mapping[str, Path] | None = None) -> None:
        """Lets all count what is counted.

        Args:
            profile: whether to look at a step with the profiler.
            traces: files for what the profiler sees, by way.
        """
        for process in self.alive:
            row, keep = self.rows[process.way], (traces or {}).get(process.way)
            row |= self._ask(process, "report", steps=self.short)
            if profile:
                row["profile"] = self._ask(process, "profile", keep=None if keep is None else str(keep))
            self.changed()

    def end(self) -> None:
        """Ends all processes."""
        while self.alive:
            self.alive.pop().end()

    def _start(self, way: str) -> Process:
        name = "".join(c if c.isalnum() else "_" for c in way)
        return Process.start(self.model, way, self.size, self.folder / name, self.weights)

    def _warm_up(self, process: Process) -> None:
        """The first request, in which the rest is compiled; its figures stand until there are better ones."""
        row = self.rows[process.way]
        answer = self._ask(process, "generation", seed=10, steps=self.short)
        if "error" in answer:
            row["not run"] = answer["error"]
            return
        del row["not run"]
        row |= timings([answer]) | {"rounds": 0}
        row["first generation"], row["first hit"] = sum(answer["seconds"]), answer["seconds"][WARMUP]
        self.alive.append(process)

    def _generation(self, process: Process, seed: int) -> None:
        row, answers = self.rows[process.way], self._answers.setdefault(process.way, [])
        answer = self._ask(process, "generation", seed=seed, steps=self.steps)
        if "error" in answer:
            if answer["error"] != OUT_OF_TIME:  # else what there is stands
                row["not run"] = answer["error"]
            return
        answers.append(answer)
        if self.flow:
            answer["flow"] = self._ask(process, "request", seed=seed).get("seconds")
        row |= timings(answers) | {"rounds": len(answers)}

    def _ask(self, process: Process, do: str, **arguments: Any) -> dict[str, Any]:
        if process.running.returncode is not None:
            return {"error": OUT_OF_TIME}
        return process.ask(do, self._left(), **arguments)

    def _left(self, needed: float = 0.0) -> float | None:
        """Seconds; None: there is no limit."""
        return None if self.deadline is None else self.deadline - time.perf_counter() - needed

    def _needed(self, turns: int) -> float:
        """Seconds to let those that are alive take turns so often, and count, as far as one knows."""
        needed = 0.0
        for row in (self.rows[process.way] for process in self.alive):
            timed, counted = (_request_of(row, n) for n in (self.steps, self.short))
            needed += turns * timed * (1 + self.flow) + 3 * counted + 3
        return needed


def timings(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the steps that computed, those that reused, and whole generations; in seconds."""
    of: dict[tuple[str, bool], list[float]] = {(k, hit): [] for k in ("seconds", "host") for hit in (False, True)}
    for answer in answers:
        for kind in ("seconds", "host"):
            for i, seconds in enumerate(answer[kind]):
                if i:
                    of[kind, _reuses(i)].append(seconds)
    flow = [answer["flow"] for answer in answers if answer.get("flow") is not None]
    found = {
        "computed step": statistics.median(of["seconds", False]),
        "computed step, quartiles": statistics.quantiles(of["seconds", False], n=4),
        "cached step": statistics.median(of["seconds", True]),
        "cached step, quartiles": statistics.quantiles(of["seconds", True], n=4),
        "computed step, call": statistics.median(of["host", False]),
        "cached step, call": statistics.median(of["host", True]),
        "first hit of later generations": statistics.median(a["seconds"][WARMUP] for a in answers),
        "reused": len(answers[-1]["reused"]),
    }
    totals = [sum(a["seconds"]) for a in answers if len(a["seconds"]) == STEPS]
    found["generation"] = statistics.median(totals) if totals else _request_of(found, STEPS)
    found["generations"] = totals
    return found | ({"flow": statistics.median(flow)} if flow else {})


def _request_of(row: Mapping[str, Any], steps: int) -> float:
    """Seconds of a request of so many steps, by the medians."""
    hits = sum(_reuses(i) for i in range(steps))
    return hits * row["cached step"] + (steps - hits) * row["computed step"]


def _reuses(step: int) -> bool:
    PATTERN.step = step
    return PATTERN.hit()


def machine(size: str) -> str:
    """What it runs on."""
    if device_for(size) == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def versions(*names: str) -> dict[str, str]:
    """Of everything that takes part and is installed."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
