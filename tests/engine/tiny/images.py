"""Pipelines that make images."""

from __future__ import annotations

import json
from pathlib import Path

from diffusers import (
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    GlmImagePipeline,
    GlmImageTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from torch import nn
from transformers import (
    ByT5Tokenizer,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
)

from tests.engine.tiny.parts import (
    HEADS,
    T5,
    WIDTH,
    autoencoder,
    bytewise,
    clip,
    clip_tokenizer,
    qwen3,
    t5_tokenizer,
)


def klein(folder: Path) -> Flux2KleinPipeline:
    transformer = Flux2Transformer2DModel(
        **HEADS,
        patch_size=1,
        in_channels=16,
        num_layers=3,
        num_single_layers=4,
        joint_attention_dim=3 * WIDTH,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    vae = AutoencoderKLFlux2(
        sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=qwen3(28),  # the pipeline takes three of its layers by number
        tokenizer=bytewise(folder / "tokenizer"),
        transformer=transformer,
    )


def qwen_image(folder: Path) -> QwenImagePipeline:
    """The one whose pipeline in the engine can be run step by step."""
    text = {
        "vocab_size": 264,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2048,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
    }
    vision = {"depth": 1, "hidden_size": WIDTH, "out_hidden_size": WIDTH, "intermediate_size": WIDTH, "num_heads": 2}
    transformer = QwenImageTransformer2DModel(
        **HEADS,
        patch_size=2,
        in_channels=64,
        out_channels=16,
        num_layers=4,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
    )
    vae = AutoencoderKLQwenImage(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)),
        tokenizer=bytewise(folder / "tokenizer"),
        transformer=transformer,
    )


def flux(folder: Path) -> FluxPipeline:
    transformer = FluxTransformer2DModel(
        **HEADS,
        in_channels=16,
        num_layers=3,
        num_single_layers=4,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=autoencoder(shift_factor=0.1, scaling_factor=0.4),
        text_encoder=clip(CLIPTextModel),
        text_encoder_2=T5EncoderModel(T5Config(**T5)),
        tokenizer=clip_tokenizer(),
        tokenizer_2=t5_tokenizer(),
        transformer=transformer,
    )


def sd3(folder: Path) -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        **HEADS,
        sample_size=32,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        joint_attention_dim=2 * WIDTH,  # what two text encoders give side by side
        caption_projection_dim=32,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=64,
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=autoencoder(shift_factor=0.1, scaling_factor=0.4),
        text_encoder=clip(CLIPTextModelWithProjection),
        text_encoder_2=clip(CLIPTextModelWithProjection),
        text_encoder_3=T5EncoderModel(T5Config(**T5 | {"d_model": 2 * WIDTH})),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        tokenizer_3=t5_tokenizer(),
        transformer=transformer,
    )


def z_image(folder: Path) -> ZImagePipeline:
    """The one that takes the two passes of guidance as a list of two samples."""
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=4,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[4, 6, 6],
        axes_lens=[128, 32, 32],
    )
    for pad in (transformer.x_pad_token, transformer.cap_pad_token):
        nn.init.normal_(pad)  # they are made without a value
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=autoencoder(shift_factor=0.1, scaling_factor=0.4),
        text_encoder=qwen3(2),
        tokenizer=bytewise(folder / "tokenizer"),
        transformer=transformer,
    )


def glm_image(folder: Path) -> GlmImagePipeline:
    """Its second stage; the tokens that the first makes are given with a request."""
    # A kind of model that the engine does not know: else it runs the two stages that it has for this class.
    (folder / "config.json").write_text(json.dumps({"model_type": "glm_image_diffusion"}))
    transformer = GlmImageTransformer2DModel(
        **HEADS,
        num_layers=4,
        in_channels=4,
        out_channels=4,
        text_embed_dim=WIDTH,
        time_embed_dim=2 * WIDTH,
        condition_dim=8,
        prior_vq_quantizer_codebook_size=16,
    )
    return GlmImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=autoencoder(latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4),
        text_encoder=T5EncoderModel(T5Config(**T5)),
        tokenizer=ByT5Tokenizer(),
        processor=None,
        vision_language_encoder=None,
        transformer=transformer,
    )
