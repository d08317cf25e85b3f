"""The demo's model: a small class-conditional DiT that draws handwritten digits, and its sampling loop."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from safetensors.torch import load_file

ASSETS = Path(__file__).resolve().parent / "assets"
WEIGHTS_NAME = "digits_dit.safetensors"
CONFIG_NAME = "digits_dit.json"

IMAGE_SIZE = 16
"""Height and width of an image, in pixels."""

NUM_CLASSES = 10
"""Number of digit classes; the labels are 0 to 9."""

NULL_LABEL = NUM_CLASSES
"""The label of the unconditional branch, the last row of the model's label embedding."""

DEFAULT_GUIDANCE_SCALE = 3.0

NOISE_SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
}
"""The noise schedule shared by training and sampling, as keyword arguments of a diffusers scheduler."""


def load_digits_dit(assets: Path = ASSETS) -> DiTTransformer2DModel:
    """Load the trained digit model.

    Args:
        assets: Folder that holds the weights and the constructor config.

    Returns:
        The model in eval mode, in float32, on the CPU. It maps noisy images [N, 1, 16, 16], timesteps [N] from 0 to
        999 and labels [N] from 0 to 10 (10 is the null label) to the noise [N, 1, 16, 16] in the images. Images
        are scaled to [-1, 1].
    """
    config = json.loads((assets / CONFIG_NAME).read_text(encoding="utf-8"))
    model = DiTTransformer2DModel(**config)
    # The file is float16 to keep the package small; load_state_dict copies into the float32 parameters.
    model.load_state_dict(load_file(assets / WEIGHTS_NAME), strict=True)
    return model.eval().requires_grad_(False)


def make_scheduler() -> DDIMScheduler:
    """Make the sampler: deterministic DDIM, which starts at the last training timestep."""
    # Trailing spacing starts from pure noise at timestep 999. The images live in [-1, 1], so clipping the predicted
    # image to that range removes the overshoot of guidance and of the first steps, where a small error in the noise
    # is a large one in the image.
    return DDIMScheduler(
        **NOISE_SCHEDULE, clip_sample=True, clip_sample_range=1.0, set_alpha_to_one=True, timestep_spacing="trailing"
    )


def generate(
    denoiser: Callable[..., tuple[torch.Tensor, ...]],
    *,
    labels: Sequence[int],
    steps: int = 50,
    guidance_scale: float = DEFAULT_GUIDANCE_SCALE,
    seed: int = 0,
    on_step: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """Draw one image per label with DDIM and classifier-free guidance.

    Every step calls the denoiser twice, on the labels and then on the null label.

    Args:
        denoiser: The model, or any callable with its forward signature, such as a compiled model. The sampling
            runs on the device and in the dtype of its parameters, or on the CPU in float32 if it has none.
        labels: The N digits to draw, each from 0 to 9.
        steps: Number of denoising steps.
        guidance_scale: Weight of the conditional prediction against the unconditional one; 1 is no guidance.
        seed: Seed of the initial noise. The noise is drawn on the CPU, so it is the same on every device.
        on_step: Called after each step with the step's index, from 0 to ``steps - 1``.

    Returns:
        Images [N, 1, 16, 16], float32 on the CPU, from 0 (background) to 1 (full ink).
    """
    if not labels or not all(0 <= label < NUM_CLASSES for label in labels):
        raise ValueError(f"labels must be one or more digits from 0 to {NUM_CLASSES - 1}, got {list(labels)}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")

    device, dtype = _placement(denoiser)
    count = len(labels)
    # The backend tells the two guidance branches apart by the identity of the conditioning, so each label tensor is
    # made once and passed as the same object in every step.
    conditional = torch.tensor(list(labels), dtype=torch.long, device=device)
    unconditional = torch.full_like(conditional, NULL_LABEL)

    noise = torch.randn(count, 1, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(seed))
    x = noise.to(device)
    scheduler = make_scheduler()
    scheduler.set_timesteps(steps)

    with torch.no_grad():
        for index, timestep in enumerate(scheduler.timesteps.tolist()):
            t = torch.full((count,), timestep, dtype=torch.long, device=device)
            model_input = x.to(dtype)
            cond = denoiser(model_input, timestep=t, class_labels=conditional, return_dict=False)[0]
            uncond = denoiser(model_input, timestep=t, class_labels=unconditional, return_dict=False)[0]
            # The guidance and the solver run in float32 whatever the model's dtype.
            cond, uncond = cond.float(), uncond.float()
            guided = uncond + guidance_scale * (cond - uncond)
            # The noise must be recomputed from the clipped image: otherwise it keeps what the clipping cut off, every
            # step adds that back, and the images drift until no digit is left.
            x = scheduler.step(guided, timestep, x, use_clipped_model_output=True, return_dict=False)[0]
            if on_step is not None:
                on_step(index)
    return ((x + 1) / 2).clamp(0, 1).cpu()


def _placement(denoiser: Callable[..., Any]) -> tuple[torch.device, torch.dtype]:
    """Return the device and dtype of the denoiser's parameters, or the CPU and float32 if it has none."""
    parameter = next(denoiser.parameters(), None) if isinstance(denoiser, torch.nn.Module) else None
    if parameter is None:
        return torch.device("cpu"), torch.float32
    return parameter.device, parameter.dtype
