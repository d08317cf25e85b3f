"""Runs requests in the engine: ``-m tests.engine.images MODEL OPTIONS REQUESTS``, the latter two as JSON.

Options are a list; an engine of each runs all requests, and prints the digests of what they make. A request is
(prompts, seed, size, steps), and may have a fifth: more sampling parameters. Its prompts are given at once.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy
import torch
from vllm_omni.entrypoints.omni import Omni
from vllm_omni.inputs.data import OmniDiffusionSamplingParams

from tests.engine.on_cpu import as_on_a_gpu
from tests.engine.tiny.sizes import read_sizes


def digest(output: Any) -> str:
    """Of an image, or of a video and its sound."""
    made = output.request_output if hasattr(output, "request_output") and output.request_output else output
    parts = [made.images[0], made.multimodal_output.get("audio", ())]
    return hashlib.sha256(b"".join(numpy.asarray(part).tobytes() for part in parts)).hexdigest()[:16]


def prompt(given: str | list[Any], size: int) -> str | dict[str, Any]:
    """A text, or (text, contrast): a picture of that contrast is to be edited.

    It is given as the engine's pipeline of GLM-Image encodes it: what the engine itself makes of a picture has one
    dimension more than that.
    """
    if isinstance(given, str):
        return given
    text, contrast = given
    picture = torch.linspace(-contrast, contrast, 3 * size * size).view(3, size, size)
    return {"prompt": text, "additional_information": {"preprocessed_image": picture}}


def main() -> None:
    """Runs them."""
    model, each, requests = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
    as_on_a_gpu()
    read_sizes(Path(model))
    for options in each:
        engine = Omni(**{"model": model, "dtype": "float32", "enforce_eager": True, **options})
        found = []
        for prompts, seed, size, steps, *more in requests:
            settings = {"height": size, "width": size, "num_inference_steps": steps, "seed": seed}
            params = OmniDiffusionSamplingParams(**settings, **(more[0] if more else {}))
            found.append([digest(o) for o in engine.generate([prompt(given, size) for given in prompts], params)])
        engine.close()
        print("DIGESTS", json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
