"""Image models whose text is a stream of its own, or runs with the image in two lists.

Flux and its kin (double blocks, then single blocks), ControlNet residuals between blocks, and edit models that carry
the reference images with the noise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor, nn

from .ten import MODELS as TEN
from .tiny import (
    CHANNELS,
    HEAD_DIM,
    HEADS,
    LAYERS,
    PATCH,
    ROPE,
    TEXT_DIM,
    TEXT_LEN,
    WIDTH,
    Grid,
    Shapes,
    TinyModel,
    flow,
    image,
    level,
    mask,
    packed,
    text,
)

_PACKED_CHANNELS = CHANNELS * PATCH * PATCH
_ROPE_FOUR_AXES = (4, 4, 4, 4)
# A reference image of 2 x 5 tokens: as many as no grid and no text has.
_REFERENCE = (1, 2, 5)
_REFERENCE_TOKENS = 10


def _tokens(grid: Grid) -> int:
    return grid[0] * grid[1] * grid[2]


def _positions(grid: Grid, first: int = 0, start: int = 0) -> Tensor:
    """Position ids of an image: [tokens, 3], with ``first`` on the first axis and rows and columns from ``start``."""
    _, height, width = grid
    ids = torch.full((height, width, 3), float(first))
    ids[..., 1] = torch.arange(height)[:, None] + start
    ids[..., 2] = torch.arange(width)[None] + start
    return ids.reshape(height * width, 3)


def _text_positions() -> Tensor:
    """Position ids of a text that counts on the axes of the rows and the columns: [tokens, 3]."""
    ids = torch.zeros(TEXT_LEN, 3)
    ids[:, 1:] = torch.arange(TEXT_LEN)[:, None]
    return ids


def _residuals(generator: Generator, grid: Grid, batch: int, count: int = 2) -> list[Tensor]:
    """What a ControlNet of ``count`` blocks adds to the image stream: fewer samples than the transformer has blocks."""
    return [0.5 * torch.randn(batch, _tokens(grid), WIDTH, generator=generator) for _ in range(count)]


def _flux_like() -> dict[str, Any]:
    """The configuration that the kin of Flux share."""
    return {
        "patch_size": 1,
        "in_channels": _PACKED_CHANNELS,
        "num_layers": LAYERS,
        "num_single_layers": LAYERS,
        "attention_head_dim": HEAD_DIM,
        "num_attention_heads": HEADS,
        "joint_attention_dim": TEXT_DIM,
        "axes_dims_rope": ROPE,
    }


# --- Bria


def _build_bria() -> nn.Module:
    from diffusers.models.transformers import BriaTransformer2DModel

    return BriaTransformer2DModel(**_flux_like())


def _condition_bria(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "encoder_hidden_states": text(generator, batch),
        "txt_ids": torch.zeros(TEXT_LEN, 3),
        "img_ids": _positions(grid),
    }


def _build_fibo() -> nn.Module:
    from diffusers.models.transformers import BriaFiboTransformer2DModel

    return BriaFiboTransformer2DModel(**_flux_like(), text_encoder_dim=TEXT_DIM // 2)


def _condition_fibo(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    prompt = _condition_bria(generator, grid, batch)
    # A layer of the text encoder for each block of both stacks.
    layers = [text(generator, batch, width=TEXT_DIM // 2) for _ in range(2 * LAYERS)]
    keep = torch.cat([mask(batch), torch.ones(batch, _tokens(grid))], dim=1).bool()
    attention = {"attention_mask": keep[:, None, None, :]}
    return {**prompt, "text_encoder_layers": layers, "joint_attention_kwargs": attention}


def _build_fibo2() -> nn.Module:
    from diffusers.models.transformers import BriaFibo2Transformer2DModel

    return BriaFibo2Transformer2DModel(
        in_channels=CHANNELS,
        patch_size=PATCH,
        dim=WIDTH,
        # Two of eight blocks read the text themselves.
        n_layers=8,
        injection_layer_ids=(2, 5),
        n_heads=HEADS,
        cap_feat_dim=TEXT_DIM,
        # Seven text tokens become six gist tokens.
        min_num_gist_tokens=4,
        max_num_gist_tokens=8,
        gist_step=2,
        gist_min_text_len=4,
        gist_max_text_len=16,
        axes_dims=ROPE,
        axes_lens=(16, 16, 16),
        # Under random weights, embeddings of levels in [0, 1000] have nothing in common from one step to the next.
        t_scale=10.0,
    )


def _condition_fibo2(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    # One bundle of features for the gist, and one for each block that reads the text; prompts of one length, no mask.
    return {"encoder_hidden_states": torch.randn(batch, 3, TEXT_LEN, TEXT_DIM, generator=generator)}


# --- Chroma


def _build_chroma() -> nn.Module:
    from diffusers.models.transformers import ChromaTransformer2DModel

    return ChromaTransformer2DModel(
        **_flux_like(),
        # Wide and shallow: the random weights of another make each step's modulation unrelated to the last.
        approximator_num_channels=128,
        approximator_hidden_dim=WIDTH,
        approximator_layers=1,
    )


def _condition_chroma(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    prompt = _condition_bria(generator, grid, batch)
    # In the dtype of the model, as the pipeline passes it: attention adds it to its scores.
    return {**prompt, "attention_mask": torch.cat([mask(batch).float(), torch.ones(batch, _tokens(grid))], dim=1)}


# --- Flux, QwenImage and Stable Diffusion 3 with a ControlNet


def _condition_flux_controlnet(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    return {
        **TEN["flux"].conditioning(generator, grid, batch),
        "controlnet_block_samples": _residuals(generator, grid, batch),
        "controlnet_single_block_samples": _residuals(generator, grid, batch),
    }


def _condition_qwenimage_controlnet(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    return {
        **TEN["qwenimage"].conditioning(generator, grid, batch),
        "controlnet_block_samples": _residuals(generator, grid, batch),
    }


def _condition_sd3_controlnet(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    return {
        **TEN["sd3"].conditioning(generator, grid, batch),
        "block_controlnet_hidden_states": _residuals(generator, grid, batch),
    }


def _build_sd35() -> nn.Module:
    from diffusers.models.transformers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=PATCH,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        # Three blocks with a second attention, three without, and the last one without a text stream to give on.
        num_layers=7,
        dual_attention_layers=(0, 1, 2),
        qk_norm="rms_norm",
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_DIM,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=20,
        pos_embed_max_size=12,
    )


# --- Flux2


def _ids(frame: int, height: int, width: int, layers: Tensor) -> Tensor:
    """Position ids on the four axes of Flux2 and Flux3 (frame, row, column, layer): [tokens, 4]."""
    return torch.cartesian_prod(torch.tensor([frame]), torch.arange(height), torch.arange(width), layers)


def _image_ids(grid: Grid, frame: int = 0, layer: int = 0) -> Tensor:
    return _ids(frame, grid[1], grid[2], torch.tensor([layer]))


def _text_ids() -> Tensor:
    return _ids(0, 1, 1, torch.arange(TEXT_LEN))


def _flux2(guidance_embeds: bool) -> Any:
    from diffusers.models.transformers import Flux2Transformer2DModel

    config = {**_flux_like(), "axes_dims_rope": _ROPE_FOUR_AXES}
    return Flux2Transformer2DModel(**config, guidance_embeds=guidance_embeds)


def _build_flux2() -> nn.Module:
    return _flux2(guidance_embeds=True)


def _build_flux2_kv() -> nn.Module:
    from diffusers.models.transformers.transformer_flux2 import Flux2KVAttnProcessor, Flux2KVParallelSelfAttnProcessor

    # As FLUX.2 Klein: no guidance, and the processors that its pipeline sets.
    model = _flux2(guidance_embeds=False)
    for block in model.transformer_blocks:
        block.attn.set_processor(Flux2KVAttnProcessor())
    for block in model.single_transformer_blocks:
        block.attn.set_processor(Flux2KVParallelSelfAttnProcessor())
    return model


def _condition_flux2_ids(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "encoder_hidden_states": text(generator, batch),
        "txt_ids": _text_ids().repeat(batch, 1, 1),
        "img_ids": _image_ids(grid).repeat(batch, 1, 1),
    }


def _condition_flux2(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    return {**_condition_flux2_ids(generator, grid, batch), "guidance": torch.full((batch,), 4.0)}


def _condition_flux2_extract(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    prompt = _condition_flux2_ids(generator, grid, batch)
    reference = _image_ids(_REFERENCE, frame=10).repeat(batch, 1, 1)
    return {**prompt, "img_ids": torch.cat([reference, prompt["img_ids"]], dim=1)}


def _condition_flux2_cached(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    from diffusers.models.transformers.transformer_flux2 import Flux2KVCache

    cache = Flux2KVCache(num_double_layers=LAYERS, num_single_layers=LAYERS)
    cache.num_ref_tokens = _REFERENCE_TOKENS
    for layer in (*cache.double_block_caches, *cache.single_block_caches):
        keys, values = torch.randn(2, batch, _REFERENCE_TOKENS, HEADS, HEAD_DIM, generator=generator)
        layer.store(keys, values)
    return {**_condition_flux2_ids(generator, grid, batch), "kv_cache": cache}


def _flux2_extract_latents(grid: Grid, batch: int) -> dict[str, Shapes]:
    """The pipeline puts the tokens of the reference before those of the image, in one tensor."""
    return {"hidden_states": (batch, _REFERENCE_TOKENS + _tokens(grid), _PACKED_CHANNELS)}


# --- Flux3


def _build_flux3() -> nn.Module:
    from diffusers.models.transformers import Flux3Transformer2DModel

    return Flux3Transformer2DModel(
        in_channels=_PACKED_CHANNELS,
        cond_in_channels=_PACKED_CHANNELS,
        num_layers=LAYERS,
        num_single_layers=LAYERS,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_DIM,
        axes_dims_rope=_ROPE_FOUR_AXES,
    )


# Rows and columns are half a position apart.
_FLUX3_SCALE = torch.tensor([1.0, 0.5, 0.5, 1.0])


def _condition_flux3(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "encoder_hidden_states": text(generator, batch),
        "txt_ids": _text_ids().float(),
        "img_ids": _image_ids(grid) * _FLUX3_SCALE,
    }


def _condition_flux3_image(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    return {
        **_condition_flux3(generator, grid, batch),
        "image_cond_hidden_states": torch.randn(batch, _REFERENCE_TOKENS, _PACKED_CHANNELS, generator=generator),
        "image_cond_ids": _image_ids(_REFERENCE, layer=-1) * _FLUX3_SCALE,
    }


# --- LongCat and Ovis


def _build_longcat() -> nn.Module:
    from diffusers.models.transformers import LongCatImageTransformer2DModel

    return LongCatImageTransformer2DModel(**_flux_like(), pooled_projection_dim=TEXT_DIM)


def _condition_longcat(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "encoder_hidden_states": text(generator, batch),
        "txt_ids": _text_positions(),
        "img_ids": _positions(grid, first=1, start=TEXT_LEN),
    }


def _build_ovis() -> nn.Module:
    from diffusers.models.transformers import OvisImageTransformer2DModel

    return OvisImageTransformer2DModel(**_flux_like(), out_channels=_PACKED_CHANNELS)


def _condition_ovis(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "encoder_hidden_states": text(generator, batch),
        "txt_ids": _text_positions(),
        "img_ids": _positions(grid),
    }


# --- JoyImage


def _joyimage() -> dict[str, Any]:
    return {
        "patch_size": [1, PATCH, PATCH],
        "in_channels": CHANNELS,
        "hidden_size": WIDTH,
        "num_attention_heads": HEADS,
        "text_dim": TEXT_DIM,
        "num_layers": LAYERS,
        "rope_dim_list": list(ROPE),
    }


def _build_joyimage() -> nn.Module:
    from diffusers.models.transformers import JoyImageEditTransformer3DModel

    return JoyImageEditTransformer3DModel(**_joyimage())


def _condition_joyimage(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    return {"encoder_hidden_states": text(generator, batch)}


def _joyimage_latents(grid: Grid, batch: int) -> dict[str, Shapes]:
    """[batch, items, channels, frames, height, width]: one reference image, then the noise."""
    return {"hidden_states": (batch, 2, CHANNELS, 1, grid[1] * PATCH, grid[2] * PATCH)}


def _build_joyimage_plus() -> nn.Module:
    from diffusers.models.transformers import JoyImageEditPlusTransformer3DModel

    return JoyImageEditPlusTransformer3DModel(**_joyimage())


def _condition_joyimage_plus(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    # Further rows of the batch have a smaller reference, and padding after it.
    shapes = [[grid, (1, 2, max(_REFERENCE[2] - row, 1))] for row in range(batch)]
    return {
        "encoder_hidden_states": text(generator, batch),
        "encoder_hidden_states_mask": mask(batch),
        "shape_list": shapes,
    }


def _joyimage_plus_latents(grid: Grid, batch: int) -> dict[str, Shapes]:
    """[batch, patches, channels, and the sides of a patch]: the noise, then a reference image of another size."""
    return {"hidden_states": (batch, _tokens(grid) + _REFERENCE_TOKENS, CHANNELS, 1, PATCH, PATCH)}


_DOUBLE, _SINGLE, _JOY = ("transformer_blocks",), ("single_transformer_blocks",), ("double_blocks",)
_BOTH = _DOUBLE + _SINGLE
_FLUX3_TEXT, _FLUX3_IMAGE, _FLUX3_REFERENCE = "txt_mode_blocks", "mode_blocks.image", "mode_blocks.image_cond"

MODELS: dict[str, TinyModel] = {
    spec.name: spec
    for spec in (
        TinyModel("BriaTransformer2DModel", _build_bria, _condition_bria, packed, flow, _BOTH),
        TinyModel("BriaFiboTransformer2DModel", _build_fibo, _condition_fibo, packed, flow, _BOTH),
        TinyModel("ChromaTransformer2DModel", _build_chroma, _condition_chroma, packed, level, _BOTH),
        TinyModel(
            "FluxTransformer2DModel+controlnet",
            TEN["flux"].build,
            _condition_flux_controlnet,
            packed,
            level,
            _BOTH,
        ),
        TinyModel("Flux2Transformer2DModel", _build_flux2, _condition_flux2, packed, level, _BOTH),
        # The pipeline makes this pass at the first step of a request only, and passes of the next kind after it.
        TinyModel(
            "Flux2Transformer2DModel+kv-extract",
            _build_flux2_kv,
            _condition_flux2_extract,
            _flux2_extract_latents,
            level,
            _BOTH,
            switches={"return_dict": False, "kv_cache_mode": "extract", "num_ref_tokens": _REFERENCE_TOKENS},
        ),
        TinyModel(
            "Flux2Transformer2DModel+kv-cached",
            _build_flux2_kv,
            _condition_flux2_cached,
            packed,
            level,
            _BOTH,
            switches={"return_dict": False, "kv_cache_mode": "cached"},
        ),
        TinyModel("LongCatImageTransformer2DModel", _build_longcat, _condition_longcat, packed, level, _BOTH),
        TinyModel("OvisImageTransformer2DModel", _build_ovis, _condition_ovis, packed, level, _BOTH),
        TinyModel(
            "Flux3Transformer2DModel",
            _build_flux3,
            _condition_flux3,
            packed,
            level,
            (_FLUX3_TEXT, _FLUX3_IMAGE, *_SINGLE),
        ),
        TinyModel(
            "Flux3Transformer2DModel+image-cond",
            _build_flux3,
            _condition_flux3_image,
            packed,
            level,
            (_FLUX3_TEXT, _FLUX3_IMAGE, _FLUX3_REFERENCE, *_SINGLE),
        ),
        TinyModel(
            "QwenImageTransformer2DModel+controlnet",
            TEN["qwenimage"].build,
            _condition_qwenimage_controlnet,
            packed,
            level,
            _DOUBLE,
        ),
        TinyModel("SD3Transformer2DModel+3.5-dual", _build_sd35, TEN["sd3"].conditioning, image, flow, _DOUBLE),
        TinyModel(
            "SD3Transformer2DModel+controlnet", TEN["sd3"].build, _condition_sd3_controlnet, image, flow, _DOUBLE
        ),
        TinyModel(
            "BriaFibo2Transformer2DModel",
            _build_fibo2,
            _condition_fibo2,
            image,
            level,
            ("noise_refiner", "perceiver.layers", "layers"),
        ),
        TinyModel(
            "JoyImageEditTransformer3DModel", _build_joyimage, _condition_joyimage, _joyimage_latents, flow, _JOY
        ),
        TinyModel(
            "JoyImageEditPlusTransformer3DModel",
            _build_joyimage_plus,
            _condition_joyimage_plus,
            _joyimage_plus_latents,
            flow,
            _JOY,
        ),
    )
}
