"""Cold compilation and step times of a deep DiT: plain `torch.compile` against `dit_cache`, paired, medians.

    python benchmarks/depth.py --blocks 14 --blocks 28 --blocks 56 --json benchmarks/results/depth.json

Each compilation runs in a process of its own with an empty Inductor cache, and once more in a second process that finds
that cache. Once as the model is written, once with its blocks marked with ``torch.compiler.nested_compile_region``.
Steps alternate within one process: plain, computed by `dit_cache`, reused by `dit_cache`.
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
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import DiTTransformer2DModel
from diffusers.models.attention import BasicTransformerBlock
from rich.console import Console
from rich.table import Table

import fx_cache

OPTIONS = {"Fn_compute_blocks": 1, "max_warmup_steps": 1, "residual_diff_threshold": 0.0}


def model_of(blocks: int) -> DiTTransformer2DModel:
    """A DiT of width 384 on 16x16 = 256 tokens, with random weights."""
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=64,
        in_channels=4,
        out_channels=4,
        num_layers=blocks,
        sample_size=32,
        patch_size=2,
        num_embeds_ada_norm=1000,
    ).eval()


def inputs_of(step: int, labels: torch.Tensor) -> dict:
    """Inputs of one step; `labels` stays the same object."""
    latent = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(step))
    timestep = torch.tensor([1000 - step])
    return {"hidden_states": latent, "timestep": timestep, "class_labels": labels, "return_dict": False}


def compile_of(model: torch.nn.Module, kind: str) -> torch.nn.Module:
    """The model compiled as a whole, or through the backend."""
    if kind == "plain":
        return torch.compile(model, fullgraph=True)
    return torch.compile(model, backend="dit_cache", fullgraph=True, options=dict(OPTIONS))


def first_calls(kind: str, blocks: int, marked: bool) -> dict[str, float]:
    """Seconds of the first call in a new process with an empty cache, and in a second one."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder}
        command = [sys.executable, __file__, "--blocks", str(blocks), "--only", kind, *["--marked"] * marked]
        seconds = []
        for _ in range(2):
            done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
            seconds.append(float(done.stdout.split()[-1]))
        return dict(zip(("cold", "second process"), seconds, strict=True))


def steps(blocks: int, count: int) -> dict[str, list[float]]:
    """Seconds of each step, the three kinds alternating."""
    model, labels = model_of(blocks), torch.tensor([7])
    plain, cached = compile_of(model, "plain"), compile_of(model, "dit_cache")
    times: dict[str, list[float]] = {"plain": [], "computed": [], "reused": []}
    with torch.no_grad(), fx_cache.session("benchmark", "only"):
        for step in range(count + 3):
            kinds = [("plain", plain, None), ("computed", cached, 0.0), ("reused", cached, 1.0)]
            for k, (kind, run, threshold) in enumerate(kinds):
                if threshold is not None and step:
                    fx_cache.configure(cached, residual_diff_threshold=threshold)
                inputs = inputs_of(3 * step + k, labels)
                begin = time.perf_counter()
                run(**inputs)
                if step >= 3:
                    times[kind].append(time.perf_counter() - begin)
    span = fx_cache.summary(cached).to_dict()["sessions"][0]["branches"][0]["spans"][0]
    assert len(span["hits"]) >= count and len(span["misses"]) >= count
    return times


def main(
    blocks: Annotated[list[int] | None, typer.Option(help="Depth of the model; several: one after the other.")] = None,
    count: Annotated[int, typer.Option(help="Steps of each kind.")] = 20,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write the result.")] = None,
    only: Annotated[str | None, typer.Option(hidden=True)] = None,
    marked: Annotated[bool, typer.Option("--marked", hidden=True)] = False,
) -> None:
    """Runs the benchmark."""
    depths = blocks or [28]
    if only is not None:
        if marked:
            BasicTransformerBlock.forward = torch.compiler.nested_compile_region(BasicTransformerBlock.forward)
        compiled = compile_of(model_of(depths[0]), only)
        begin = time.perf_counter()
        with torch.no_grad():
            compiled(**inputs_of(0, torch.tensor([7])))
        print(time.perf_counter() - begin)
        return
    table = Table("blocks", "", "plain", "dit_cache", "reused")
    rows = []
    for depth in depths:
        row = measured(depth, count)
        for blocks_are, ways in row["first_call_seconds"].items():
            for call in ("cold", "second process"):
                seconds = [f"{ways[kind][call]:.1f}" for kind in ("plain", "dit_cache")]
                table.add_row(str(depth), f"{call}, blocks {blocks_are}, s", *seconds, "")
        medians = [f"{1e3 * row['step_seconds_median'][k]:.1f}" for k in ("plain", "computed", "reused")]
        table.add_row(str(depth), "step, ms", *medians)
        rows.append(row)
    Console().print(table)
    result = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "versions": {name: version(name) for name in ("torch", "diffusers", "fx_cache")},
        "steps": count,
        "rows": rows,
    }
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n")


def measured(blocks: int, count: int) -> dict[str, Any]:
    """The row of one depth."""
    compile_seconds = {
        blocks_are: {kind: first_calls(kind, blocks, blocks_are == "marked") for kind in ("plain", "dit_cache")}
        for blocks_are in ("as written", "marked")
    }
    torch._dynamo.reset()
    times = steps(blocks, count)
    medians = {kind: statistics.median(values) for kind, values in times.items()}
    return {
        "blocks": blocks,
        "first_call_seconds": compile_seconds,
        "step_seconds_median": medians,
        "step_seconds_quartiles": {kind: statistics.quantiles(values, n=4) for kind, values in times.items()},
        "computed_to_plain": medians["computed"] / medians["plain"],
        "plain_to_reused": medians["plain"] / medians["reused"],
    }


if __name__ == "__main__":
    typer.run(main)
