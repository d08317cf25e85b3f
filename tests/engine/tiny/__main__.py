"""Pipelines of a megabyte with random weights, as folders for the engine: ``-m tests.engine.tiny NAME FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tests.engine.tiny import images, own, videos

MAKERS = {
    "klein": images.klein,
    "qwen-image": images.qwen_image,
    "flux": images.flux,
    "sd3": images.sd3,
    "z-image": images.z_image,
    "glm-image": images.glm_image,
    "wan": videos.wan,
    "helios": videos.helios,
    "ltx2": videos.ltx2,
    "bagel": own.bagel,
    "hunyuan-image3": own.hunyuan_image3,
}


def save(name: str, folder: Path) -> None:
    """Writes a pipeline."""
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    pipeline = MAKERS[name](folder)
    if pipeline is not None:
        pipeline.save_pretrained(folder)


if __name__ == "__main__":
    save(sys.argv[1], Path(sys.argv[2]))
