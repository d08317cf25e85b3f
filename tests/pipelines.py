"""diffusers' pipelines with tiny random weights, and what is asked of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ChromaPipeline,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    GlmImagePipeline,
    QwenImagePipeline,
    WanPipeline,
)
from PIL import Image
from torch import Tensor, nn

from tests.models.tiny import CHANNELS, TEXT_LEN, mask, text
from tests.models.weights import randomize
from tests.running import compile_cached, shallow

THRESHOLD = 0.6
SIZE = {"height": 64, "width": 64}
Request = dict[str, Any]


def scheduler(shifting: bool = True) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=shifting, shift=3.0)


def prompts(seed: int) -> Request:
    """A prompt and what is to be avoided, as the text encoder would give them."""
    generator = torch.Generator().manual_seed(seed)
    return {"prompt_embeds": text(generator, 1), "negative_prompt_embeds": text(generator, 1)}


def qwenimage() -> DiffusionPipeline:
    return QwenImagePipeline(
        scheduler=scheduler(), vae=None, text_encoder=None, tokenizer=None, transformer=shallow("qwenimage")
    )


def ask_qwenimage(seed: int) -> Request:
    masks = {"prompt_embeds_mask": mask(1), "negative_prompt_embeds_mask": torch.ones_like(mask(1))}
    return {**prompts(seed), **masks, **SIZE, "true_cfg_scale": 2.0}


def chroma() -> DiffusionPipeline:
    transformer = shallow("ChromaTransformer2DModel")
    return ChromaPipeline(scheduler=scheduler(), vae=None, text_encoder=None, tokenizer=None, transformer=transformer)


def ask_chroma(seed: int) -> Request:
    masks = {"prompt_attention_mask": mask(1).float(), "negative_prompt_attention_mask": torch.ones(1, TEXT_LEN)}
    return {**prompts(seed), **masks, **SIZE, "guidance_scale": 2.0}


def wan() -> DiffusionPipeline:
    """Wan 2.2: one transformer for the noisy steps, another for the rest."""
    return WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=scheduler(shifting=False),
        transformer=shallow("wan", seed=0),
        transformer_2=shallow("wan", seed=1),
        boundary_ratio=0.7,
    )


def ask_wan(seed: int) -> Request:
    return {**prompts(seed), "height": 48, "width": 64, "num_frames": 5, "guidance_scale": 2.0}


def glm() -> DiffusionPipeline:
    """Without text encoder and language model: what they would give is part of the request."""
    vae = AutoencoderKL(
        block_out_channels=(4,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=CHANNELS,
        latents_mean=(0.0,) * CHANNELS,
        latents_std=(1.0,) * CHANNELS,
        norm_num_groups=2,
    )
    randomize(vae, seed=0)
    return GlmImagePipeline(
        tokenizer=None,
        processor=None,
        text_encoder=None,
        vision_language_encoder=None,
        vae=vae.eval(),
        transformer=shallow("GlmImageTransformer2DModel"),
        scheduler=scheduler(),
    )


def ask_glm(seed: int) -> Request:
    """An image of 4 x 6 tokens is edited. The pipeline calls the transformer on it once, to fill a KV cache."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (64, 96, 3), generator=generator, dtype=torch.uint8)
    return {
        **prompts(seed),
        **SIZE,
        "image": [Image.fromarray(pixels.numpy())],
        "prior_token_ids": torch.randint(20, (1, 16), generator=generator),
        "prior_token_image_ids": [torch.randint(20, (24,), generator=generator)],
        "source_image_grid_thw": [torch.tensor([[1, 4, 6]])],
        "guidance_scale": 2.0,
    }


@dataclass(frozen=True)
class Case:
    """A pipeline and what is asked of it.

    Attributes:
        build: Makes the pipeline; its weights are always the same.
        ask: What a request is given, for a seed.
        calls: How many kinds of calls a request makes to each transformer: those are its branches.
        reused: How many of them are made at every step.
        says: Whether the pipeline enters `cache_context`.
        transformers: Names of its transformers.
    """

    build: Callable[[], DiffusionPipeline]
    ask: Callable[[int], Request]
    calls: int = 2
    reused: int = 2
    says: bool = False
    transformers: tuple[str, ...] = ("transformer",)

    def cached(self, threshold: float) -> DiffusionPipeline:
        pipeline = self.build()
        # Which way a new process's first timesteps go shows at the second step only: with less warm-up a later
        # request, of which it is known, may reuse a step earlier.
        options = {"residual_diff_threshold": threshold, "max_warmup_steps": 2}
        for name in self.transformers:
            compiled = compile_cached(getattr(pipeline, name), **options)
            setattr(pipeline, name, compiled)
        return pipeline

    def of(self, pipeline: DiffusionPipeline) -> list[nn.Module]:
        """Its transformers."""
        return [getattr(pipeline, name) for name in self.transformers]


CASES = {
    "qwenimage": Case(qwenimage, ask_qwenimage, says=True),
    "chroma": Case(chroma, ask_chroma),
    "wan": Case(wan, ask_wan, says=True, transformers=("transformer", "transformer_2")),
    "glm": Case(glm, ask_glm, calls=3),
}
FIRST, SECOND = 10, 12
"""The two requests: the seed, and also the number of steps."""


def run(pipeline: DiffusionPipeline, request: Request, seed: int) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(seed)
    return pipeline(**request, generator=noise, num_inference_steps=seed, output_type="latent", return_dict=False)[0]
