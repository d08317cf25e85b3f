"""What the examples have in common: loading a pipeline, or making a tiny one, and choosing its cache."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

import fx_cache


class CacheBackend(StrEnum):
    """What reuses residuals from step to step."""

    none = "none"
    dit_cache = "dit_cache"
    cache_dit = "cache_dit"


OPTIONS = {
    "Fn_compute_blocks": 1,
    "max_warmup_steps": 4,
    "residual_diff_threshold": 0.24,
    "max_continuous_cached_steps": 3,
}
"""The same for both caches; what vLLM-Omni has by default."""

LATENT_CHANNELS = 4
PROMPT_TOKENS = 8


def generate(
    pipeline: DiffusionPipeline,
    request: dict[str, Any],
    *,
    cache_backend: CacheBackend,
    enable_cache_summary: bool,
    seed: int,
    num_inference_steps: int,
) -> Any:
    """Enables the cache, runs one request, and says how long it took.

    Returns:
        What the pipeline returns.
    """
    handle = None
    if cache_backend is CacheBackend.dit_cache:
        handle = fx_cache.enable(pipeline, OPTIONS, profile="recommended")
    elif cache_backend is CacheBackend.cache_dit:
        import cache_dit

        cache_dit.enable_cache(pipeline, cache_config=cache_dit.DBCacheConfig(**OPTIONS))
    begin = time.perf_counter()
    result = pipeline(**request, generator=torch.Generator().manual_seed(seed), num_inference_steps=num_inference_steps)
    print(
        f"{num_inference_steps} steps in {time.perf_counter() - begin:.1f} s, with what is compiled at the first step"
    )
    if enable_cache_summary and handle is not None:
        print(handle.summary())
    elif enable_cache_summary and cache_backend is CacheBackend.cache_dit:
        cache_dit.summary(pipeline)
    return result


def load(model_path: str | None, tiny: Callable[[], DiffusionPipeline] | None) -> DiffusionPipeline:
    """A pipeline from a folder or a hub, on the GPU where there is one; or a tiny one."""
    if tiny is not None:
        torch.manual_seed(0)
        return tiny()
    if model_path is None:
        raise SystemExit("--model-path: got nothing; expected a folder or a name on the hub; or give --tiny.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return DiffusionPipeline.from_pretrained(model_path, torch_dtype=torch.bfloat16).to(device)


def random_prompt(prompt: str, width: int, pooled: int = 0) -> dict[str, torch.Tensor]:
    """What a text encoder might make of a prompt: noise of its own, and always the same."""
    generator = torch.Generator().manual_seed(zlib.crc32(prompt.encode()))
    embeds = {"prompt_embeds": torch.randn(1, PROMPT_TOKENS, width, generator=generator)}
    return embeds | ({"pooled_prompt_embeds": torch.randn(1, pooled, generator=generator)} if pooled else {})


def tiny_flux(kind: str) -> DiffusionPipeline:
    """A pipeline of FLUX's family of 12 narrow blocks, with random weights and no text encoder."""
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=4,
        num_single_layers=8,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        shift_factor=0.0,
    )
    return getattr(diffusers, kind)(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae.eval(),
        transformer=transformer.eval(),
        **dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")),
    )


def tiny_wan() -> DiffusionPipeline:
    """A video pipeline with two transformers of 6 narrow blocks, with random weights and no text encoder."""
    transformers = [
        diffusers.WanTransformer3DModel(
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            num_layers=6,
            attention_head_dim=12,
            num_attention_heads=4,
            ffn_dim=64,
            text_dim=32,
            freq_dim=32,
        ).eval()
        for _ in range(2)
    ]
    vae = diffusers.AutoencoderKLWan(
        base_dim=3,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )
    return diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae.eval(),
        transformer=transformers[0],
        transformer_2=transformers[1],
        boundary_ratio=0.7,
    )


def made(path: Path) -> Path:
    """The path, with the folder that it lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
