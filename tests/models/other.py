"""Audio, proteins, and the plain transformers inside UNets: models whose tokens are no patches of images or video."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn

from .tiny import (
    CHANNELS,
    HEAD_DIM,
    HEADS,
    IMAGE_GRIDS,
    LAYERS,
    PATCH,
    TEXT_DIM,
    TEXT_LEN,
    VIDEO_GRIDS,
    WIDTH,
    Grid,
    Shapes,
    TinyModel,
    level,
    mask,
    text,
)

# Audio frames (or residues of a protein) are the width of a grid.
_LINE_GRIDS: tuple[Grid, ...] = ((1, 1, 18), (1, 1, 22), (1, 1, 13))
_POOLED_DIM = 20
_AUDIO_CHANNELS = 6


def _nothing(*_: Any) -> dict[str, Any]:
    return {}


def _condition_text(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    return {"encoder_hidden_states": text(generator, batch)}


def _line(grid: Grid, batch: int) -> dict[str, Shapes]:
    """[batch, frames, channels]."""
    return {"hidden_states": (batch, grid[2], CHANNELS)}


def _line_channels_first(grid: Grid, batch: int) -> dict[str, Shapes]:
    """[batch, channels, frames]."""
    return {"hidden_states": (batch, CHANNELS, grid[2])}


def _data_level(sigma: float, batch: int) -> dict[str, Any]:
    """Float in [0, 1), [batch]: 0 is noise and 1 is data."""
    return {"timestep": torch.full((batch,), 1.0 - sigma)}


def _rename(module: nn.Module, name: str, known: str) -> None:
    """Let ``randomize``, which tells norms and modulations by their names, see a child or parameter as ``known``.

    The first of two names counts; the forward goes on using the other.
    """
    value = getattr(module, name)
    delattr(module, name)
    setattr(module, known, value)
    setattr(module, name, value)


# --- ACE-Step


def _build_ace_step() -> nn.Module:
    from diffusers import AceStepTransformer1DModel

    return AceStepTransformer1DModel(
        hidden_size=WIDTH,
        intermediate_size=64,
        # Layers with and without a sliding window take turns.
        num_hidden_layers=6,
        num_attention_heads=HEADS,
        num_key_value_heads=1,
        head_dim=HEAD_DIM,
        in_channels=3 * CHANNELS,
        audio_acoustic_hidden_dim=CHANNELS,
        patch_size=PATCH,
        # Shorter than the shortest sequence, of 7 tokens: the mask hides something.
        sliding_window=3,
        encoder_hidden_size=TEXT_DIM,
        is_turbo=True,
    )


def _condition_ace_step(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    source = torch.randn(batch, grid[2], CHANNELS, generator=generator)
    context = torch.cat([source, torch.ones_like(source)], dim=-1)
    return {"encoder_hidden_states": text(generator, batch), "context_latents": context}


def _ace_step_timestep(sigma: float, batch: int) -> dict[str, Any]:
    """The pipeline passes one tensor as both."""
    timestep = torch.full((batch,), sigma)
    return {"timestep": timestep, "timestep_r": timestep}


# --- LongCat audio


def _build_longcat_audio() -> nn.Module:
    from diffusers import LongCatAudioDiTTransformer

    return LongCatAudioDiTTransformer(
        dit_dim=WIDTH,
        dit_depth=LAYERS,
        dit_heads=HEADS,
        dit_text_dim=TEXT_DIM,
        latent_dim=CHANNELS,
        ff_mult=2.0,
    )


def _condition_longcat_audio(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "encoder_hidden_states": text(generator, batch),
        "encoder_attention_mask": mask(batch).bool(),
        # Requests of one batch may differ in length; the first is the longest.
        "attention_mask": torch.arange(grid[2])[None] < (grid[2] - torch.arange(batch))[:, None],
        "latent_cond": torch.randn(batch, grid[2], CHANNELS, generator=generator),
    }


# --- MiniMax


def _build_minimax_h3() -> nn.Module:
    from diffusers import MiniMaxH3Transformer3DModel

    model = MiniMaxH3Transformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        hidden_size=WIDTH,
        num_layers=LAYERS,
        num_refiner_layers=2,
        ffn_dim=64,
        in_channels=CHANNELS,
        audio_in_channels=_AUDIO_CHANNELS,
        patch_size=(1, PATCH, PATCH),
        text_dim=TEXT_DIM,
        freq_dim=32,
        time_embed_hidden_dim=WIDTH,
        time_embed_dim=16,
        # Three axes of two channels a frequency: 12 of the 16 channels of a head turn.
        rope_freq_dim=2,
    )
    for block in model.transformer_blocks:
        _rename(block, "adaln_proj", "norm_adaln_proj")
    return model


def _minimax_h3_lengths(grid: Grid) -> tuple[int, int]:
    """Rows of audio and of video; each frame of the video has two of audio."""
    return 2 * grid[0], grid[0] * grid[1] * grid[2]


def _condition_minimax_h3(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    frames, height, width = grid
    audio, video = _minimax_h3_lengths(grid)
    # Text, then audio, then video: one packed sequence.
    parts = torch.arange(TEXT_LEN), TEXT_LEN + torch.arange(audio), TEXT_LEN + audio + torch.arange(video)
    line = torch.cat([torch.arange(TEXT_LEN), TEXT_LEN + torch.arange(audio) // 2])
    times = TEXT_LEN + torch.arange(frames)
    volume = torch.cartesian_prod(times, torch.arange(height), torch.arange(width))
    tags = torch.tensor([1, 2, 0]).repeat_interleave(torch.tensor([TEXT_LEN, audio, video]))
    return {
        "encoder_hidden_states": text(generator, batch),
        # The text is clean, the rest as noisy as the step.
        "timestep_indices": (tags == 1).long(),
        "token_tags": tags,
        "position_ids": torch.cat([line[:, None].expand(-1, 3), volume]),
        "text_indices": parts[0],
        "audio_indices": parts[1],
        "video_indices": parts[2],
    }


def _minimax_h3_latents(grid: Grid, batch: int) -> dict[str, Shapes]:
    audio, video = _minimax_h3_lengths(grid)
    return {
        "hidden_states": (batch, video, CHANNELS * PATCH * PATCH),
        "audio_hidden_states": (batch, audio, _AUDIO_CHANNELS),
    }


def _minimax_h3_timestep(sigma: float, batch: int) -> dict[str, Any]:
    """The distinct noise levels of the packed sequence, whatever the batch."""
    return {"timestep": torch.tensor([sigma, 0.0])}


def _build_minimax_music() -> nn.Module:
    from diffusers import MiniMaxMusic3Transformer1DModel

    return MiniMaxMusic3Transformer1DModel(
        in_channels=CHANNELS,
        condition_dim=TEXT_DIM,
        num_layers=LAYERS,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        ff_inner_dim=64,
        rotary_dim=8,
        fourier_embedding_dim=32,
    )


def _condition_minimax_music(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    # A hidden state of the language model for each frame.
    return {"encoder_hidden_states": text(generator, batch, length=grid[2])}


def _build_minimax_depth() -> nn.Module:
    from diffusers.models.transformers.minimax_music3_rvq_depth_decoder import MiniMaxMusic3RVQDepthDecoder

    return MiniMaxMusic3RVQDepthDecoder(
        hidden_size=WIDTH,
        num_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=64,
        audio_vocab_size=10,
    )


def _minimax_depth_latents(grid: Grid, batch: int) -> dict[str, Shapes]:
    """No noise is taken away: these are the embeddings of the codes that one audio frame has so far."""
    return {"inputs_embeds": (batch, grid[2], WIDTH)}


# --- Stable Audio


def _build_stable_audio_3(differential: bool) -> nn.Module:
    from diffusers import StableAudio3DiTModel
    from diffusers.models.transformers.transformer_stable_audio3 import StableAudio3RMSNorm

    model = StableAudio3DiTModel(
        io_channels=CHANNELS,
        embed_dim=WIDTH,
        depth=LAYERS,
        num_heads=HEADS,
        cond_token_dim=TEXT_DIM,
        global_cond_dim=_POOLED_DIM,
        local_add_cond_dim=CHANNELS + 1,
        timestep_features_dim=32,
        ff_mult=2.0,
        num_memory_tokens=3,
        use_differential_attention=differential,
    )
    for module in model.modules():
        if isinstance(module, StableAudio3RMSNorm):
            _rename(module, "gamma", "weight")
    return model


def _condition_stable_audio_3(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "encoder_hidden_states": text(generator, batch),
        "encoder_attention_mask": mask(batch),
        "global_hidden_states": torch.randn(batch, _POOLED_DIM, generator=generator),
    }


def _build_stable_audio() -> nn.Module:
    from diffusers import StableAudioDiTModel

    return StableAudioDiTModel(
        in_channels=CHANNELS,
        num_layers=LAYERS,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        num_key_value_attention_heads=1,
        out_channels=CHANNELS,
        cross_attention_dim=HEAD_DIM,
        time_proj_dim=32,
        global_states_input_dim=_POOLED_DIM,
        cross_attention_input_dim=TEXT_DIM,
    )


def _condition_stable_audio(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    return {
        "encoder_hidden_states": text(generator, batch),
        "global_hidden_states": text(generator, batch, length=1, width=_POOLED_DIM),
        # Half the channels of a head turn; the global state is one more token.
        "rotary_embedding": get_1d_rotary_pos_embed(
            HEAD_DIM // 2, grid[2] + 1, use_real=True, repeat_interleave_real=False
        ),
    }


def _stable_audio_timestep(sigma: float, batch: int) -> dict[str, Any]:
    """One for the whole batch."""
    return level(sigma, 1)


# --- Transformers inside UNets. The UNet adds the timestep in its residual blocks and passes them none.


def _build_temporal() -> nn.Module:
    from diffusers import TransformerTemporalModel

    return TransformerTemporalModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=WIDTH,
        num_layers=LAYERS,
        norm_num_groups=4,
    )


_TEMPORAL_FRAMES = 5


def _temporal_latents(grid: Grid, batch: int) -> dict[str, Shapes]:
    """[batch * frames, channels, height, width]."""
    return {"hidden_states": (batch * grid[0], WIDTH, grid[1], grid[2])}


def _build_dreamlite() -> nn.Module:
    from diffusers import DreamLiteTransformer2DModel
    from diffusers.models.attention_processor import Attention
    from diffusers.models.unets.unet_dreamlite import DreamLiteAttnProcessor2_0

    model = DreamLiteTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=WIDTH,
        num_layers=LAYERS,
        norm_num_groups=4,
        cross_attention_dim=TEXT_DIM,
        use_linear_projection=True,
        qk_norm="rms_norm",
        num_kv_heads=1,
        ff_mult=2,
    )
    # As the UNet does: the default one takes no keys and values that heads share.
    for module in model.modules():
        if isinstance(module, Attention):
            module.set_processor(DreamLiteAttnProcessor2_0())
    return model


def _condition_dreamlite(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    # The UNet has made a bias of the mask.
    bias = (1 - mask(batch).float()) * -10000.0
    return {"encoder_hidden_states": text(generator, batch), "encoder_attention_mask": bias[:, None]}


_PLAIN: dict[str, Any] = {
    "num_attention_heads": HEADS,
    "attention_head_dim": HEAD_DIM,
    "in_channels": WIDTH,
    "num_layers": LAYERS,
    "norm_num_groups": 4,
    "cross_attention_dim": TEXT_DIM,
}


def _build_plain() -> nn.Module:
    from diffusers import Transformer2DModel

    return Transformer2DModel(**_PLAIN, use_linear_projection=True)


_DUAL_IMAGE_LEN = 5


def _build_dual() -> nn.Module:
    from diffusers.models.transformers.dual_transformer_2d import DualTransformer2DModel

    model = DualTransformer2DModel(**_PLAIN)
    # Set by the pipeline: text tokens for the second transformer, then image tokens for the first.
    model.condition_lengths = [TEXT_LEN, _DUAL_IMAGE_LEN]
    return model


def _condition_dual(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    return {"encoder_hidden_states": text(generator, batch, length=TEXT_LEN + _DUAL_IMAGE_LEN)}


def _feature_map(grid: Grid, batch: int) -> dict[str, Shapes]:
    """[batch, width, height, width]: a feature map of a UNet, a token a pixel."""
    return {"hidden_states": (batch, WIDTH, grid[1], grid[2])}


# --- RFD4-Proteina


def _build_rfd4() -> nn.Module:
    from diffusers import RFD4ProteinaTransformer

    return RFD4ProteinaTransformer(
        # The pairs are updated after every second layer, and not after the last.
        nlayers=6,
        token_dim=WIDTH,
        nheads=HEADS,
        dim_cond=16,
        pair_repr_dim=12,
        latent_dim=CHANNELS,
        token_type_emb_dim=8,
        cath_emb_dim=4,
        t_emb_dim=16,
        seq_sep_dim=8,
        xt_pair_dist_dim=10,
        tri_mult_c=8,
    )


_ATOMS = 37


def _condition_rfd4(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    length = grid[2]

    def draw(*shape: int, below: int = 2) -> Tensor:
        return torch.randint(0, below, (batch, length, *shape), generator=generator)

    position = torch.arange(length)
    padding_mask = position[None] < (length - torch.arange(batch))[:, None]
    chains = (position[None] >= length // 2).long().expand(batch, -1)
    bonds = ((position[:, None] - position[None]).abs() == 1).expand(batch, -1, -1)
    conditioning = {
        # The first residue is given, and the last has no side chain to find.
        "is_in_context_conditioning": (position == 0).expand(batch, -1),
        "supports_local_latent": (position < length - 1).expand(batch, -1),
        "molecule_iid": chains,
        "molecule_entity_id": torch.zeros_like(chains),
        "bond_mask": bonds,
        "bond_order": bonds.long(),
        "token_bond_path_length": (position[:, None] - position[None]).abs().expand(batch, -1, -1),
        "condition_index-group_1_token": (position // 3).expand(batch, -1),
        "condition_secondary-structure_1_residue": draw(below=4),
        "condition_cath-label_1_residue": draw(3, below=5),
        "condition_coordinate_1_atom": torch.randn(batch, length, _ATOMS, 3, generator=generator),
        "condition_hbond_1_atom": draw(_ATOMS, below=4),
        "condition_pication_1_atom": draw(_ATOMS, below=4),
    }
    for name in ("pistack", "saltbridge", "hydrophobic", "metal-coord"):
        conditioning[f"condition_{name}_1_atom"] = draw(_ATOMS)
    return {
        "padding_mask": padding_mask,
        "token_type": torch.zeros(batch, length, dtype=torch.int64),
        "atom37_mask": draw(_ATOMS).bool(),
        "conditioning": conditioning,
    }


def _rfd4_latents(grid: Grid, batch: int) -> dict[str, Shapes]:
    return {"bb_ca": (batch, grid[2], 3), "local_latents": (batch, grid[2], CHANNELS)}


def _rfd4_timestep(sigma: float, batch: int) -> dict[str, Any]:
    """0 is noise and 1 is data, on a schedule of its own for each."""
    return {
        "bb_ca_time": torch.full((batch,), 1.0 - sigma),
        "local_latents_time": torch.full((batch,), (1.0 - sigma) ** 2),
    }


# --- Spectrogram diffusion


def _build_t5_film() -> nn.Module:
    from diffusers.models.transformers.t5_film_transformer import T5FilmDecoder

    return T5FilmDecoder(
        input_dims=CHANNELS,
        targets_length=32,
        d_model=WIDTH,
        num_layers=LAYERS,
        num_heads=HEADS,
        d_kv=HEAD_DIM,
        d_ff=64,
    )


def _condition_t5_film(generator: Generator, grid: Grid, batch: int) -> dict[str, Any]:
    notes = text(generator, batch, width=WIDTH)
    last_segment = text(generator, batch, length=grid[2], width=WIDTH)
    return {
        "encodings_and_masks": [
            (notes, mask(batch).bool()),
            (last_segment, torch.ones(batch, grid[2], dtype=torch.bool)),
        ]
    }


def _t5_film_latents(grid: Grid, batch: int) -> dict[str, Shapes]:
    return {"decoder_input_tokens": (batch, grid[2], CHANNELS)}


def _t5_film_timestep(sigma: float, batch: int) -> dict[str, Any]:
    """Float in [0, 1), [batch]."""
    return {"decoder_noise_time": torch.full((batch,), sigma)}


_BLOCKS = "transformer_blocks"

MODELS: dict[str, TinyModel] = {
    spec.name: spec
    for spec in (
        TinyModel(
            "AceStepTransformer1DModel",
            _build_ace_step,
            _condition_ace_step,
            _line,
            _ace_step_timestep,
            ("layers",),
            # The last length is odd: the model pads it to whole patches.
            _LINE_GRIDS,
        ),
        TinyModel(
            "LongCatAudioDiTTransformer",
            _build_longcat_audio,
            _condition_longcat_audio,
            _line,
            level,
            ("blocks",),
            _LINE_GRIDS,
        ),
        TinyModel(
            "MiniMaxH3Transformer3DModel",
            _build_minimax_h3,
            _condition_minimax_h3,
            _minimax_h3_latents,
            _minimax_h3_timestep,
            ("token_refiner.refiner_blocks", _BLOCKS),
            VIDEO_GRIDS,
        ),
        TinyModel(
            "MiniMaxMusic3Transformer1DModel",
            _build_minimax_music,
            _condition_minimax_music,
            _line_channels_first,
            _data_level,
            (_BLOCKS,),
            _LINE_GRIDS,
        ),
        TinyModel(
            "StableAudio3DiTModel",
            partial(_build_stable_audio_3, differential=False),
            _condition_stable_audio_3,
            _line_channels_first,
            level,
            (_BLOCKS,),
            _LINE_GRIDS,
        ),
        TinyModel(
            "StableAudio3DiTModel+diff-attn",
            partial(_build_stable_audio_3, differential=True),
            _condition_stable_audio_3,
            _line_channels_first,
            level,
            (_BLOCKS,),
            _LINE_GRIDS,
        ),
        TinyModel(
            "StableAudioDiTModel",
            _build_stable_audio,
            _condition_stable_audio,
            _line_channels_first,
            _stable_audio_timestep,
            (_BLOCKS,),
            _LINE_GRIDS,
        ),
        TinyModel(
            "TransformerTemporalModel",
            _build_temporal,
            _nothing,
            _temporal_latents,
            _nothing,
            (_BLOCKS,),
            # The frames are a switch: the model cannot tell them from the batch.
            ((_TEMPORAL_FRAMES, 3, 4), (_TEMPORAL_FRAMES, 4, 4), (_TEMPORAL_FRAMES, 5, 3)),
            {"num_frames": _TEMPORAL_FRAMES, "return_dict": False},
        ),
        TinyModel(
            "DreamLiteTransformer2DModel",
            _build_dreamlite,
            _condition_dreamlite,
            _feature_map,
            _nothing,
            (_BLOCKS,),
            IMAGE_GRIDS,
        ),
        TinyModel(
            "DualTransformer2DModel",
            _build_dual,
            _condition_dual,
            _feature_map,
            _nothing,
            # Both take the same input; the second is asked first.
            (f"transformers.1.{_BLOCKS}", f"transformers.0.{_BLOCKS}"),
            IMAGE_GRIDS,
        ),
        TinyModel("Transformer2DModel", _build_plain, _condition_text, _feature_map, _nothing, (_BLOCKS,), IMAGE_GRIDS),
        TinyModel(
            "MiniMaxMusic3RVQDepthDecoder",
            _build_minimax_depth,
            _nothing,
            _minimax_depth_latents,
            _nothing,
            ("layers",),
            # At most eight codes a frame.
            ((1, 1, 6), (1, 1, 8), (1, 1, 4)),
            {},
        ),
        TinyModel(
            "RFD4ProteinaTransformer",
            _build_rfd4,
            _condition_rfd4,
            _rfd4_latents,
            _rfd4_timestep,
            # The pair updates are no stack of their own: each runs between two of these layers.
            ("transformer_layers",),
            _LINE_GRIDS,
        ),
        TinyModel(
            "RFD4ProteinaTransformer+recycle2",
            _build_rfd4,
            _condition_rfd4,
            _rfd4_latents,
            _rfd4_timestep,
            ("transformer_layers",),
            _LINE_GRIDS,
            {"recycle_depth": 2, "return_dict": False},
        ),
        TinyModel(
            "T5FilmDecoder",
            _build_t5_film,
            _condition_t5_film,
            _t5_film_latents,
            _t5_film_timestep,
            ("decoders",),
            _LINE_GRIDS,
            {},
        ),
    )
}
