"""How the cost of keeping state grows: ``python benchmarks/growth.py``, in microseconds a step, on narrow DiTs.

What a step takes beside running the rewritten graph (`benchmarks/overhead.py`), with ``compiler="eager"`` and a policy
that measures and computes every step; one of blocks, tokens, samples in a batch, and requests that take turns grows,
the others stay. Also the bytes that one request holds.
"""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import DiTTransformer2DModel
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

import fx_cache
from benchmarks.overhead import POLICIES, Meter
from tests.running import compile_cached

WARMUP = 2
"""Steps that are not counted: each request's first, where its state is made, and the next."""

CALLS = 200
"""Steps that are counted, of all requests together."""


@dataclass(frozen=True)
class Setting:
    """What is run.

    Attributes:
        blocks: of the transformer.
        tokens: of one sample.
        batch: samples.
        requests: take turns, step by step.
    """

    blocks: int = 14
    tokens: int = 64
    batch: int = 1
    requests: int = 1


GROWING = {
    "blocks": (14, 28, 56, 112),
    "tokens": (64, 256, 1024, 4096),
    "batch": (1, 2, 4, 8),
    "requests": (1, 4, 16, 64),
}


def model_of(setting: Setting) -> DiTTransformer2DModel:
    """A DiT of width 32; its weights are as many as a wide one's."""
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        num_layers=setting.blocks,
        sample_size=2 * round(setting.tokens**0.5),
        patch_size=2,
        num_embeds_ada_norm=1000,
    ).eval()


def measure(setting: Setting) -> dict[str, Any]:
    """The row of one setting."""
    torch._dynamo.reset()
    model = model_of(setting)
    side, batch = model.config.sample_size, setting.batch
    labels = [torch.full((batch,), number) for number in range(setting.requests)]
    meter = Meter()
    with meter():
        cached = compile_cached(model, **POLICIES["computes, measured"], max_sessions=2 * setting.requests)
        for i in range(WARMUP + max(2, CALLS // setting.requests)):
            if i == WARMUP:
                meter.calls.clear()
            for label in labels:
                latent = torch.randn(batch, 4, side, side)
                time = torch.full((batch,), 999 - i)
                cached(hidden_states=latent, timestep=time, class_labels=label, return_dict=False)
    sessions = fx_cache.summary(cached).to_dict()["sessions"]
    told = sum(len(session["branches"]) for session in sessions)
    assert told == setting.requests, f"{setting}: {told} requests were told apart"
    held = [span["bytes"] for session in sessions for branch in session["branches"] for span in branch["spans"]]
    low, middle, high = statistics.quantiles(meter.calls, n=4)
    return {
        **asdict(setting),
        "weights": len(list(model.parameters())),
        "us a step": round(1e6 * middle, 1),
        "quartiles": [round(1e6 * low, 1), round(1e6 * high, 1)],
        "bytes a request": sum(held) // setting.requests,
    }


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write the result.")] = None,
) -> None:
    """Runs every setting, one thread."""
    torch.set_num_threads(1)
    table = Table("growing", "to", "weights", "us a step", "bytes a request")
    rows = []
    with torch.no_grad():
        for name, values in GROWING.items():
            for value in values:
                row = {"growing": name, **measure(replace(Setting(), **{name: value}))}
                rows.append(row)
                table.add_row(name, *(str(row[k]) for k in (name, "weights", "us a step", "bytes a request")))
    Console().print(table)
    if json_file is not None:
        record = {
            "date": datetime.date.today().isoformat(),
            "machine": f"{platform.machine()}, 1 thread",
            "torch": torch.__version__,
            "calls": CALLS,
            "rows": rows,
        }
        json_file.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
