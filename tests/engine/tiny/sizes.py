"""Lets the engine read from a folder what it has written down: sizes of models, and what a CPU does otherwise."""

from __future__ import annotations

import functools
import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig


def read_sizes(folder: Path) -> None:
    """Changes, in this process, the engine's pipelines that would not take them from a model's folder."""
    for own in (_z_image, _bagel, _hunyuan_image3):
        own(folder)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _z_image(folder: Path) -> None:
    """It is made without any sizes."""
    from vllm_omni.diffusion.models.z_image import pipeline_z_image as pipeline

    config, kind = _read(folder / "transformer" / "config.json"), pipeline.ZImageTransformer2DModel
    if config.get("_class_name") == "ZImageTransformer2DModel":
        names = inspect.signature(kind).parameters
        pipeline.ZImageTransformer2DModel = functools.partial(kind, **{k: v for k, v in config.items() if k in names})


def _bagel(folder: Path) -> None:
    """Its autoencoder has one size. Its precision is mixed on accelerators alone."""
    from vllm_omni.diffusion.models.bagel import pipeline_bagel as pipeline

    config, usual = _read(folder / "ae_config.json"), pipeline.default_ae_params()
    if config:
        pipeline.default_ae_params = lambda: replace(usual, **config)
        mixed = torch.autocast("cpu", torch.bfloat16)
        for name in ("forward_cache_update_text", "generate_image"):
            setattr(pipeline.Bagel, name, mixed(getattr(pipeline.Bagel, name)))
        # The engine warms up with an image of its own size, which a CPU decodes in bfloat16 for minutes.
        decode = torch.autocast("cpu", enabled=False)(pipeline.AutoEncoder.decode)
        pipeline.AutoEncoder.decode = lambda vae, z: decode(vae.float(), z.float()).to(z.dtype)


def _hunyuan_image3(folder: Path) -> None:
    """Its configuration comes with the checkpoint, as code. It decodes in float16, to which a CPU adds no bfloat16."""
    from vllm_omni.diffusion.models.hunyuan_image3.autoencoder import AutoencoderKLConv3D
    from vllm_omni.diffusion.models.hunyuan_image3.hunyuan_image3_transformer import HunyuanImage3Config

    name = "hunyuan_image3_dit"
    if _read(folder / "config.json").get("model_type") == name:
        decode = AutoencoderKLConv3D.decode
        AutoencoderKLConv3D.decode = lambda self, *args, **options: decode(self.float(), *args, **options)
        HunyuanImage3Config.model_type = name
        AutoConfig.register(name, HunyuanImage3Config)
