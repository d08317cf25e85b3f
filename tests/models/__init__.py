"""Tiny, real transformers and seeded walks along a denoising path.

Every model has four or more blocks a stack, runs in milliseconds on a CPU in float32, and is built without a model hub.
``build`` makes the module, ``conditioning`` the tensors a pipeline computes once per request, and ``walk`` the keyword
arguments of each forward call::

    model = build("flux")
    for kwargs in walk("flux", steps=6):
        (sample,) = model(**kwargs)

The same prompt with another noise seed (the conditioning tensors are the same objects)::

    prompt = conditioning("flux", seed=0)
    first, second = walk("flux", seed=1, conditioning=prompt), walk("flux", seed=2, conditioning=prompt)

``NAMES`` are the ten that most tests run, each in three sizes; ``MODELS`` has every class that diffusers exports as a
transformer, with its variants where they change the graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from . import image_joint, image_single, other, ten, video_first, video_second
from .tiny import TinyModel
from .weights import randomize

__all__ = ["MODELS", "NAMES", "SIZES", "TinyModel", "build", "conditioning", "walk"]

NAMES: tuple[str, ...] = tuple(ten.MODELS)
SIZES: tuple[int, ...] = (0, 1, 2)
_FAMILIES = (ten, image_joint, image_single, video_first, video_second, other)
MODELS: dict[str, TinyModel] = {name: spec for family in _FAMILIES for name, spec in family.MODELS.items()}

# The prompt and the noise of one seed come from unrelated generators: a walk with given conditioning then has the very
# noise that the same seed gives without it.
_NOISE_STREAM = 1_000_003

# A walk covers this part of the noise levels. A full 1 -> 0 in six steps makes every timestep embedding unrelated to
# the one before, and no probe of a random model would ever be near the last one.
_SIGMA_FIRST, _SIGMA_LAST = 0.95, 0.65


def build(name: str, seed: int = 0) -> nn.Module:
    """Build model ``name`` in eval mode with weights that depend on ``name`` and ``seed`` only.

    The global random state is left as it was; ``requires_grad`` is left as diffusers sets it.
    """
    spec = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        # diffusers' own initialisation draws from the global generator, also for values that are not parameters.
        torch.manual_seed(seed)
        model = spec.build()
    randomize(model, seed)
    return model.eval()


def conditioning(name: str, seed: int = 0, size: int = 0, batch: int = 1) -> dict[str, Any]:
    """What a pipeline passes unchanged at every step: text embeddings, masks, ids, pooled vectors, guidance, shapes.

    The text depends on ``seed`` and ``batch`` only, so two sizes of one seed are the same prompt at two resolutions.
    """
    return _request(name, seed, size, batch)


def _request(name: str, seed: int, size: int, batch: int) -> dict[str, Any]:
    """``conditioning`` under a name that the argument of ``walk`` does not shadow."""
    generator = torch.Generator().manual_seed(seed)
    return MODELS[name].conditioning(generator, MODELS[name].grids[size], batch)


def walk(
    name: str,
    steps: int = 6,
    seed: int = 0,
    size: int = 0,
    delta: float = 0.15,
    *,
    conditioning: dict[str, Any] | None = None,
    batch: int = 1,
) -> list[dict[str, Any]]:
    """The keyword arguments of each of ``steps`` forward calls along a denoising path.

    Each step has a fresh latent, ``delta`` (root mean square) away from the one before, and a fresh timestep tensor as
    the pipeline of the model passes it, strictly decreasing. Everything else is the same objects at every step: those
    of ``conditioning`` where it is given, else those that ``seed``, ``size`` and ``batch`` give.
    """
    spec = MODELS[name]
    if conditioning is None:
        conditioning = _request(name, seed, size, batch)
    generator = torch.Generator().manual_seed(seed + _NOISE_STREAM)
    shapes, layout = tree_flatten(spec.latents(spec.grids[size], batch), is_leaf=lambda s: isinstance(s, tuple))

    def noise() -> list[torch.Tensor]:
        return [torch.randn(shape, generator=generator) for shape in shapes]

    latents, drift = noise(), noise()
    calls = []
    for index in range(steps):
        done = index / max(steps - 1, 1)
        sigma = _SIGMA_FIRST + (_SIGMA_LAST - _SIGMA_FIRST) * done
        calls.append(
            {**tree_unflatten(latents, layout), **spec.timestep(sigma, batch), **conditioning, **spec.switches}
        )
        # Part of the way is common to all steps, as on a real path, and part is new; 0.8^2 + 0.6^2 = 1 keeps the size
        # of a step at delta.
        steps_on = zip(latents, drift, noise(), strict=True)
        latents = [latent + delta * (0.8 * common + 0.6 * new) for latent, common, new in steps_on]
    return calls
