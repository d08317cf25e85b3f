"""State on a card: moved to the host and back, and accounted for."""

from __future__ import annotations

import pytest
import torch
from diffusers import DiTTransformer2DModel

import fx_cache
from fx_cache.testing import Request, assert_bytes_accounted, counted_hits
from tests.gpu.card import Sent, device, needs_card
from tests.models import walk
from tests.running import REUSING, compile_cached, hits_of, shallow

pytestmark = pytest.mark.slow


def test_state_that_is_moved_to_the_host_between_steps() -> None:
    send = Sent()
    steps = [send(step) for step in walk("dit", 8)]
    compiled = compile_cached(shallow("dit").to(device()), **REUSING)
    outputs = []
    for name in ("stays", "moves"):
        with fx_cache.session(name, "only"):
            for step in steps:
                outputs.append(compiled(**step)[0].clone())
                if name == "moves":
                    fx_cache.offload(name)
    assert all(map(torch.equal, outputs[:8], outputs[8:]))
    assert len(hits_of(compiled)) == 2


@torch._dynamo.config.patch(recompile_limit=64)
def test_a_model_that_is_moved_to_the_host_between_requests() -> None:
    send = Sent()
    steps = [send(step) for step in walk("dit", 8)]
    model = shallow("dit").to(device())
    compiled = compile_cached(model, **REUSING)
    outputs, counts = [], []
    for number in range(3):
        with fx_cache.session(f"request {number}", "only"), counted_hits() as hits:
            outputs.append([compiled(**step)[0].clone() for step in steps])
        counts.append(hits.count)
        model.to("cpu")
        model.to(device())
    assert all(map(torch.equal, outputs[0] + outputs[0], outputs[1] + outputs[2]))
    assert counts[0] == counts[1] == counts[2] > 0


@needs_card
@pytest.mark.parametrize("how", ["block_level", "leaf_level"])
@torch._dynamo.config.patch(recompile_limit=256)
def test_group_offloading_on_a_stream_of_its_own(how: str) -> None:
    """Whatever the hooks move while the model runs: a step that computes gives the model's output."""
    send = Sent()
    steps = [send(step) for step in walk("dit", 8)]
    plain, model = shallow("dit").to(device()), shallow("dit")
    blocks = {"num_blocks_per_group": 1} if how == "block_level" else {}
    model.enable_group_offload(onload_device=device(), offload_type=how, use_stream=True, **blocks)
    options = {"compiler": "eager", "Fn_compute_blocks": 1, **REUSING, "max_continuous_cached_steps": 1}
    compiled = torch.compile(model, backend="dit_cache", options=options)
    for number in range(3):
        reused = []
        for i, step in enumerate(steps):
            with fx_cache.session(f"request {number}", "only"), counted_hits() as hits:
                output = compiled(**step)[0].clone()
            assert hits.count or torch.equal(plain(**step)[0], output), (number, i)
            reused += [i] if hits.count else []
    assert reused


@needs_card
def test_memory() -> None:
    """What the summary says is what the allocator says, within one percent."""
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=16,
        attention_head_dim=64,
        in_channels=4,
        num_layers=6,
        sample_size=128,
        num_embeds_ada_norm=8,
    )
    compiled = compile_cached(model.eval().to(device(), torch.bfloat16), **REUSING)

    def request(number: int) -> Request:
        labels = torch.tensor([number], device=device())
        start = torch.randn(1, 4, 128, 128, device=device(), dtype=torch.bfloat16)
        calls = [
            {"hidden_states": start * (1 - 0.01 * i), "timestep": torch.tensor([999 - 40 * i], device=device())}
            for i in range(4)
        ]
        return Request([("only", {**call, "class_labels": labels}) for call in calls], f"request {number}")

    warm = request(7)
    for i in range(4):
        warm.call(compiled, i)
    fx_cache.end("request 7")
    del warm
    assert assert_bytes_accounted(compiled, [request(k) for k in range(4)], 0.01, str(device())) > 4 * 2 * 8e6
