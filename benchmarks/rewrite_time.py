"""How long finding and rewriting takes, apart from the inner compiler: ``python benchmarks/rewrite_time.py``.

Captures the largest graph of the zoo, whose blocks are full of unrolled loops, and a FLUX-like transformer of growing
depth; times the pipeline over each; medians of five runs.

Options:
    --json FILE  where the figures go
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.zoo import captured
from fx_cache.backend import rewrite
from fx_cache.config import CacheConfig
from tests.models import walk

DEPTHS = (3, 7, 15, 31, 62)
LARGEST = "SanaWMTransformer3DModel"
RUNS = 5


def capture(layers: int) -> fx.GraphModule:
    """The graph of a FLUX transformer with `layers` blocks of each kind."""
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        num_layers=layers,
        num_single_layers=layers,
        attention_head_dim=16,
        num_attention_heads=2,
        in_channels=16,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=True,
    ).eval()
    found: list[fx.GraphModule] = []

    def look(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        del example_inputs
        found.append(gm)
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=look, fullgraph=True)(**walk("flux", 1)[0])
    return found[0]


def time_rewriting(gm: fx.GraphModule, name: str) -> dict[str, Any]:
    """One graph's size, and the seconds that finding and rewriting take, in all and by pass."""
    config = CacheConfig(Fn_compute_blocks=1, compiler="eager")
    seconds = []
    for _ in range(RUNS):
        gc.collect()  # what others left behind is not counted
        begin = time.perf_counter()
        rewritten = rewrite(gm, config)
        seconds.append(time.perf_counter() - begin)
    assert rewritten.plan.spans
    passes = {r.name: round(r.seconds, 4) for r in rewritten.records}
    row = {"graph": name, "nodes": len(gm.graph.nodes), "seconds": statistics.median(seconds), "passes": passes}
    print(
        f"{name}, {row['nodes']} nodes: {row['seconds']:.3f} s ({1e6 * row['seconds'] / row['nodes']:.0f} us a node)",
        passes,
        flush=True,
    )
    return row


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    with torch.no_grad():
        rows = [time_rewriting(gm, LARGEST) for gm in captured(LARGEST)]
    rows += [time_rewriting(capture(depth), f"FLUX, {depth} + {depth} blocks") for depth in DEPTHS]
    record = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "rows": rows,
    }
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
