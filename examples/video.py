"""A video of a prompt, with a cache or without: both transformers of Wan 2.2 are cached, and none is told its steps.

python examples/video.py --tiny --cache-backend dit_cache --enable-cache-summary --output out/video.gif
python examples/video.py --model-path Wan-AI/Wan2.2-T2V-A14B-Diffusers --cache-backend dit_cache --output out/video.mp4
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from diffusers.utils import export_to_gif, export_to_video
from PIL import Image
from pipelines import CacheBackend, generate, load, made, random_prompt, tiny_wan


def main(
    prompt: str = "a cat walks on the grass",
    model_path: str | None = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="Random weights, made on the spot.")] = False,
    cache_backend: CacheBackend = CacheBackend.none,
    enable_cache_summary: Annotated[bool, typer.Option("--enable-cache-summary")] = False,
    output: Annotated[Path, typer.Option(help="A .gif, or a .mp4, which needs imageio-ffmpeg.")] = Path(
        "out/video.gif"
    ),
    seed: int = 42,
    num_inference_steps: int = 40,
    num_frames: int | None = None,
) -> None:
    """Makes the video."""
    pipeline = load(model_path, tiny_wan if tiny else None)
    request: dict[str, Any] = {"prompt": prompt, "output_type": "pil"}
    if num_frames is not None:
        request["num_frames"] = num_frames
    if tiny:
        request |= {"prompt": None, **random_prompt(prompt, pipeline.transformer.config.text_dim)}
        # Without a text encoder there is nothing to encode an empty negative prompt with.
        request |= {"height": 64, "width": 64, "num_frames": num_frames or 5, "guidance_scale": 1.0}
    result = generate(
        pipeline,
        request,
        cache_backend=cache_backend,
        enable_cache_summary=enable_cache_summary,
        seed=seed,
        num_inference_steps=num_inference_steps,
    )
    frames: list[Image.Image] = result.frames[0]
    export = export_to_gif if output.suffix == ".gif" else export_to_video
    print(export(frames, str(made(output))))


if __name__ == "__main__":
    typer.run(main)
