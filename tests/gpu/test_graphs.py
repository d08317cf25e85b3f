"""CUDA graphs: what is remembered is not overwritten by replays, and a user may capture steps himself."""

from __future__ import annotations

import random
import threading

import pytest
import torch

import fx_cache
from fx_cache.testing import Request, counted_hits, interleaved
from tests import test_schedules
from tests.gpu.card import Sent, device, needs_card
from tests.models import conditioning, walk
from tests.running import REUSING, compile_cached, hits_of, last_branch, relative_error, shallow

pytestmark = [needs_card, pytest.mark.slow, pytest.mark.filterwarnings("ignore::fx_cache.CacheWarning")]

SCHEDULES = 200
STATIC = {"steps_computation_mask": [1, 0, 0, 1, 0, 0], "steps_computation_policy": "static"}


@pytest.mark.parametrize("kind", test_schedules.KINDS)
def test_what_is_remembered_survives_random_schedules(kind: str) -> None:
    """As many requests, mixed call by call: with CUDA graphs each output is what it is without."""
    pool = {(size, seed): conditioning(kind, seed=seed, size=size) for size in (0, 1) for seed in range(3)}
    with_graphs, without = (
        compile_cached(shallow(kind).to(device()), compiler="inductor", mode=mode, dynamic=False, **REUSING)
        for mode in ("reduce-overhead", "default")
    )
    hits = 0
    for number in range(SCHEDULES // len(test_schedules.KINDS)):
        rng = random.Random(f"{kind} {number}")
        requests, send = test_schedules.requests(kind, rng, pool), Sent()
        requests = [Request(send(r.calls), r.name, r.breaks) for r in requests]
        order, found = interleaved(requests, rng), []
        for model in (with_graphs, without):
            done = [0] * len(requests)
            outputs = []
            with counted_hits() as counted:
                for k in order:
                    torch.compiler.cudagraph_mark_step_begin()
                    outputs.append([t.clone() for t in requests[k].call(model, done[k])])
                    done[k] += 1
            found.append((counted.count, outputs))
            fx_cache.reset(model)
        assert found[0][0] == found[1][0]
        hits += found[0][0]
        for i, (a, b) in enumerate(zip(found[0][1], found[1][1], strict=True)):
            assert all(relative_error(x, y) < 1e-4 for x, y in zip(b, a, strict=True)), f"schedule {number}, call {i}"
    assert hits


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
@pytest.mark.parametrize("kind", ["dit", "flux"])
def test_each_step_captured_by_the_user(kind: str, compiler: str) -> None:
    """A static mask, and the step said: nothing is read while it is captured, and replays give what calls give."""
    send = Sent()
    steps = [send(step) for step in walk(kind, 6)]
    compiled = compile_cached(shallow(kind).to(device()), compiler=compiler, **STATIC)
    expected = []
    for i, step in enumerate(steps):
        with fx_cache.session("called", "only", step=i):
            expected.append(compiled(**step)[0].clone())
    given = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in steps[0].items()}
    graphs, outputs = [], []
    for i in range(6):
        graphs.append(torch.cuda.CUDAGraph())
        with fx_cache.session("captured", "only", step=i), torch.cuda.graph(graphs[-1]):
            outputs.append(compiled(**given)[0])
    assert last_branch(compiled)["spans"][0]["hits"] == [1, 2, 4, 5]
    for _ in range(2):
        for i, step in enumerate(steps):
            for name, value in given.items():
                if isinstance(value, torch.Tensor):
                    value.copy_(step[name])
            graphs[i].replay()
            assert relative_error(expected[i], outputs[i]) < 1e-5


def test_a_step_that_nobody_names_computes_while_it_is_captured() -> None:
    send = Sent()
    steps = [send(step) for step in walk("dit", 3)]
    model = shallow("dit").to(device())
    compiled = compile_cached(model, residual_diff_threshold=0.99)
    for step in steps:
        compiled(**step)
    graph = torch.cuda.CUDAGraph()
    with pytest.warns(fx_cache.CacheWarning, match="within fx_cache.session"), torch.cuda.graph(graph):
        output = compiled(**steps[2])[0]
    graph.replay()
    assert relative_error(model(**steps[2])[0], output) < 1e-5


def test_two_threads_with_a_stream_each() -> None:
    """With Inductor: each gives what it gives alone."""
    send, kind = Sent(), "dit"
    walks = [[send(s) for s in walk(kind, 28, seed=k, conditioning=conditioning(kind, seed=k))] for k in range(2)]
    compiled = compile_cached(shallow(kind).to(device()), compiler="inductor", **REUSING)

    def request(name: str, steps: list[dict], into: list[torch.Tensor]) -> None:
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            for step in steps:
                with fx_cache.session(name, "only"):
                    into.append(compiled(**step)[0].clone())
            torch.cuda.current_stream().synchronize()

    expected: list[list[torch.Tensor]] = [[], []]
    for k, steps in enumerate(walks):
        request(f"alone {k}", steps, expected[k])
    for number in range(10):
        found: list[list[torch.Tensor]] = [[], []]
        threads = [
            threading.Thread(target=request, args=(f"beside {number} {k}", walks[k], found[k])) for k in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(map(torch.equal, expected[0] + expected[1], found[0] + found[1])), number
    assert hits_of(compiled)


def test_a_request_that_changes_streams_at_every_step() -> None:
    """What it left on one stream is not overwritten by work on another: long kernels are queued between the steps."""
    send = Sent()
    steps = [send(step) for step in walk("dit", 28)]
    compiled = compile_cached(shallow("dit").to(device()), **REUSING)
    with fx_cache.session("one stream", "only"):
        expected = [compiled(**step)[0].clone() for step in steps]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    busy, found = torch.randn(4096, 4096, device=device()), []
    with fx_cache.session("four streams", "only"):
        for i, step in enumerate(steps):
            stream = streams[i % 4]
            with torch.cuda.stream(stream):
                busy @ busy
                found.append(compiled(**step)[0].clone())
    torch.cuda.synchronize()
    assert all(map(torch.equal, expected, found))
    assert hits_of(compiled)
