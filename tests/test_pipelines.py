"""diffusers' pipelines with tiny random weights, each run twice. The oracles: uncached, and alone in another process.

No pipeline is told of guidance, of numbers of steps, or that a request begins.
"""

from __future__ import annotations

import inspect
import multiprocessing
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

import fx_cache
from tests.pipelines import CASES, FIRST, SECOND, THRESHOLD, Case, run
from tests.selection import few

pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")  # Chroma's own


def hits_of(transformer: nn.Module) -> list[list[int]]:
    """How many steps were reused, for each session and branch."""
    sessions = fx_cache.summary(transformer).to_dict()["sessions"]
    return [[sum(len(span["hits"]) for span in b["spans"]) for b in s["branches"]] for s in sessions]


def assert_reused(case: Case, pipeline: DiffusionPipeline) -> None:
    """Every transformer reused in the first request, in every branch that comes at every step."""
    for transformer in case.of(pipeline):
        assert sum(hits > 0 for hits in hits_of(transformer)[0]) == case.reused


def alone(name: str, path: str) -> None:
    """What the other process does: the second request, with nothing before it."""
    torch.set_num_threads(1)
    pipeline = CASES[name].cached(THRESHOLD)
    torch.save(run(pipeline, CASES[name].ask(SECOND), SECOND), path)
    assert_reused(CASES[name], pipeline)


@pytest.mark.slow
@pytest.mark.parametrize("name", few(CASES, 2))
def test_run_twice(name: str, tmp_path: Path) -> None:
    case, path = CASES[name], tmp_path / "latents.pt"
    # Forked from a process that has imported this file and run nothing.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["tests.test_pipelines"])
    process = processes.Process(target=alone, args=(name, str(path)))
    process.start()
    plain, cached = case.build(), case.cached(THRESHOLD)
    run(cached, case.ask(FIRST), FIRST)
    assert_reused(case, cached)
    second = run(cached, case.ask(SECOND), SECOND)
    process.join()
    assert process.exitcode == 0
    assert torch.equal(torch.load(path), second)
    # From here on with a policy that never reuses.
    hits = [sum(map(sum, hits_of(transformer))) for transformer in case.of(cached)]
    for transformer in case.of(cached):
        fx_cache.configure(transformer, residual_diff_threshold=0.0)
    for seed in (FIRST, SECOND):
        assert torch.equal(run(plain, case.ask(seed), seed), run(cached, case.ask(seed), seed))
    assert hits == [sum(map(sum, hits_of(transformer))) for transformer in case.of(cached)]
    for transformer in case.of(cached):
        assert [len(branches) for branches in hits_of(transformer)] == [case.calls] * 4


@pytest.mark.slow
@pytest.mark.parametrize("name", few(["qwenimage", "wan"], 1))
def test_the_same_prompt_with_more_steps(name: str) -> None:
    """Nothing is measured that could tell the requests apart: every step that may be reused is."""
    # Wan's second transformer is first called at a later step than the request before ended at.
    case, always = CASES[name], 1.0
    request = case.ask(SECOND)
    expected = run(case.cached(always), request, SECOND)
    pipeline = case.cached(always)
    run(pipeline, request, 4)
    assert torch.equal(expected, run(pipeline, request, SECOND))


@pytest.mark.parametrize("name", CASES)
def test_who_enters_cache_context(name: str) -> None:
    case = CASES[name]
    assert ("cache_context" in inspect.getsource(type(case.build()).__call__)) is case.says
