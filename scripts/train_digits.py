"""Train the demo's digit model and write its weights and config.

Run from the repository root: ``python scripts/train_digits.py --out fx_cache/demo/assets``.
"""

import copy
import json
import math
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import DDPMScheduler, DiTTransformer2DModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC

# The script also runs from a checkout in which the package is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fx_cache.demo.digits import (
    CONFIG_NAME,
    DEFAULT_GUIDANCE_SCALE,
    IMAGE_SIZE,
    NOISE_SCHEDULE,
    NULL_LABEL,
    NUM_CLASSES,
    WEIGHTS_NAME,
    generate,
    load_digits_dit,
)

MODEL_CONFIG: dict[str, Any] = {
    "num_attention_heads": 3,
    "attention_head_dim": 32,
    "in_channels": 1,
    "num_layers": 12,
    "sample_size": IMAGE_SIZE,
    "patch_size": 2,
    "num_embeds_ada_norm": NUM_CLASSES,
}

LABEL_DROPOUT = 0.1
WARMUP_STEPS = 100
EMA_DECAY = 0.998
WEIGHT_DECAY = 0.01
GRADIENT_CLIP = 1.0
MAX_SHIFT = 1
"""Largest shift of a real image along each axis, in pixels."""

console = Console()


def load_images() -> tuple[torch.Tensor, torch.Tensor]:
    """Load scikit-learn's digits, upsampled to the model's size.

    Returns:
        Images [1797, 1, 16, 16] from -1 (background) to 1 (full ink), and labels [1797].
    """
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 16
    images = torch.nn.functional.interpolate(images, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bicubic")
    # Bicubic interpolation overshoots at the edges of a stroke.
    return images.clamp(0, 1) * 2 - 1, torch.from_numpy(digits.target).long()


def shift_images(images: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
    """Shift each image by whole pixels and fill with background.

    Args:
        images: Images [N, 1, 16, 16] in [-1, 1].
        shifts: Integer shifts [N, 2] in pixels, down and right, each at most MAX_SHIFT in size.

    Returns:
        The shifted images [N, 1, 16, 16].
    """
    padded = torch.nn.functional.pad(images, (MAX_SHIFT,) * 4, value=-1.0)
    span = torch.arange(IMAGE_SIZE)
    rows = (MAX_SHIFT - shifts[:, 0, None] + span)[:, :, None]
    columns = (MAX_SHIFT - shifts[:, 1, None] + span)[:, None, :]
    return padded[torch.arange(len(images))[:, None, None], 0, rows, columns][:, None]


def build_model() -> DiTTransformer2DModel:
    """Build the untrained model with the initialisation of the DiT paper."""
    model = DiTTransformer2DModel(**MODEL_CONFIG)
    for block in model.transformer_blocks:
        # adaLN-Zero: each block starts as the identity, which a 12-block stack needs to learn quickly.
        torch.nn.init.zeros_(block.norm1.linear.weight)
        torch.nn.init.zeros_(block.norm1.linear.bias)
        # The default label embedding, N(0, 1), would drown the timestep embedding it is added to.
        torch.nn.init.normal_(block.norm1.emb.class_embedder.embedding_table.weight, std=0.2)
    for layer in (model.proj_out_1, model.proj_out_2):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    # Each block has a label embedding that drops labels independently of the other blocks in train mode, so the
    # unconditional branch would never be trained as a whole. The model stays in eval mode, which changes nothing
    # else (it has no dropout layers of its own), and train() drops each label for all blocks at once.
    return model.eval()


def train(steps: int, batch_size: int, learning_rate: float, seed: int) -> DiTTransformer2DModel:
    """Train the model on all images and return the averaged weights.

    Args:
        steps: Number of optimiser steps.
        batch_size: Images per step.
        learning_rate: Peak learning rate; it warms up linearly and falls to zero along a cosine.
        seed: Seed of the initial weights, the batches, the augmentation and the noise.
    """
    torch.manual_seed(seed)
    images, labels = load_images()
    model = build_model()
    average = copy.deepcopy(model).requires_grad_(False)
    scheduler = DDPMScheduler(**NOISE_SCHEDULE)
    num_timesteps: int = NOISE_SCHEDULE["num_train_timesteps"]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=WEIGHT_DECAY, fused=True
    )
    parameters, averaged = list(model.parameters()), list(average.parameters())
    order = torch.empty(0, dtype=torch.long)
    smooth_loss = 1.0

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=steps, loss=smooth_loss)
        for step in range(steps):
            if len(order) < batch_size:
                order = torch.cat([order, torch.randperm(len(images))])
            batch, order = order[:batch_size], order[batch_size:]
            clean = shift_images(images[batch], torch.randint(-MAX_SHIFT, MAX_SHIFT + 1, (batch_size, 2)))
            target_labels = labels[batch].masked_fill(torch.rand(batch_size) < LABEL_DROPOUT, NULL_LABEL)
            # Stratified timesteps cover the whole schedule in every batch, which makes the gradient less noisy.
            strata = (torch.arange(batch_size) + torch.rand(batch_size)) / batch_size
            timesteps = (strata * num_timesteps).long().clamp(max=num_timesteps - 1)
            noise = torch.randn_like(clean)

            for group in optimizer.param_groups:
                group["lr"] = learning_rate * learning_rate_factor(step, steps)
            prediction = model(
                scheduler.add_noise(clean, noise, timesteps),
                timestep=timesteps,
                class_labels=target_labels,
                return_dict=False,
            )[0]
            loss = torch.nn.functional.mse_loss(prediction, noise)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, GRADIENT_CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            # The shorter horizon at the start keeps the random initial weights out of the average.
            decay = min(EMA_DECAY, (1 + step) / (10 + step))
            torch._foreach_lerp_(averaged, [parameter.detach() for parameter in parameters], 1 - decay)

            smooth_loss += (loss.item() - smooth_loss) * min(0.02, 1 / (step + 1) + 0.01)
            progress.update(task, advance=1, loss=smooth_loss)
            if (step + 1) % 250 == 0:
                progress.console.print(f"step {step + 1}: loss {smooth_loss:.4f}")
    return average


