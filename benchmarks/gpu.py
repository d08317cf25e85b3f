"""What there is to measure on a GPU, in parts of ten minutes: ``python benchmarks/gpu.py --part 1 --out out/gpu``.

Models in their real dimensions, in bfloat16, with random weights. Each way to run one has a process of its own, as many
at a time as memory holds; they take turns, request by request, as in `benchmarks/peers.py`, and reuse the same steps.
The rest runs in groups, each with "compile" and "dit_cache" in it again. ``--dry`` runs the same code on a CPU, with
tiny models of which no kernel is compiled: its figures say nothing. ``--show FILE...`` prints the tables of results.

- cold: the first call with empty caches; 2nd process: the first call in a process that finds what the first one left.
- a step is timed until the device is done, "flow" is a request in which nobody waits between steps but who has to.
- launches and waits are those that the profiler saw in one step: kernels, and calls that wait for the device. What is
  read of tensors, warned of by ``set_sync_debug_mode`` and waited for with events is in the results, as ``waits``.
- call: until a step came back, while the device may have work left; busy: what its device has to do; idle: what is
  left of the step while it is profiled.
"""

from __future__ import annotations

import json
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.contest.models import MODELS
from benchmarks.contest.turns import OUT_OF_TIME, ROOT, Turns, machine, versions
from benchmarks.contest.ways import HITS_IN_A_ROW, STEPS, WARMUP

GIB = 2**30
SHORT = WARMUP + HITS_IN_A_ROW + 1
"""Steps of a request in which everything happens once."""

PEERS = ("compile", "dit_cache", "cache-dit + compile", "FirstBlockCache + compile")
LIMITS = ("first block and tail alone, compile", "first block and tail alone, CUDA graph")
GRAPHS = ("compile, reduce-overhead", "dit_cache, reduce-overhead")
REST = (
    "dit_cache, enable",
    "dit_cache, never reusing",
    "cache-dit + compile, torch's settings",
    "dit_cache, cache-dit's settings",
    "compile, cache-dit's settings",
    "cache-dit",
    "eager",
)
REGIONAL = ("compile, regional", "cache-dit + compile, regional", "FirstBlockCache + compile, regional")
TUNED = ("compile, max-autotune", "dit_cache, max-autotune")
ANCHORS = ("compile", "dit_cache")
"""In every group: what the others are beside."""
TRACED = ("dit_cache", "cache-dit + compile")


@dataclass(frozen=True)
class Part:
    """What fits in ten minutes.

    Attributes:
        model: its name.
        ways: to run it, those that matter most first.
        once: those that another part compiles with empty caches.
        traced: whether to keep traces of a reused step.
        steps: of a request that is timed; fewer than all where a step takes seconds.
        beside: GiB that a process takes beside its weights.
    """

    model: str
    ways: tuple[str, ...]
    once: tuple[str, ...] = ()
    traced: bool = False
    steps: int = STEPS
    beside: float = 3.0

    def groups(self, most: int) -> list[list[str]]:
        """The ways in groups of so many processes; of a model cut short there can be more."""
        heavy = [way for way in self.ways if way not in LIMITS]
        light = [way for way in self.ways if way in LIMITS]
        if len(heavy) <= most:
            return [light + heavy]
        kept = [way for way in heavy if way in ANCHORS][-(most - 1) :] if most > 1 else []
        rest = [way for way in heavy if way not in kept]
        size = max(1, most - len(kept))
        found = [kept + rest[i : i + size] for i in range(0, len(rest), size)]
        return [light + found[0], *found[1:]]


PARTS = (
    Part("flux", PEERS, traced=True),
    Part("dit", (*LIMITS, *PEERS, *GRAPHS), traced=True),
    Part("flux", (*LIMITS, *ANCHORS, *reversed(GRAPHS)), once=ANCHORS),
    Part("wan", (*LIMITS[:1], *PEERS), beside=6.0),
    Part("qwen", PEERS),
    Part("sd3.5", (*LIMITS[:1], *PEERS)),
    Part("pixart", (*LIMITS, *PEERS)),
    Part("wan-14b", PEERS[:3], steps=SHORT, beside=8.0),
    Part("dit", (*ANCHORS, *reversed(TUNED)), once=ANCHORS),
    Part("flux", (*ANCHORS, *reversed(TUNED)), once=ANCHORS),
    Part("flux", (*ANCHORS, *REST[:4]), once=ANCHORS),
    Part("dit", (*ANCHORS, *REST), once=ANCHORS),
    Part("flux", (*ANCHORS, *REGIONAL, *REST[4:]), once=ANCHORS),
)
"""Part 1 is the first."""


