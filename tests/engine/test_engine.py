"""The real engine, on a CPU, with and without the cache. Oracles: its own uncached images, and a request run alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import fx_cache
from fx_cache.profiles import options_for
from tests.engine.running import ALWAYS, NEVER, SUMMARY, Digests, make, run, summarised

STEPS, SIZE = 8, 64
A, B, AGAIN = (["a cat"], 1, SIZE, STEPS), (["a dog"], 2, SIZE, STEPS), (["a cat"], 1, SIZE, STEPS)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make("klein", tmp_path_factory.mktemp("klein"))


@pytest.fixture(scope="session")
def runs(model: str) -> list[tuple[Digests, str]]:
    """A, B and A again: without a cache, with a policy that never reuses, and with every step reused that may be."""
    return run(model, [{}, NEVER | SUMMARY, ALWAYS | SUMMARY], [A, B, AGAIN])


def test_a_policy_that_never_reuses_gives_the_same_images(runs: list[tuple[Digests, str]]) -> None:
    (uncached, _), (never, said), _ = runs
    assert never == uncached
    assert summarised(said) == [0, 0, 0]


def test_requests_reuse_and_do_not_meet(runs: list[tuple[Digests, str]]) -> None:
    (uncached, _), _, (images, said) = runs
    # Four to begin with, three reused, and then one must be computed.
    assert summarised(said) == [3, 3, 3]
    assert images[0] == images[2] != images[1]
    assert all(image != plain for image, plain in zip(images, uncached, strict=True))


def test_a_profile_is_kept_through_every_request(runs: list[tuple[Digests, str]]) -> None:
    """Two blocks in the head, as this model has it."""
    _, said = runs[2]
    assert re.search(r"dit_cache runs transformer of Flux2KleinPipeline with .*'Fn_compute_blocks': 2", said)


def test_a_mask_of_steps_without_the_plugin(model: str, runs: list[tuple[Digests, str]]) -> None:
    masked = {**ALWAYS["cache_config"], "scm_steps_mask_policy": "medium", "scm_steps_policy": "static"}
    runner = {"diffusion_model_runner_cls": "fx_cache.integrations.vllm_omni.DitCacheRunner"}
    options = ALWAYS | SUMMARY | runner | {"cache_config": masked}
    ((images, said),) = run(model, [options], [A, B, AGAIN], VLLM_PLUGINS="omni_cpu")
    assert "'Fn_compute_blocks': 2" in said
    assert summarised(said) == [2, 2, 2]  # 11110101
    assert images[0] == images[2] != images[1]
    assert images[0] != runs[2][0][0]


def test_what_cannot_be_enabled_leaves_the_engine_serving(model: str, runs: list[tuple[Digests, str]]) -> None:
    options = {"cache_backend": "dit_cache", "cache_config": {"rel_l1_thresh": 0.3}}
    ((images, said),) = run(model, [options], [A])
    assert images == runs[0][0][:1]
    lines = [line for line in said.splitlines() if "dit_cache is off" in line]
    assert len(lines) == 1
    assert "cache_config key 'rel_l1_thresh': got a key that is none of dit_cache's" in lines[0]


def test_a_plugin_that_cannot_be_loaded_leaves_the_engine_serving(
    model: str, runs: list[tuple[Digests, str]], tmp_path: Path
) -> None:
    """As with an engine whose modules lie elsewhere."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['fx_cache.integrations.vllm_omni'] = None\n")
    ((images, said),) = run(model, [ALWAYS], [A], PYTHONPATH=str(tmp_path))
    assert images == runs[0][0][:1]
    (line,) = [line for line in said.splitlines() if "dit_cache is off" in line]
    assert "got ModuleNotFoundError: import of fx_cache.integrations.vllm_omni halted" in line


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
