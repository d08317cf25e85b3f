"""One step as torch's profiler sees it: what the device ran and when, and what the host did meanwhile."""

from __future__ import annotations

import gzip
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

STEP = "the step"
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
ON_HOST = ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver")
Interval = tuple[float, float]


@dataclass(frozen=True)
class Event:
    """Something that took a while, in microseconds."""

    name: str
    kind: str
    begin: float
    end: float


@dataclass(frozen=True)
class Trace:
    """One step.

    Attributes:
        begin: when the call began.
        returned: when it came back; the device may have things to do yet.
        host: what the host did within, in order of time, outer before inner.
        device: what the device ran; without a GPU, the outermost operations of torch.
    """

    begin: float
    returned: float
    host: list[Event]
    device: list[Event]

    def summary(self, most: int = 5) -> dict[str, Any]:
        """Counts, times in milliseconds, and the longest gaps of the device, with what the host did in them."""
        busy = _joined([(e.begin, e.end) for e in self.device])
        end = max([self.returned, *(b for _, b in busy)])
        edges = [(self.begin, self.begin), *busy, (end, end)]
        gaps = [(a, b) for (_, a), (b, _) in pairwise(edges) if b > a]
        runtime = [e.name for e in self.host if e.kind.startswith("cuda")]
        return {
            "kernels": sum(e.kind not in ON_DEVICE[1:] for e in self.device),
            "copies": sum(e.kind in ON_DEVICE[1:] for e in self.device),
            "launches": sum("Launch" in name for name in runtime),
            "waits": dict(Counter(name for name in runtime if "Synchronize" in name)),
            "step ms": _ms(end - self.begin),
            "host ms": _ms(self.returned - self.begin),
            "busy ms": _ms(sum(b - a for a, b in busy)),
            "device ms": _ms(sum(e.end - e.begin for e in self.device)),
            "idle ms": _ms(sum(b - a for a, b in gaps)),
            "gaps": [
                {"at ms": _ms(a - self.begin), "ms": _ms(b - a), "host": self._doing(a, b)}
                for a, b in sorted(gaps, key=lambda gap: gap[0] - gap[1])[:most]
            ],
        }

    def _doing(self, begin: float, end: float, most: int = 4) -> dict[str, float]:
        """What the host spent a while on, each without what it called; `STEP` itself is Python."""
        spent: Counter[str] = Counter()
        inside: list[Event] = []
        for event in self.host:
            while inside and inside[-1].end <= event.begin:
                inside.pop()
            overlap = max(0.0, min(end, event.end) - max(begin, event.begin))
            spent[event.name] += overlap
            if inside:
                spent[inside[-1].name] -= overlap
            inside.append(event)
        spent["behind the call"] = end - begin - sum(spent.values())
        named: Counter[str] = Counter()
        for name, us in spent.items():
            named["Python" if name == STEP else name[:32].strip()] += us
        return {name: _ms(us) for name, us in named.most_common(most) if us > 1}


def record(call: Callable[[], object], cuda: bool, keep: Path | None = None) -> Trace:
    """Runs a step under the profiler.

    Args:
        call: the step.
        cuda: whether it runs on a GPU.
        keep: where the whole trace shall lie, ``*.json.gz``.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as seen:
        with record_function(STEP):
            call()
        if cuda:
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json" if keep is None else keep
        seen.export_chrome_trace(str(path))
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
            return read(json.load(file)["traceEvents"])


def read(entries: list[dict[str, Any]]) -> Trace:
    """The step that is in the events of a chrome trace."""
    timed = [e for e in entries if e.get("ph") == "X" and "dur" in e]
    step = next(e for e in timed if e["name"] == STEP and e.get("cat") == "user_annotation")
    begin, returned = float(step["ts"]), float(step["ts"] + step["dur"])
    host = [_event(e) for e in timed if e.get("cat") in ON_HOST and e["tid"] == step["tid"]]
    host = [e for e in host if begin <= e.begin <= returned]
    host.sort(key=lambda e: (e.begin, -e.end))
    device = [_event(e) for e in timed if e.get("cat") in ON_DEVICE]
    if not any(e.get("cat") in ("cuda_runtime", "cuda_driver") for e in timed):
        device = _outermost([e for e in host if e.name.startswith("aten::")])
    return Trace(begin, returned, host, [e for e in device if e.begin >= begin])


def _event(entry: dict[str, Any]) -> Event:
    return Event(entry["name"], entry["cat"], float(entry["ts"]), float(entry["ts"] + entry["dur"]))


def _outermost(ordered: list[Event]) -> list[Event]:
    found: list[Event] = []
    for event in ordered:
        if not found or event.begin >= found[-1].end:
            found.append(event)
    return found


def _joined(intervals: list[Interval]) -> list[Interval]:
    """The same time, in intervals that do not meet."""
    joined: list[Interval] = []
    for begin, end in sorted(intervals):
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((begin, end))
    return joined


def _ms(us: float) -> float:
    return round(us / 1e3, 4)
