"""Runs requests in the engine: ``images.py MODEL OPTIONS REQUESTS``, the latter two as JSON.

Prints, as the last line, the digest of each image. A request is (prompt, seed, size, steps); a list of those is given
to the engine at once.
"""

from __future__ import annotations

import hashlib
import json
import sys
from typing import Any

import numpy


def digests(outputs: list[Any]) -> list[str]:
    """Of the images, in the order of the requests."""
    images = [(o.request_output if hasattr(o, "request_output") and o.request_output else o).images[0] for o in outputs]
    return [hashlib.sha256(numpy.asarray(image).tobytes()).hexdigest()[:16] for image in images]


def main() -> None:
    """Runs them."""
    from vllm_omni.entrypoints.omni import Omni
    from vllm_omni.inputs.data import OmniDiffusionSamplingParams

    model, options, requests = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
    engine = Omni(model=model, dtype="float32", enforce_eager=True, **options)
    found = []
    for prompts, seed, size, steps in requests:
        params = OmniDiffusionSamplingParams(height=size, width=size, num_inference_steps=steps, seed=seed)
        found.append(digests(engine.generate(prompts, params)))
    engine.close()
    print("DIGESTS", json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
