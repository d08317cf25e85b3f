"""The engine's own transformers with small random weights, and the calls that a request makes to each."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any
from unittest import mock

import torch
from torch import Generator, Tensor, nn

ROOT = "vllm_omni.diffusion.models."
STEPS = 8
Inputs = dict[str, Any]


def normal(generator: Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def drawn(name: str, shape: torch.Size, generator: Generator) -> Tensor:
    """A parameter under which no signal dies out; the scales of norms are around one."""
    noise = normal(generator, *shape)
    if len(shape) == 1 and "norm" in name and name.endswith("weight"):
        return 1 + 0.1 * noise
    return 0.5 * noise / max(1, shape[1:].numel() if len(shape) > 1 else shape.numel()) ** 0.5


@dataclass(frozen=True)
class Model:
    """One transformer of the engine.

    Attributes:
        path: of its class, behind `ROOT`.
        build: makes it, from its class and the engine's configuration.
        prompt: what is given unchanged at every step of a request.
        latent: names and shapes of what is denoised.
        time: name of the timestep; empty: there is none.
        listed: whether it takes a list of latents.
        settings: of the engine's configuration of a transformer.
        low: whether it has bfloat16 weights.
        held: name under which its pipeline has it.
        step: changes the inputs of a step to what the model takes at it.
        hits: of each pass of a request that it tells apart, the steps that reuse where every step does that may.
    """

    path: str
    build: Callable[[Any, Any], nn.Module]
    prompt: Callable[[Generator], Inputs]
    latent: dict[str, tuple[int, ...]]
    time: str = "timestep"
    listed: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    low: bool = False
    held: str = "transformer"
    step: Callable[[int, Inputs], Inputs] = lambda i, inputs: inputs
    hits: tuple[list[int], ...] = ([2, 3, 4, 6, 7],)

    def make(self, config: Any) -> nn.Module:
        """The module, with its weights."""
        module, name = self.path.rsplit(".", 1)
        usual = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16 if self.low else usual)
        try:
            made = self.build(getattr(import_module(ROOT + module), name), config)
        finally:
            torch.set_default_dtype(usual)
        generator = Generator().manual_seed(1)
        for name, weight in made.named_parameters():
            weight.copy_(drawn(name, weight.shape, generator))
        for part in made.modules():
            # What the engine does with weights that it has loaded.
            method = getattr(part, "quant_method", None)
            if hasattr(method, "process_weights_after_loading"):
                method.process_weights_after_loading(part)
        return made.eval()

    def request(self, seed: int, count: int = STEPS) -> list[Inputs]:
        """The calls of one request of so many steps."""
        generator = Generator().manual_seed(seed)
        fixed = self.prompt(generator)
        start = {name: normal(generator, *shape) for name, shape in self.latent.items()}
        drift = {name: normal(generator, *shape) for name, shape in self.latent.items()}
        steps: list[Inputs] = []
        for i in range(count):
            moved: Inputs = {name: value + 0.4 * i / count * drift[name] for name, value in start.items()}
            if self.low:
                moved = {name: value.bfloat16() for name, value in moved.items()}
            if self.listed:
                moved = {name: [value] for name, value in moved.items()}
            time = {self.time: torch.tensor([1.0 - i / count])} if self.time else {}
            steps.append(self.step(i, {**fixed, **moved, **time}))
        return steps


def grid(width: int) -> Tensor:
    """Places of 4 x 4 tokens."""
    places = torch.zeros(16, width)
    places[:, 1], places[:, 2] = torch.arange(16) // 4, torch.arange(16) % 4
    return places


def text(generator: Generator, **more: Any) -> Inputs:
    return {"encoder_hidden_states": normal(generator, 1, 6, 24), "return_dict": False, **more}


def flux(generator: Generator) -> Inputs:
    pooled = normal(generator, 1, 20)
    return text(generator, pooled_projections=pooled, img_ids=grid(3), txt_ids=torch.zeros(6, 3)) | {
        "guidance": torch.tensor([3.5])
    }


def klein(generator: Generator) -> Inputs:
    places = torch.zeros(6, 4)
    places[:, 3] = torch.arange(6)
    return text(generator, img_ids=grid(4), txt_ids=places)


def glm(generator: Generator) -> Inputs:
    return text(
        generator,
        prior_token_id=torch.randint(0, 16, (1, 16), generator=generator),
        prior_token_drop=torch.zeros(1, 16, dtype=torch.bool),
        target_size=torch.tensor([[64.0, 64.0]]),
        crop_coords=torch.tensor([[0.0, 0.0]]),
    )


def helios(generator: Generator) -> Inputs:
    history = {
        "latents_history_short": normal(generator, 1, 4, 2, 16, 16),
        "latents_history_mid": normal(generator, 1, 4, 2, 16, 16),
        "latents_history_long": normal(generator, 1, 4, 4, 16, 16),
    }
    places = {
        "indices_hidden_states": torch.arange(18, 21)[None],
        "indices_latents_history_short": torch.arange(16, 18)[None],
        "indices_latents_history_mid": torch.arange(14, 16)[None],
        "indices_latents_history_long": torch.arange(10, 14)[None],
    }
    return text(generator, **history, **places)


def ltx2(generator: Generator) -> Inputs:
    sound = {"audio_encoder_hidden_states": normal(generator, 1, 6, 24), "audio_num_frames": 5}
    return text(generator, num_frames=2, height=3, width=3, fps=24.0, **sound)


def bagel(generator: Generator) -> Inputs:
    """Its prompt is a KV cache."""
    cache = import_module(ROOT + "bagel.bagel_transformer").NaiveCache(4)
    for i in range(4):
        cache.key_cache[i] = normal(generator, 5, 2, 16).bfloat16()
        cache.value_cache[i] = normal(generator, 5, 2, 16).bfloat16()
    return {
        "query_lens": torch.tensor([18], dtype=torch.int),
        "packed_query_position_ids": torch.full((18,), 5),
        "past_key_values": cache,
        "update_past_key_values": False,
        "is_causal": False,
        "mode": "gen",
        "packed_vae_token_indexes": torch.arange(1, 17),
        "packed_text_indexes": torch.tensor([0, 17]),
    }


def build_bagel(kind: Any, config: Any) -> nn.Module:
    options = import_module(kind.__module__).Qwen2MoTConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        layer_module="Qwen2MoTDecoderLayer",
        pad_token_id=0,
    )
    options.rope_theta = 1e4
    return kind(options, parallel_config=config.parallel_config)


PROMPT, IMAGE = 7, 17  # tokens


def hunyuan(generator: Generator) -> Inputs:
    """Prompt and image are one sequence, and what is given of places is fixed."""
    angles = torch.rand(1, PROMPT + IMAGE, 8, generator=generator)
    return {
        "prompt": normal(generator, 1, PROMPT, 32).bfloat16(),
        "custom_pos_emb": (angles.cos(), angles.sin()),
        "attention_mask": torch.ones(1, 1, PROMPT + IMAGE, PROMPT + IMAGE, dtype=torch.bool),
        "position_ids": torch.arange(PROMPT + IMAGE)[None],
        "seq_lens": [PROMPT + IMAGE],
        "num_image_tokens": IMAGE,
        "gen_timestep_scatter_index": torch.tensor([[PROMPT]]),
        "mode": "gen_image",
        "use_cache": False,
        "return_dict": False,
    }


def first_with_prompt(i: int, inputs: Inputs) -> Inputs:
    """The first step has prompt and image; later ones the image alone, and the keys and values of the prompt."""
    prompt, image = inputs.pop("prompt"), inputs.pop("inputs_embeds")
    tokens = IMAGE if i else PROMPT + IMAGE
    return inputs | {
        "inputs_embeds": image if i else torch.cat((prompt, image), dim=1),
        "custom_pos_emb": tuple(t[:, -tokens:] for t in inputs["custom_pos_emb"]),
        "attention_mask": inputs["attention_mask"][:, :, -tokens:],
        "position_ids": inputs["position_ids"][:, -tokens:],
        "query_lens": [tokens],
        "first_step": i == 0,
    }


def build_hunyuan(kind: Any, config: Any) -> nn.Module:
    options = import_module(kind.__module__).HunyuanImage3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        attention_head_dim=16,
        max_position_embeddings=128,
        num_experts=1,
        moe_topk=1,
        num_shared_expert=1,
        use_mixed_mlp_moe=False,
        use_qk_norm=True,
        rope_scaling={"rope_type": "default", "rope_theta": 1e4},
    )
    return kind(options)


WAN = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "text_dim": 24}
WAN |= {"freq_dim": 32, "ffn_dim": 48, "num_layers": 4, "patch_size": (1, 2, 2)}
JOINT = {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 24}

MODELS = {
    "GLM-Image": Model(
        "glm_image.glm_image_transformer.GlmImageTransformer2DModel",
        lambda kind, config: kind(config),
        glm,
        {"hidden_states": (1, 4, 8, 8)},
        settings={
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "time_embed_dim": 32,
            "condition_dim": 8,
            "prior_vq_quantizer_codebook_size": 16,
            "text_embed_dim": 24,
            "num_layers": 4,
        },
    ),
    "FLUX.2-klein": Model(
        "flux2_klein.flux2_klein_transformer.Flux2Transformer2DModel",
        lambda kind, config: kind(
            patch_size=1,
            in_channels=8,
            num_layers=3,
            num_single_layers=4,
            timestep_guidance_channels=32,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
            od_config=config,
            **JOINT,
        ),
        klein,
        {"hidden_states": (1, 16, 8)},
    ),
    "Qwen-Image": Model(
        "qwen_image.qwen_image_transformer.QwenImageTransformer2DModel",
        lambda kind, config: kind(
            config, patch_size=2, in_channels=16, out_channels=4, num_layers=4, axes_dims_rope=(4, 6, 6), **JOINT
        ),
        lambda g: text(g, encoder_hidden_states_mask=None, img_shapes=[[(1, 4, 4)]], txt_seq_lens=[6]),
        {"hidden_states": (1, 16, 16)},
    ),
    "Wan 2.2": Model(
        "wan2_2.wan2_2_transformer.WanTransformer3DModel",
        lambda kind, config: kind(**WAN),
        text,
        {"hidden_states": (1, 4, 2, 8, 8)},
    ),
    "Helios": Model(
        "helios.helios_transformer.HeliosTransformer3DModel",
        lambda kind, config: kind(**WAN, rope_dim=(4, 6, 6)),
        helios,
        {"hidden_states": (1, 4, 3, 16, 16)},
    ),
    "Bagel": Model(
        "bagel.bagel_transformer.Qwen2MoTModel",
        build_bagel,
        bagel,
        {"packed_query_sequence": (18, 32)},
        time="",
        low=True,
    ),
    "LTX-2": Model(
        "ltx2.ltx2_transformer.LTX2VideoTransformer3DModel",
        lambda kind, config: kind(
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=16,
            cross_attention_dim=32,
            audio_in_channels=8,
            audio_out_channels=8,
            audio_num_attention_heads=2,
            audio_attention_head_dim=8,
            audio_cross_attention_dim=16,
            num_layers=4,
            caption_channels=24,
        ),
        ltx2,
        {"hidden_states": (1, 18, 8), "audio_hidden_states": (1, 5, 8)},
    ),
    "FLUX.1": Model(
        "flux.flux_transformer.FluxTransformer2DModel",
        lambda kind, config: kind(
            od_config=config,
            in_channels=16,
            num_single_layers=4,
            pooled_projection_dim=20,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
            **JOINT,
        ),
        flux,
        {"hidden_states": (1, 16, 16)},
        settings={"num_layers": 3},
    ),
    "SD3": Model(
        "sd3.sd3_transformer.SD3Transformer2DModel",
        lambda kind, config: kind(config),
        lambda g: text(g, pooled_projections=normal(g, 1, 20)),
        {"hidden_states": (1, 4, 8, 8)},
        settings={
            "num_layers": 4,
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 20,
            "patch_size": 2,
            "pos_embed_max_size": 16,
            "dual_attention_layers": (),
            "qk_norm": "rms_norm",
            **JOINT,
        },
    ),
    "Z-Image": Model(
        "z_image.z_image_transformer.ZImageTransformer2DModel",
        lambda kind, config: kind(
            in_channels=4,
            dim=32,
            n_layers=4,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=24,
            axes_dims=[4, 6, 6],
            axes_lens=[64, 32, 32],
        ),
        lambda g: {"cap_feats": [normal(g, 7, 24)]},
        {"x": (4, 1, 16, 16)},
        time="t",
        listed=True,
    ),
    "HunyuanImage3": Model(
        "hunyuan_image3.hunyuan_image3_transformer.HunyuanImage3Model",
        build_hunyuan,
        hunyuan,
        {"inputs_embeds": (1, IMAGE, 32)},
        time="",
        low=True,
        held="model",
        step=first_with_prompt,
        hits=([], [2, 3, 4, 6]),
    ),
}
"""By the name that the engine's documentation has for each."""


