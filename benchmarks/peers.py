"""fx_cache beside its peers, on the same models, with the same steps reused by all: ``python benchmarks/peers.py``.

Every way to run a model has a process of its own. The processes take turns, request by request, each alone on the
machine; all figures are medians. Compiled twice, in two processes: with empty caches, and with those that the first
one left on disk. What a way decides is overruled where it has measured, so that everybody computes the same steps:
four, and then every fourth.

ParaAttention takes part where it is installed: ``pip install --no-deps para-attn==0.3.38``.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.contest.models import MODELS, models_of
from benchmarks.contest.turns import Turns, machine, versions
from benchmarks.contest.ways import STEPS, WAYS


def compare(model: str, ways: list[str], size: str, rounds: int, console: Console) -> list[dict[str, Any]]:
    """One row for each way of running a model."""
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.pt" if size == "cpu" else None
        if weights is not None:
            torch.save(MODELS[model].build(size, "cpu").state_dict(), weights)
        turns = Turns(model, size, Path(folder), weights)
        for way in ways:
            begin = time.perf_counter()
            turns.prepare([way])
            ready = turns.rows[way].get("not run", f"ready after {time.perf_counter() - begin:.0f} s")
            console.print(f"{model}: {way}: {ready}")
        turns.take_turns(rounds)
        turns.report()
        turns.end()
    return list(turns.rows.values())


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
        "machine": machine(size),
        "versions": versions("torch", "diffusers", "cache-dit", "para-attn", "fx_cache"),
        "steps": STEPS,
        "rounds": rounds,
        "rows": [],
    }
    for model in models or models_of(size):
        rows = compare(model, ways or list(WAYS), size, rounds, console)
        result["rows"] += rows
        console.print(table(rows))
        if json_file is not None:
            json_file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
