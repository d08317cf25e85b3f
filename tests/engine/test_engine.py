"""The real engine, on a CPU, with and without the cache. Oracles: its own uncached images, and a request run alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fx_cache
from fx_cache.profiles import options_for

HERE = Path(__file__).parent
STEPS, SIZE = 8, 64
A, B, AGAIN = (["a cat"], 1, SIZE, STEPS), (["a dog"], 2, SIZE, STEPS), (["a cat"], 1, SIZE, STEPS)
NEVER = {"cache_backend": "dit_cache", "cache_config": {"residual_diff_threshold": 0.0, "compiler": "eager"}}
ALWAYS = {"cache_backend": "dit_cache", "cache_config": {"residual_diff_threshold": 2.0, "compiler": "eager"}}
SUMMARY = {"enable_cache_dit_summary": True}


def make(pipeline: str, folder: Path) -> str:
    """The folder of a tiny pipeline."""
    command = [sys.executable, str(HERE / "tiny_pipelines.py"), pipeline, str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    return str(folder)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make("klein", tmp_path_factory.mktemp("klein"))


def run(model: str, options: dict[str, Any], requests: list[Any], **environment: str) -> tuple[list[list[str]], str]:
    """The digests of the images, and everything that the engine said."""
    command = [sys.executable, str(HERE / "images.py"), model, json.dumps(options), json.dumps(requests)]
    settings = {"VLLM_TARGET_DEVICE": "cpu", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2", **environment}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, **settings}, check=False
    )
    said = done.stdout + done.stderr
    found = re.findall(r"DIGESTS (.*)", said)
    assert found, said[-4000:]
    return json.loads(found[-1]), said


def hits(said: str) -> list[int]:
    """Of each request, as the summaries have them."""
    rows = [line.split("│") for line in said.splitlines() if "│ branch-" in line and "dummy" not in line]
    return [int(row[5]) for row in rows]


@pytest.fixture(scope="session")
def uncached(model: str) -> list[list[str]]:
    """The images of A and B without a cache."""
    return run(model, {}, [A, B])[0]


@pytest.fixture(scope="session")
def cached(model: str) -> tuple[list[list[str]], str]:
    """A, B and A again, with every step reused that may be."""
    return run(model, ALWAYS | SUMMARY, [A, B, AGAIN])


def test_a_policy_that_never_reuses_gives_the_same_images(model: str, uncached: list[list[str]]) -> None:
    images, said = run(model, NEVER | SUMMARY, [A, B])
    assert images == uncached
    assert hits(said) == [0, 0]


def test_another_pipeline(tmp_path: Path) -> None:
    """Qwen-Image; that it reuses is seen over HTTP, in `test_serve`."""
    folder = make("qwen-image", tmp_path)
    images, said = run(folder, NEVER | SUMMARY, [A])
    assert images == run(folder, {}, [A])[0]
    assert hits(said) == [0]


def test_requests_reuse_and_do_not_meet(cached: tuple[list[list[str]], str], uncached: list[list[str]]) -> None:
    images, said = cached
    # Four to begin with, three reused, and then one must be computed.
    assert hits(said) == [3, 3, 3]
    assert images[0] == images[2] != images[1]
    assert images[:2] != uncached


def test_a_profile_is_kept_through_every_request(cached: tuple[list[list[str]], str]) -> None:
    """Two blocks in the head, as this model has it."""
    _, said = cached
    assert re.search(r"dit_cache runs transformer of Flux2KleinPipeline with .*'Fn_compute_blocks': 2", said)


def test_a_mask_of_steps_without_the_plugin(model: str, cached: tuple[list[list[str]], str]) -> None:
    masked = {**ALWAYS["cache_config"], "scm_steps_mask_policy": "medium", "scm_steps_policy": "static"}
    runner = {"diffusion_model_runner_cls": "fx_cache.integrations.vllm_omni.DitCacheRunner"}
    options = ALWAYS | SUMMARY | runner | {"cache_config": masked}
    images, said = run(model, options, [A, B, AGAIN], VLLM_PLUGINS="omni_cpu")
    assert "'Fn_compute_blocks': 2" in said
    assert hits(said) == [2, 2, 2]  # 11110101
    assert images[0] == images[2] != images[1]
    assert images[0] != cached[0][0]


def test_what_cannot_be_enabled_leaves_the_engine_serving(model: str, uncached: list[list[str]]) -> None:
    options = {"cache_backend": "dit_cache", "cache_config": {"rel_l1_thresh": 0.3}}
    images, said = run(model, options, [A])
    assert images == uncached[:1]
    lines = [line for line in said.splitlines() if "dit_cache is off" in line]
    assert len(lines) == 1
    assert "cache_config key 'rel_l1_thresh': got a key that is none of dit_cache's" in lines[0]


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"mag_threshold": 0.3}, "'mag_threshold': got a key that is none of dit_cache's"),
        ({"Fn_block": 2}, "'Fn_block': got a key that is none of dit_cache's"),
        ({"enable_taylorseer": True}, "'enable_taylorseer': got True; expected False"),
    ],
)
def test_keys_that_are_not_ours(config: dict[str, Any], match: str) -> None:
    from fx_cache.integrations.vllm_omni import DitCacheBackend

    with pytest.raises(fx_cache.OptionError, match=match):
        DitCacheBackend(config)


def test_keys_as_the_engine_has_them() -> None:
    """Defaults of the engine's give way to a profile; what is set goes before it."""
    from vllm_omni.diffusion.data import DiffusionCacheConfig

    from fx_cache.integrations.vllm_omni import DEFAULTS, read_config

    options, profiles = read_config(DiffusionCacheConfig.from_dict({"profiles": {"My*": {"Fn_compute_blocks": 3}}}))
    assert options == {}
    assert options_for(["Any"], profiles) == DEFAULTS
    assert options_for(["Flux2KleinPipeline"], profiles) == {**DEFAULTS, "Fn_compute_blocks": 2}
    assert options_for(["MyModel"], profiles) == {**DEFAULTS, "Fn_compute_blocks": 3}
    given = {"Fn_compute_blocks": 4, "scm_steps_mask_policy": "fast", "scope": "stack"}
    assert read_config(DiffusionCacheConfig.from_dict(given))[0] == {"Fn_compute_blocks": 4, "scope": "stack"}
    usual = {name: getattr(DiffusionCacheConfig(), name) for name in DEFAULTS}
    assert usual == DEFAULTS