@dataclass
class Record:
    """What is written, whenever there is something new.

    Attributes:
        path: where.
        about: what is said of all rows.
        rows: one for each way in each group.
    """

    path: Path
    about: dict[str, Any]
    rows: list[list[dict[str, Any]]] = field(default_factory=list)

    def write(self) -> None:
        """Writes all; a file is there whole, or as it was before."""
        rows = [{"group": k, **row} for k, group in enumerate(self.rows, 1) for row in group]
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps({**self.about, "rows": rows}, indent=1) + "\n")
        new.replace(self.path)


def measure(number: int, dry: bool, deadline: float, out: Path, caches: Path, rounds: int) -> dict[str, Any]:
    """Runs one part, and returns what was written."""
    part, size = PARTS[number - 1], "tiny" if dry else "gpu"
    weights, bytes_of = MODELS[part.model].weights("gpu")
    # So many of a tiny model that there are groups.
    most = 4 if dry else int(0.95 * _card()["memory"] / (bytes_of + part.beside * GIB))
    groups = part.groups(most)
    about = {"part": number, "model": part.model, "class": MODELS[part.model].kind, "weights": weights}
    record = Record(out / f"gpu_{number}.json", {**about, "dry": dry, "steps": part.steps, **surroundings(dry)})
    record.rows = [[{"model": part.model, "way": way, "not run": OUT_OF_TIME} for way in group] for group in groups]
    record.write()
    for k, group in enumerate(groups):
        traces = {way: out / f"trace_{part.model}_{_slug(way)}.json.gz" for way in TRACED if part.traced and k == 0}
        turns = Turns(part.model, size, caches, steps=part.steps, short=SHORT, deadline=deadline, ahead=True)
        turns.flow = part.steps == STEPS
        turns.changed = _writing(record, k, turns)
        # The first of a dry run alone is started twice.
        turns.prepare(group, once={*part.once, *(ANCHORS if k else ()), *(group[1:] if dry else ())})
        turns.take_turns(rounds)
        turns.report(profile=True, traces=traces)
        turns.end()
    record.about["seconds"] = round(time.perf_counter() - _BEGAN, 1)
    record.write()
    return json.loads(record.path.read_text())


def _writing(record: Record, group: int, turns: Turns) -> Callable[[], None]:
    def write() -> None:
        record.rows[group] = list(turns.rows.values())
        record.write()

    return write


def surroundings(dry: bool) -> dict[str, Any]:
    """When, on what, and with which versions."""
    found: dict[str, Any] = {"date": datetime.now().astimezone().isoformat(timespec="seconds")}
    found |= {"machine": machine("tiny" if dry else "gpu")} | ({} if dry else _card())
    found["driver"] = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    found["commit"] = _said("git", "-C", str(ROOT), "rev-parse", "HEAD")
    found["versions"] = {
        "Python": platform.python_version(),
        **versions("torch", "triton", "diffusers", "cache-dit", "fx_cache"),
        "CUDA": torch.version.cuda,
    }
    return found


def _card() -> dict[str, Any]:
    card = torch.cuda.get_device_properties(0)
    return {"card": card.name, "memory": card.total_memory, "multiprocessors": card.multi_processor_count}


def _said(*command: str) -> str | None:
    """The first line of what a program says; None if there is none, or it fails."""
    if shutil.which(command[0]) is None:
        return None
    ran = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return ran.stdout.strip().split("\n")[0] if ran.returncode == 0 else None


def _slug(way: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in way)


COLUMNS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "cold, s": lambda row: f"{row['cold']:.1f}",
    "2nd process, s": lambda row: f"{row['second process']:.1f}",
    "computed, ms": lambda row: f"{1e3 * row['computed step']:.2f}",
    "cached, ms": lambda row: f"{1e3 * row['cached step']:.2f}",
    f"{STEPS} steps, s": lambda row: f"{row['generation']:.3f}",
    "in flow, s": lambda row: f"{row['flow']:.3f}",
    "beside dit_cache": lambda row: f"{row['beside']:.2f}",
    "reused": lambda row: row["reused"],
    "peak, MiB": lambda row: f"{row['peak bytes'] / 2**20:.1f}",
    "kernels": lambda row: f"{row['profile']['miss']['kernels']}, {row['profile']['hit']['kernels']}",
    "launches": lambda row: f"{row['profile']['miss']['launches']}, {row['profile']['hit']['launches']}",
    "waits": lambda row: f"{_waits(row, 'miss')}, {_waits(row, 'hit')}",
    "call, ms": lambda row: f"{1e3 * row['cached step, call']:.2f}",
    "busy, ms": lambda row: f"{row['profile']['hit']['busy ms']:.2f}",
    "idle, ms": lambda row: f"{row['profile']['hit']['idle ms']:.2f}",
}
"""Of a row; two figures are those of a computed and of a cached step, the last three of a cached one."""


