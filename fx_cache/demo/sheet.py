"""The demo: digits drawn once plainly compiled and once cached, side by side, with everything written to a folder."""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib.figure
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import fx_cache
from fx_cache.demo.digits import generate, load_digits_dit

OPTIONS: dict[str, Any] = {
    "Fn_compute_blocks": 1,
    "residual_diff_threshold": 0.12,
    "max_warmup_steps": 2,
    "max_continuous_cached_steps": 5,
}
ROWS = 2
"""Rows of ten digits on the sheet."""


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured.

    Attributes:
        plain_seconds, cached_seconds: median time of a whole generation.
        plain_compile_seconds, cached_compile_seconds: time of the first call, which compiles.
        speedup: plain_seconds / cached_seconds.
        steps: denoising steps, each of two calls.
        hits: for each branch, the steps that reused the span.
        psnr_db: of the cached images against the plain ones, in float64, for a peak of 1.
    """

    plain_seconds: float
    cached_seconds: float
    plain_compile_seconds: float
    cached_compile_seconds: float
    speedup: float
    steps: int
    hits: dict[str, list[int]]
    psnr_db: float


def psnr(reference: torch.Tensor, image: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in [0, 1], in float64; inf for equal ones."""
    error = float((reference.double() - image.double()).square().mean())
    return float("inf") if error == 0.0 else float(-10.0 * torch.log10(torch.tensor(error, dtype=torch.float64)))


def default_compiler() -> str:
    """``"inductor"``, or ``"eager"`` where there is no C++ compiler for it."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "eager"
    return "inductor"


def run_demo(out: Path, *, steps: int = 50, repeats: int = 3, compiler: str | None = None) -> DemoResult:
    """Generates the sheet both ways, alternating, and writes figures, graphs, explanation and summary to `out`.

    Args:
        out: folder to write to; graphs of an earlier run in it are replaced.
        steps: denoising steps.
        repeats: generations each way; the median counts.
        compiler: the inner compiler, and that of the plain model; None: what the machine has.
    """
    console = Console()
    if compiler is None:
        compiler = default_compiler()
        if compiler != "inductor":
            console.print("No C++ compiler found, which Inductor needs: both ways run with compiler 'eager'.")
    graphs = out / "graphs"
    shutil.rmtree(graphs, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    labels = list(range(10)) * ROWS
    plain_model, cached_model = load_digits_dit(), load_digits_dit()
    plain = torch.compile(plain_model, backend=compiler)
    options = {**OPTIONS, "compiler": compiler, "dump_dir": str(graphs)}
    cached = torch.compile(cached_model, backend="dit_cache", fullgraph=True, options=options)

    columns = (TextColumn("{task.description:>24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:

        def timed(name: str, model: Callable[..., Any], count: int, seed: int) -> tuple[torch.Tensor, float]:
            task = progress.add_task(name, total=count)
            begin = time.perf_counter()
            images = generate(model, labels=labels, steps=count, seed=seed, on_step=lambda _: progress.advance(task))
            return images, time.perf_counter() - begin

        compile_plain = timed("compiling plain", plain, 1, 1)[1]
        compile_cached = timed("compiling dit_cache", cached, 1, 1)[1]
        plain_times, cached_times = [], []
        for i in range(repeats):
            images_plain, seconds = timed(f"plain, run {i + 1}", plain, steps, 0)
            plain_times.append(seconds)
            images_cached, seconds = timed(f"dit_cache, run {i + 1}", cached, steps, 0)
            cached_times.append(seconds)

    summary = fx_cache.summary(cached_model).to_dict()
    session = summary["sessions"][-1]
    branches = dict(zip(("cond", "uncond"), (b["spans"][0] for b in session["branches"]), strict=True))
    plain_seconds, cached_seconds = statistics.median(plain_times), statistics.median(cached_times)
    result = DemoResult(
        plain_seconds,
        cached_seconds,
        compile_plain,
        compile_cached,
        plain_seconds / cached_seconds,
        steps,
        {name: span["hits"] for name, span in branches.items()},
        psnr(images_plain, images_cached),
    )
    _write_sheet(out / "grid.png", images_plain, images_cached)
    _write_diffs(out / "diffs.png", branches, steps)
    last = max(graphs.glob("graph_*/[0-9]*.py"))
    shutil.copy(graphs / "graph_0" / "00_captured.py", out / "graph_before.py")
    shutil.copy(last, out / "graph_after.py")
    shutil.copy(graphs / "graph_0" / "skeleton.txt", out / "skeleton.txt")
    (out / "explain.txt").write_text((graphs / "graph_0" / "explain.txt").read_text())
    (out / "summary.json").write_text(json.dumps({"result": asdict(result), "summary": summary}, indent=2))
    _report(console, result, out)
    return result


def _report(console: Console, result: DemoResult, out: Path) -> None:
    hits = ", ".join(f"{name} {len(steps)}/{result.steps}" for name, steps in result.hits.items())
    compiling = f"{result.plain_compile_seconds:.1f} s plain, {result.cached_compile_seconds:.1f} s dit_cache"
    console.print(
        f"plain   {result.plain_seconds:6.2f} s\n"
        f"cached  {result.cached_seconds:6.2f} s\n"
        f"compilation: {compiling}\n"
        f"speed-up {result.speedup:.2f}x, hits: {hits}, PSNR {result.psnr_db:.1f} dB\n"
        f"written to {out}/: {' '.join(sorted(p.name for p in out.iterdir()))}",
        highlight=False,
    )


def _write_sheet(path: Path, plain: torch.Tensor, cached: torch.Tensor) -> None:
    """Rows of plain digits, the same rows cached, and their difference."""
    figure = matplotlib.figure.Figure(figsize=(10, 3.3 * ROWS))
    kinds = ((plain, "plain"), (cached, "dit_cache"), ((plain - cached).abs(), "|difference|"))
    axes = figure.subplots(len(kinds) * ROWS, 10)
    for k, (images, name) in enumerate(kinds):
        for i in range(10 * ROWS):
            axis = axes[k * ROWS + i // 10][i % 10]
            axis.imshow(images[i, 0].numpy(), cmap="gray", vmin=0.0, vmax=1.0, interpolation="bicubic")
            axis.set_xticks([])
            axis.set_yticks([])
            if i % 10 == 0:
                axis.set_ylabel(name)
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=100)


def _write_diffs(path: Path, branches: dict[str, dict[str, Any]], steps: int) -> None:
    """The diff at each step against the threshold; hits are filled."""
    figure = matplotlib.figure.Figure(figsize=(9, 4))
    axis = figure.subplots()
    for name, span in branches.items():
        diffs = {s: d for s, d in span["diffs"].items() if d >= 0.0}
        (line,) = axis.plot(list(diffs), list(diffs.values()), linewidth=0.8, label=name)
        hits = [s for s in span["hits"] if s in diffs]
        axis.plot(hits, [diffs[s] for s in hits], "o", color=line.get_color(), label=f"{name}: hit")
        for step in range(steps):
            if step not in diffs:
                axis.plot([step], [0.0], "x", color=line.get_color(), markersize=4)
    axis.axhline(OPTIONS["residual_diff_threshold"], color="black", linestyle="--", label="threshold")
    axis.set_xlabel("step (x: computed without measuring)")
    axis.set_ylabel("residual diff")
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
