"""fx_cache beside its peers, on the same models, with the same steps reused by all: ``python benchmarks/peers.py``.

Every way to run a model has a process of its own. The processes take turns, request by request, each alone on the
machine; all figures are medians. Compiled twice, in two processes: with empty caches, and with those that the first
one left on disk. What a way decides is overruled where it has measured, so that everybody computes the same steps:
four, and then every fourth.

ParaAttention takes part where it is installed: ``pip install --no-deps para-attn==0.3.38``.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.contest.models import MODELS  # noqa: E402
from benchmarks.contest.ways import PATTERN, STEPS, WARMUP, WAYS  # noqa: E402


@dataclass
class Process:
    """One way of running a model, alive."""

    way: str
    running: subprocess.Popen[str]

    @classmethod
    def start(cls, model: str, way: str, size: str, caches: str, weights: Path | None) -> Process:
        command = [sys.executable, "-m", "benchmarks.contest.worker", model, way, size]
        command += [] if weights is None else [str(weights)]
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": caches, "PYTHONPATH": str(ROOT)}
        pipe = subprocess.PIPE
        running = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, env=environment, cwd=ROOT
        )
        return cls(way, running)

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """What the process answers; ``{"error": ...}`` where it cannot."""
        assert self.running.stdin is not None
        assert self.running.stdout is not None
        self.running.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self.running.stdin.flush()
        line = self.running.stdout.readline()
        return json.loads(line) if line else {"error": "the process has ended"}

    def end(self) -> None:
        assert self.running.stdin is not None
        self.running.stdin.close()
        self.running.wait()


def compare(model: str, ways: list[str], size: str, rounds: int, console: Console) -> list[dict[str, Any]]:
    """One row for each way of running a model."""
    rows: dict[str, dict[str, Any]] = {}
    alive: list[Process] = []
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.pt" if size == "cpu" else None
        if weights is not None:
            torch.save(MODELS[model].build(size, "cpu").state_dict(), weights)
        for way in ways:
            begin = time.perf_counter()
            caches = str(Path(folder) / str(len(rows)))
            cold = Process.start(model, way, size, caches, weights)
            first = cold.ask("first")
            cold.end()
            rows[way] = {"model": model, "way": way}
            if "error" in first:
                rows[way]["not run"] = first["error"]
                console.print(f"{model}: {way}: {first['error']}")
                continue
            process = Process.start(model, way, size, caches, weights)
            again = process.ask("first")
            alive.append(process)
            rows[way] |= {"cold": first["seconds"], "second process": again["seconds"], "graphs": first["graphs"]}
            console.print(f"{model}: {way}: ready after {time.perf_counter() - begin:.0f} s")
        seconds: dict[str, list[list[float]]] = {p.way: [] for p in alive}
        for number in range(rounds + 1):
            for process in alive if number % 2 else alive[::-1]:
                answer = process.ask("generation", seed=10 + number)
                if "error" in answer:
                    rows[process.way]["not run"] = answer["error"]
                elif number:
                    seconds[process.way].append(answer["seconds"])
                else:
                    rows[process.way]["first generation"] = sum(answer["seconds"])
                    rows[process.way]["first hit"] = answer["seconds"][WARMUP]
        for process in alive:
            if "not run" not in rows[process.way]:
                rows[process.way] |= {**timings(seconds[process.way]), **process.ask("report")}
            process.end()
    return list(rows.values())


def timings(generations: list[list[float]]) -> dict[str, Any]:
    """Medians over the steps that computed, those that reused, and whole generations; in seconds."""
    hits, misses, first_hits = [], [], []
    for steps in generations:
        first_hits.append(steps[WARMUP])
        for i, seconds in enumerate(steps):
            PATTERN.step = i
            (hits if PATTERN.hit() else misses if i else []).append(seconds)
    totals = [sum(steps) for steps in generations]
    return {
        "generation": statistics.median(totals),
        "generations": totals,
        "computed step": statistics.median(misses),
        "computed step, quartiles": statistics.quantiles(misses, n=4),
        "cached step": statistics.median(hits),
        "cached step, quartiles": statistics.quantiles(hits, n=4),
        "first hit of later generations": statistics.median(first_hits),
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows of one model, for the reader."""
    shown = Table(
        *(str(rows[0]["model"]), "cold, s", "2nd process, s", "computed, ms", "cached, ms", f"{STEPS} steps, s"),
        *("graphs", "breaks", "later", "syncs"),
    )
    for row in rows:
        if "not run" in row:
            shown.add_row(row["way"], *["-"] * 9)
            continue
        shown.add_row(
            row["way"],
            f"{row['cold']:.1f}",
            f"{row['second process']:.1f}",
            f"{1e3 * row['computed step']:.1f}",
            f"{1e3 * row['cached step']:.1f}",
            f"{row['generation']:.2f}",
            *(str(row.get(k, "-")) for k in ("graphs", "breaks", "compiled after the first step")),
            str(row.get("syncs", {}).get("hit", "-")),
        )
    return shown


def markdown(result: dict[str, Any]) -> str:
    """The tables of `docs/performance.md`."""
    lines: list[str] = []
    for model in dict.fromkeys(row["model"] for row in result["rows"]):
        names = "way", "cold, s", "2nd process, s", "computed, ms", "cached, ms", f"{result['steps']} steps, s"
        names += "beside dit_cache", "graphs", "later", "peak, MiB"
        lines += [f"**{model}**", "", "| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
        rows = [row for row in result["rows"] if row["model"] == model]
        best = next((r["generation"] for r in rows if r["way"] == "dit_cache"), None)
        for row in rows:
            if "not run" in row:
                lines.append(f"| {row['way']} | not run: {row['not run'].split('.')[0]} |" + " |" * (len(names) - 2))
                continue
            cells = [row["way"], f"{row['cold']:.1f}", f"{row['second process']:.1f}"]
            cells += [
                f"{1e3 * row['computed step']:.1f}",
                f"{1e3 * row['cached step']:.1f}",
                f"{row['generation']:.2f}",
            ]
            cells += ["" if best is None else f"{row['generation'] / best:.2f}"]
            cells += [str(row["graphs"]), str(row["compiled after the first step"])]
            cells += [f"{row['peak bytes'] / 2**20:.1f}" if "peak bytes" in row else ""]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def versions() -> dict[str, str]:
    """Of everything that takes part and is installed."""
    found = {}
    for name in ("torch", "diffusers", "cache-dit", "para-attn", "fx_cache"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def main(
    models: Annotated[list[str] | None, typer.Option("--model", help=f"One of {', '.join(MODELS)}; all.")] = None,
    ways: Annotated[list[str] | None, typer.Option("--way", help="A way of running them; all.")] = None,
    size: Annotated[str, typer.Option(help="cpu, or gpu: real dimensions in bfloat16.")] = "cpu",
    rounds: Annotated[int, typer.Option(help="Generations of each way, behind one that is not counted.")] = 3,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write the result.")] = None,
    show: Annotated[
        Path | None, typer.Option(help="Run nothing: print the tables of a result that was written.")
    ] = None,
) -> None:
    """Runs the comparison."""
    if show is not None:
        print(markdown(json.loads(show.read_text())))
        return
    console = Console(width=160)
    result = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
        if size == "cpu"
        else torch.cuda.get_device_name(),
        "versions": versions(),
        "steps": STEPS,
        "rounds": rounds,
        "rows": [],
    }
    for model in models or list(MODELS):
        rows = compare(model, ways or list(WAYS), size, rounds, console)
        result["rows"] += rows
        console.print(table(rows))
        if json_file is not None:
            json_file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
