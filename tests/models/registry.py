"""The ten tiny models: configuration, conditioning, latent shape and timestep of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

# Frames, height and width of the grid of image (video) tokens; frames is 1 for image models.
Grid = tuple[int, int, int]

_HEADS = 2
_HEAD_DIM = 16
_WIDTH = _HEADS * _HEAD_DIM
_ROPE = (4, 6, 6)
_TEXT_DIM = 24
_TEXT_LEN = 7
_CHANNELS = 4
_LAYERS = 4
_PATCH = 2


@dataclass(frozen=True)
class TinyModel:
    """One tiny model and what its pipeline would pass it.

    Attributes:
        name: Key in ``MODELS``.
        build: Make the module, with the weights diffusers gives it.
        conditioning: Keyword arguments that stay the same over a request, from a generator, a grid and a batch size.
        latent: Shape of ``hidden_states`` for a grid and a batch size.
        timestep: The ``timestep`` argument for a noise level in (0, 1] and a batch size: a new tensor at every call.
        stacks: Names of the block lists, in the order they run.
        grids: Token grids of the sizes 0, 1 and 2; the token counts differ from each other and from the text length.
    """

    name: str
    build: Callable[[], nn.Module]
    conditioning: Callable[[Generator, Grid, int], dict[str, Any]]
    latent: Callable[[Grid, int], tuple[int, ...]]
    timestep: Callable[[float, int], Tensor]
    stacks: tuple[str, ...]
    grids: tuple[Grid, Grid, Grid]


_IMAGE_GRIDS: tuple[Grid, Grid, Grid] = ((1, 4, 4), (1, 4, 6), (1, 6, 3))
_VIDEO_GRIDS: tuple[Grid, Grid, Grid] = ((2, 3, 4), (3, 4, 4), (2, 5, 3))


def _text(generator: Generator, batch: int, length: int = _TEXT_LEN) -> Tensor:
    return torch.randn(batch, length, _TEXT_DIM, generator=generator)


def _mask(batch: int, length: int = _TEXT_LEN) -> Tensor:
    """A padding mask (1 = keep) with two padded tokens, and one more in each further row of the batch."""
    keep = (length - 2 - torch.arange(batch)).clamp(min=1)
    return (torch.arange(length)[None] < keep[:, None]).long()


# --- Latent layouts


def _image(grid: Grid, batch: int) -> tuple[int, ...]:
    """[batch, channels, height, width] before patches of 2 x 2."""
    return batch, _CHANNELS, grid[1] * _PATCH, grid[2] * _PATCH


def _image_no_patch(grid: Grid, batch: int) -> tuple[int, ...]:
    return batch, _CHANNELS, grid[1], grid[2]


def _video(grid: Grid, batch: int) -> tuple[int, ...]:
    """[batch, channels, frames, height, width]."""
    return batch, _CHANNELS, grid[0], grid[1] * _PATCH, grid[2] * _PATCH


def _video_frames_first(grid: Grid, batch: int) -> tuple[int, ...]:
    """[batch, frames, channels, height, width]."""
    return batch, grid[0], _CHANNELS, grid[1] * _PATCH, grid[2] * _PATCH


def _packed(grid: Grid, batch: int) -> tuple[int, ...]:
    """[batch, tokens, channels]: the pipeline has packed the patches."""
    return batch, grid[0] * grid[1] * grid[2], _CHANNELS * _PATCH * _PATCH


# --- Timesteps, as the pipelines pass them


def _level(sigma: float, batch: int) -> Tensor:
    """Float in (0, 1], [batch]: Flux, QwenImage and AuraFlow divide the scheduler's timestep by 1000."""
    return torch.full((batch,), sigma)


def _flow(sigma: float, batch: int) -> Tensor:
    """Float in (0, 1000], [batch]: flow-matching schedulers."""
    return torch.full((batch,), sigma * 1000)


def _discrete(sigma: float, batch: int) -> Tensor:
    """int64 in [1, 1000), [batch]: DDIM, DPM-Solver, UniPC."""
    return torch.full((batch,), int(sigma * 1000), dtype=torch.int64)


# --- Models


