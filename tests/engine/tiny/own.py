"""Models that are not diffusers': their folders are as the engine reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import SiglipImageProcessor

from tests.engine.models import drawn, engine
from tests.engine.tiny.parts import WIDTH, bytewise
from tests.engine.tiny.sizes import read_sizes


def write(folder: Path, **configs: dict[str, Any]) -> None:
    """Writes configurations by the names of their files."""
    for name, config in configs.items():
        (folder / f"{name}.json").write_text(json.dumps(config))


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """Random ones for a module of the engine."""
    generator = torch.Generator().manual_seed(0)
    found = {name: drawn(name, weight.shape, generator) for name, weight in module.named_parameters()}
    return {name: weight.bfloat16() for name, weight in found.items()}


def bagel(folder: Path) -> None:
    """In one stage, whose pipeline encodes the prompt itself."""
    bytewise(folder).save_pretrained(folder)
    SiglipImageProcessor().save_pretrained(folder)
    llm = {
        "vocab_size": 320,  # a multiple of what the engine pads it to
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "pad_token_id": 0,
    }
    vit = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2}
    write(
        folder,
        config={
            "model_type": "bagel_single_stage",
            "architectures": ["BagelForConditionalGeneration"],
            "vit_max_num_patch_per_side": 4,
        },
        llm_config=llm,
        vit_config=vit | {"image_size": 28, "patch_size": 14},
        ae_config={"ch": 32, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1},
    )
    read_sizes(folder)
    with engine({}) as config:
        from vllm_omni.diffusion.models.bagel.pipeline_bagel import BagelPipeline

        config.model = str(folder)
        save_file(weights(BagelPipeline(od_config=config)), folder / "ema.safetensors")


def hunyuan_image3(folder: Path) -> None:
    """Dense, in one stage."""
    special = ["<boi>", "<eoi>", "<img>", "<cfg>", "<timestep>", "<pad>", "<img_size_64>", "</answer>", "</recaption>"]
    words = bytewise(folder)
    words.add_tokens([*special, "</think>", *(f"<img_ratio_{i}>" for i in range(41))], special_tokens=True)
    words.bos_token = "<|im_start|>"
    words.save_pretrained(folder)
    config = {
        "model_type": "hunyuan_image3_dit",
        "architectures": ["HunyuanImage3ForCausalMM"],
        "vocab_size": 384,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "attention_head_dim": 16,
        "max_position_embeddings": 2048,
        "num_experts": 1,
        "moe_topk": 1,
        "num_shared_expert": 1,
        "use_mixed_mlp_moe": False,
        "use_qk_norm": True,
        "use_cla": False,
        "norm_type": "hf_rms",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": 1e4,
        "rope_scaling": {"rope_type": "default", "rope_theta": 1e4},
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "cfg_distilled": False,
        "use_meanflow": False,
        "image_base_size": 64,
        "img_proj_type": "unet",
        "patch_size": 1,
        "patch_embed_hidden_dim": 32,
        "vae_downsample_factor": [8, 8],
        "vae": {
            "in_channels": 3,
            "out_channels": 3,
            "latent_channels": 4,
            "block_out_channels": [32, 32, 32, 32],
            "layers_per_block": 1,
            "ffactor_spatial": 8,
            "ffactor_temporal": 1,
            "sample_size": 64,
            "sample_tsize": 1,
            "scaling_factor": 0.5,
        },
        "vit": {
            "hidden_size": WIDTH,
            "intermediate_size": WIDTH,
            "num_hidden_layers": 0,
            "num_attention_heads": 2,
            "num_channels": 3,
            "num_patches": 16,
            "patch_size": 16,
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": 1e-6,
        },
        "vit_aligner": {"projector_type": "mlp_gelu", "input_dim": WIDTH, "n_embed": 32, "depth": 1},
        "vit_processor": {"patch_size": 16, "max_num_patches": 16},
    }
    generation = {"flow_shift": 3.0, "drop_think": False, "sequence_template": "pretrain", "max_length": 2048}
    write(folder, config=config, generation_config=generation)
    read_sizes(folder)
    with engine({}) as settings:
        from vllm_omni.diffusion.models.hunyuan_image3.pipeline_hunyuan_image3 import HunyuanImage3Pipeline

        settings.model = str(folder)
        save_file(weights(HunyuanImage3Pipeline(settings)), folder / "model.safetensors")