@contextlib.contextmanager
def engine(settings: dict[str, Any]) -> Iterator[Any]:
    """What the engine sets up in a worker, in this process; its configuration."""
    from vllm.config import set_current_vllm_config
    from vllm_omni.diffusion.data import OmniDiffusionConfig, TransformerConfig
    from vllm_omni.diffusion.distributed import parallel_state
    from vllm_omni.diffusion.forward_context import set_forward_context
    from vllm_omni.diffusion.vllm_config import create_diffusion_vllm_config

    from tests.engine.on_cpu import as_on_a_gpu

    as_on_a_gpu()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    alone = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    config = OmniDiffusionConfig(model=None, dtype=torch.float32, tf_model_config=TransformerConfig.from_dict(settings))
    vllm_config = create_diffusion_vllm_config(torch.device("cpu"), config)
    with (
        mock.patch.dict(os.environ, alone),
        set_forward_context(vllm_config=vllm_config, omni_diffusion_config=config),
        set_current_vllm_config(vllm_config),
    ):
        if not torch.distributed.is_initialized():
            parallel_state.init_distributed_environment(world_size=1, rank=0)
            sizes = ("data_parallel", "cfg_parallel", "sequence_parallel", "tensor_parallel", "pipeline_parallel")
            degrees = {f"{name}_size": 1 for name in sizes} | {"ulysses_degree": 1, "ring_degree": 1}
            parallel_state.initialize_model_parallel(**degrees)
        yield config
