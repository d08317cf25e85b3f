"""Continuous batching: who is in a batch changes from step to step. Oracle: each request alone, bit for bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vllm_omni.diffusion.worker.input_batch import InputBatch
from vllm_omni.diffusion.worker.utils import StepRequestState

from fx_cache.integrations.vllm_omni import ByRequest, DitCacheBackend

WIDTH, TOKENS = 16, 6
OPTIONS = {"compiler": "eager", "residual_diff_threshold": 0.5, "max_warmup_steps": 2}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.q, self.kv, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, text: Tensor, time: Tensor, mask: Tensor) -> Tensor:
        k, v = self.kv(torch.cat((self.norm(x) + time, text), dim=1)).chunk(2, dim=-1)
        return x + self.out(nn.functional.scaled_dot_product_attention(self.q(self.norm(x)), k, v, mask))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, mask: Tensor) -> Tensor:
        shown = torch.cat((torch.ones_like(hidden_states[..., 0], dtype=torch.bool), mask.bool()), dim=1)[:, None]
        time = timestep[:, None, None]
        for block in self.blocks:
            hidden_states = block(hidden_states, encoder_hidden_states, time, shown)
        return hidden_states


class Pipeline:
    """As the engine's step mode wants one; prompts of their own lengths, guidance by a second call."""

    _dit_modules = ("transformer",)

    def __init__(self, transformer: nn.Module) -> None:
        self.transformer = transformer

    def prepare_encode(self, state: StepRequestState) -> None:
        number = int(state.prompt)
        generator = torch.Generator().manual_seed(number)
        state.latents = torch.randn(1, TOKENS, WIDTH, generator=generator)
        for kind in ("prompt_embeds", "negative_prompt_embeds"):
            setattr(state, kind, torch.randn(1, 3 + number % 3, WIDTH, generator=generator))
            setattr(state, f"{kind}_mask", torch.ones(1, 3 + number % 3))
        state.txt_seq_lens = state.negative_txt_seq_lens = [3 + number % 3]
        state.timesteps = torch.linspace(1.0, 0.1, 8 + number)
        state.do_true_cfg = True

    def denoise_step(self, batch: InputBatch, states: Any = ()) -> Tensor:
        """The prediction for each latent of a batch."""
        latents, times = batch.latents.clone(), batch.timesteps.clone()
        cond = self.transformer(latents, times, batch.prompt_embeds, batch.prompt_embeds_mask)
        uncond = self.transformer(latents, times, batch.negative_prompt_embeds, batch.negative_prompt_embeds_mask)
        return uncond + 2.0 * (cond - uncond)


def serve(pipeline: Pipeline, requests: dict[int, int]) -> dict[int, Tensor]:
    """Runs requests, each of which comes in at some step, as the engine's runner does; their last latents."""
    waiting, running, done = dict(requests), [], {}
    batch, now = None, 0
    while waiting or running:
        for number in [n for n, arrival in waiting.items() if arrival <= now]:
            del waiting[number]
            state = StepRequestState(f"request-{number}", sampling=None, prompt=str(number))
            pipeline.prepare_encode(state)
            running.append(state)
        if running:
            batch = InputBatch.make_batch(running, cached_batch=batch)
            noise = pipeline.denoise_step(batch, states=running)
            for state, row in zip(running, noise.split(1), strict=True):
                state.latents = state.latents - 0.05 * row
                state.step_index += 1
                if state.denoise_completed:
                    done[int(state.prompt)] = state.latents
            running = [state for state in running if not state.denoise_completed]
            pipeline.denoise_step.forget_all_but([state.request_id for state in running])
        now += 1
    return done


def cached(transformer: nn.Module) -> tuple[Pipeline, DitCacheBackend]:
    pipeline = Pipeline(copy.deepcopy(transformer))
    backend = DitCacheBackend(OPTIONS)
    backend.enable(pipeline)
    ByRequest(pipeline, backend)
    return pipeline, backend


@pytest.mark.parametrize("inference", [False, True])
def test_each_request_as_if_it_were_alone(inference: bool) -> None:
    torch.manual_seed(0)
    transformer = Transformer().eval()
    with torch.inference_mode() if inference else torch.no_grad():
        alone = {}
        for number in (1, 2, 3):
            pipeline, backend = cached(transformer)
            alone |= serve(pipeline, {number: 0})
            spans = [b["spans"][0] for b in backend.handle.summary().sessions[-1]["branches"]]
            assert len(spans) == 2
            assert all(span["hits"] for span in spans)
        pipeline, backend = cached(transformer)
        together = serve(pipeline, {1: 0, 2: 3, 3: 5})
        assert {n: torch.equal(together[n], alone[n]) for n in alone} == {1: True, 2: True, 3: True}
        steps = {s["name"]: [b["spans"][0]["steps"] for b in s["branches"]] for s in backend.handle.summary().sessions}
        assert steps == {f"request-{n}": [8 + n, 8 + n] for n in alone}
        sessions = backend.handle.summary().sessions
        assert [span["bytes"] for s in sessions for b in s["branches"] for span in b["spans"]] == [0] * 6
