"""Video models, first part of the alphabet: Allegro to Kandinsky 5."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor, nn

from .tiny import (
    CHANNELS,
    HEAD_DIM,
    HEADS,
    LAYERS,
    PATCH,
    ROPE,
    TEXT_DIM,
    TEXT_LEN,
    VIDEO_GRIDS,
    WIDTH,
    Grid,
    Shapes,
    TinyModel,
    discrete,
    flow,
    mask,
    text,
    video,
    video_frames_first,
)

# Where the timestep has a value a frame, sizes differ in height and width only.
_FRAMES = 2
_FRAME_GRIDS: tuple[Grid, ...] = ((_FRAMES, 3, 4), (_FRAMES, 4, 4), (_FRAMES, 5, 3))
_POOLED_DIM = 20
_IMAGE_DIM, _IMAGE_LEN = 20, 5


def _channels(channels: int) -> Callable[[Grid, int], dict[str, Shapes]]:
    """``video`` with image latents (and their mask) concatenated along the channels, as the pipelines do."""

    def shapes(grid: Grid, batch: int) -> dict[str, Shapes]:
        return {"hidden_states": (batch, channels, *video(grid, batch)["hidden_states"][2:])}

    return shapes


def _condition_text(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    return {"encoder_hidden_states": text(generator, batch)}


# --- Allegro

# Rotary embeddings split a head into three parts of an even size.
_ALLEGRO_HEAD = 18


def _build_allegro() -> nn.Module:
    from diffusers import AllegroTransformer3DModel

    return AllegroTransformer3DModel(
        patch_size=PATCH,
        num_attention_heads=HEADS,
        attention_head_dim=_ALLEGRO_HEAD,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=LAYERS,
        cross_attention_dim=HEADS * _ALLEGRO_HEAD,
        sample_height=8,
        sample_width=8,
        sample_frames=3,
        caption_channels=TEXT_DIM,
    )


def _condition_allegro(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    frames, height, width = grid
    rotary = get_3d_rotary_pos_embed_allegro(
        embed_dim=_ALLEGRO_HEAD,
        crops_coords=((0, 0), (height, width)),
        grid_size=(height, width),
        temporal_size=frames,
        interpolation_scale=(2.2, 2.0, 2.0),
    )
    # The tables of the three axes, then the position of each token in them.
    positions = torch.cartesian_prod(*(axis.long() for axis in rotary[3:]))
    return {
        "encoder_hidden_states": text(generator, batch),
        "encoder_attention_mask": mask(batch),
        "image_rotary_emb": (rotary[:3], tuple(positions.T.reshape(3, 1, -1).contiguous())),
    }


# --- AnyFlow


def _build_anyflow() -> nn.Module:
    from diffusers import AnyFlowTransformer3DModel

    return AnyFlowTransformer3DModel(
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


def _anyflow_timestep(sigma: float, batch: int) -> dict[str, Any]:
    """Where a step starts and where it ends, [batch, frames]."""
    start = torch.full((batch, _FRAMES), sigma * 1000)
    return {"timestep": start, "r_timestep": start * 0.9}


# Frames of each chunk of a video. The last one is denoised; those before it are in the KV cache, the first compressed.
_CHUNKS = (1, 2, 2, _FRAMES)
_FULL_CHUNKS = 3


def _build_anyflow_far() -> nn.Module:
    from diffusers import AnyFlowFARTransformer3DModel

    return AnyFlowFARTransformer3DModel(
        full_chunk_limit=_FULL_CHUNKS,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=32,
        ffn_dim=64,
        num_layers=LAYERS,
        rope_max_seq_len=32,
        chunk_partition=_CHUNKS,
    )


def _condition_anyflow_far(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    _, height, width = grid
    most = max(_CHUNKS)
    full = _FULL_CHUNKS * most * height * width
    compressed = (len(_CHUNKS) - _FULL_CHUNKS + 1) * most * (height // 2) * (width // 2)

    def cache(tokens: int) -> Tensor:
        return torch.randn(2, batch, HEADS, tokens, HEAD_DIM, generator=generator)

    return {
        "encoder_hidden_states": text(generator, batch),
        "chunk_partition": list(_CHUNKS),
        "kv_cache": [{"full_cache": cache(full), "compressed_cache": cache(compressed)} for _ in range(LAYERS)],
    }


def _anyflow_far_timestep(sigma: float, batch: int) -> dict[str, Any]:
    # The forward writes into the flags, so the pipeline passes a new copy at each step.
    flags = {"num_cached_chunks": len(_CHUNKS) - 1, "is_cache_step": False}
    return {**_anyflow_timestep(sigma, batch), "kv_cache_flag": flags}


# --- ChronoEdit


def _build_chronoedit() -> nn.Module:
    from diffusers import ChronoEditTransformer3DModel

    return ChronoEditTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=3 * CHANNELS,
        out_channels=CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=32,
        ffn_dim=64,
        num_layers=LAYERS,
        image_dim=_IMAGE_DIM,
        added_kv_proj_dim=WIDTH,
        rope_max_seq_len=32,
    )


def _condition_chronoedit(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    return {
        # The attention takes the last 512 tokens for text, and those before for the image.
        "encoder_hidden_states": text(generator, batch, length=512),
        "encoder_hidden_states_image": text(generator, batch, _IMAGE_LEN, _IMAGE_DIM),
    }


# --- CogVideoX 1.5 and ConsisID


def _build_cogvideox15() -> nn.Module:
    from diffusers import CogVideoXTransformer3DModel

    return CogVideoXTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=2 * CHANNELS,
        out_channels=CHANNELS,
        time_embed_dim=16,
        # As CogVideoX1.5-5B-I2V.
        ofs_embed_dim=16,
        text_embed_dim=TEXT_DIM,
        num_layers=LAYERS,
        sample_width=16,
        sample_height=16,
        sample_frames=9,
        patch_size=PATCH,
        patch_size_t=2,
        max_text_seq_length=TEXT_LEN,
        use_rotary_positional_embeddings=True,
        patch_bias=False,
    )


def _condition_cogvideox15(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    frames, height, width = grid
    rotary = get_3d_rotary_pos_embed(
        embed_dim=HEAD_DIM,
        crops_coords=None,
        grid_size=(height, width),
        temporal_size=frames,
        grid_type="slice",
        max_size=(8, 8),
    )
    return {
        "encoder_hidden_states": text(generator, batch),
        "image_rotary_emb": rotary,
        "ofs": torch.full((1,), 2.0),
    }


def _cogvideox15_latents(grid: Grid, batch: int) -> dict[str, Shapes]:
    """Two frames a token; image latents are concatenated along the channels."""
    frames, height, width = grid
    return {"hidden_states": (batch, 2 * frames, 2 * CHANNELS, height * PATCH, width * PATCH)}


_VIT_DIM, _VIT_LEN, _VIT_LAYERS = 16, 6, 5


def _build_consisid() -> nn.Module:
    from diffusers import ConsisIDTransformer3DModel

    return ConsisIDTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        time_embed_dim=16,
        text_embed_dim=TEXT_DIM,
        # Every second block is followed by a cross-attention to the face.
        num_layers=6,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        patch_size=PATCH,
        max_text_seq_length=TEXT_LEN,
        use_rotary_positional_embeddings=True,
        is_train_face=True,
        cross_attn_interval=2,
        cross_attn_dim_head=HEAD_DIM,
        cross_attn_num_heads=HEADS,
        LFE_id_dim=_IMAGE_DIM,
        LFE_vit_dim=_VIT_DIM,
        LFE_depth=_VIT_LAYERS,
        LFE_dim_head=8,
        LFE_num_heads=HEADS,
        LFE_num_id_token=2,
        LFE_num_querie=3,
        # The width that the cross-attentions take.
        LFE_output_dim=int(WIDTH / 3 * 2),
        LFE_ff_mult=2,
        LFE_num_scale=_VIT_LAYERS,
    )


def _condition_consisid(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    frames, height, width = grid
    rotary = get_3d_rotary_pos_embed(
        embed_dim=HEAD_DIM,
        crops_coords=((0, 0), (height, width)),
        grid_size=(height, width),
        temporal_size=frames,
    )
    return {
        "encoder_hidden_states": text(generator, batch),
        "image_rotary_emb": rotary,
        "id_cond": torch.randn(batch, _IMAGE_DIM, generator=generator),
        "id_vit_hidden": [text(generator, batch, _VIT_LEN, _VIT_DIM) for _ in range(_VIT_LAYERS)],
    }


# --- Cosmos


def _build_cosmos(**config: Any) -> nn.Module:
    from diffusers import CosmosTransformer3DModel

    return CosmosTransformer3DModel(
        **{
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "num_attention_heads": HEADS,
            "attention_head_dim": HEAD_DIM,
            "num_layers": LAYERS,
            "mlp_ratio": 2.0,
            "text_embed_dim": TEXT_DIM,
            "adaln_lora_dim": 12,
            "max_size": (8, 16, 16),
            # Resizing the padding mask (zeros in every pipeline) needs torchvision.
            "concat_padding_mask": False,
            **config,
        }
    )


def _build_cosmos_v2w() -> nn.Module:
    # As Cosmos Predict 2: the mask of the given frames is one more channel.
    return _build_cosmos(in_channels=CHANNELS + 1, extra_pos_embed_type=None, rope_scale=(1.0, 3.0, 3.0))


def _given_frames(frames: int) -> Tensor:
    """1 at the frames that the user gave (here the first), [1, 1, frames, 1, 1]."""
    return (torch.arange(frames) == 0).float().reshape(1, 1, frames, 1, 1)


def _condition_cosmos_v2w(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    frames, height, width = grid
    given = _given_frames(frames).expand(batch, 1, frames, height * PATCH, width * PATCH)
    return {"encoder_hidden_states": text(generator, batch), "condition_mask": given.clone()}


def _cosmos_timestep(sigma: float, batch: int) -> dict[str, Any]:
    """EDM: a quarter of the logarithm of a noise level of up to 80."""
    return {"timestep": torch.full((batch,), math.log(80 * sigma) / 4)}


def _cosmos_v2w_timestep(sigma: float, batch: int) -> dict[str, Any]:
    """A noise level a frame, next to nothing at the given one."""
    given = _given_frames(_FRAMES)
    return {"timestep": (given * 1e-4 + (1 - given) * sigma).repeat(batch, 1, 1, 1, 1)}


# The numbers of tokens appear in the timesteps too, so there is one size. Of three frames the first is given.
_COSMOS3_GRIDS: tuple[Grid, ...] = ((3, 3, 4),)
_COSMOS3_NOISY = 2 * 3 * 4
_SOUND_DIM, _SOUND_LEN = 6, 5


def _build_cosmos3() -> nn.Module:
    from diffusers import Cosmos3OmniTransformer

    return Cosmos3OmniTransformer(
        head_dim=HEAD_DIM,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        latent_channel=CHANNELS,
        latent_patch_size=PATCH,
        num_attention_heads=HEADS,
        num_hidden_layers=LAYERS,
        num_key_value_heads=1,
        patch_latent_dim=CHANNELS * PATCH * PATCH,
        rope_axes_dim=(4, 2, 2),
        sound_dim=_SOUND_DIM,
        sound_gen=True,
        vocab_size=50,
    )


def _condition_cosmos3(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    """One packed sequence of text, video and sound; there is no batch."""
    frames, height, width = grid
    vision_end = TEXT_LEN + math.prod(grid)
    end = vision_end + _SOUND_LEN
    # Positions of video and sound start far behind the text.
    offset = TEXT_LEN + 15000
    times, rows, columns = torch.cartesian_prod(torch.arange(frames), torch.arange(height), torch.arange(width)).T
    sound_positions = torch.zeros(3, _SOUND_LEN)
    sound_positions[0] = offset + torch.arange(_SOUND_LEN) * (24 / 25)
    positions = [
        torch.arange(TEXT_LEN).expand(3, -1).float(),
        torch.stack([offset + times, rows, columns]).float(),
        sound_positions,
    ]
    return {
        "input_ids": torch.randint(0, 50, (TEXT_LEN,), generator=generator),
        "text_indexes": torch.arange(TEXT_LEN),
        "position_ids": torch.cat(positions, dim=1),
        "und_len": TEXT_LEN,
        "sequence_length": end,
        "vision_token_shapes": [grid],
        "vision_sequence_indexes": torch.arange(TEXT_LEN, vision_end),
        "vision_mse_loss_indexes": torch.arange(TEXT_LEN + height * width, vision_end),
        "vision_noisy_frame_indexes": [torch.arange(1, frames)],
        "sound_token_shapes": [(_SOUND_LEN, 1, 1)],
        "sound_sequence_indexes": torch.arange(vision_end, end),
        "sound_mse_loss_indexes": torch.arange(vision_end, end),
        "sound_noisy_frame_indexes": [torch.arange(_SOUND_LEN)],
    }


def _cosmos3_latents(grid: Grid, batch: int) -> dict[str, Shapes]:
    return {
        "vision_tokens": [(1, CHANNELS, grid[0], grid[1] * PATCH, grid[2] * PATCH)],
        "sound_tokens": [(_SOUND_DIM, _SOUND_LEN)],
    }


def _cosmos3_timestep(sigma: float, batch: int) -> dict[str, Any]:
    """A timestep a noisy token."""
    time = int(sigma * 1000)
    return {
        "vision_timesteps": torch.full((_COSMOS3_NOISY,), time),
        "sound_timesteps": torch.full((_SOUND_LEN,), time),
    }


# --- EasyAnimate


def _build_easyanimate(num_layers: int = LAYERS, mmdit_layers: int = LAYERS) -> nn.Module:
    from diffusers import EasyAnimateTransformer3DModel

    return EasyAnimateTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        patch_size=PATCH,
        sample_width=8,
        sample_height=8,
        num_layers=num_layers,
        mmdit_layers=mmdit_layers,
        time_embed_dim=16,
        add_norm_text_encoder=True,
        text_embed_dim=TEXT_DIM,
    )


def _build_easyanimate_half() -> nn.Module:
    # Three blocks with weights for the text of its own, then three that share them with the video.
    return _build_easyanimate(num_layers=6, mmdit_layers=3)


# --- Helios


def _build_helios() -> nn.Module:
    from diffusers import HeliosTransformer3DModel

    return HeliosTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=32,
        ffn_dim=64,
        num_layers=LAYERS,
        rope_dim=ROPE,
    )


def _history(generator: Generator, grid: Grid, batch: int, frames: int) -> Tensor:
    return torch.randn(batch, CHANNELS, frames, grid[1] * PATCH, grid[2] * PATCH, generator=generator)


def _condition_helios(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    # Frames in order: the very first, four and two of history at a coarse scale, the last one at full scale, the new.
    prefix, long, mid, last, new = torch.arange(8 + grid[0]).split([1, 4, 2, 1, grid[0]])
    return {
        "encoder_hidden_states": text(generator, batch),
        "indices_hidden_states": new[None],
        "indices_latents_history_short": torch.cat([prefix, last])[None],
        "indices_latents_history_mid": mid[None],
        "indices_latents_history_long": long[None],
        "latents_history_short": _history(generator, grid, batch, 2),
        "latents_history_mid": _history(generator, grid, batch, 2),
        "latents_history_long": _history(generator, grid, batch, 4),
    }


# --- HunyuanVideo


def _hunyuan_config(**config: Any) -> dict[str, Any]:
    return {
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM,
        "num_layers": LAYERS,
        "num_refiner_layers": 2,
        "mlp_ratio": 2.0,
        "text_embed_dim": TEXT_DIM,
        "rope_axes_dim": ROPE,
        **config,
    }


def _build_hunyuan(**config: Any) -> nn.Module:
    from diffusers import HunyuanVideoTransformer3DModel

    config = {"num_single_layers": LAYERS, "pooled_projection_dim": _POOLED_DIM, **config}
    return HunyuanVideoTransformer3DModel(**_hunyuan_config(**config))


_HUNYUAN_CONCAT_CHANNELS = 2 * CHANNELS + 1


def _build_hunyuan_concat() -> nn.Module:
    return _build_hunyuan(
        in_channels=_HUNYUAN_CONCAT_CHANNELS, guidance_embeds=False, image_condition_type="latent_concat"
    )


def _build_hunyuan_replace() -> nn.Module:
    return _build_hunyuan(image_condition_type="token_replace")


def _condition_hunyuan_undistilled(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "encoder_hidden_states": text(generator, batch),
        "encoder_attention_mask": mask(batch),
        "pooled_projections": torch.randn(batch, _POOLED_DIM, generator=generator),
    }


def _condition_hunyuan(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    return {
        **_condition_hunyuan_undistilled(generator, grid, batch),
        "guidance": torch.full((batch,), 6000.0),
    }


def _build_hunyuan15() -> nn.Module:
    from diffusers import HunyuanVideo15Transformer3DModel

    return HunyuanVideo15Transformer3DModel(
        **_hunyuan_config(
            in_channels=_HUNYUAN_CONCAT_CHANNELS,
            patch_size=1,
            text_embed_2_dim=_POOLED_DIM,
            image_embed_dim=_IMAGE_DIM,
        )
    )


def _condition_hunyuan15(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "encoder_hidden_states": text(generator, batch),
        "encoder_attention_mask": mask(batch),
        "encoder_hidden_states_2": text(generator, batch, 6, _POOLED_DIM),
        "encoder_attention_mask_2": mask(batch, 6),
        # Zeros would make it a text-to-video request.
        "image_embeds": text(generator, batch, _IMAGE_LEN, _IMAGE_DIM),
    }


def _hunyuan15_latents(grid: Grid, batch: int) -> dict[str, Shapes]:
    return {"hidden_states": (batch, _HUNYUAN_CONCAT_CHANNELS, *grid)}


def _build_framepack() -> nn.Module:
    from diffusers import HunyuanVideoFramepackTransformer3DModel

    return HunyuanVideoFramepackTransformer3DModel(
        **_hunyuan_config(
            num_single_layers=LAYERS,
            pooled_projection_dim=_POOLED_DIM,
            has_image_proj=True,
            image_proj_dim=_IMAGE_DIM,
            has_clean_x_embedder=True,
        )
    )


def _condition_framepack(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    # Frames in order: the given image, the new ones, and what was made before (it is made backwards) at three scales.
    image, new, clean, history_2x, history_4x = torch.arange(8 + grid[0]).split([1, grid[0], 1, 2, 4])
    return {
        **_condition_hunyuan(generator, grid, batch),
        "image_embeds": text(generator, batch, _IMAGE_LEN, _IMAGE_DIM),
        "indices_latents": new,
        "latents_clean": _history(generator, grid, batch, 2),
        "indices_latents_clean": torch.cat([image, clean]),
        "latents_history_2x": _history(generator, grid, batch, 2),
        "indices_latents_history_2x": history_2x,
        "latents_history_4x": _history(generator, grid, batch, 4),
        "indices_latents_history_4x": history_4x,
    }


# --- Kandinsky 5


def _build_kandinsky5() -> nn.Module:
    from diffusers import Kandinsky5Transformer3DModel

    return Kandinsky5Transformer3DModel(
        in_visual_dim=CHANNELS,
        in_text_dim=TEXT_DIM,
        in_text_dim2=_POOLED_DIM,
        time_dim=16,
        out_visual_dim=CHANNELS,
        patch_size=(1, PATCH, PATCH),
        model_dim=WIDTH,
        ff_dim=64,
        num_text_blocks=2,
        num_visual_blocks=LAYERS,
        axes_dims=ROPE,
        visual_cond=True,
    )


def _condition_kandinsky5(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "encoder_hidden_states": text(generator, batch),
        "pooled_projections": torch.randn(batch, _POOLED_DIM, generator=generator),
        "visual_rope_pos": [torch.arange(size) for size in grid],
        "text_rope_pos": torch.arange(TEXT_LEN),
    }


def _kandinsky5_latents(grid: Grid, batch: int) -> dict[str, Shapes]:
    """Channels last: latents, those of the given frames, and a mask."""
    return {"hidden_states": (batch, grid[0], grid[1] * PATCH, grid[2] * PATCH, 2 * CHANNELS + 1)}


_BLOCKS, _DOUBLE, _SINGLE = "blocks", "transformer_blocks", "single_transformer_blocks"
_REFINER = "context_embedder.token_refiner.refiner_blocks"
_HUNYUAN_STACKS = (_REFINER, _DOUBLE, _SINGLE)

MODELS: dict[str, TinyModel] = {
    spec.name: spec
    for spec in (
        TinyModel(
            "AllegroTransformer3DModel", _build_allegro, _condition_allegro, video, flow, (_DOUBLE,), VIDEO_GRIDS
        ),
        TinyModel(
            "AnyFlowTransformer3DModel",
            _build_anyflow,
            _condition_text,
            video_frames_first,
            _anyflow_timestep,
            (_BLOCKS,),
            _FRAME_GRIDS,
        ),
        TinyModel(
            "AnyFlowFARTransformer3DModel",
            _build_anyflow_far,
            _condition_anyflow_far,
            video_frames_first,
            _anyflow_far_timestep,
            (_BLOCKS,),
            _FRAME_GRIDS,
        ),
        TinyModel(
            "ChronoEditTransformer3DModel",
            _build_chronoedit,
            _condition_chronoedit,
            _channels(3 * CHANNELS),
            discrete,
            (_BLOCKS,),
            VIDEO_GRIDS,
        ),
        TinyModel(
            "CogVideoXTransformer3DModel+1.5",
            _build_cogvideox15,
            _condition_cogvideox15,
            _cogvideox15_latents,
            discrete,
            (_DOUBLE,),
            VIDEO_GRIDS,
        ),
        TinyModel(
            "ConsisIDTransformer3DModel",
            _build_consisid,
            _condition_consisid,
            video_frames_first,
            discrete,
            (_DOUBLE,),
            VIDEO_GRIDS,
        ),
        TinyModel(
            "CosmosTransformer3DModel",
            _build_cosmos,
            _condition_text,
            video,
            _cosmos_timestep,
            (_DOUBLE,),
            VIDEO_GRIDS,
            {"return_dict": False, "fps": 30},
        ),
        TinyModel(
            "CosmosTransformer3DModel+v2w",
            _build_cosmos_v2w,
            _condition_cosmos_v2w,
            video,
            _cosmos_v2w_timestep,
            (_DOUBLE,),
            _FRAME_GRIDS,
            {"return_dict": False, "fps": 16},
        ),
        TinyModel(
            "Cosmos3OmniTransformer",
            _build_cosmos3,
            _condition_cosmos3,
            _cosmos3_latents,
            _cosmos3_timestep,
            ("layers",),
            _COSMOS3_GRIDS,
        ),
        TinyModel(
            "EasyAnimateTransformer3DModel",
            _build_easyanimate,
            _condition_text,
            video,
            flow,
            (_DOUBLE,),
            VIDEO_GRIDS,
        ),
        TinyModel(
            "EasyAnimateTransformer3DModel+half-mmdit",
            _build_easyanimate_half,
            _condition_text,
            video,
            flow,
            (_DOUBLE,),
            VIDEO_GRIDS,
        ),
        TinyModel(
            "HeliosTransformer3DModel", _build_helios, _condition_helios, video, discrete, (_BLOCKS,), VIDEO_GRIDS
        ),
        TinyModel(
            "HunyuanVideoTransformer3DModel",
            _build_hunyuan,
            _condition_hunyuan,
            video,
            flow,
            _HUNYUAN_STACKS,
            VIDEO_GRIDS,
        ),
        TinyModel(
            "HunyuanVideoTransformer3DModel+i2v-latent-concat",
            _build_hunyuan_concat,
            _condition_hunyuan_undistilled,
            _channels(_HUNYUAN_CONCAT_CHANNELS),
            flow,
            _HUNYUAN_STACKS,
            VIDEO_GRIDS,
        ),
        TinyModel(
            "HunyuanVideoTransformer3DModel+token-replace",
            _build_hunyuan_replace,
            _condition_hunyuan,
            video,
            flow,
            _HUNYUAN_STACKS,
            VIDEO_GRIDS,
        ),
        TinyModel(
            "HunyuanVideo15Transformer3DModel",
            _build_hunyuan15,
            _condition_hunyuan15,
            _hunyuan15_latents,
            flow,
            (_REFINER, _DOUBLE),
            # The second text's projection is as wide as it is: with fewer tokens it is most of the work.
            ((4, 6, 8), (3, 8, 8), (4, 6, 6)),
        ),
        TinyModel(
            "HunyuanVideoFramepackTransformer3DModel",
            _build_framepack,
            _condition_framepack,
            video,
            flow,
            _HUNYUAN_STACKS,
            VIDEO_GRIDS,
        ),
        TinyModel(
            "Kandinsky5Transformer3DModel",
            _build_kandinsky5,
            _condition_kandinsky5,
            _kandinsky5_latents,
            flow,
            ("text_transformer_blocks", "visual_transformer_blocks"),
            VIDEO_GRIDS,
            {"return_dict": False, "scale_factor": (1.0, 2.0, 2.0)},
        ),
    )
}
