"""What the engine, or cache-dit in it, does by hand for single models. Here nothing says which model it is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

import fx_cache
from fx_cache.integrations.vllm_omni import DitCacheBackend
from tests.engine.models import MODELS, STEPS, Inputs, engine, normal
from tests.engine.running import OPTIONS, hits, same, tensors

REUSED = [2, 3, 4, 6, 7]
"""Of eight steps, two to begin with; after three reused in a row one must be computed."""


def run(module: nn.Module, request: str, calls: list[Inputs]) -> list[list[Tensor]]:
    with fx_cache.session(request):
        return [tensors(module(**inputs)) for inputs in calls]


def enabled(module: nn.Module, **options: Any) -> DitCacheBackend:
    backend = DitCacheBackend(OPTIONS | {"residual_diff_threshold": 2.0} | options)
    backend.enable(SimpleNamespace(transformer=module))
    return backend


def test_editing_with_a_call_before_the_loop() -> None:
    """The condition image goes through the model first. With the hint of the engine's pull request, and without."""
    model = MODELS["GLM-Image"]

    def edit(module: Any, request: str) -> list[list[Tensor]]:
        generator, cache = Generator().manual_seed(5), module.create_kv_cache()
        prompt = model.prompt(generator)
        cache.set_mode("write")
        before = prompt | {
            "hidden_states": normal(generator, 1, 4, 8, 8),
            "encoder_hidden_states": prompt["encoder_hidden_states"][:, :0],
            "timestep": torch.zeros(1),
            "kv_cache": cache,
        }
        run(module, request, [before])
        cache.set_mode("read")
        return run(module, request, [inputs | {"kv_cache": cache} for inputs in model.request(0)])

    with engine(model.settings) as config, torch.no_grad():
        module = model.make(config)
        expected, hinted = None, {"force_refresh_step_hint": 1}
        for name, options in {"none": {}, "hinted": hinted, "never": {"residual_diff_threshold": 0.0}}.items():
            backend = enabled(module, **options)
            for request in (f"{name}-1", f"{name}-2"):
                got = edit(module, request)
                reused = [[], REUSED] if name != "never" else [[], []]
                assert hits(backend.handle, request) == reused
                expected = expected or got
                assert same(expected, got) == (name != "never")
            backend.disable(None)


def test_every_chunk_of_a_video_begins_afresh() -> None:
    """A chunk has the same prompt and the history that the one before made. With `repeat`, and without any hint."""
    model = MODELS["Helios"]
    first, second = model.request(0), model.request(1)
    second = [inputs | {"encoder_hidden_states": first[0]["encoder_hidden_states"]} for inputs in second]
    repeat = {"force_refresh_step_hint": STEPS, "force_refresh_step_policy": "repeat"}
    with engine(model.settings) as config, torch.no_grad():
        module = model.make(config)
        outputs = []
        for name, options in {"none": {}, "repeat": repeat}.items():
            backend = enabled(module, **options)
            outputs.append(run(module, name, first + second))
            assert hits(backend.handle, name) == [REUSED, REUSED]
            outputs.append(run(module, f"{name}-alone", second))
            backend.disable(None)
        assert same(outputs[0], outputs[2])
        assert same(outputs[0][STEPS:], outputs[1])


def test_the_summary_of_fifty_steps() -> None:
    """The settings and the table of the engine's pull request 1858: cached steps, P50, P95 and max of the diffs."""
    model = MODELS["GLM-Image"]
    with engine(model.settings) as config, torch.no_grad():
        module = model.make(config)
        backend = DitCacheBackend({"compiler": "eager"})  # F1 B0, W4, 0.24, MC3 are the engine's defaults
        backend.enable(SimpleNamespace(transformer=module))
        run(module, "fifty", model.request(0, 50))
        assert backend.handle is not None
        summary = backend.handle.summary("fifty")
        (span,) = summary.sessions[0]["branches"][0]["spans"]
        assert span["steps"] == 50
        # Every fourth step behind the warm-up is computed, since the model moves slowly.
        assert span["hits"] == [step for step in range(4, 50) if (step - 4) % 4 != 3]
        diffs = sorted(span["diffs"].values())
        expected = torch.tensor(diffs, dtype=torch.float64).quantile(
            torch.tensor([0.5, 0.95, 1.0], dtype=torch.float64)
        )
        (row,) = [line.split("│") for line in str(summary).splitlines() if "branch-0" in line]
        assert int(row[5]) == len(span["hits"])
        assert [float(cell) for cell in row[6:9]] == pytest.approx(expected.tolist(), abs=5e-4)
