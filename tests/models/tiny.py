"""What a tiny model is, and the layouts of latents and timesteps that several of them share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor, nn

# Frames, height and width of the grid of image (video) tokens; frames is 1 for image models.
Grid = tuple[int, int, int]
# The shape of one tensor, or a list of such (a model that takes a list of tensors).
Shapes = Any

HEADS = 2
HEAD_DIM = 16
WIDTH = HEADS * HEAD_DIM
ROPE = (4, 6, 6)
TEXT_DIM = 24
TEXT_LEN = 7
CHANNELS = 4
LAYERS = 5
PATCH = 2

IMAGE_GRIDS: tuple[Grid, ...] = ((1, 4, 4), (1, 4, 6), (1, 6, 3))
VIDEO_GRIDS: tuple[Grid, ...] = ((2, 3, 4), (3, 4, 4), (2, 5, 3))


@dataclass(frozen=True)
class TinyModel:
    """One tiny model and what its pipeline would pass it.

    Attributes:
        name: Key in the registry: the class name, and ``+variant`` where a class is there more than once.
        build: Make the module, with the weights diffusers gives it.
        conditioning: Keyword arguments that stay the same over a request, from a generator, a grid and a batch size.
        latents: The keyword arguments that are denoised, as shapes (``{"hidden_states": (1, 16, 32)}``; a list of
            shapes for a list of tensors), for a grid and a batch size.
        timestep: The keyword arguments that say how far the denoising is, for a noise level in (0, 1] and a batch
            size: new tensors at every call, as the pipeline of the model passes them.
        stacks: The block lists that hold the repeated blocks, as dotted attribute paths, in the order they run.
        grids: Token grids of the sizes that are tried; the token counts differ from each other and from the text's.
        switches: Keyword arguments that are no tensors.
    """

    name: str
    build: Callable[[], nn.Module]
    conditioning: Callable[[Generator, Grid, int], dict[str, Any]]
    latents: Callable[[Grid, int], dict[str, Shapes]]
    timestep: Callable[[float, int], dict[str, Any]]
    stacks: tuple[str, ...]
    grids: tuple[Grid, ...] = IMAGE_GRIDS
    switches: dict[str, Any] = field(default_factory=lambda: {"return_dict": False})


def text(generator: Generator, batch: int, length: int = TEXT_LEN, width: int = TEXT_DIM) -> Tensor:
    """Embeddings of a prompt: [batch, length, width]."""
    return torch.randn(batch, length, width, generator=generator)


def mask(batch: int, length: int = TEXT_LEN) -> Tensor:
    """A padding mask (1 = keep) with two padded tokens, and one more in each further row of the batch."""
    keep = (length - 2 - torch.arange(batch)).clamp(min=1)
    return (torch.arange(length)[None] < keep[:, None]).long()


# --- Latent layouts


def image(grid: Grid, batch: int) -> dict[str, Shapes]:
    """[batch, channels, height, width] before patches of 2 x 2."""
    return {"hidden_states": (batch, CHANNELS, grid[1] * PATCH, grid[2] * PATCH)}


def image_no_patch(grid: Grid, batch: int) -> dict[str, Shapes]:
    """[batch, channels, height, width], a token a pixel."""
    return {"hidden_states": (batch, CHANNELS, grid[1], grid[2])}


def video(grid: Grid, batch: int) -> dict[str, Shapes]:
    """[batch, channels, frames, height, width]."""
    return {"hidden_states": (batch, CHANNELS, grid[0], grid[1] * PATCH, grid[2] * PATCH)}


def video_frames_first(grid: Grid, batch: int) -> dict[str, Shapes]:
    """[batch, frames, channels, height, width]."""
    return {"hidden_states": (batch, grid[0], CHANNELS, grid[1] * PATCH, grid[2] * PATCH)}


def packed(grid: Grid, batch: int) -> dict[str, Shapes]:
    """[batch, tokens, channels]: the pipeline has packed the patches."""
    return {"hidden_states": (batch, grid[0] * grid[1] * grid[2], CHANNELS * PATCH * PATCH)}


# --- Timesteps, as the pipelines pass them


def level(sigma: float, batch: int) -> dict[str, Any]:
    """Float in (0, 1], [batch]: Flux, QwenImage and AuraFlow divide the scheduler's timestep by 1000."""
    return {"timestep": torch.full((batch,), sigma)}


def flow(sigma: float, batch: int) -> dict[str, Any]:
    """Float in (0, 1000], [batch]: flow-matching schedulers."""
    return {"timestep": torch.full((batch,), sigma * 1000)}


def discrete(sigma: float, batch: int) -> dict[str, Any]:
    """int64 in [1, 1000), [batch]: DDIM, DPM-Solver, UniPC."""
    return {"timestep": torch.full((batch,), int(sigma * 1000), dtype=torch.int64)}
