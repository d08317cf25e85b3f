"""Transformers with random weights, in real dimensions for a GPU; four of them in a size for two CPU cores, too."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """One model at one size.

    Attributes:
        config: of the diffusers class.
        latent: shape of what is denoised.
        text: tokens of the prompt.
    """

    config: dict[str, Any]
    latent: tuple[int, ...]
    text: int


@dataclass(frozen=True)
class Model:
    """A transformer as a pipeline calls it.

    Attributes:
        kind: the diffusers class.
        stacks: its lists of blocks, in order.
        prompt: what is given unchanged at every step: (module, size, generator) -> keyword arguments.
        step: what is new at each: (latent, time from 1 to 0) -> keyword arguments.
        sizes: "gpu", real dimensions in bfloat16; "tiny", the same on a CPU with a few narrow blocks; "cpu", float32.
    """

    kind: str
    stacks: tuple[str, ...]
    prompt: Callable[[nn.Module, Size, Callable[..., torch.Tensor]], Inputs]
    step: Callable[[torch.Tensor, float], Inputs]
    sizes: dict[str, Size]

    def build(self, size: str, device: str, weights: Path | None = None) -> nn.Module:
        """The module, in eval mode, its weights made where they stay; of the type that a pipeline has them in.

        Args:
            size: of `sizes`.
            device: where.
            weights: a file that they lie in; processes that read the same have them in memory once.
        """
        torch.manual_seed(0)
        dtype = torch.float32 if size == "cpu" else torch.bfloat16
        with torch.device(device), _by_default(dtype):
            module = getattr(diffusers, self.kind)(**self.sizes[size].config).eval()
        if weights is not None:
            module.load_state_dict(torch.load(weights, mmap=True), assign=True)
        kept = module._keep_in_fp32_modules or ()
        if not kept:
            return nn.Module.to(module, dtype)
        for name, parameter in module.named_parameters():  # as `from_pretrained` has them
            if not set(kept).isdisjoint(name.split(".")):
                parameter.data = parameter.data.float()
        return module

    def weights(self, size: str) -> tuple[int, int]:
        """The number of weights, and of their bytes; nothing is allocated."""
        parameters = list(self.build(size, "meta").parameters())
        return sum(p.numel() for p in parameters), sum(p.numel() * p.element_size() for p in parameters)

    def truncated(self, module: nn.Module) -> nn.Module:
        """The module with its first block alone: what a cached step cannot be faster than."""
        for k, name in enumerate(self.stacks):
            setattr(module, name, getattr(module, name)[: 1 if k == 0 else 0])
        return module

    def request(self, module: nn.Module, size: str, steps: int, seed: int) -> list[Inputs]:
        """The keyword arguments of each step of one request."""
        device, dtype = next(module.parameters()).device, module.dtype
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

        fixed = self.prompt(module, self.sizes[size], normal)
        start, way = (normal(*self.sizes[size].latent) for _ in range(2))
        moves = [start + 0.02 * i * way for i in range(steps)]  # as a sampler's steps follow from each other
        return [{**fixed, **self.step(latent, 1.0 - i / steps), "return_dict": False} for i, latent in enumerate(moves)]


def device_for(size: str) -> str:
    """Where a model of a size runs."""
    return "cuda" if size == "gpu" else "cpu"


def models_of(size: str) -> list[str]:
    """The names of the models that there are in a size."""
    return [name for name, model in MODELS.items() if size in model.sizes]


@contextlib.contextmanager
def _by_default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _like(value: torch.Tensor, number: float) -> torch.Tensor:
    return torch.full((value.shape[0],), number, device=value.device, dtype=value.dtype)


def _flux_prompt(module: nn.Module, size: Size, normal: Callable[..., torch.Tensor]) -> Inputs:
    config = module.config
    pooled = normal(1, config.pooled_projection_dim)
    side = int(size.latent[1] ** 0.5)
    ids = torch.zeros(side, side, 3, device=pooled.device, dtype=pooled.dtype)
    ids[..., 1] += torch.arange(side, device=pooled.device)[:, None]
    ids[..., 2] += torch.arange(side, device=pooled.device)[None, :]
    return {
        "encoder_hidden_states": normal(1, size.text, config.joint_attention_dim),
        "pooled_projections": pooled,
        "txt_ids": torch.zeros(size.text, 3, device=pooled.device, dtype=pooled.dtype),
        "img_ids": ids.reshape(-1, 3),
        "guidance": torch.full((1,), 3.5, device=pooled.device),
    }


def _dit_prompt(module: nn.Module, size: Size, normal: Callable[..., torch.Tensor]) -> Inputs:
    # A class, and none: guidance, as the pipeline of this model has it.
    return {"class_labels": torch.tensor([7, module.config.num_embeds_ada_norm], device=normal(1).device)}


def _wan_prompt(module: nn.Module, size: Size, normal: Callable[..., torch.Tensor]) -> Inputs:
    return {"encoder_hidden_states": normal(1, size.text, module.config.text_dim)}


def _pixart_prompt(module: nn.Module, size: Size, normal: Callable[..., torch.Tensor]) -> Inputs:
    text = normal(size.latent[0], size.text, module.config.caption_channels)
    mask = torch.ones(*text.shape[:2], device=text.device, dtype=text.dtype)
    mask[:, size.text * 2 // 3 :] = 0
    added = {"resolution": None, "aspect_ratio": None}
    return {"encoder_hidden_states": text, "encoder_attention_mask": mask, "added_cond_kwargs": added}


def _qwen_prompt(module: nn.Module, size: Size, normal: Callable[..., torch.Tensor]) -> Inputs:
    side = int(size.latent[1] ** 0.5)
    text = normal(1, size.text, module.config.joint_attention_dim)
    return {"encoder_hidden_states": text, "img_shapes": [[(1, side, side)]]}


def _sd3_prompt(module: nn.Module, size: Size, normal: Callable[..., torch.Tensor]) -> Inputs:
    config, samples = module.config, size.latent[0]
    return {
        "encoder_hidden_states": normal(samples, size.text, config.joint_attention_dim),
        "pooled_projections": normal(samples, config.pooled_projection_dim),
    }


MODELS: dict[str, Model] = {
    "flux": Model(
        "FluxTransformer2DModel",
        ("transformer_blocks", "single_transformer_blocks"),
        _flux_prompt,
        lambda latent, time: {"hidden_states": latent, "timestep": _like(latent, time)},
        {
            "cpu": Size(
                {
                    "num_layers": 4,
                    "num_single_layers": 8,
                    "num_attention_heads": 12,
                    "attention_head_dim": 64,
                    "joint_attention_dim": 512,
                    "pooled_projection_dim": 256,
                    "guidance_embeds": True,
                    "axes_dims_rope": (16, 24, 24),
                },
                (1, 256, 64),
                64,
            ),
            "gpu": Size({"guidance_embeds": True}, (1, 4096, 64), 512),
            "tiny": Size(
                {
                    "num_layers": 3,
                    "num_single_layers": 4,
                    "num_attention_heads": 2,
                    "attention_head_dim": 16,
                    "joint_attention_dim": 32,
                    "pooled_projection_dim": 16,
                    "guidance_embeds": True,
                    "axes_dims_rope": (4, 6, 6),
                },
                (1, 16, 64),
                8,
            ),
        },
    ),
    "dit": Model(
        "DiTTransformer2DModel",
        ("transformer_blocks",),
        _dit_prompt,
        lambda latent, time: {
            "hidden_states": latent,
            "timestep": torch.full((latent.shape[0],), int(999 * time), device=latent.device),
        },
        {
            # DiT-XL/2 at 256x256 with guidance, as it was published.
            "cpu": Size(
                {
                    "num_layers": 28,
                    "num_attention_heads": 16,
                    "attention_head_dim": 72,
                    "in_channels": 4,
                    "out_channels": 8,
                    "sample_size": 32,
                    "num_embeds_ada_norm": 1000,
                },
                (2, 4, 32, 32),
                0,
            ),
            "gpu": Size(
                {
                    "num_layers": 28,
                    "num_attention_heads": 16,
                    "attention_head_dim": 72,
                    "in_channels": 4,
                    "out_channels": 8,
                    "sample_size": 64,
                    "num_embeds_ada_norm": 1000,
                },
                (2, 4, 64, 64),
                0,
            ),
            "tiny": Size(
                {
                    "num_layers": 5,
                    "num_attention_heads": 2,
                    "attention_head_dim": 16,
                    "in_channels": 4,
                    "out_channels": 8,
                    "sample_size": 8,
                    "num_embeds_ada_norm": 10,
                },
                (2, 4, 8, 8),
                0,
            ),
        },
    ),
    "wan": Model(
        "WanTransformer3DModel",
        ("blocks",),
        _wan_prompt,
        lambda latent, time: {"hidden_states": latent, "timestep": _like(latent, 1000 * time)},
        {
            "cpu": Size(
                {
                    "num_layers": 10,
                    "num_attention_heads": 12,
                    "attention_head_dim": 64,
                    "ffn_dim": 3072,
                    "text_dim": 512,
                    "freq_dim": 128,
                },
                (1, 16, 5, 16, 16),
                64,
            ),
            # The 1.3B model at 480x832, 81 frames.
            "gpu": Size(
                {"num_layers": 30, "num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960},
                (1, 16, 21, 60, 104),
                512,
            ),
            "tiny": Size(
                {
                    "num_layers": 5,
                    "num_attention_heads": 2,
                    "attention_head_dim": 16,
                    "ffn_dim": 64,
                    "text_dim": 16,
                    "freq_dim": 32,
                },
                (1, 16, 1, 8, 8),
                8,
            ),
        },
    ),
    "pixart": Model(
        "PixArtTransformer2DModel",
        ("transformer_blocks",),
        _pixart_prompt,
        lambda latent, time: {"hidden_states": latent, "timestep": _like(latent, 1000 * time)},
        {
            "cpu": Size(
                {
                    "num_layers": 12,
                    "num_attention_heads": 12,
                    "attention_head_dim": 64,
                    "cross_attention_dim": 768,
                    "caption_channels": 512,
                    "sample_size": 32,
                    "use_additional_conditions": False,
                },
                (1, 4, 32, 32),
                300,
            ),
            "gpu": Size(
                {"sample_size": 128, "caption_channels": 4096, "use_additional_conditions": False},
                (2, 4, 128, 128),
                300,
            ),
            "tiny": Size(
                {
                    "num_layers": 5,
                    "num_attention_heads": 2,
                    "attention_head_dim": 16,
                    "cross_attention_dim": 32,
                    "caption_channels": 16,
                    "sample_size": 8,
                    "use_additional_conditions": False,
                },
                (2, 4, 8, 8),
                8,
            ),
        },
    ),
    "qwen": Model(
        "QwenImageTransformer2DModel",
        ("transformer_blocks",),
        _qwen_prompt,
        lambda latent, time: {"hidden_states": latent, "timestep": _like(latent, time)},
        {
            "gpu": Size({}, (1, 4096, 64), 512),
            "tiny": Size(
                {
                    "num_layers": 5,
                    "num_attention_heads": 2,
                    "attention_head_dim": 16,
                    "joint_attention_dim": 32,
                    "axes_dims_rope": (4, 6, 6),
                },
                (1, 16, 64),
                8,
            ),
        },
    ),
    "sd3.5": Model(
        "SD3Transformer2DModel",
        ("transformer_blocks",),
        _sd3_prompt,
        lambda latent, time: {"hidden_states": latent, "timestep": _like(latent, 1000 * time)},
        {
            # The large one at 1024x1024 with guidance: 77 tokens of one text encoder and 256 of the other.
            "gpu": Size(
                {
                    "num_layers": 38,
                    "num_attention_heads": 38,
                    "attention_head_dim": 64,
                    "joint_attention_dim": 4096,
                    "caption_projection_dim": 2432,
                    "pooled_projection_dim": 2048,
                    "sample_size": 128,
                    "out_channels": 16,
                    "pos_embed_max_size": 192,
                    "qk_norm": "rms_norm",
                },
                (2, 16, 128, 128),
                333,
            ),
            "tiny": Size(
                {
                    "num_layers": 5,
                    "num_attention_heads": 2,
                    "attention_head_dim": 16,
                    "joint_attention_dim": 32,
                    "caption_projection_dim": 32,
                    "pooled_projection_dim": 16,
                    "sample_size": 8,
                    "out_channels": 16,
                    "pos_embed_max_size": 8,
                    "qk_norm": "rms_norm",
                },
                (2, 16, 8, 8),
                8,
            ),
        },
    ),
}
"""FLUX.1 (two stacks), DiT-XL, Wan 2.1 video, PixArt with a long prompt, Qwen-Image, Stable Diffusion 3.5."""

MODELS["wan-14b"] = replace(
    MODELS["wan"], sizes={"gpu": Size({}, (1, 16, 21, 60, 104), 512), "tiny": MODELS["wan"].sizes["tiny"]}
)
