"""What each rank of `test_diffusers_parallelism` does: ``torchrun ... tests/diffusers_ranks.py CASE FOLDER``."""

from __future__ import annotations

import datetime
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import ContextParallelConfig, TensorParallelConfig
from diffusers.hooks import tensor_parallel
from torch import distributed, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import fx_cache
from fx_cache.runtime.registry import stores
from tests.models import walk
from tests.ranks import PUSHED
from tests.running import shallow

OPTIONS = {"Fn_compute_blocks": 1, "max_warmup_steps": 2, "residual_diff_threshold": 0.5, "compiler": "eager"}
CONFIGS = {
    "context": lambda ranks: ContextParallelConfig(ulysses_degree=ranks),
    "tensor": lambda ranks: TensorParallelConfig(tp_degree=ranks),
}


def request() -> list[dict[str, Any]]:
    """Steps whose number of text tokens can be divided."""
    steps = walk("flux", 8)
    text = {name: steps[0][name][..., :4, :].clone() for name in ("encoder_hidden_states", "txt_ids")}
    return [{**step, **text} for step in steps]


def run(model: nn.Module, compiled: nn.Module, name: str, pushed: bool = False) -> dict[str, Any]:
    """The outputs and hits of one request."""
    outputs = []
    with fx_cache.session(name):
        for i, step in enumerate(request()):
            if pushed and i == PUSHED:
                (branch,) = [b for s in stores(model) for b in s._branches.values() if b.owner == name]
                branch.slots[0].tensors[0].add_(10.0)  # the probe that this rank compares with
            outputs.append(compiled(**step)[0].clone())
    (session,) = [s for s in fx_cache.summary(model).to_dict()["sessions"] if s["name"] == name]
    return {"outputs": outputs, **session["branches"][0]["spans"][0]}


def main() -> None:
    """Runs one case on this rank: the model alone, divided, and divided with the last rank over the threshold."""
    case, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    # diffusers counts accelerators, and has tensor parallelism on them alone; this is the same on a CPU.
    torch.accelerator.device_count = lambda: ranks
    tensor_parallel._SUPPORTED_TP_DEVICES = ("cpu",)
    whole, divided = shallow("flux"), shallow("flux")
    divided.set_attention_backend("native")
    divided.enable_parallelism(config=CONFIGS[case](ranks))
    with torch.no_grad():
        one, many = (torch.compile(m, backend="dit_cache", options=OPTIONS) for m in (whole, divided))
        found = {
            "alone": run(whole, one, "alone"),
            "divided": run(divided, many, "divided"),
            "pushed": run(divided, many, "pushed", pushed=rank == ranks - 1),
        }
    torch.save(found, folder / f"{ranks}-{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
