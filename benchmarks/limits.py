"""How close a step comes to what is possible: ``python benchmarks/limits.py``, in one process, in turns, medians.

- A step that computes, beside the plain model under ``torch.compile``.
- A step that reuses, beside the model with its first block alone under ``torch.compile``: what has to run anyway.
- The same beside the whole model's graph without its span: what has to run anyway in a model of as many weights, since
  Dynamo looks at each block's modules and hands over all weights at every call, before any backend is called.

Each also with head, span and tail compiled whole (``regional=False``), and without what is computed once a request
(``hoist_invariants``); the latter with everything left in the head that stands there in the model (`sink_into_spans`).
The models are those of `benchmarks/peers.py`.
Ratios are medians of the ratios of steps that ran one after the other.
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

import fx_cache
from benchmarks.contest.models import MODELS, device_for, models_of
from benchmarks.contest.turns import machine, versions
from fx_cache.compiling import inner_compiler
from fx_cache.config import CacheConfig
from fx_cache.passes import PIPELINE
from fx_cache.passes.mark_regions import mark_regions
from fx_cache.passes.runner import RewriteContext, run_passes
from fx_cache.patterns import spans

WARMUP = 10
LEAST_SUNK, ALL_OF_IT = spans.MIN_SUNK, 2.0
PAIRS = {
    "computed / plain": ("computed", "plain"),
    "computed / plain, nothing hoisted": ("computed, nothing hoisted", "plain"),
    "computed / plain, whole": ("computed, whole", "plain"),
    "cached / first block alone": ("cached", "first block alone"),
    "cached / graph without span": ("cached", "graph without span"),
    "cached / graph without span, whole": ("cached, whole", "graph without span"),
    "cached / first block alone, nothing hoisted": ("cached, nothing hoisted", "first block alone"),
    "cached / first block alone, nothing sunk": ("cached, nothing sunk", "first block alone"),
}


def runs(name: str, size: str) -> dict[str, Callable[..., Any]]:
    """The ways to run one model, compiled, by what each step does."""
    model = MODELS[name]
    module = model.build(size, device_for(size))

    def copied() -> torch.nn.Module:
        """The module once more, of the same weights."""
        return copy.deepcopy(module, {id(w): w for w in module.parameters()})

    found: dict[str, Callable[..., Any]] = {
        "plain": torch.compile(copied(), fullgraph=True),
        "first block alone": torch.compile(model.truncated(copied()), fullgraph=True),
        "graph without span": torch.compile(copied(), backend=without_span, fullgraph=True),
    }
    computed, cached = {"residual_diff_threshold": 0.0}, {"residual_diff_threshold": 0.99}
    kinds: dict[str, dict[str, Any]] = {
        "computed": computed,
        "computed, nothing hoisted": {**computed, "hoist_invariants": False},
        "computed, whole": {**computed, "regional": False},
        "cached": cached,
        "cached, whole": {**cached, "regional": False},
        "cached, nothing hoisted": {**cached, "hoist_invariants": False},
        # One option differs: compiled code is shared by those that have all in common.
        "cached, nothing sunk": {**cached, "max_cached_steps": 1 << 30},
    }
    for kind, policy in kinds.items():
        options = {"Fn_compute_blocks": 1, "max_warmup_steps": 1, **policy}
        found[kind] = torch.compile(copied(), backend="dit_cache", fullgraph=True, options=options)
    return found


def without_span(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """A Dynamo backend: a graph in which nothing comes of the span's blocks, compiled as one."""
    context = RewriteContext(CacheConfig(Fn_compute_blocks=1))
    run_passes(gm, PIPELINE[: PIPELINE.index(mark_regions) + 1], context)
    assert context.plan is not None
    for live_out in (lo for span in context.plan.spans for lo in span.live_outs):
        assert live_out.continues is not None and live_out.continues.form is None
        live_out.value.replace_all_uses_with(live_out.continues.parts[0])
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return inner_compiler("inductor", None, {})(gm, list(example_inputs))


def measure(name: str, size: str, steps: int) -> dict[str, Any]:
    """The row of one model."""
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 32  # all ways are captured from the same code
    ways = runs(name, size)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    request = MODELS[name].request(MODELS[name].build(size, device_for(size)), size, steps, seed=0)
    for i, step in enumerate(request):
        for way in list(ways) if i % 2 else reversed(list(ways)):
            # Read where a graph is rewritten.
            spans.MIN_SUNK = ALL_OF_IT if way.endswith("nothing sunk") else LEAST_SUNK
            wait(size)
            begin = time.perf_counter()
            ways[way](**step)
            wait(size)
            if i >= WARMUP:
                seconds[way].append(time.perf_counter() - begin)
    # The ways have their weights in common, and so their statistics.
    done = fx_cache.summary(ways["cached"]).to_dict()["sessions"]
    hits = [len(session["branches"][0]["spans"][0]["hits"]) for session in done]
    reusing = [way for way in ways if way.startswith("cached")]
    assert sum(n >= steps - WARMUP for n in hits) == len(reusing), f"{name}: hits {hits}; expected of {reusing}"
    ratios = {
        pair: statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True))
        for pair, (a, b) in PAIRS.items()
    }
    return {
        "model": name,
        "milliseconds": {way: round(1e3 * statistics.median(v), 2) for way, v in seconds.items()},
        "quartiles": {way: [round(1e3 * q, 2) for q in statistics.quantiles(v, n=4)] for way, v in seconds.items()},
        "ratios": {pair: round(ratio, 3) for pair, ratio in ratios.items()},
    }


def wait(size: str) -> None:
    """Until the device is done."""
    if device_for(size) == "cuda":
        torch.cuda.synchronize()


def main(
    models: Annotated[list[str] | None, typer.Option("--model", help=f"One of {', '.join(MODELS)}; all.")] = None,
    size: Annotated[str, typer.Option(help="cpu, or gpu: real dimensions in bfloat16.")] = "cpu",
    steps: Annotated[int, typer.Option(help="Steps of each kind; the first ten are not counted.")] = 60,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write the result.")] = None,
) -> None:
    """Runs the comparison."""
    warnings.simplefilter("ignore")
    rows = []
    table = Table("model", *PAIRS)
    with torch.no_grad():
        for name in models or models_of(size):
            row = measure(name, size, steps)
            rows.append(row)
            table.add_row(name, *(f"{row['ratios'][pair]:.3f}" for pair in PAIRS))
            print(row, flush=True)
    Console(width=140).print(table)
    result = {
        "date": date.today().isoformat(),
        "machine": machine(size),
        "versions": versions("torch", "diffusers", "fx_cache"),
        "steps": steps,
        "rows": rows,
    }
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
