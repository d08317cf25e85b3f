"""Seeded weights under which every part of a tiny transformer matters."""

from __future__ import annotations

import math

import torch
from torch import nn

# Gain of matrices relative to 1/sqrt(fan in). With 1.0 a block adds to its stream about as much as it carries; below it
# the sum of four blocks stays of the order of one.
_MATRIX_GAIN = 0.8
# The layers that make shift, scale and gate out of the timestep embedding. With the values of the others gates
# would be near zero, and a block would add a few hundredths of what its stream carries. Their bias, and that of the
# timestep embedder, keep a part of them constant: a block changes with the timestep but is no other block at each step.
_MODULATION = ("norm", "_mod.", "modulation")
_MODULATION_GAIN = 1.2
_MODULATION_GAIN_WITHOUT_BIAS = 1.4
_TIME = ("time", ".emb.")
_BIAS_STD = 0.1
_MODULATION_BIAS_STD = 0.4
_NORM_STD = 0.15
# Tables of shift, scale and gate (PixArt, Sana, Wan, LTX), learned embeddings and tokens.
_TABLE_STD = 0.4


def randomize(model: nn.Module, seed: int) -> None:
    """Overwrite every parameter of ``model`` with seeded random values.

    diffusers leaves gates, tables and final layers at zero or norm weights at one in several of these classes, which
    would hide a wrong residual or a lost stream: no parameter keeps such a value here.
    """
    generator = torch.Generator().manual_seed(seed)
    matrices = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    kinds = {
        f"{prefix}.{name}": "matrix" if name == "weight" else "bias"
        for prefix, module in model.named_modules()
        if isinstance(module, matrices)
        for name, _ in module.named_parameters(recurse=False)
    }
    with torch.no_grad():
        # Sorted, so that values do not depend on the order in which a class registers its children.
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            # DiT keeps its timestep embedder inside a norm.
            time = any(part in name for part in _TIME)
            modulation = not time and any(part in name for part in _MODULATION)
            kind = kinds.get(name)
            if kind == "matrix":
                gain = _MATRIX_GAIN
                if modulation:
                    has_bias = f"{name.removesuffix('weight')}bias" in kinds
                    gain = _MODULATION_GAIN if has_bias else _MODULATION_GAIN_WITHOUT_BIAS
                parameter.copy_(noise * (gain / math.sqrt(parameter[0].numel())))
            elif kind == "bias":
                parameter.copy_(noise * (_MODULATION_BIAS_STD if modulation or time else _BIAS_STD))
            elif parameter.ndim == 1 and name.endswith("weight"):
                parameter.copy_(1.0 + _NORM_STD * noise)
            elif parameter.ndim == 1:
                parameter.copy_(_BIAS_STD * noise)
            else:
                parameter.copy_(_TABLE_STD * noise)
