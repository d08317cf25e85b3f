"""Image models with one stream, and those that read, gather or sort tokens."""

from __future__ import annotations

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
    WIDTH,
    Grid,
    Shapes,
    TinyModel,
    discrete,
    flow,
    image,
    image_no_patch,
    level,
    mask,
    packed,
    text,
)

# Length of a second text, apart from the first's and from every token count.
_TEXT_LEN_T5 = 10
# Pixels per token: the VAE makes one latent of 8, and a patch is 2 wide.
_PIXELS = 16


def _build_prior() -> nn.Module:
    from diffusers import PriorTransformer

    return PriorTransformer(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=LAYERS,
        embedding_dim=TEXT_DIM,
        num_embeddings=TEXT_LEN,
    )


def _condition_prior(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "proj_embedding": torch.randn(batch, TEXT_DIM, generator=generator),
        "encoder_hidden_states": text(generator, batch),
        "attention_mask": mask(batch).bool(),
    }


def _prior_latents(grid: Grid, batch: int) -> dict[str, Shapes]:
    """What is denoised is the CLIP embedding of an image."""
    return {"hidden_states": (batch, TEXT_DIM)}


def _prior_timestep(sigma: float, batch: int) -> dict[str, Any]:
    """An entry of the scheduler's int64 timesteps, as it comes: without dimensions."""
    return {"timestep": torch.tensor(int(sigma * 1000))}


def _build_ernie() -> nn.Module:
    from diffusers import ErnieImageTransformer2DModel

    return ErnieImageTransformer2DModel(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_layers=LAYERS,
        ffn_hidden_size=2 * WIDTH,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_in_dim=TEXT_DIM,
        rope_axes_dim=ROPE,
    )


