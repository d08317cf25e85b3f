"""Video models, second part of the alphabet: Latte to Wan, and those with audio, a cache or super-resolution."""

from __future__ import annotations

from functools import partial
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
    packed,
    text,
    video,
)

_AUDIO_CHANNELS = 6
_POOLED_DIM = 20


def _condition_text(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    return {"encoder_hidden_states": text(generator, batch)}


def _condition_masked(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    return {"encoder_hidden_states": text(generator, batch), "encoder_attention_mask": mask(batch)}


def _audio_length(grid: Grid) -> int:
    """Audio tokens: more of them for a longer video, and never as many as text tokens."""
    return grid[0] + 3


# --- Latte


def _build_latte(frames: int) -> nn.Module:
    from diffusers import LatteTransformer3DModel

    return LatteTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=CHANNELS,
        out_channels=2 * CHANNELS,
        num_layers=LAYERS,
        cross_attention_dim=WIDTH,
        attention_bias=True,
        sample_size=8,
        patch_size=PATCH,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        caption_channels=TEXT_DIM,
        # The temporal position table has exactly the frames of the video (it is not used for one frame).
        video_length=frames,
    )


_LATTE_STACKS = ("transformer_blocks", "temporal_transformer_blocks")
_LATTE_SWITCHES = {"enable_temporal_attentions": True, "return_dict": False}


# --- LTX-2


def _build_ltx2() -> nn.Module:
    from diffusers import LTX2VideoTransformer3DModel

    return LTX2VideoTransformer3DModel(**_ltx2_config())


def _ltx2_config() -> dict[str, Any]:
    """Of LTX-2; the refiner of SANA-WM takes the same."""
    return {
        "in_channels": CHANNELS * PATCH * PATCH,
        "out_channels": CHANNELS * PATCH * PATCH,
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM,
        "cross_attention_dim": WIDTH,
        "audio_in_channels": _AUDIO_CHANNELS,
        "audio_out_channels": _AUDIO_CHANNELS,
        "audio_num_attention_heads": HEADS,
        "audio_attention_head_dim": HEAD_DIM // 2,
        "audio_cross_attention_dim": WIDTH // 2,
        "num_layers": LAYERS,
        "caption_channels": TEXT_DIM,
        "rope_type": "split",
    }


def _condition_ltx2(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    from diffusers.models.transformers.transformer_ltx2 import LTX2AudioVideoRotaryPosEmbed

    frames, height, width = grid
    rope = LTX2AudioVideoRotaryPosEmbed(WIDTH)
    audio_rope = LTX2AudioVideoRotaryPosEmbed(WIDTH // 2, scale_factors=(4,), modality="audio")
    device = torch.device("cpu")
    padding = mask(batch)
    return {
        "encoder_hidden_states": text(generator, batch),
        "audio_encoder_hidden_states": text(generator, batch),
        "encoder_attention_mask": padding,
        "audio_encoder_attention_mask": padding,
        "num_frames": frames,
        "height": height,
        "width": width,
        "fps": 24.0,
        "audio_num_frames": _audio_length(grid),
        "video_coords": rope.prepare_video_coords(batch, frames, height, width, device, fps=24.0),
        "audio_coords": audio_rope.prepare_audio_coords(batch, _audio_length(grid), device),
    }


def _ltx2_latents(grid: Grid, batch: int) -> dict[str, Shapes]:
    return packed(grid, batch) | {"audio_hidden_states": (batch, _audio_length(grid), _AUDIO_CHANNELS)}


def _ltx2_timestep(sigma: float, batch: int) -> dict[str, Any]:
    """One tensor for both arguments."""
    timestep = flow(sigma, batch)["timestep"]
    return {"timestep": timestep, "sigma": timestep}


# --- Mochi


def _build_mochi() -> nn.Module:
    from diffusers import MochiTransformer3DModel

    return MochiTransformer3DModel(
        patch_size=PATCH,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        # The last block returns no text stream: a fifth block leaves four alike.
        num_layers=LAYERS + 1,
        pooled_projection_dim=_POOLED_DIM,
        in_channels=CHANNELS,
        text_embed_dim=TEXT_DIM,
        time_embed_dim=32,
    )


def _condition_mochi(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    return {"encoder_hidden_states": text(generator, batch), "encoder_attention_mask": mask(batch).bool()}


def _mochi_timestep(sigma: float, batch: int) -> dict[str, Any]:
    """Mochi counts up: 0 is noise."""
    return flow(1.0 - sigma, batch)


# --- Motif-Video


def _build_motif(cross: bool, decoder: int) -> nn.Module:
    from diffusers import MotifVideoTransformer3DModel

    return MotifVideoTransformer3DModel(
        # The pipeline joins the noise, the latents of the first frame and their mask.
        in_channels=2 * CHANNELS + 1,
        out_channels=CHANNELS,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=LAYERS,
        num_single_layers=LAYERS + decoder,
        num_decoder_layers=decoder,
        patch_size=PATCH,
        text_embed_dim=TEXT_DIM,
        rope_axes_dim=ROPE,
        enable_text_cross_attention_dual=cross,
        enable_text_cross_attention_single=cross,
    )


def _motif_latents(grid: Grid, batch: int) -> dict[str, Shapes]:
    return {"hidden_states": (batch, 2 * CHANNELS + 1, grid[0], grid[1] * PATCH, grid[2] * PATCH)}


_MOTIF_STACKS = ("transformer_blocks", "single_transformer_blocks")


# --- Sana-Video


def _build_sana_video() -> nn.Module:
    from diffusers import SanaVideoTransformer3DModel

    return SanaVideoTransformer3DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=LAYERS,
        num_cross_attention_heads=HEADS,
        cross_attention_head_dim=HEAD_DIM,
        cross_attention_dim=WIDTH,
        caption_channels=TEXT_DIM,
        sample_size=8,
        patch_size=(1, PATCH, PATCH),
        rope_max_seq_len=32,
    )


# --- Wan and its descendants

_IMAGE_DIM = 20
_IMAGE_LEN = 5
# Wan's cross-attention takes the last 512 tokens for text and those before for the image.
_WAN_TEXT_LEN = 512
# Noise, latents of the reference and a mask of 4 channels.
_WAN_I2V_CHANNELS = 2 * CHANNELS + 4


def _wan_config(**changes: Any) -> dict[str, Any]:
    return {
        "patch_size": (1, PATCH, PATCH),
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "text_dim": TEXT_DIM,
        "freq_dim": 32,
        "ffn_dim": 64,
        "num_layers": LAYERS,
        "rope_max_seq_len": 32,
        **changes,
    }


_WAN_IMAGE_CONFIG = {"in_channels": _WAN_I2V_CHANNELS, "image_dim": _IMAGE_DIM, "added_kv_proj_dim": WIDTH}


def _wan_i2v_latents(grid: Grid, batch: int) -> dict[str, Shapes]:
    return {"hidden_states": (batch, _WAN_I2V_CHANNELS, grid[0], grid[1] * PATCH, grid[2] * PATCH)}


def _condition_wan_i2v(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "encoder_hidden_states": text(generator, batch, _WAN_TEXT_LEN),
        "encoder_hidden_states_image": text(generator, batch, _IMAGE_LEN, _IMAGE_DIM),
    }


def _build_skyreels() -> nn.Module:
    from diffusers import SkyReelsV2Transformer3DModel

    return SkyReelsV2Transformer3DModel(**_wan_config())


def _build_wan_i2v() -> nn.Module:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(**_wan_config(**_WAN_IMAGE_CONFIG))


def _build_wan_animate() -> nn.Module:
    from diffusers import WanAnimateTransformer3DModel
    from diffusers.models.transformers.transformer_wan_animate import MotionConv2d, MotionLinear

    model = WanAnimateTransformer3DModel(
        # A face adapter after blocks 0, 2 and 4.
        **_wan_config(**_WAN_IMAGE_CONFIG, num_layers=6),
        inject_face_latents_blocks=2,
        latent_channels=CHANNELS,
        motion_encoder_channel_sizes={"4": 12, "8": 8, "16": 6},
        motion_encoder_size=16,
        motion_style_dim=12,
        motion_dim=5,
        motion_encoder_dim=10,
        face_encoder_hidden_dim=12,
        face_encoder_num_heads=2,
        motion_encoder_batch_size=4,
    )
    # These layers divide by the root of their fan in themselves. After ten of them with random weights of 0.4 next to
    # nothing would be left of the face.
    for module in model.motion_encoder.modules():
        if isinstance(module, (MotionConv2d, MotionLinear)):
            module.scale *= 2.5
    return model


def _condition_wan_animate(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    frames, height, width = grid
    kwargs = _condition_wan_i2v(generator, grid, batch)
    pose = torch.randn(batch, CHANNELS, frames - 1, height * PATCH, width * PATCH, generator=generator)
    # The first latent frame is the reference image; four frames of the face video make one of the others.
    face = torch.randn(batch, 3, 4 * (frames - 2) + 1, 16, 16, generator=generator).clamp(-1.0, 1.0)
    return kwargs | {"pose_hidden_states": pose, "face_pixel_values": face}


_WAN_ANIMATE_2_GRIDS = ((3, 3, 4), (4, 4, 3), (3, 5, 3))


def _build_wan_animate_2() -> nn.Module:
    from diffusers import WanAnimate2Transformer3DModel

    model = WanAnimate2Transformer3DModel(
        patch_size=(1, PATCH, PATCH),
        text_len=TEXT_LEN,
        in_dim=_WAN_I2V_CHANNELS,
        dim=WIDTH,
        ffn_dim=64,
        freq_dim=32,
        text_dim=TEXT_DIM,
        out_dim=CHANNELS,
        num_heads=HEADS,
        num_layers=LAYERS,
    )
    # The model makes an attention mask at the first step of a size and keeps it. It would compile what makes the mask,
    # with Inductor, for a minute.
    with torch.compiler.set_stance("force_eager"):
        for frames, height, width in _WAN_ANIMATE_2_GRIDS:
            size = (frames - 1, height * width)
            model.block_masks[size] = model.create_mask(*size, torch.device("cpu"))
    return model


def _condition_wan_animate_2(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    """Of a pass over ``grid``, with an empty cache."""
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    frames, height, width = grid
    condition = (CHANNELS + 4, frames, height * PATCH, width * PATCH)
    return {
        # Lists of samples; the model pads the text.
        "encoder_hidden_states": list(text(generator, batch, TEXT_LEN - 2)),
        # 1280 is the width of CLIP's features, which no argument changes.
        "encoder_hidden_states_image": text(generator, batch, _IMAGE_LEN, 1280),
        "condition_latents": [torch.randn(condition, generator=generator) for _ in range(batch)],
        "kv_cache": WanAnimate2KVCache(LAYERS),
        "seq_len": frames * height * width,
    }


def _condition_wan_animate_2_cached(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    """The reference has a frame less than what is generated; its keys and values are in the cache."""
    frames, height, width = grid
    kwargs = _condition_wan_animate_2(generator, grid, batch)
    for layer in kwargs["kv_cache"].layer_caches:
        layer.store(*torch.randn(2, batch, (frames - 1) * height * width, HEADS, HEAD_DIM, generator=generator))
    return kwargs | {
        "reference_grid_sizes": torch.tensor([[frames - 1, height, width]] * batch),
        # Pixels: a latent frame is four frames, a token 16 x 16 pixels.
        "origin_len": 4 * (frames - 2) + 1,
        "origin_area": [16 * height, 16 * width],
    }


def _condition_wan_animate_2_extract(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    return _condition_wan_animate_2(generator, grid, batch) | {"offset_grid_sizes": torch.tensor([grid] * batch)}


def _wan_animate_2_latents(grid: Grid, batch: int) -> dict[str, Shapes]:
    return {"hidden_states": [(CHANNELS, grid[0], grid[1] * PATCH, grid[2] * PATCH)] * batch}


def _build_wan_vace() -> nn.Module:
    from diffusers import WanVACETransformer3DModel

    return WanVACETransformer3DModel(
        **_wan_config(num_layers=6), vace_layers=[0, 2, 4], vace_in_channels=2 * CHANNELS + 1
    )


def _condition_wan_vace(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    frames, height, width = grid
    return {
        "encoder_hidden_states": text(generator, batch),
        "control_hidden_states": torch.randn(
            batch, 2 * CHANNELS + 1, frames, height * PATCH, width * PATCH, generator=generator
        ),
        "control_hidden_states_scale": torch.tensor([1.0, 0.8, 0.6]),
    }


# --- SANA-WM

# As many frames in each size: the timestep has one value a frame.
_SANA_WM_FRAMES = 3
_PLUCKER_CHANNELS = 12


def _build_sana_wm() -> nn.Module:
    from diffusers import SanaWMTransformer3DModel

    return SanaWMTransformer3DModel(
        in_channels=CHANNELS,
        # Every fourth block has softmax attention: two periods.
        num_layers=8,
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        linear_head_dim=HEAD_DIM,
        chunk_plucker_channels=_PLUCKER_CHANNELS,
        caption_channels=TEXT_DIM,
    )


def _condition_sana_wm(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    frames, height, width = grid
    return {
        "encoder_hidden_states": text(generator, batch)[:, None],
        "mask": mask(batch),
        "data_info": {"img_hw": torch.tensor([[32.0 * height, 32.0 * width]])},
        "camera_conditions": _cameras(generator, grid, batch),
        "chunk_plucker": torch.randn(batch, _PLUCKER_CHANNELS, frames, height, width, generator=generator),
    }


def _cameras(generator: Generator, grid: Grid, batch: int) -> Tensor:
    """Camera to world matrices, row by row, and focal lengths and centre in latent pixels: [batch, frames, 20]."""
    frames, height, width = grid
    spin = 0.2 * torch.randn(batch, frames, 3, 3, generator=generator)
    pose = torch.eye(4).repeat(batch, frames, 1, 1)
    pose[..., :3, :3] = torch.linalg.matrix_exp(spin - spin.mT)
    pose[..., :3, 3] = 0.5 * torch.randn(batch, frames, 3, generator=generator)
    # The first camera is the origin.
    pose[:, 0] = torch.eye(4)
    intrinsics = torch.tensor([width, height, width / 2, height / 2]).expand(batch, frames, 4)
    return torch.cat([pose.flatten(2), intrinsics], dim=-1)


def _sana_wm_timestep(sigma: float, batch: int) -> dict[str, Any]:
    """[batch, 1, frames]: the first frame is given, and stays at 0."""
    timestep = torch.full((batch, 1, _SANA_WM_FRAMES), sigma * 1000)
    timestep[..., 0] = 0.0
    return {"timestep": timestep}


def _video_no_patch(grid: Grid, batch: int) -> dict[str, Shapes]:
    return {"hidden_states": (batch, CHANNELS, *grid)}


# One size: the timestep has one value a token.
_REFINER_GRID = (2, 3, 5)


def _build_refiner() -> nn.Module:
    from diffusers import SanaWMLTX2RefinerTransformer3DModel

    return SanaWMLTX2RefinerTransformer3DModel(**_ltx2_config())


def _condition_refiner(generator: Generator, grid: Grid, batch: int, *, cache: bool) -> dict[str, Any]:
    from diffusers.models.transformers.transformer_sana_wm_refiner import (
        SanaWMLTX2AudioVideoRotaryPosEmbed,
        SanaWMRefinerKVCache,
    )

    frames, height, width = grid
    # The tokens of a frame that all look at (the sink), of two refined frames, and of the frames at work.
    sink, history = height * width, 2 * height * width
    rope = SanaWMLTX2AudioVideoRotaryPosEmbed(WIDTH, rope_type="split", num_attention_heads=HEADS)
    coords = rope.prepare_video_coords(batch, 3 + frames, height, width, torch.device("cpu"))
    kwargs = _condition_masked(generator, grid, batch)
    kwargs["video_rotary_emb"] = rope(coords[:, :, sink + history :])
    if cache:
        kv_cache = SanaWMRefinerKVCache(LAYERS)
        kv_cache.sink_pe = rope(coords[:, :, :sink])
        for layer in kv_cache.layer_caches:
            layer.store_sink(*torch.randn(2, batch, sink, WIDTH, generator=generator))
            layer.store_history(*torch.randn(2, batch, history, WIDTH, generator=generator))
        kwargs["kv_cache"] = kv_cache
    return kwargs


def _refiner_timestep(sigma: float, batch: int) -> dict[str, Any]:
    frames, height, width = _REFINER_GRID
    return {"timestep": torch.full((batch, frames * height * width), sigma * 1000)}


# --- Kandinsky 6


def _build_kandinsky6() -> nn.Module:
    from diffusers import Kandinsky6Transformer3DModel

    return Kandinsky6Transformer3DModel(
        in_visual_dim=CHANNELS,
        out_visual_dim=CHANNELS,
        in_text_dim=TEXT_DIM,
        in_text_dim2=_POOLED_DIM,
        time_dim=16,
        patch_size=(1, PATCH, PATCH),
        model_dim=WIDTH,
        ff_dim=64,
        num_text_blocks=2,
        num_visual_blocks=LAYERS,
        axes_dims=ROPE,
        in_audio_dim=_AUDIO_CHANNELS,
        out_audio_dim=_AUDIO_CHANNELS,
        # One head: those of audio are as wide as those of video.
        model_dim_a=HEAD_DIM,
        ff_dim_a=WIDTH,
        text_token_padding=True,
        ca_rope=True,
        cross_gates=True,
        fix_modulation=True,
        visual_token_type_num_embeddings=2,
    )


def _condition_kandinsky6(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    frames, height, width = grid
    # The last frame is the reference image: of type 1, and at the time of the first.
    types = (torch.arange(frames) == frames - 1).long()
    return {
        "encoder_hidden_states": text(generator, batch),
        "pooled_projections": torch.randn(batch, _POOLED_DIM, generator=generator),
        "encoder_attention_mask": mask(batch).bool(),
        "visual_token_type_ids": types.expand(batch, frames).contiguous(),
        "visual_rope_pos": (torch.arange(frames) * (1 - types), torch.arange(height), torch.arange(width)),
    }


def _kandinsky_video(grid: Grid, batch: int) -> dict[str, Shapes]:
    """Channels last: noise, condition and mask."""
    return {"hidden_states": (batch, grid[0], grid[1] * PATCH, grid[2] * PATCH, 2 * CHANNELS + 1)}


def _kandinsky_video_and_audio(grid: Grid, batch: int) -> dict[str, Shapes]:
    return _kandinsky_video(grid, batch) | {"audio_hidden_states": (batch, _audio_length(grid), _AUDIO_CHANNELS)}


def _build_kandinsky6_sr() -> nn.Module:
    from diffusers import Kandinsky6SRTransformer3DModel

    return Kandinsky6SRTransformer3DModel(
        in_visual_dim=CHANNELS,
        out_visual_dim=CHANNELS,
        time_dim=16,
        model_dim=WIDTH,
        ff_dim=64,
        num_visual_blocks=LAYERS,
        axes_dims=ROPE,
        nabla_window=(1, 1, 1),
    )


def _condition_nothing(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    return {}


def _kandinsky_sr(grid: Grid, batch: int) -> dict[str, Shapes]:
    """A token a pixel."""
    return {"hidden_states": (batch, *grid, 2 * CHANNELS + 1)}


MODELS: dict[str, TinyModel] = {
    spec.name: spec
    for spec in (
        TinyModel(
            "LatteTransformer3DModel",
            partial(_build_latte, frames=1),
            _condition_text,
            video,
            discrete,
            _LATTE_STACKS,
            ((1, 4, 4), (1, 4, 6), (1, 6, 3)),
            _LATTE_SWITCHES,
        ),
        TinyModel(
            "LatteTransformer3DModel+3frames",
            partial(_build_latte, frames=3),
            _condition_text,
            video,
            discrete,
            _LATTE_STACKS,
            ((3, 3, 4), (3, 4, 4), (3, 5, 3)),
            _LATTE_SWITCHES,
        ),
        TinyModel(
            "LTX2VideoTransformer3DModel",
            _build_ltx2,
            _condition_ltx2,
            _ltx2_latents,
            _ltx2_timestep,
            ("transformer_blocks",),
            VIDEO_GRIDS,
            {
                "isolate_modalities": False,
                "spatio_temporal_guidance_blocks": None,
                "perturbation_mask": None,
                "use_cross_timestep": False,
                "return_dict": False,
            },
        ),
        TinyModel(
            "MochiTransformer3DModel",
            _build_mochi,
            _condition_mochi,
            video,
            _mochi_timestep,
            ("transformer_blocks",),
            VIDEO_GRIDS,
        ),
        TinyModel(
            "MotifVideoTransformer3DModel",
            partial(_build_motif, cross=False, decoder=0),
            _condition_masked,
            _motif_latents,
            flow,
            _MOTIF_STACKS,
            VIDEO_GRIDS,
        ),
        TinyModel(
            "MotifVideoTransformer3DModel+decoder4",
            partial(_build_motif, cross=True, decoder=4),
            _condition_masked,
            _motif_latents,
            flow,
            _MOTIF_STACKS,
            VIDEO_GRIDS,
        ),
        TinyModel(
            "SanaVideoTransformer3DModel",
            _build_sana_video,
            _condition_masked,
            video,
            discrete,
            ("transformer_blocks",),
            VIDEO_GRIDS,
        ),
        TinyModel(
            "SkyReelsV2Transformer3DModel", _build_skyreels, _condition_text, video, discrete, ("blocks",), VIDEO_GRIDS
        ),
        TinyModel(
            "WanTransformer3DModel+i2v",
            _build_wan_i2v,
            _condition_wan_i2v,
            _wan_i2v_latents,
            discrete,
            ("blocks",),
            VIDEO_GRIDS,
        ),
        TinyModel(
            "WanAnimateTransformer3DModel",
            _build_wan_animate,
            _condition_wan_animate,
            _wan_i2v_latents,
            discrete,
            ("blocks",),
            # With fewer frames the face video fits in one batch.
            ((3, 3, 4), (4, 4, 3), (3, 5, 3)),
        ),
        TinyModel(
            "WanAnimate2Transformer3DModel",
            _build_wan_animate_2,
            _condition_wan_animate_2_cached,
            _wan_animate_2_latents,
            discrete,
            ("blocks",),
            _WAN_ANIMATE_2_GRIDS,
            {"kv_cache_mode": "cached", "is_uncondtion": False, "return_dict": False},
        ),
        TinyModel(
            "WanAnimate2Transformer3DModel+kv-extract",
            _build_wan_animate_2,
            _condition_wan_animate_2_extract,
            _wan_animate_2_latents,
            flow,
            ("blocks",),
            VIDEO_GRIDS,
            {"kv_cache_mode": "extract", "return_dict": False},
        ),
        TinyModel(
            "WanVACETransformer3DModel",
            _build_wan_vace,
            _condition_wan_vace,
            video,
            discrete,
            ("vace_blocks", "blocks"),
            VIDEO_GRIDS,
        ),
        TinyModel(
            "SanaWMTransformer3DModel",
            _build_sana_wm,
            _condition_sana_wm,
            _video_no_patch,
            _sana_wm_timestep,
            ("blocks",),
            ((_SANA_WM_FRAMES, 3, 4), (_SANA_WM_FRAMES, 4, 4), (_SANA_WM_FRAMES, 5, 3)),
        ),
        TinyModel(
            "SanaWMLTX2RefinerTransformer3DModel",
            _build_refiner,
            partial(_condition_refiner, cache=True),
            packed,
            _refiner_timestep,
            ("transformer_blocks",),
            (_REFINER_GRID,),
            {"kv_cache_mode": "inject", "return_dict": False},
        ),
        TinyModel(
            "SanaWMLTX2RefinerTransformer3DModel+no-cache",
            _build_refiner,
            partial(_condition_refiner, cache=False),
            packed,
            _refiner_timestep,
            ("transformer_blocks",),
            (_REFINER_GRID,),
        ),
        TinyModel(
            "Kandinsky6Transformer3DModel",
            _build_kandinsky6,
            _condition_kandinsky6,
            _kandinsky_video_and_audio,
            flow,
            ("video_text_transformer_blocks", "audio_text_transformer_blocks", "visual_transformer_blocks"),
            VIDEO_GRIDS,
        ),
        TinyModel(
            "Kandinsky6Transformer3DModel+video-only",
            _build_kandinsky6,
            _condition_kandinsky6,
            _kandinsky_video,
            flow,
            # The text blocks for audio run, but nothing uses what they give.
            ("video_text_transformer_blocks", "visual_transformer_blocks"),
            VIDEO_GRIDS,
        ),
        TinyModel(
            "Kandinsky6SRTransformer3DModel",
            _build_kandinsky6_sr,
            _condition_nothing,
            _kandinsky_sr,
            flow,
            ("visual_transformer_blocks",),
            # Attention is sparse in tiles of 8 x 8 tokens.
            ((2, 8, 8), (3, 8, 8), (2, 8, 16)),
        ),
    )
}