def _waits(row: dict[str, Any], kind: str) -> int:
    seen = row["profile"][kind]["waits"]
    return sum(seen.values()) if "multiprocessors" in row["about"] else sum(row["waits"][kind].values())


def cells(row: dict[str, Any]) -> list[str]:
    """A row as it is shown; what it does not have is left out."""
    if "not run" in row:
        return [row["way"], f"not run: {row['not run'].split('. ')[0][:60]}", *[""] * (len(COLUMNS) - 1)]
    found = [row["way"]]
    for value in COLUMNS.values():
        try:
            found.append(str(value(row)))
        except KeyError:
            found.append("")
    return found


def tables(result: dict[str, Any]) -> list[list[list[str]]]:
    """The rows of each group as they are shown."""
    groups: dict[int, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        groups.setdefault(row["group"], []).append({**row, "about": result})
    for rows in groups.values():
        best = next((row.get("generation") for row in rows if row["way"] == "dit_cache"), None)
        for row in rows:
            row |= {} if best is None or "generation" not in row else {"beside": row["generation"] / best}
    return [[cells(row) for row in rows] for rows in groups.values()]


def title(result: dict[str, Any]) -> str:
    """What a result is of."""
    name = "tiny, on a CPU" if result["dry"] else f"{result['weights'] / 1e9:.2f} B weights"
    when = f"{result['machine']}, torch {result['versions']['torch']}, {result['date'][:10]}"
    return f"part {result['part']}: {result['model']} ({result['class']}, {name}); {when}"


def gaps(result: dict[str, Any]) -> list[str]:
    """Where the device is idle in a cached step, a line for each way that was profiled."""
    lines = []
    for row in result["rows"]:
        hit = row.get("profile", {}).get("hit")
        if hit is None or row["group"] > 1:
            continue
        found = [
            f"{gap['ms']:.2f} at {gap['at ms']:.2f} ({', '.join(f'{n} {ms:.2f}' for n, ms in gap['host'].items())})"
            for gap in hit["gaps"][:3]
        ]
        lines.append(f"{row['way']}: idle {hit['idle ms']:.2f} of {hit['step ms']:.2f} ms; {'; '.join(found)}")
    return lines


def markdown(result: dict[str, Any]) -> str:
    """The tables of one result."""
    lines = [f"**{title(result)}**", ""]
    for rows in tables(result):
        lines += ["| " + " | ".join(("way", *COLUMNS)) + " |", "|" + "---|" * (1 + len(COLUMNS))]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        lines.append("")
    return "\n".join([*lines, *(f"- {line}" for line in gaps(result)), ""])


def main(
    files: Annotated[list[Path] | None, typer.Argument(help="With --show: results.")] = None,
    part: Annotated[int, typer.Option(help="Which; see --list.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("out/gpu"),
    dry: Annotated[bool, typer.Option("--dry", help="Tiny models, on the CPU.")] = False,
    seconds: Annotated[float, typer.Option(help="What is not reached in this time does not run.")] = 540,
    rounds: Annotated[int, typer.Option(help="Requests of each way, behind one that is not counted.")] = 3,
    caches: Annotated[Path | None, typer.Option(help="Folder for what is compiled; a new one.")] = None,
    listed: Annotated[bool, typer.Option("--list", help="Show the parts.")] = False,
    show: Annotated[bool, typer.Option("--show", help="Print the tables of results.")] = False,
) -> None:
    """Runs one part."""
    if show:
        print("\n".join(markdown(json.loads(file.read_text())) for file in files or []))
        return
    if listed:
        for number, one in enumerate(PARTS, 1):
            print(f"{number} {one.model} ({MODELS[one.model].weights('gpu')[0] / 1e9:.2f} B): {'; '.join(one.ways)}")
        return
    if not 1 <= part <= len(PARTS):
        raise typer.BadParameter(f"got part {part}; expected 1 to {len(PARTS)}")
    if not dry and not torch.cuda.is_available():
        raise typer.BadParameter("no GPU; --dry runs without")
    # Whoever ends this ends the processes, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        where = Path(folder) if caches is None else caches
        where.mkdir(parents=True, exist_ok=True)
        result = measure(part, dry, _BEGAN + seconds, out.absolute(), where.absolute(), rounds)
    console = Console(width=260)
    console.print(title(result))
    for rows in tables(result):
        shown = Table("way", *COLUMNS)
        for row in rows:
            shown.add_row(*row)
        console.print(shown)
    for line in gaps(result):
        console.print(line, markup=False)


_BEGAN = time.perf_counter()

if __name__ == "__main__":
    typer.run(main)
