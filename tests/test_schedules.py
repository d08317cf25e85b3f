"""Random schedules of interleaved requests: every output is bit for bit that of the request in a process of its own."""

from __future__ import annotations

import io
import multiprocessing
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

import fx_cache
from fx_cache.testing import Alone, Outputs, Request, assert_as_if_alone, interleaved, run
from tests.models import conditioning, walk
from tests.running import REUSING, compile_cached, shallow

STEPS = 6
SCHEDULES = int(os.environ.get("FX_CACHE_SCHEDULES", "30"))
"""Schedules in all, over all kinds of models."""

KINDS = ("dit", "flux", "wan")


def unused(kind: str, rng: random.Random, size: int, used: set[str]) -> dict[str, Any]:
    """A prompt that no other request has: small tensors on the host are compared by value."""
    while True:
        prompt = conditioning(kind, seed=rng.randrange(1 << 16), size=size)
        key = str([(k, v.tolist() if isinstance(v, torch.Tensor) else v) for k, v in prompt.items()])
        if key not in used:
            used.add(key)
            return prompt


def requests(kind: str, rng: random.Random, pool: dict[Any, dict[str, Any]]) -> list[Request]:
    """2 to 6 requests of 1 to 3 branches: another resolution, a prompt used before, skipped branches, steps evaluated
    twice, and some that break off."""
    found = []
    used: set[str] = set()
    for r in range(rng.randint(2, 6)):
        # The fewest different prompts that a kind has are ten class labels.
        size, named = rng.choice((0, 0, 1)), rng.random() < 0.5 or len(used) > 6
        branches = [f"branch-{b}" for b in range(rng.randint(1, 3))]
        walks = {}
        for branch in branches:
            seed = rng.randrange(3)
            # Two requests that share a prompt and run at once have to be named.
            prompt = pool[size, seed] if named else unused(kind, rng, size, used)
            walks[branch] = walk(kind, STEPS, seed=rng.randrange(1 << 16), size=size, conditioning=prompt)
        calls = []
        for i in range(STEPS):
            for branch in rng.sample(branches, len(branches)):
                if branch == branches[0] or rng.random() < 0.85:
                    calls += [(branch, walks[branch][i])] * (2 if rng.random() < 0.08 else 1)
        breaks = rng.random() < 0.3
        if breaks:
            calls = calls[: rng.randint(1, len(calls))]
        found.append(Request(calls, f"request-{r}" if named else None, breaks))
    return found


def is_complete(request: Request) -> bool:
    """Whether every branch comes to its last step."""
    last = dict(request.calls)
    ends = [step["timestep"].item() for step in last.values()]
    return not request.breaks and ends == [min(step["timestep"].item() for _, step in request.calls)] * len(last)


def saved(value: Any) -> bytes:
    """What is sent to another process, with all that is one object in it still one."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def loaded(value: bytes) -> Any:
    return torch.load(io.BytesIO(value), weights_only=False)


def captured(kind: str) -> Any:
    """A compiled model that has seen both sizes, and nothing of which is left."""
    compiled = compile_cached(shallow(kind), **REUSING)
    for size in (0, 1):
        step = walk(kind, 1, size=size)[0]
        compiled(**step)
        compiled(**loaded(saved(step)))
    fx_cache.reset()
    return compiled


def serve(kind: str, connection: Connection) -> None:
    """A process that captures a model and runs no request: each that comes is run in a fork of it."""
    torch.set_num_threads(1)
    with torch.no_grad():
        compiled = captured(kind)
        while request := connection.recv_bytes():
            reader, writer = os.pipe()
            if not os.fork():
                outputs = saved(run(compiled, loaded(request)))
                with os.fdopen(writer, "wb") as file:
                    file.write(outputs)
                os._exit(0)
            os.close(writer)
            with os.fdopen(reader, "rb") as file:
                connection.send_bytes(file.read())
            os.wait()


@contextmanager
def processes(kind: str) -> Iterator[Alone]:
    """Runs each request in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_schedules"])
    ours, theirs = context.Pipe()
    server = context.Process(target=serve, args=(kind, theirs))
    server.start()

    def alone(request: Request) -> list[Outputs]:
        ours.send_bytes(saved(request))
        return loaded(ours.recv_bytes())

    yield alone
    ours.send_bytes(b"")
    server.join()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::fx_cache.CacheWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_every_request_is_as_if_alone(kind: str) -> None:
    pool = {(size, seed): conditioning(kind, seed=seed, size=size) for size in (0, 1) for seed in range(3)}
    count, hits, calls = SCHEDULES // len(KINDS), 0, 0
    with processes(kind) as alone:
        compiled = captured(kind)
        for number in range(count):
            rng = random.Random(f"{kind} {number}")
            found = requests(kind, rng, pool)
            hits += assert_as_if_alone(compiled, found, interleaved(found, rng), alone)
            calls += sum(len(r.calls) for r in found)
            for name in {r.name for r in found} - {None}:
                fx_cache.end(name)
            if any(r.name is None and not is_complete(r) for r in found):
                # It has left branches on the way. Whoever comes with a prompt of the same value may have to compute
                # steps in doubt, which alone are reused, since nobody has said that those are over; here somebody does.
                fx_cache.reset(compiled)
    assert hits > 10 * count
    print(f"{kind}: {count} schedules, {calls} calls, {hits} hits")