def _build_flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=_CHANNELS * _PATCH * _PATCH,
        num_layers=_LAYERS,
        num_single_layers=_LAYERS,
        attention_head_dim=_HEAD_DIM,
        num_attention_heads=_HEADS,
        joint_attention_dim=_TEXT_DIM,
        pooled_projection_dim=20,
        guidance_embeds=True,
        axes_dims_rope=_ROPE,
    )


def _condition_flux(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    _, height, width = grid
    ids = torch.zeros(height, width, 3)
    ids[..., 1] += torch.arange(height)[:, None]
    ids[..., 2] += torch.arange(width)[None]
    return {
        "encoder_hidden_states": _text(generator, batch),
        "pooled_projections": torch.randn(batch, 20, generator=generator),
        "guidance": torch.full((batch,), 3.5),
        "txt_ids": torch.zeros(_TEXT_LEN, 3),
        "img_ids": ids.reshape(height * width, 3),
    }


def _build_dit() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=_HEADS,
        attention_head_dim=_HEAD_DIM,
        in_channels=_CHANNELS,
        num_layers=_LAYERS,
        norm_num_groups=4,
        sample_size=8,
        patch_size=_PATCH,
        num_embeds_ada_norm=10,
    )


def _condition_dit(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    return {"class_labels": torch.randint(0, 10, (batch,), generator=generator)}


def _build_wan() -> nn.Module:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, _PATCH, _PATCH),
        num_attention_heads=_HEADS,
        attention_head_dim=_HEAD_DIM,
        in_channels=_CHANNELS,
        out_channels=_CHANNELS,
        text_dim=_TEXT_DIM,
        freq_dim=32,
        ffn_dim=64,
        num_layers=_LAYERS,
        rope_max_seq_len=32,
    )


def _condition_text(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    return {"encoder_hidden_states": _text(generator, batch)}


def _build_sd3() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=_PATCH,
        in_channels=_CHANNELS,
        out_channels=_CHANNELS,
        # The last block returns no text stream: a fifth block leaves four alike.
        num_layers=_LAYERS + 1,
        attention_head_dim=_HEAD_DIM,
        num_attention_heads=_HEADS,
        joint_attention_dim=_TEXT_DIM,
        caption_projection_dim=_WIDTH,
        pooled_projection_dim=20,
        pos_embed_max_size=12,
    )


def _condition_sd3(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "encoder_hidden_states": _text(generator, batch),
        "pooled_projections": torch.randn(batch, 20, generator=generator),
    }


def _build_pixart() -> nn.Module:
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        num_attention_heads=_HEADS,
        attention_head_dim=_HEAD_DIM,
        in_channels=_CHANNELS,
        out_channels=2 * _CHANNELS,
        num_layers=_LAYERS,
        cross_attention_dim=_WIDTH,
        sample_size=8,
        patch_size=_PATCH,
        caption_channels=_TEXT_DIM,
        norm_num_groups=4,
    )


