"""An image of a prompt, with a cache or without.

python examples/text_to_image.py --tiny --cache-backend dit_cache --enable-cache-summary --output out/image.png
python examples/text_to_image.py --model-path black-forest-labs/FLUX.1-dev --cache-backend dit_cache
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from pipelines import CacheBackend, generate, load, made, random_prompt, tiny_flux


def main(
    prompt: str = "a cup of coffee on the table",
    model_path: str | None = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="Random weights, made on the spot.")] = False,
    cache_backend: CacheBackend = CacheBackend.none,
    enable_cache_summary: Annotated[bool, typer.Option("--enable-cache-summary")] = False,
    output: Path = Path("out/image.png"),
    seed: int = 42,
    num_inference_steps: int = 28,
    height: int | None = None,
    width: int | None = None,
) -> None:
    """Makes the image."""
    pipeline = load(model_path, partial(tiny_flux, "FluxPipeline") if tiny else None)
    request = {"height": height, "width": width, "prompt": prompt}
    if tiny:
        config = pipeline.transformer.config
        request = {
            "height": 64,
            "width": 64,
            **random_prompt(prompt, config.joint_attention_dim, config.pooled_projection_dim),
        }
    result = generate(
        pipeline,
        request,
        cache_backend=cache_backend,
        enable_cache_summary=enable_cache_summary,
        seed=seed,
        num_inference_steps=num_inference_steps,
    )
    result.images[0].save(made(output))
    print(output)


if __name__ == "__main__":
    typer.run(main)
