"""At real dimensions, with tensors that have shapes alone and lie on a GPU: rewriting and lowering need no card."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import diffusers
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fx_cache
from tests.gpu import standin

CUDA = torch.device("cuda:0")


@dataclass(frozen=True)
class Real:
    """A model in its published width.

    Attributes:
        config: of the diffusers class; a few blocks of each kind.
        given: shapes and dtypes of what it is given.
        stored: elements of one tensor as wide as the model: tokens times channels.
    """

    config: dict[str, Any]
    given: dict[str, tuple[tuple[int, ...], torch.dtype]]
    stored: int


BF16, INT, FLOAT = torch.bfloat16, torch.int64, torch.float32

MODELS = {
    # FLUX.1-dev at 1024x1024.
    "FluxTransformer2DModel": Real(
        {"guidance_embeds": True, "num_layers": 3, "num_single_layers": 4},
        {
            "hidden_states": ((1, 4096, 64), BF16),
            "timestep": ((1,), BF16),
            "guidance": ((1,), FLOAT),
            "encoder_hidden_states": ((1, 512, 4096), BF16),
            "pooled_projections": ((1, 768), BF16),
            "txt_ids": ((512, 3), BF16),
            "img_ids": ((4096, 3), BF16),
        },
        4096 * 3072,
    ),
    # DiT-XL/2 at 512x512, with guidance.
    "DiTTransformer2DModel": Real(
        {"num_layers": 6, "num_attention_heads": 16, "attention_head_dim": 72, "sample_size": 64, "out_channels": 8},
        {"hidden_states": ((2, 4, 64, 64), BF16), "timestep": ((2,), INT), "class_labels": ((2,), INT)},
        2 * 1024 * 1152,
    ),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_step_of_tensors_that_have_shapes_alone(kind: str, compiler: str) -> None:
    """What comes out lies on the GPU, in the model's dtype, and so does what is kept: the probe and one residual."""
    real = MODELS[kind]
    model = getattr(diffusers, kind)
    standin.device()  # answers for a GPU that is not there
    with FakeTensorMode(allow_non_fake_inputs=True):
        torch.set_default_dtype(BF16)
        try:
            with CUDA:
                module = model(**real.config).eval()
        finally:
            torch.set_default_dtype(FLOAT)
        given = {k: torch.empty(shape, dtype=dtype, device=CUDA) for k, (shape, dtype) in real.given.items()}
        options = {"compiler": compiler, "Fn_compute_blocks": 1, "max_warmup_steps": 1}
        compiled = torch.compile(module, backend="dit_cache", fullgraph=True, options=options)
        (output,) = compiled(**given, return_dict=False)
    assert (output.device, output.dtype) == (CUDA, BF16)
    (span,) = fx_cache.summary(compiled).to_dict()["sessions"][-1]["branches"][-1]["spans"]
    assert span["bytes"] == 2 * real.stored * BF16.itemsize
    assert span["misses"] == {0: "warm-up"}