def _condition_pixart(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "encoder_hidden_states": _text(generator, batch),
        "encoder_attention_mask": _mask(batch),
        # What the pipeline passes for all sizes but 1024.
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def _build_cogvideox() -> nn.Module:
    from diffusers import CogVideoXTransformer3DModel

    return CogVideoXTransformer3DModel(
        num_attention_heads=_HEADS,
        attention_head_dim=_HEAD_DIM,
        in_channels=_CHANNELS,
        out_channels=_CHANNELS,
        time_embed_dim=16,
        text_embed_dim=_TEXT_DIM,
        num_layers=_LAYERS,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        patch_size=_PATCH,
        max_text_seq_length=_TEXT_LEN,
        # As CogVideoX-5B: the pipeline computes the rotary embedding once and passes it.
        use_rotary_positional_embeddings=True,
    )


def _condition_cogvideox(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    frames, height, width = grid
    rotary = get_3d_rotary_pos_embed(
        embed_dim=_HEAD_DIM,
        crops_coords=((0, 0), (height, width)),
        grid_size=(height, width),
        temporal_size=frames,
    )
    return {"encoder_hidden_states": _text(generator, batch), "image_rotary_emb": rotary}


def _build_qwenimage() -> nn.Module:
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(
        patch_size=_PATCH,
        in_channels=_CHANNELS * _PATCH * _PATCH,
        out_channels=_CHANNELS,
        num_layers=_LAYERS,
        attention_head_dim=_HEAD_DIM,
        num_attention_heads=_HEADS,
        joint_attention_dim=_TEXT_DIM,
        axes_dims_rope=_ROPE,
    )


def _condition_qwenimage(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "encoder_hidden_states": _text(generator, batch),
        "encoder_hidden_states_mask": _mask(batch).bool(),
        "img_shapes": [[grid]] * batch,
    }


def _build_ltx() -> nn.Module:
    from diffusers import LTXVideoTransformer3DModel

    return LTXVideoTransformer3DModel(
        in_channels=_CHANNELS * _PATCH * _PATCH,
        out_channels=_CHANNELS * _PATCH * _PATCH,
        num_attention_heads=_HEADS,
        attention_head_dim=_HEAD_DIM,
        cross_attention_dim=_WIDTH,
        num_layers=_LAYERS,
        caption_channels=_TEXT_DIM,
    )


def _condition_ltx(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    frames, height, width = grid
    return {
        "encoder_hidden_states": _text(generator, batch),
        "encoder_attention_mask": _mask(batch),
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
        patch_size=_PATCH,
        in_channels=_CHANNELS,
        out_channels=_CHANNELS,
        num_mmdit_layers=_LAYERS,
        num_single_dit_layers=_LAYERS,
        attention_head_dim=_HEAD_DIM,
        num_attention_heads=_HEADS,
        joint_attention_dim=_TEXT_DIM,
        caption_projection_dim=_WIDTH,
        pos_embed_max_size=64,
    )


def _build_sana() -> nn.Module:
    from diffusers import SanaTransformer2DModel

    return SanaTransformer2DModel(
        in_channels=_CHANNELS,
        out_channels=_CHANNELS,
        num_attention_heads=_HEADS,
        attention_head_dim=_HEAD_DIM,
        num_layers=_LAYERS,
        num_cross_attention_heads=_HEADS,
        cross_attention_head_dim=_HEAD_DIM,
        cross_attention_dim=_WIDTH,
        caption_channels=_TEXT_DIM,
        sample_size=4,
        patch_size=1,
    )


def _condition_masked(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    return {"encoder_hidden_states": _text(generator, batch), "encoder_attention_mask": _mask(batch)}


def _sana_timestep(sigma: float, batch: int) -> Tensor:
    """The pipeline multiplies an integer timestep with ``timestep_scale`` (1.0), which makes it a float."""
    return _discrete(sigma, batch) * 1.0


_DOUBLE, _SINGLE = "transformer_blocks", "single_transformer_blocks"

MODELS: dict[str, TinyModel] = {
    spec.name: spec
    for spec in (
        TinyModel("flux", _build_flux, _condition_flux, _packed, _level, (_DOUBLE, _SINGLE), _IMAGE_GRIDS),
        # DiT's forward takes the output for a square, so its sizes are squares.
        TinyModel("dit", _build_dit, _condition_dit, _image, _discrete, (_DOUBLE,), ((1, 4, 4), (1, 5, 5), (1, 6, 6))),
        TinyModel("wan", _build_wan, _condition_text, _video, _discrete, ("blocks",), _VIDEO_GRIDS),
        TinyModel("sd3", _build_sd3, _condition_sd3, _image, _flow, (_DOUBLE,), _IMAGE_GRIDS),
        TinyModel("pixart", _build_pixart, _condition_pixart, _image, _discrete, (_DOUBLE,), _IMAGE_GRIDS),
        TinyModel(
            "cogvideox",
            _build_cogvideox,
            _condition_cogvideox,
            _video_frames_first,
            _discrete,
            (_DOUBLE,),
            _VIDEO_GRIDS,
        ),
        TinyModel("qwenimage", _build_qwenimage, _condition_qwenimage, _packed, _level, (_DOUBLE,), _IMAGE_GRIDS),
        TinyModel("ltx", _build_ltx, _condition_ltx, _packed, _flow, (_DOUBLE,), _VIDEO_GRIDS),
        TinyModel(
            "auraflow",
            _build_auraflow,
            _condition_text,
            _image,
            _level,
            ("joint_transformer_blocks", _SINGLE),
            _IMAGE_GRIDS,
        ),
        TinyModel("sana", _build_sana, _condition_masked, _image_no_patch, _sana_timestep, (_DOUBLE,), _IMAGE_GRIDS),
    )
}
