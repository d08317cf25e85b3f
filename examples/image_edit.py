"""An image changed as a prompt says, with a cache or without.

python examples/image_edit.py --tiny --cache-backend dit_cache --enable-cache-summary --output out/edit.png
python examples/image_edit.py --model-path black-forest-labs/FLUX.1-Kontext-dev --image cat.png
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from diffusers.utils import load_image
from PIL import Image
from pipelines import CacheBackend, generate, load, made, random_prompt, tiny_flux


def main(
    prompt: str = "let the cat wear a hat",
    image: Annotated[str | None, typer.Option(help="A file or an address.")] = None,
    model_path: str | None = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="Random weights and an image, made on the spot.")] = False,
    cache_backend: CacheBackend = CacheBackend.none,
    enable_cache_summary: Annotated[bool, typer.Option("--enable-cache-summary")] = False,
    output: Path = Path("out/edit.png"),
    seed: int = 42,
    num_inference_steps: int = 28,
) -> None:
    """Makes the image."""
    pipeline = load(model_path, partial(tiny_flux, "FluxKontextPipeline") if tiny else None)
    request: dict[str, Any]
    if tiny:
        config = pipeline.transformer.config
        request = random_prompt(prompt, config.joint_attention_dim, config.pooled_projection_dim)
        request |= {"image": Image.linear_gradient("L").convert("RGB").resize((64, 64)), "height": 64, "width": 64}
        request |= {"max_area": 64 * 64, "_auto_resize": False}
    elif image is None:
        raise SystemExit("--image: got nothing; expected a file or an address; or give --tiny.")
    else:
        request = {"prompt": prompt, "image": load_image(image)}
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
