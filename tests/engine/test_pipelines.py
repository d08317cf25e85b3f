"""Whole pipelines of the engine. Oracles: what it makes without a cache, and a request that is made again.

``make test-all`` runs those that show something of their own, and ``make test`` those of them that do not take long;
``FX_CACHE_PIPELINES=all`` runs every one.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.engine.running import ALWAYS, NEVER, SUMMARY, make, run, summarised

LOW = {"dtype": "bfloat16"}
ONE_DEVICE = {"tensor_parallel_size": 1, "enable_expert_parallel": False, "devices": "0"}


@dataclass(frozen=True)
class Case:
    """How a pipeline is run.

    Attributes:
        hits: of each pass of a request, where every step reuses that may.
        own: what it shows of its own; nothing: it is run on demand.
        long: whether only ``make test-all`` runs it.
        steps: of a request.
        size: of its image, height and width.
        more: sampling parameters of it.
        options: of the engine.
        prompts: of two requests.
    """

    hits: list[int]
    own: str = ""
    long: bool = False
    steps: int = 8
    size: int = 64
    more: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    prompts: tuple[Any, Any] = ("a cat", "a dog")


def places(count: int) -> list[int]:
    """What the first stage of GLM-Image gives: a token for each 16 x 16 pixels."""
    return [i % 16 for i in range(count)]


QUOTED = ('a "cat"', 'a "dog"')  # only what is quoted tells its prompts apart
EDITED = {"prior_token_ids": places(1024), "prior_token_image_ids": [places(1024)]}
CASES = {
    "klein": Case([3]),
    "qwen-image": Case([3]),
    "flux": Case([3]),
    "sd3": Case([3]),
    "z-image": Case([3], "two samples in a list, of a size that the engine has not warmed up with"),
    "glm-image": Case([3, 3], more={"extra_args": {"prior_token_ids": places(16)}}, prompts=QUOTED),
    "glm-image editing": Case(
        [0, 3, 3],  # the call before the loop, which fills a KV cache, and two passes
        size=512,
        more={"extra_args": EDITED},
        options=LOW,
        prompts=tuple([text, contrast] for text, contrast in zip(QUOTED, (1.0, 0.5), strict=True)),
    ),
    "wan": Case([3, 3, 4, 4], "two transformers, with two passes each", steps=16),
    "helios": Case([3, 3, 3, 3], "two chunks, with two passes each", True, size=128, more={"num_frames": 66}),
    "ltx2": Case([3], "conditioning that is made anew at every step", True, size=32, more={"num_frames": 5}),
    "bagel": Case([3, 0], "a KV cache that is made anew at every step; no timestep", True, steps=10, options=LOW),
    "hunyuan-image3": Case([0, 3], options=LOW | ONE_DEVICE),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.long if c.long else ()) for n, c in CASES.items()])
def test_a_whole_pipeline(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    if not case.own and os.environ.get("FX_CACHE_PIPELINES") != "all":
        pytest.skip("FX_CACHE_PIPELINES is not set to all")
    first, second = [([prompt], seed, case.size, case.steps, case.more) for seed, prompt in enumerate(case.prompts)]
    options = [case.options | more for more in ({}, NEVER | SUMMARY, ALWAYS | SUMMARY)]
    (uncached, _), (never, silent), (images, said) = run(
        make(name.split()[0], tmp_path / "model"), options, [first, second, first]
    )
    # Helios, uncached, now and then makes something else of a request that is made again.
    assert never == [*uncached[:2], uncached[0]]
    assert summarised(silent) == [0] * 3 * len(case.hits)
    assert summarised(said) == case.hits * 3
    assert images[0] == images[2] != images[1]
    assert all(image != plain for image, plain in zip(images, uncached, strict=True))
