"""What each rank of `test_ranks` does: ``torchrun ... tests/ranks.py CASE FOLDER``. Its results go to the folder."""

from __future__ import annotations

import datetime
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

sys.path.insert(0, str(Path(__file__).parents[1]))

import fx_cache
from fx_cache.runtime.registry import stores
from tests.models.ranks import TOKENS, Divided, part_of
from tests.running import compile_cached, hits_of

STEPS = 10
THRESHOLD = 0.15
PUSHED = 4
"""A step that is reused if nothing happens."""


def request(seed: int, steps: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    start, drift = (torch.randn(2, TOKENS, 8, generator=generator) for _ in range(2))
    noise = [torch.randn(start.shape, generator=generator) for _ in range(steps)]
    return [(start + 0.05 * i * drift + 0.03 * n, torch.full((2,), 1.0 - i / steps)) for i, n in enumerate(noise)]


def model_of(case: str, rank: int, parts: int, group: str) -> Divided:
    tokens = case.startswith("tokens")
    torch.manual_seed(0)
    whole = Divided(1, group, tokens)
    model = Divided(parts, group, tokens)
    model.load_state_dict(part_of(whole.state_dict(), rank, parts, tokens))
    return model.eval()


def break_graph(*_: Any) -> None:
    torch._dynamo.graph_break()


def run(case: str, rank: int, parts: int, group: str) -> dict[str, Any]:
    """The outputs and hits of one rank."""
    model = model_of(case, rank, parts, group)
    options: dict[str, Any] = {"residual_diff_threshold": THRESHOLD}
    compiled = compile_cached(model, **options)
    if "broken" in case:
        for block in model.blocks:
            block.register_forward_pre_hook(break_graph)
        options |= {"compiler": "eager", "Fn_compute_blocks": 1, "max_warmup_steps": 1}
        compiled = torch.compile(model, backend="dit_cache", options=options)

    def given(latent: Tensor) -> Tensor:
        return latent.chunk(parts, dim=1)[rank].contiguous() if case.startswith("tokens") else latent

    if case.endswith("different"):
        # Every rank is a group of its own, and has a request of its own, of its own length.
        for latent, time in request(rank, STEPS + 3 * rank):
            compiled(given(latent), time)
        return {"hits": hits_of(compiled)}
    outputs = []
    with fx_cache.session("request"):
        for i, (latent, time) in enumerate(request(0, 500 if case.endswith("long") else STEPS)):
            if case.endswith("pushed") and i == PUSHED and rank == parts - 1:
                (branch,) = next(s for s in stores(model) if s._branches)._branches.values()
                branch.slots[0].tensors[0].add_(10.0)  # the probe that this rank compares with
            if case.endswith("lost") and i == PUSHED and rank == parts - 1:
                model.out.bias.add_(0.0)  # a write: this rank's weights have changed
            outputs.append(compiled(given(latent), time)[0].clone())
    span = fx_cache.summary(model).to_dict()["sessions"][-1]["branches"][0]["spans"][0]
    return {"outputs": outputs, "hits": span["hits"], "misses": span["misses"], "diffs": span["diffs"]}


def main() -> None:
    """Runs one case on this rank."""
    case, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    rank, world = distributed.get_rank(), distributed.get_world_size()
    groups = [distributed.new_group([r]) for r in range(world)]
    alone = case.endswith("different")
    group = groups[rank] if alone else distributed.group.WORLD
    assert group is not None
    with torch.no_grad():
        result = run(case, 0 if alone else rank, 1 if alone else world, group.group_name)
    torch.save(result, folder / f"{world}-{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
