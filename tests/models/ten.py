"""The ten models that most tests run: one of each pattern, each in three sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, nn

from .tiny import (
    CHANNELS,
    HEAD_DIM,
    HEADS,
    IMAGE_GRIDS,
    LAYERS,
    PATCH,
    ROPE,
    TEXT_DIM,
    TEXT_LEN,
    VIDEO_GRIDS,
    WIDTH,
    Grid,
    TinyModel,
    discrete,
    flow,
    image,
    image_no_patch,
    level,
    mask,
    packed,
    text,
    video,
    video_frames_first,
)


def _build_flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=CHANNELS * PATCH * PATCH,
        num_layers=LAYERS,
        num_single_layers=LAYERS,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_DIM,
        pooled_projection_dim=20,
        guidance_embeds=True,
        axes_dims_rope=ROPE,
    )


def _condition_flux(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    _, height, width = grid
    ids = torch.zeros(height, width, 3)
    ids[..., 1] += torch.arange(height)[:, None]
    ids[..., 2] += torch.arange(width)[None]
    return {
        "encoder_hidden_states": text(generator, batch),
        "pooled_projections": torch.randn(batch, 20, generator=generator),
        "guidance": torch.full((batch,), 3.5),
        "txt_ids": torch.zeros(TEXT_LEN, 3),
        "img_ids": ids.reshape(height * width, 3),
    }


def _build_dit() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=CHANNELS,
        num_layers=LAYERS,
        norm_num_groups=4,
        sample_size=8,
        patch_size=PATCH,
        num_embeds_ada_norm=10,
    )


def _condition_dit(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    return {"class_labels": torch.randint(0, 10, (batch,), generator=generator)}


def _build_wan() -> nn.Module:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, PATCH, PATCH),
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=32,
        ffn_dim=64,
        num_layers=LAYERS,
        rope_max_seq_len=32,
    )


def _condition_text(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    return {"encoder_hidden_states": text(generator, batch)}


def _build_sd3() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=PATCH,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        # The last block returns no text stream: a fifth block leaves four alike.
        num_layers=LAYERS + 1,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_DIM,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=20,
        pos_embed_max_size=12,
    )


def _condition_sd3(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "encoder_hidden_states": text(generator, batch),
        "pooled_projections": torch.randn(batch, 20, generator=generator),
    }


def _build_pixart() -> nn.Module:
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=CHANNELS,
        out_channels=2 * CHANNELS,
        num_layers=LAYERS,
        cross_attention_dim=WIDTH,
        sample_size=8,
        patch_size=PATCH,
        caption_channels=TEXT_DIM,
        norm_num_groups=4,
    )


def _condition_pixart(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "encoder_hidden_states": text(generator, batch),
        "encoder_attention_mask": mask(batch),
        # What the pipeline passes for all sizes but 1024.
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def _build_cogvideox() -> nn.Module:
    from diffusers import CogVideoXTransformer3DModel

    return CogVideoXTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        time_embed_dim=16,
        text_embed_dim=TEXT_DIM,
        num_layers=LAYERS,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        patch_size=PATCH,
        max_text_seq_length=TEXT_LEN,
        # As CogVideoX-5B: the pipeline computes the rotary embedding once and passes it.
        use_rotary_positional_embeddings=True,
    )


def _condition_cogvideox(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    frames, height, width = grid
    rotary = get_3d_rotary_pos_embed(
        embed_dim=HEAD_DIM,
        crops_coords=((0, 0), (height, width)),
        grid_size=(height, width),
        temporal_size=frames,
    )
    return {"encoder_hidden_states": text(generator, batch), "image_rotary_emb": rotary}


def _build_qwenimage() -> nn.Module:
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(
        patch_size=PATCH,
        in_channels=CHANNELS * PATCH * PATCH,
        out_channels=CHANNELS,
        num_layers=LAYERS,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_DIM,
        axes_dims_rope=ROPE,
    )


def _condition_qwenimage(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "encoder_hidden_states": text(generator, batch),
        "encoder_hidden_states_mask": mask(batch).bool(),
        "img_shapes": [[grid]] * batch,
    }


def _build_ltx() -> nn.Module:
    from diffusers import LTXVideoTransformer3DModel

    return LTXVideoTransformer3DModel(
        in_channels=CHANNELS * PATCH * PATCH,
        out_channels=CHANNELS * PATCH * PATCH,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        cross_attention_dim=WIDTH,
        num_layers=LAYERS,
        caption_channels=TEXT_DIM,
    )


def _condition_ltx(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    frames, height, width = grid
    return {
        "encoder_hidden_states": text(generator, batch),
        "encoder_attention_mask": mask(batch),
        "num_frames": frames,
        "height": height,
        "width": width,
        # Temporal compression 8 at 25 frames a second, spatial compression 32.
        "rope_interpolation_scale": (8 / 25, 32, 32),
    }


def _build_auraflow() -> nn.Module:
    from diffusers import AuraFlowTransformer2DModel

    return AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=PATCH,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_mmdit_layers=LAYERS,
        num_single_dit_layers=LAYERS,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_DIM,
        caption_projection_dim=WIDTH,
        pos_embed_max_size=64,
    )


def _build_sana() -> nn.Module:
    from diffusers import SanaTransformer2DModel

    return SanaTransformer2DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=LAYERS,
        num_cross_attention_heads=HEADS,
        cross_attention_head_dim=HEAD_DIM,
        cross_attention_dim=WIDTH,
        caption_channels=TEXT_DIM,
        sample_size=4,
        patch_size=1,
    )


def _condition_masked(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    return {"encoder_hidden_states": text(generator, batch), "encoder_attention_mask": mask(batch)}


def _sana_timestep(sigma: float, batch: int) -> dict[str, Any]:
    """The pipeline multiplies an integer timestep with ``timestep_scale`` (1.0), which makes it a float."""
    return {"timestep": discrete(sigma, batch)["timestep"] * 1.0}


_DOUBLE, _SINGLE = "transformer_blocks", "single_transformer_blocks"

MODELS: dict[str, TinyModel] = {
    spec.name: spec
    for spec in (
        TinyModel("flux", _build_flux, _condition_flux, packed, level, (_DOUBLE, _SINGLE), IMAGE_GRIDS),
        # DiT's forward takes the output for a square, so its sizes are squares.
        TinyModel("dit", _build_dit, _condition_dit, image, discrete, (_DOUBLE,), ((1, 4, 4), (1, 5, 5), (1, 6, 6))),
        TinyModel("wan", _build_wan, _condition_text, video, discrete, ("blocks",), VIDEO_GRIDS),
        TinyModel("sd3", _build_sd3, _condition_sd3, image, flow, (_DOUBLE,), IMAGE_GRIDS),
        TinyModel("pixart", _build_pixart, _condition_pixart, image, discrete, (_DOUBLE,), IMAGE_GRIDS),
        TinyModel(
            "cogvideox",
            _build_cogvideox,
            _condition_cogvideox,
            video_frames_first,
            discrete,
            (_DOUBLE,),
            VIDEO_GRIDS,
        ),
        TinyModel("qwenimage", _build_qwenimage, _condition_qwenimage, packed, level, (_DOUBLE,), IMAGE_GRIDS),
        TinyModel("ltx", _build_ltx, _condition_ltx, packed, flow, (_DOUBLE,), VIDEO_GRIDS),
        TinyModel(
            "auraflow",
            _build_auraflow,
            _condition_text,
            image,
            level,
            ("joint_transformer_blocks", _SINGLE),
            IMAGE_GRIDS,
        ),
        TinyModel("sana", _build_sana, _condition_masked, image_no_patch, _sana_timestep, (_DOUBLE,), IMAGE_GRIDS),
    )
}
