"""The hardest oracle of state: each request alone in a process of its own."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch

import fx_cache
from tests.models import conditioning, walk
from tests.running import REUSING, compile_cached, hits_of, shallow

REQUESTS = {
    "cond": (0, 0, 0),
    "uncond": (1, 0, 1),
    "second prompt": (2, 0, 2),
    "other seed": (3, 0, 0),
    "large": (4, 1, 0),
}
"""(seed of the noise, size, seed of the prompt) of each request."""


def request(name: str, which: str, prompts: dict | None = None) -> list[dict]:
    seed, size, prompt = REQUESTS[which]
    prompts = {} if prompts is None else prompts
    if (size, prompt) not in prompts:
        prompts[size, prompt] = conditioning(name, seed=prompt, size=size)
    return walk(name, 8, seed=seed, size=size, conditioning=prompts[size, prompt])


def alone(name: str, which: str, path: str) -> None:
    """What the other process does."""
    torch.set_num_threads(1)
    with torch.no_grad():
        compiled = compile_cached(shallow(name), **REUSING)
        torch.save([compiled(**step)[0].clone() for step in request(name, which)], path)
        assert hits_of(compiled)


@pytest.mark.slow
def test_every_request_is_what_a_fresh_process_gives(tmp_path: Path) -> None:
    name = "flux"
    # Forked from a process that has imported this file and run nothing.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["tests.test_fresh_process"])
    expected = {}
    for which in REQUESTS:
        path = tmp_path / f"{which}.pt"
        process = processes.Process(target=alone, args=(name, which, str(path)))
        process.start()
        process.join()
        assert process.exitcode == 0, which
        expected[which] = torch.load(path)
    compiled = compile_cached(shallow(name), **REUSING)
    prompts: dict = {}
    steps = {which: request(name, which, prompts) for which in REQUESTS}
    got: dict[str, list[torch.Tensor]] = {which: [] for which in REQUESTS}
    # cond and uncond take turns, with another resolution in between; then a second prompt; then the first prompt again.
    order = [(w, i) for i in range(8) for w in ("cond", "uncond", "large")]
    order += [(w, i) for w in ("second prompt", "other seed") for i in range(8)]
    for which, i in order:
        got[which].append(compiled(**steps[which][i])[0].clone())
    for which in REQUESTS:
        same = [torch.equal(a, b) for a, b in zip(expected[which], got[which], strict=True)]
        assert same == [True] * 8, which
    assert len(fx_cache.summary(compiled).to_dict()["sessions"]) >= 3