def _condition_ernie(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    # The pipeline pads to the longest text only.
    return {"text_bth": text(generator, batch), "text_lens": TEXT_LEN - torch.arange(batch)}


def _build_glm() -> nn.Module:
    from diffusers import GlmImageTransformer2DModel

    return GlmImageTransformer2DModel(
        patch_size=PATCH,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=LAYERS,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        text_embed_dim=TEXT_DIM,
        time_embed_dim=16,
        condition_dim=8,
        prior_vq_quantizer_codebook_size=20,
    )


def _pixels(grid: Grid, batch: int) -> Tensor:
    """Height and width of the image: [batch, 2]."""
    return torch.tensor([[grid[1] * _PIXELS, grid[2] * _PIXELS]]).float().repeat(batch, 1)


def _condition_glm(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache

    prompt = text(generator, batch)
    prior = torch.randint(0, 20, (batch, grid[1] * grid[2]), generator=generator)
    return {
        "encoder_hidden_states": prompt,
        "prior_token_id": prior,
        "prior_token_drop": torch.zeros_like(prior, dtype=torch.bool),
        "target_size": _pixels(grid, batch),
        "crop_coords": torch.zeros(batch, 2),
        # Empty and in no mode, as without an image in the prompt.
        "kv_caches": GlmImageKVCache(num_layers=LAYERS),
    }


def _glm_timestep(sigma: float, batch: int) -> dict[str, Any]:
    return {"timestep": flow(sigma, batch)["timestep"] - 1}


def _build_hidream() -> nn.Module:
    from diffusers import HiDreamImageTransformer2DModel

    return HiDreamImageTransformer2DModel(
        patch_size=PATCH,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=LAYERS,
        num_single_layers=LAYERS,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        caption_channels=[TEXT_DIM, 20],
        text_emb_dim=20,
        axes_dims_rope=ROPE,
        # Images that are no squares are padded to 6 x 6 tokens.
        max_resolution=(12, 12),
        llama_layers=list(range(2 * LAYERS)),
    )


def _condition_hidream(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "encoder_hidden_states_t5": text(generator, batch),
        "encoder_hidden_states_llama3": torch.randn(2 * LAYERS, batch, TEXT_LEN, 20, generator=generator),
        "pooled_embeds": torch.randn(batch, 20, generator=generator),
    }


def _hidream_timestep(sigma: float, batch: int) -> dict[str, Any]:
    return {"timesteps": flow(sigma, batch)["timestep"]}


_HUNYUAN_DIT = {
    "num_attention_heads": HEADS,
    "attention_head_dim": HEAD_DIM,
    "in_channels": CHANNELS,
    "patch_size": PATCH,
    "sample_size": 8,
    "hidden_size": WIDTH,
    # Blocks 5, 6 and 7 take what blocks 2, 1 and 0 gave.
    "num_layers": 8,
    "cross_attention_dim": TEXT_DIM,
    "cross_attention_dim_t5": 16,
    "pooled_projection_dim": 20,
    "text_len": TEXT_LEN,
    "text_len_t5": _TEXT_LEN_T5,
}


def _build_hunyuan_dit() -> nn.Module:
    from diffusers import HunyuanDiT2DModel

    return HunyuanDiT2DModel(**_HUNYUAN_DIT)


def _build_hunyuan_dit_controlnet() -> nn.Module:
    from diffusers import HunyuanDiT2DModel

    class HunyuanDiT2DControlled(HunyuanDiT2DModel):
        """Does not empty the list of the caller, so that one request's arguments serve more than one call."""

        def forward(self, *args: Any, controlnet_block_samples: list[Tensor], **kwargs: Any) -> Any:
            return super().forward(*args, controlnet_block_samples=list(controlnet_block_samples), **kwargs)

    return HunyuanDiT2DControlled(**_HUNYUAN_DIT)


def _condition_hunyuan_dit(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed

    size = grid[1:]
    return {
        "encoder_hidden_states": text(generator, batch),
        "text_embedding_mask": mask(batch),
        "encoder_hidden_states_t5": text(generator, batch, _TEXT_LEN_T5, 16),
        "text_embedding_mask_t5": mask(batch, _TEXT_LEN_T5),
        # Original size, target size, crop.
        "image_meta_size": torch.cat([_pixels(grid, batch), _pixels(grid, batch), torch.zeros(batch, 2)], dim=1),
        "style": torch.zeros(batch, dtype=torch.int64),
        "image_rotary_emb": get_2d_rotary_pos_embed(HEAD_DIM, ((0, 0), size), size, output_type="pt"),
    }


def _condition_hunyuan_dit_controlnet(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    prompt = _condition_hunyuan_dit(generator, grid, batch)
    samples = [torch.randn(batch, grid[1] * grid[2], WIDTH, generator=generator) for _ in range(3)]
    return {**prompt, "controlnet_block_samples": samples}


def _hunyuan_dit_timestep(sigma: float, batch: int) -> dict[str, Any]:
    return {"timestep": discrete(sigma, batch)["timestep"].float()}


def _build_cogview3() -> nn.Module:
    from diffusers import CogView3PlusTransformer2DModel

    return CogView3PlusTransformer2DModel(
        patch_size=PATCH,
        in_channels=CHANNELS,
        num_layers=LAYERS,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        out_channels=CHANNELS,
        text_embed_dim=TEXT_DIM,
        time_embed_dim=16,
        condition_dim=8,
        pos_embed_max_size=8,
        sample_size=8,
    )


def _build_cogview4() -> nn.Module:
    from diffusers import CogView4Transformer2DModel

    return CogView4Transformer2DModel(
        patch_size=PATCH,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=LAYERS,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        text_embed_dim=TEXT_DIM,
        time_embed_dim=16,
        condition_dim=8,
        sample_size=8,
        rope_axes_dim=(8, 8),
    )


def _condition_cogview(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "encoder_hidden_states": text(generator, batch),
        "original_size": _pixels(grid, batch),
        "target_size": _pixels(grid, batch),
        "crop_coords": torch.zeros(batch, 2),
    }


def _build_ideogram4() -> nn.Module:
    from diffusers import Ideogram4Transformer2DModel

    return Ideogram4Transformer2DModel(
        in_channels=CHANNELS * PATCH * PATCH,
        num_layers=LAYERS,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        intermediate_size=2 * WIDTH,
        adaln_dim=16,
        llm_features_dim=TEXT_DIM,
        mrope_section=(4, 2, 2),
    )


def _image_ids(grid: Grid) -> Tensor:
    """Frame, row and column of each token: [tokens, 3]."""
    return torch.cartesian_prod(torch.zeros(1), torch.arange(float(grid[1])), torch.arange(float(grid[2])))


def _condition_ideogram4(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    from diffusers.models.transformers import transformer_ideogram4 as ideogram4

    # Padded on the left: padding and text take the first TEXT_LEN places, the image the rest.
    is_text = mask(batch).flip(1).bool()
    is_image = torch.ones(batch, grid[1] * grid[2], dtype=torch.bool)
    prompt = text(generator, batch) * is_text[..., None]
    text_ids = (is_text.long().cumsum(1) - 1).clamp(min=0)[..., None].expand(-1, -1, 3)
    image_ids = _image_ids(grid).long().expand(batch, -1, -1) + ideogram4.IMAGE_POSITION_OFFSET
    padding = torch.full((batch, TEXT_LEN), ideogram4.SEQUENCE_PADDING_INDICATOR)
    return {
        "encoder_hidden_states": torch.cat([prompt, torch.zeros(batch, grid[1] * grid[2], TEXT_DIM)], dim=1),
        "position_ids": torch.cat([text_ids, image_ids], dim=1),
        "segment_ids": torch.cat([torch.where(is_text, 1, padding), is_image.long()], dim=1),
        "indicator": torch.cat(
            [is_text * ideogram4.LLM_TOKEN_INDICATOR, is_image * ideogram4.OUTPUT_IMAGE_INDICATOR], dim=1
        ),
    }


def _ideogram4_latents(grid: Grid, batch: int) -> dict[str, Shapes]:
    """The pipeline puts as many tokens in front of the latents as the text has; the model masks them out."""
    return {"hidden_states": (batch, TEXT_LEN + grid[1] * grid[2], CHANNELS * PATCH * PATCH)}


def _progress(sigma: float, batch: int) -> dict[str, Any]:
    """Float in [0, 1), [batch], 0 for noise and 1 for an image: Ideogram, Lumina, OmniGen and Z-Image."""
    return {"timestep": torch.full((batch,), 1 - sigma)}


def _build_krea2() -> nn.Module:
    from diffusers import Krea2Transformer2DModel

    return Krea2Transformer2DModel(
        in_channels=CHANNELS * PATCH * PATCH,
        num_layers=LAYERS,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        num_key_value_heads=1,
        intermediate_size=2 * WIDTH,
        timestep_embed_dim=16,
        text_hidden_dim=TEXT_DIM,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=2 * TEXT_DIM,
        axes_dims_rope=ROPE,
    )


def _condition_krea2(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    return {
        # What three layers of the text encoder gave.
        "encoder_hidden_states": torch.randn(batch, TEXT_LEN, 3, TEXT_DIM, generator=generator),
        "encoder_attention_mask": mask(batch).bool(),
        "position_ids": torch.cat([torch.zeros(TEXT_LEN, 3), _image_ids(grid)]),
    }


def _build_lumina() -> nn.Module:
    from diffusers import LuminaNextDiT2DModel

    return LuminaNextDiT2DModel(
        sample_size=8,
        patch_size=PATCH,
        in_channels=CHANNELS,
        hidden_size=WIDTH,
        num_layers=LAYERS,
        num_attention_heads=HEADS,
        num_kv_heads=1,
        multiple_of=16,
        cross_attention_dim=TEXT_DIM,
    )


def _condition_lumina(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    return {
        "encoder_hidden_states": text(generator, batch),
        "encoder_mask": mask(batch),
        # For a canvas larger than the image, as in the pipeline; the model takes its corner.
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(HEAD_DIM, 12, 12),
        # Attention is scaled by how much longer the sequence is than this.
        "cross_attention_kwargs": {"base_sequence_length": 9},
    }


def _build_lumina2() -> nn.Module:
    from diffusers import Lumina2Transformer2DModel

    return Lumina2Transformer2DModel(
        sample_size=8,
        patch_size=PATCH,
        in_channels=CHANNELS,
        hidden_size=WIDTH,
        num_layers=LAYERS,
        num_refiner_layers=2,
        num_attention_heads=HEADS,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=ROPE,
        axes_lens=(16, 12, 12),
        cap_feat_dim=TEXT_DIM,
    )


def _condition_masked(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    return {"encoder_hidden_states": text(generator, batch), "encoder_attention_mask": mask(batch)}


# Where the tokens of an input image stand between those of the text: 2 x 2 of them.
_INPUT_IMAGE = (3, 7)


def _build_omnigen() -> nn.Module:
    from diffusers import OmniGenTransformer2DModel

    return OmniGenTransformer2DModel(
        in_channels=CHANNELS,
        patch_size=PATCH,
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        intermediate_size=2 * WIDTH,
        num_layers=LAYERS,
        pad_token_id=0,
        vocab_size=20,
        max_position_embeddings=128,
        original_max_position_embeddings=64,
        rope_scaling={
            "short_factor": [1.0 + 0.1 * i for i in range(HEAD_DIM // 2)],
            "long_factor": [1.0 + 0.5 * i for i in range(HEAD_DIM // 2)],
        },
        pos_embed_max_size=8,
        time_step_dim=16,
    )


def _condition_omnigen(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    start, end = _INPUT_IMAGE
    length = TEXT_LEN + end - start
    ids = torch.randint(1, 20, (batch, length), generator=generator)
    ids[:, start:end] = 0
    # Text, a token for the timestep, the image. Causal, but for each image within itself and what is made.
    total = length + 1 + grid[1] * grid[2]
    attention = torch.ones(total, total).tril()
    attention[start:end, start:end] = 1
    attention[length + 1 :] = 1
    return {
        "input_ids": ids,
        "input_img_latents": [torch.randn(1, CHANNELS, 4, 4, generator=generator) for _ in range(batch)],
        "input_image_sizes": {row: [[start, end]] for row in range(batch)},
        "attention_mask": attention.repeat(batch, 1, 1),
        "position_ids": torch.arange(total).repeat(batch, 1),
    }


def _build_prx() -> nn.Module:
    from diffusers.models.transformers.transformer_prx import PRXTransformer2DModel

    return PRXTransformer2DModel(
        in_channels=CHANNELS,
        patch_size=PATCH,
        context_in_dim=TEXT_DIM,
        hidden_size=WIDTH,
        mlp_ratio=2.0,
        num_heads=HEADS,
        depth=LAYERS,
        axes_dim=[8, 8],
    )


def _condition_prx(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    return {"encoder_hidden_states": text(generator, batch), "attention_mask": mask(batch).bool()}


# Texts and images are each padded to a multiple of 32 tokens: 32 of text and 64, 96 or 128 of an image.
_Z_GRIDS: tuple[Grid, ...] = ((1, 6, 6), (1, 8, 9), (1, 12, 9))
# Apart from the 32 tokens of a text.
_Z_WIDTH = 3 * HEAD_DIM


def _build_z_image() -> nn.Module:
    from diffusers import ZImageTransformer2DModel

    model = ZImageTransformer2DModel(
        all_patch_size=(PATCH,),
        in_channels=CHANNELS,
        dim=_Z_WIDTH,
        n_layers=LAYERS,
        n_refiner_layers=2,
        n_heads=3,
        n_kv_heads=3,
        cap_feat_dim=TEXT_DIM,
        axes_dims=list(ROPE),
        axes_lens=[64, 16, 16],
    )
    # The first call would make the rotary table, in a way that Dynamo cannot capture.
    model.rope_embedder(torch.zeros(1, 3, dtype=torch.int64))
    return model


def _condition_z_image(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    return {"cap_feats": list(text(generator, batch).unbind())}


def _condition_z_image_controlnet(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    prompt = _condition_z_image(generator, grid, batch)
    tokens = -(-grid[1] * grid[2] // 32) * 32 + 32
    # By block, and not for every block.
    samples = {block: torch.randn(batch, tokens, _Z_WIDTH, generator=generator) for block in (0, 2)}
    return {**prompt, "controlnet_block_samples": samples}


def _z_image_latents(grid: Grid, batch: int) -> dict[str, Shapes]:
    """A list of [channels, frames, height, width], one of each row of the batch."""
    return {"x": [(CHANNELS, 1, grid[1] * PATCH, grid[2] * PATCH)] * batch}


def _z_image_timestep(sigma: float, batch: int) -> dict[str, Any]:
    return {"t": _progress(sigma, batch)["timestep"]}


def _build_nucleus(layers: int, moe: bool) -> nn.Module:
    from diffusers import NucleusMoEImageTransformer2DModel

    return NucleusMoEImageTransformer2DModel(
        patch_size=PATCH,
        in_channels=CHANNELS * PATCH * PATCH,
        out_channels=CHANNELS,
        num_layers=layers,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        num_key_value_heads=1,
        joint_attention_dim=TEXT_DIM,
        axes_dims_rope=ROPE,
        # Feed-forwards are rounded down to a multiple of 128: any smaller ratio leaves none.
        mlp_ratio=6.0,
        moe_enabled=moe,
        num_experts=4,
        moe_intermediate_dim=8,
        # Each expert takes half of the tokens, so tokens go to none, one or several.
        capacity_factors=2.0,
        # The weights of experts come out larger than those of layers here; this takes their part back to size.
        route_scale=0.25,
    )


def _build_nucleus_dense() -> nn.Module:
    return _build_nucleus(LAYERS, moe=False)


def _build_nucleus_moe() -> nn.Module:
    # The first three and the last are dense, four in between have experts.
    return _build_nucleus(8, moe=True)


def _condition_nucleus(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "encoder_hidden_states": text(generator, batch),
        "encoder_hidden_states_mask": mask(batch).bool(),
        "img_shapes": [grid] * batch,
    }


# Image tokens come in groups of 2 x 2, each one place of the vision-language encoder.
_QWEN21_GRIDS: tuple[Grid, ...] = ((1, 4, 4), (1, 4, 6), (1, 6, 6))


def _build_qwen21() -> nn.Module:
    from diffusers import QwenImage21Transformer2DModel

    return QwenImage21Transformer2DModel(
        in_channels=CHANNELS * PATCH * PATCH,
        out_channels=CHANNELS * PATCH * PATCH,
        num_layers=LAYERS,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        context_in_dim=TEXT_DIM,
        axes_dims_rope=ROPE,
    )


def _condition_qwen21(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    places = torch.cat([torch.zeros(TEXT_LEN), torch.ones(grid[1] * grid[2] // 4)]).bool()
    return {
        "encoder_hidden_states": text(generator, batch),
        "encoder_hidden_states_mask": mask(batch).bool(),
        "img_shapes": [[grid]] * batch,
        "img_mask": places.repeat(batch, 1),
    }


def _condition_qwen21_cached(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    """As at every step but the first, which fills the cache with the keys and values of the text."""
    from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache

    prompt = _condition_qwen21(generator, grid, batch)
    cache = QwenImage21KVCache(LAYERS)
    for layer in range(LAYERS):
        key, value = torch.randn(2, batch, TEXT_LEN, HEADS, HEAD_DIM, generator=generator)
        cache.get_layer(layer).store(key, value)
    return {**prompt, "kv_cache": cache}


_BYT5_LEN, _BYT5_DIM = 5, 12


def _build_hunyuan_image(byt5_dim: int | None) -> nn.Module:
    from diffusers import HunyuanImageTransformer2DModel

    return HunyuanImageTransformer2DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=LAYERS,
        num_single_layers=LAYERS,
        num_refiner_layers=2,
        mlp_ratio=2.0,
        text_embed_dim=TEXT_DIM,
        text_embed_2_dim=byt5_dim,
        rope_axes_dim=(8, 8),
    )


def _build_hunyuan_image_byt5() -> nn.Module:
    return _build_hunyuan_image(_BYT5_DIM)


def _build_hunyuan_image_no_byt5() -> nn.Module:
    return _build_hunyuan_image(None)


def _condition_hunyuan_image(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    return {
        **_condition_masked(generator, grid, batch),
        "encoder_hidden_states_2": text(generator, batch, _BYT5_LEN, _BYT5_DIM),
        "encoder_attention_mask_2": mask(batch, _BYT5_LEN),
    }


_HUNYUAN_IMAGE_STACKS = (
    "context_embedder.token_refiner.refiner_blocks",
    "transformer_blocks",
    "single_transformer_blocks",
)
_BLOCKS, _LAYERS, _TRANSFORMER = ("blocks",), ("layers",), ("transformer_blocks",)

MODELS: dict[str, TinyModel] = {
    spec.name: spec
    for spec in (
        TinyModel(
            "PriorTransformer",
            _build_prior,
            _condition_prior,
            _prior_latents,
            _prior_timestep,
            _TRANSFORMER,
            ((1, 1, 1),),
        ),
        TinyModel("ErnieImageTransformer2DModel", _build_ernie, _condition_ernie, image_no_patch, flow, _LAYERS),
        TinyModel("GlmImageTransformer2DModel", _build_glm, _condition_glm, image, _glm_timestep, _TRANSFORMER),
        TinyModel(
            "HiDreamImageTransformer2DModel",
            _build_hidream,
            _condition_hidream,
            image,
            _hidream_timestep,
            ("double_stream_blocks", "single_stream_blocks"),
        ),
        TinyModel(
            "HunyuanDiT2DModel",
            _build_hunyuan_dit,
            _condition_hunyuan_dit,
            image,
            _hunyuan_dit_timestep,
            _BLOCKS,
        ),
        TinyModel(
            "HunyuanDiT2DModel+controlnet",
            _build_hunyuan_dit_controlnet,
            _condition_hunyuan_dit_controlnet,
            image,
            _hunyuan_dit_timestep,
            _BLOCKS,
        ),
        TinyModel("CogView3PlusTransformer2DModel", _build_cogview3, _condition_cogview, image, discrete, _TRANSFORMER),
        TinyModel("CogView4Transformer2DModel", _build_cogview4, _condition_cogview, image, flow, _TRANSFORMER),
        TinyModel(
            "Ideogram4Transformer2DModel",
            _build_ideogram4,
            _condition_ideogram4,
            _ideogram4_latents,
            _progress,
            _LAYERS,
        ),
        TinyModel(
            "Krea2Transformer2DModel",
            _build_krea2,
            _condition_krea2,
            packed,
            level,
            ("text_fusion.layerwise_blocks", "text_fusion.refiner_blocks", "transformer_blocks"),
        ),
        TinyModel("LuminaNextDiT2DModel", _build_lumina, _condition_lumina, image, _progress, _LAYERS),
        TinyModel(
            "Lumina2Transformer2DModel",
            _build_lumina2,
            _condition_masked,
            image,
            _progress,
            ("context_refiner", "noise_refiner", "layers"),
        ),
        TinyModel("OmniGenTransformer2DModel", _build_omnigen, _condition_omnigen, image, _progress, _LAYERS),
        TinyModel("PRXTransformer2DModel", _build_prx, _condition_prx, image, level, _BLOCKS),
        TinyModel(
            "ZImageTransformer2DModel",
            _build_z_image,
            _condition_z_image,
            _z_image_latents,
            _z_image_timestep,
            ("noise_refiner", "context_refiner", "layers"),
            _Z_GRIDS,
        ),
        TinyModel(
            "ZImageTransformer2DModel+controlnet",
            _build_z_image,
            _condition_z_image_controlnet,
            _z_image_latents,
            _z_image_timestep,
            ("noise_refiner", "context_refiner", "layers"),
            _Z_GRIDS,
        ),
        TinyModel(
            "NucleusMoEImageTransformer2DModel",
            _build_nucleus_dense,
            _condition_nucleus,
            packed,
            level,
            _TRANSFORMER,
        ),
        TinyModel(
            "NucleusMoEImageTransformer2DModel+moe",
            _build_nucleus_moe,
            _condition_nucleus,
            packed,
            level,
            _TRANSFORMER,
        ),
        TinyModel(
            "QwenImage21Transformer2DModel",
            _build_qwen21,
            _condition_qwen21,
            packed,
            level,
            _TRANSFORMER,
            _QWEN21_GRIDS,
        ),
        TinyModel(
            "QwenImage21Transformer2DModel+kv-cached",
            _build_qwen21,
            _condition_qwen21_cached,
            packed,
            level,
            _TRANSFORMER,
            _QWEN21_GRIDS,
            {"return_dict": False, "kv_cache_mode": "cached"},
        ),
        TinyModel(
            "HunyuanImageTransformer2DModel",
            _build_hunyuan_image_byt5,
            _condition_hunyuan_image,
            image_no_patch,
            flow,
            _HUNYUAN_IMAGE_STACKS,
            # The projection of the second text is 2048 wide whatever the model: with fewer tokens it is all the work.
            ((1, 16, 12), (1, 16, 16), (1, 12, 14)),
        ),
        TinyModel(
            "HunyuanImageTransformer2DModel+no-byt5",
            _build_hunyuan_image_no_byt5,
            _condition_masked,
            image_no_patch,
            flow,
            _HUNYUAN_IMAGE_STACKS,
        ),
    )
}
