"""Pipelines that make videos."""

from __future__ import annotations

from pathlib import Path

from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    HeliosPipeline,
    HeliosScheduler,
    HeliosTransformer3DModel,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
from transformers import ByT5Tokenizer, Gemma3Config, Gemma3ForConditionalGeneration, UMT5Config, UMT5EncoderModel

from tests.engine.tiny.parts import HEADS, SPECIAL, T5, WIDTH, bytewise

WAN = {**HEADS, "num_layers": 4, "text_dim": WIDTH, "freq_dim": 2 * WIDTH, "ffn_dim": 3 * WIDTH}


def wan(folder: Path) -> WanPipeline:
    """Two transformers, one after the other."""
    first, second = (WanTransformer3DModel(**WAN, in_channels=4, out_channels=4, rope_max_seq_len=64) for _ in range(2))
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return WanPipeline(
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        vae=vae,
        text_encoder=UMT5EncoderModel(UMT5Config(**T5)),
        tokenizer=ByT5Tokenizer(),
        transformer=first,
        transformer_2=second,
        boundary_ratio=0.875,
    )


def helios(folder: Path) -> HeliosPipeline:
    """Chunk after chunk."""
    # One latent for 32 x 32 pixels keeps the engine's warm-up, a chunk of 512 x 512, short.
    vae = AutoencoderKLWan(
        base_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        patch_size=4,
        in_channels=48,
        out_channels=48,
        scale_factor_spatial=32,
    )
    return HeliosPipeline(
        scheduler=HeliosScheduler(),
        vae=vae,
        text_encoder=UMT5EncoderModel(UMT5Config(**T5)),
        tokenizer=ByT5Tokenizer(),
        transformer=HeliosTransformer3DModel(**WAN, rope_dim=(4, 6, 6)),
    )


def ltx2(folder: Path) -> LTX2Pipeline:
    """With sound; four passes a step, as one batch."""
    words = bytewise(folder / "tokenizer")
    words.bos_token, words.model_max_length = SPECIAL[1], 32
    text = {
        "vocab_size": 264,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    encoder = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    connector = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "num_learnable_registers": 16}
    connectors = LTX2TextConnectors(
        caption_channels=WIDTH,
        text_proj_in_factor=3,
        **{f"{kind}_connector_{name}": value for kind in ("video", "audio") for name, value in connector.items()},
    )
    transformer = LTX2VideoTransformer3DModel(
        **HEADS,
        in_channels=4,
        out_channels=4,
        cross_attention_dim=32,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        num_layers=4,
        caption_channels=WIDTH,
    )
    vae = AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
    )
    vocoder = LTX2Vocoder(
        in_channels=16,
        hidden_channels=8,
        upsample_kernel_sizes=[4],
        upsample_factors=[2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1]],
    )
    return LTX2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1),
        vae=vae,
        audio_vae=AutoencoderKLLTX2Audio(base_channels=4, latent_channels=2, mel_bins=8, num_res_blocks=1),
        text_encoder=Gemma3ForConditionalGeneration(encoder),
        tokenizer=words,
        connectors=connectors,
        transformer=transformer,
        vocoder=vocoder,
    )