def learning_rate_factor(step: int, steps: int) -> float:
    """Return the factor on the peak learning rate: linear warm-up, then a cosine to zero."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    return 0.5 * (1 + math.cos(math.pi * (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)))


def save(model: DiTTransformer2DModel, out: Path) -> None:
    """Write the weights in float16 and the constructor config to the folder ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, out / WEIGHTS_NAME, metadata={"format": "pt"})
    (out / CONFIG_NAME).write_text(json.dumps(MODEL_CONFIG, indent=2) + "\n", encoding="utf-8")


def train_classifier() -> tuple[SVC, float]:
    """Train the classifier that judges the generated digits.

    Returns:
        A support vector classifier of images [N, 256] in [0, 1], trained on all real digits and their shifts by a
        pixel, and the accuracy on real images of the same classifier trained on three quarters of them.
    """
    images, labels = load_images()

    def augmented(subset: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        grid = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
        shifted = [shift_images(images[subset], torch.tensor([shift]).expand(len(subset), 2)) for shift in grid]
        pixels = (torch.cat(shifted).flatten(1).numpy() + 1) / 2
        return pixels, np.tile(labels[subset].numpy(), len(grid))

    indices = np.arange(len(images))
    fit, held_out = train_test_split(indices, test_size=0.25, random_state=0, stratify=labels.numpy())
    pixels = (images[held_out].flatten(1).numpy() + 1) / 2
    held_out_accuracy = SVC(C=10).fit(*augmented(fit)).score(pixels, labels[held_out].numpy())
    return SVC(C=10).fit(*augmented(indices)), float(held_out_accuracy)


def evaluate(model: DiTTransformer2DModel, per_class: int, guidance_scale: float, sheet: Path | None) -> None:
    """Generate digits, print how many a classifier reads as their label, and draw a sheet of them.

    Args:
        model: The trained model.
        per_class: Images to generate of each digit.
        guidance_scale: Scale of the classifier-free guidance.
        sheet: PNG file to write, one column per digit; None writes none.
    """
    classifier, held_out_accuracy = train_classifier()
    console.print(f"classifier on held-out real digits: {held_out_accuracy:.1%}")
    labels = list(range(NUM_CLASSES)) * per_class
    start = time.perf_counter()
    images = generate(model, labels=labels, guidance_scale=guidance_scale)
    seconds = time.perf_counter() - start
    predicted = classifier.predict(images.flatten(1).numpy())
    correct = predicted == np.array(labels)
    per_digit = ", ".join(f"{digit}: {correct[digit::NUM_CLASSES].mean():.0%}" for digit in range(NUM_CLASSES))
    console.print(
        f"classifier on {len(labels)} generated digits, guidance {guidance_scale}: {correct.mean():.1%} ({per_digit}); "
        f"{seconds:.1f} s"
    )
    if sheet is not None:
        draw_sheet(images, sheet)


def draw_sheet(images: torch.Tensor, path: Path) -> None:
    """Write images [N, 1, 16, 16] in [0, 1] as a PNG sheet of ten columns and at most ten rows."""
    import matplotlib.image

    rows = min(10, len(images) // NUM_CLASSES)
    grid = images[: rows * NUM_CLASSES].reshape(rows, NUM_CLASSES, IMAGE_SIZE, IMAGE_SIZE)
    grid = torch.nn.functional.pad(grid, (1, 1, 1, 1), value=0.5)
    pixels = grid.permute(0, 2, 1, 3).reshape(rows * (IMAGE_SIZE + 2), NUM_CLASSES * (IMAGE_SIZE + 2))
    pixels = pixels.repeat_interleave(4, 0).repeat_interleave(4, 1)
    matplotlib.image.imsave(path, pixels.numpy(), cmap="gray", vmin=0, vmax=1)


def main(
    out: Annotated[Path, typer.Option(help="Folder for the weights and the config.")],
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 3000,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per step.")] = 48,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 1.5e-3,
    seed: Annotated[int, typer.Option(help="Seed of the weights, the batches and the noise.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of PyTorch.")] = 2,
    per_class: Annotated[int, typer.Option(min=1, help="Images of each digit to generate for the evaluation.")] = 20,
    guidance_scale: Annotated[float, typer.Option(help="Guidance scale of the evaluation.")] = DEFAULT_GUIDANCE_SCALE,
    sheet: Annotated[Path | None, typer.Option(help="PNG file for a sheet of generated digits.")] = None,
    evaluate_only: Annotated[bool, typer.Option(help="Evaluate the weights in the folder without training.")] = False,
) -> None:
    """Train the digit model on the CPU, write it to the folder and evaluate what was written."""
    torch.set_num_threads(threads)
    if not evaluate_only:
        start = time.perf_counter()
        model = train(steps, batch_size, learning_rate, seed)
        save(model, out)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        size = (out / WEIGHTS_NAME).stat().st_size
        console.print(
            f"trained {parameters:,} parameters in {(time.perf_counter() - start) / 60:.1f} min; "
            f"{WEIGHTS_NAME} is {size / 1e6:.2f} MB"
        )
    # Reading the files back also checks that the float16 weights are good enough.
    evaluate(load_digits_dit(out), per_class, guidance_scale, sheet)


if __name__ == "__main__":
    typer.run(main)
