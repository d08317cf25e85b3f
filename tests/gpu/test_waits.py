"""On a device whose values the host has to wait for: decided as on the host, and waited for once a step at most."""

from __future__ import annotations

import contextlib
import random
import threading
from typing import Any

import pytest
import torch
from torch import nn

import fx_cache
from fx_cache.runtime.batches import MixedHit
from fx_cache.runtime.clock import Sign, read_schedule
from fx_cache.runtime.device import Readback
from fx_cache.runtime.moves import Call, Learner
from fx_cache.testing import counted_hits
from fx_cache.testing import run as run_requests
from tests import test_relay, test_schedules
from tests.gpu.card import REAL, Sent, called, device, needs_standin, watched
from tests.gpu.standin import capturing
from tests.models import NAMES, build, conditioning, walk
from tests.running import REUSING, compile_cached, hits_of, last_branch, relative_error, shallow
from tests.selection import few

pytestmark = pytest.mark.slow


@needs_standin
def test_the_stand_in_shows_nothing_that_nobody_waits_for() -> None:
    x = torch.ones(3, device=device())
    there = torch.zeros(3, pin_memory=True)
    with watched() as seen:
        there.copy_(x, non_blocking=True)
        assert there.tolist() == [0.0] * 3
    assert not seen.waits
    event = torch.Event(device=device())
    event.record(torch.accelerator.current_stream())
    with watched() as seen:
        event.synchronize()
        assert there.tolist() == [1.0] * 3
        assert x.sum().item() == 3.0
        assert x.tolist() == [1.0] * 3
        assert torch.equal(x, x)
        torch.ones(3).to(device())
        x.nonzero()
    assert len(seen.waits) == 6
    assert "aten::sum" in seen.launches
    with capturing(), pytest.raises(RuntimeError, match="captured"):
        x.tolist()


@pytest.mark.parametrize("name", NAMES if REAL else few(NAMES, 3))
def test_ten_models(name: str) -> None:
    """Where nothing is reused each output is the model's; else what is reused is what is reused on the host."""
    steps, send = walk(name, 8), Sent()
    host = compile_cached(build(name), **REUSING)
    expected = [host(**step)[0] for step in steps]
    model = build(name).to(device())
    sent = [send(step) for step in steps]
    alone = torch.compile(model, backend="eager", fullgraph=True)
    plain = [called(alone, step) for step in sent]
    torch._dynamo.reset()
    never = compile_cached(model, residual_diff_threshold=0.0)
    for step, (output, _) in zip(sent[:3], plain, strict=False):
        assert torch.equal(never(**step)[0], output)
    torch._dynamo.reset()
    compiled = compile_cached(build(name).to(device()), **REUSING)
    for i, (step, (_, alone)) in enumerate(zip(sent, plain, strict=True)):
        output, seen = called(compiled, step)
        assert relative_error(expected[i], output.cpu()) < (1e-3 if REAL else 1e-5)
        # The model's own waits are its own.
        assert len(seen.waits) - len(alone.waits) <= (i >= REUSING["max_warmup_steps"]), (i, seen.waits)
    assert hits_of(compiled) == hits_of(host) != []


STATIC = {"steps_computation_mask": [1, 0, 0, 1, 0, 0], "steps_computation_policy": "static"}

SETTLED: dict[str, tuple[dict[str, Any], bool, list[int]]] = {
    "never": ({"residual_diff_threshold": 0.0}, False, []),
    "warm-up": ({"max_warmup_steps": 99}, False, []),
    "always": ({"residual_diff_threshold": 1.0}, True, [1, 2, 3, 4, 5]),
    "a static mask": (STATIC, True, [1, 2, 4, 5]),
    "enough hits": ({"max_cached_steps": 2, "residual_diff_threshold": 1.0}, True, [1, 2]),
}
"""Policies that need no diff: whether the step has to be said for nothing to be read, and what is reused."""


@pytest.mark.parametrize("kind", SETTLED)
def test_nothing_is_waited_for_where_the_policy_settles_the_step(kind: str) -> None:
    policy, said, hits = SETTLED[kind]
    compiled, send = compile_cached(shallow("dit").to(device()), **policy), Sent()
    for i, step in enumerate(walk("dit", 6)):
        with fx_cache.session("request", "only", step=i) if said else contextlib.nullcontext():
            _, seen = called(compiled, send(step))
        assert not seen.waits, i
    assert last_branch(compiled)["spans"][0]["hits"] == hits


@needs_standin
def test_what_a_reused_step_launches_beside_the_graph() -> None:
    """Looking at the latent and the time, and reading them with the diff: a few launches, whatever the model."""
    send, counts = Sent(), []
    for policy, named in (({"residual_diff_threshold": 1.0}, True), ({"residual_diff_threshold": 0.99}, False)):
        torch._dynamo.reset()
        compiled = compile_cached(shallow("dit").to(device()), **policy)
        for i, step in enumerate(walk("dit", 5)):
            with fx_cache.session("request", "only", step=i) if named else contextlib.nullcontext():
                _, seen = called(compiled, send(step))
        assert last_branch(compiled)["spans"][0]["hits"][-1] == 4
        counts.append(len(seen.launches))
    measure = 6  # one kernel, or two, where it is compiled
    assert counts[1] - counts[0] - measure <= 10


def test_a_number_on_the_host_beside_the_time_on_the_device() -> None:
    """Nothing is waited for to take both, and what is read then is what both are known by on the host."""
    for time in (torch.tensor([7]), torch.tensor([0.3, -0.2, 0.3]), torch.arange(200.0) % 7):
        values = [torch.tensor(3.5), time, torch.tensor([0.1, 0.9])]
        with watched() as seen:
            found = read_schedule([values[0], time.to(device()), values[2]])
        assert len(seen.waits) <= 1  # ours, here: the time's way to the device
        sign = Sign(found)
        with watched() as seen:
            sign = sign.read(iter(Readback(sign.late).take()))
        assert seen.waits == ["an event"]
        assert sign.values == pytest.approx(read_schedule(values), rel=1e-12)


def test_weights_that_move_are_looked_at_together() -> None:
    """Offloading moves all of them before each call: they are compared with one copy, not with one for each."""
    model = shallow("dit").to(device())
    compiled, send = compile_cached(model, **REUSING), Sent()
    weights = list(model.parameters())
    for i, step in enumerate(walk("dit", 6)):
        for weight in weights:
            weight.data = weight.data.clone()
        _, seen = called(compiled, send(step))
        assert len(seen.waits) <= 2, (i, seen.waits)
    assert hits_of(compiled)


def test_samples_of_a_batch_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """One wait for all samples; where some compute, no other one but, once, to see that each is computed by itself."""
    compiled = compile_cached(
        shallow("dit").to(device()), batch_policy="per_sample", residual_diff_threshold=0.3, max_warmup_steps=1
    )
    slow, fast = (walk("dit", 8, seed=k, delta=d) for k, d in enumerate((0.05, 0.9)))
    labels = torch.cat([slow[0]["class_labels"], fast[0]["class_labels"]]).to(device())
    mixed, run = [], MixedHit.run
    monkeypatch.setattr(MixedHit, "run", lambda *args: mixed.append(1) or run(*args))
    with fx_cache.session("request", branch="only"):
        for a, b in zip(slow, fast, strict=True):
            step = {k: torch.cat([a[k], b[k]]).to(device()) for k in ("hidden_states", "timestep")}
            _, seen = called(compiled, {**a, **step, "class_labels": labels})
            assert seen.waits.count("an event") <= 1
            assert len(seen.waits) - seen.waits.count("an event") <= (len(mixed) == 1)
    assert mixed


def test_prompts_made_anew() -> None:
    """Of a named request, by content: that is compared on the device, and read with one copy more, before the diff."""
    compiled, send = compile_cached(shallow("dit").to(device()), **REUSING), Sent()
    for i, step in enumerate(walk("dit", 6)):
        step = send(step)
        with fx_cache.session("request"):
            _, seen = called(compiled, {**step, "class_labels": step["class_labels"].clone()})
        assert len(seen.waits) <= 2, (i, seen.waits)
    assert hits_of(compiled)


@needs_standin
def test_nothing_is_waited_for_while_a_graph_is_captured() -> None:
    """A static mask decides as ever if the step is said; without that nothing is known, and no diff can be read."""
    send = Sent()
    steps = [send(step) for step in walk("dit", 6)]
    for policy, hits in ((STATIC, [1, 2, 4, 5]), ({"residual_diff_threshold": 0.99}, [])):
        torch._dynamo.reset()
        compiled = compile_cached(shallow("dit").to(device()), **policy)
        compiled(**steps[0])
        fx_cache.reset(compiled)
        for i, step in enumerate(steps):
            with fx_cache.session("request", "only", step=i), capturing():
                compiled(**step)
        assert last_branch(compiled)["spans"][0]["hits"] == hits
        with counted_hits() as counted, capturing(), pytest.warns(fx_cache.CacheWarning, match="fx_cache.session"):
            for step in steps:
                compiled(**step)
        assert counted.count == 0


@needs_standin
@pytest.mark.parametrize("how", ["goes on", "begins", "was broken off"])
def test_what_is_recorded_is_not_there(how: str) -> None:
    """A call that runs uses nothing that was only recorded, and a recorded one nothing that was computed."""
    send = Sent()
    model = shallow("dit").to(device())
    steps = [send(step) for step in walk("dit", 6)]
    compiled = compile_cached(model, **STATIC)
    compiled(**steps[0])
    with fx_cache.session("request", "only", step=0):
        if how == "was broken off":
            with pytest.raises(ArithmeticError), capturing():
                compiled(**steps[0])
                raise ArithmeticError
        else:
            with capturing():
                compiled(**steps[0])
    for i in (0, 1, 2) if how == "begins" else (1, 2):
        with fx_cache.session("request", "only", step=i):
            output = compiled(**steps[i])[0]
        assert not output.isnan().any()
        if i == (0 if how == "begins" else 1):
            assert torch.equal(output, model(**steps[i])[0])
    with fx_cache.session("request", "only", step=3 - 1), capturing(), counted_hits() as hits:
        compiled(**steps[2])
    assert hits.count == 0


@needs_standin
@pytest.mark.filterwarnings("error")
def test_what_is_recorded_stays_where_its_graph_has_it() -> None:
    """`offload` moves nothing of it; behind a request that was moved, nothing is brought back while one is recorded."""
    send = Sent()
    steps = [send(step) for step in walk("dit", 6)]
    compiled = compile_cached(shallow("dit").to(device()), **STATIC)
    for name, recorded in (("moved", False), ("moved", True), ("recorded", True)):
        for i, step in enumerate(steps):
            with fx_cache.session(name, "only", step=i), capturing() if recorded else contextlib.nullcontext():
                compiled(**step)
            with capturing():
                fx_cache.offload(name)
            fx_cache.offload(name)
        assert last_branch(compiled)["spans"][0]["hits"] == [1, 2, 4, 5]


@needs_standin
@pytest.mark.filterwarnings("error")
def test_what_is_not_known_yet_is_not_asked_for_while_a_graph_is_captured() -> None:
    """Which input is denoised, and what another pass has shown."""
    compiled = compile_cached(Untimed().to(device()), **STATIC)
    latent, text, t = (torch.randn(*shape, device=device()) for shape in ((1, 16, 32), (1, 5, 32), (1,)))
    compiled(latent, text, t)
    for i in range(3):
        with fx_cache.session("request", "only", step=i), capturing():
            compiled(latent, text, t)
    torch._dynamo.reset()
    send, kind = Sent(), "dit"
    compiled = compile_cached(shallow(kind).to(device()), **STATIC)
    first, second = ([send(s) for s in walk(kind, 3, seed=k)] for k in range(2))
    for step in first:
        with fx_cache.session("passes", "cond"):
            compiled(**step)
    for i, step in enumerate(second):
        with fx_cache.session("passes", "uncond", step=i), capturing():
            compiled(**step)


@pytest.mark.parametrize("named", [True, False])
def test_two_passes_wait_once_each(named: bool) -> None:
    """Guidance in two calls: none waits twice, the first one of a request not at all."""
    send, kind = Sent(), "dit"
    compiled = compile_cached(shallow(kind).to(device()), **REUSING)
    walks = [[send(s) for s in walk(kind, 6, seed=k, conditioning=conditioning(kind, seed=k))] for k in range(2)]
    waits = []
    for i in range(6):
        for k, name in enumerate(("cond", "uncond")):
            with fx_cache.session("request", name) if named else contextlib.nullcontext():
                waits.append(len(called(compiled, walks[k][i])[1].waits))
    assert waits[0] == 0
    assert max(waits) == 1, waits
    assert len(hits_of(compiled)) == 2


def test_with_the_device_as_default() -> None:
    """What the host makes for itself lies on the host."""
    send = Sent()
    steps = [send(step) for step in walk("dit", 6)]
    compiled = compile_cached(shallow("dit").to(device()), **REUSING)
    with device():
        for i, step in enumerate(steps):
            _, seen = called(compiled, {**step, "timestep": step["timestep"]})
            assert len(seen.waits) <= 1, (i, seen.waits)
    assert hits_of(compiled)


@needs_standin
def test_a_request_goes_on_in_another_stream() -> None:
    """What it left in one stream is waited for in the other one, there, and not freed while that uses it."""
    compiled, send = compile_cached(shallow("dit").to(device()), **REUSING), Sent()
    streams = [torch.Stream(device=device()) for _ in range(2)]
    for i, step in enumerate(walk("dit", 6)):
        with streams[i // 3]:
            _, seen = called(compiled, send(step))
        crossed = i == 3  # that nothing is read before it is there, the stand-in sees to
        assert ("wait for a stream" in seen.launches) is crossed
        assert ("aten::record_stream" in seen.launches) is crossed
        assert len(seen.waits) <= 1
    assert hits_of(compiled)


@pytest.mark.parametrize("named", ["branch", "session", "no"])
def test_passes_on_streams_of_their_own(named: str) -> None:
    """What is looked at of another pass is waited for first; so are prompts that are made anew, and compared."""
    send, kind = Sent(), "dit"
    compiled = compile_cached(shallow(kind).to(device()), **REUSING)
    walks = [[send(s) for s in walk(kind, 6, seed=k, conditioning=conditioning(kind, seed=k))] for k in range(2)]
    streams = [torch.Stream(device=device()) for _ in range(3)]
    for i in range(6):
        for k in range(2):
            step = walks[k][i]
            session = fx_cache.session("request", ("cond", "uncond")[k] if named == "branch" else None)
            with session if named != "no" else contextlib.nullcontext(), streams[(i + k) % 3]:
                if named == "session":
                    step = {**step, "class_labels": step["class_labels"].clone()}
                compiled(**step)
    torch.accelerator.synchronize()
    assert len(hits_of(compiled)) == 2


@pytest.mark.filterwarnings("error")
def test_latents_on_the_host() -> None:
    """The model moves them: what came out lies on the device, and is compared with what lies on the host."""

    class Moving(Untimed):
        def forward(self, latent: torch.Tensor, text: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return super().forward(latent.to(text.device), text, t)

    found = []
    for place in ("cpu", device()):
        torch.manual_seed(0)
        torch._dynamo.reset()
        compiled = compile_cached(Moving().to(device()), **REUSING)
        latent, text = torch.randn(1, 16, 32).to(place), torch.randn(1, 5, 32).to(device())
        for i in range(6):
            latent = latent - 0.05 * compiled(latent, text, torch.tensor([0.9 - 0.1 * i]).to(device())).to(place)
        found.append((hits_of(compiled), latent.cpu()))
    assert found[0][0] == found[1][0]
    assert any(map(len, found[0][0]))
    assert torch.equal(found[0][1], found[1][1])


def test_what_comes_out_of_a_call_is_not_added_while_another_one_learns() -> None:
    """Another thread's stream is waited for, and then it is looked at: nothing may come in between."""
    learner = Learner()
    call = Call([torch.randn(1, 16, 32, device=device())], ["latent"], latents=[0])
    learner.see(call)
    output = torch.randn(1, 16, 32, device=device())
    with learner._lock:
        adding = threading.Thread(target=call.came_out, args=([output],))
        adding.start()
        adding.join(0.2)
        assert adding.is_alive()
    adding.join()
    assert call._fitting == {0}


def test_two_threads_with_a_stream_each() -> None:
    """As alone, one after the other."""
    send, kind = Sent(), "dit"
    walks = [[send(s) for s in walk(kind, 6, seed=k, conditioning=conditioning(kind, seed=k))] for k in range(2)]
    compiled = compile_cached(shallow(kind).to(device()), **REUSING)

    def request(name: str, steps: list[dict[str, Any]], into: list[torch.Tensor]) -> None:
        with torch.no_grad(), torch.Stream(device=device()):
            for step in steps:
                with fx_cache.session(name, "only"):
                    into.append(compiled(**step)[0].clone())
            torch.accelerator.synchronize()

    expected: list[list[torch.Tensor]] = [[], []]
    for k, steps in enumerate(walks):
        request(f"alone {k}", steps, expected[k])
    found: list[list[torch.Tensor]] = [[], []]
    threads = [threading.Thread(target=request, args=(f"beside {k}", walks[k], found[k])) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(map(torch.equal, expected[0] + expected[1], found[0] + found[1]))
    assert len(hits_of(compiled)) == 4


@pytest.mark.filterwarnings("ignore::fx_cache.CacheWarning")
@pytest.mark.parametrize("kind", test_schedules.KINDS if REAL else few(test_schedules.KINDS, 1))
def test_random_schedules_are_decided_as_on_the_host(kind: str) -> None:
    pool = {(size, seed): conditioning(kind, seed=seed, size=size) for size in (0, 1) for seed in range(3)}
    host = compile_cached(shallow(kind), **REUSING)
    compiled = compile_cached(shallow(kind).to(device()), **REUSING)
    hits = 0
    for number in range(20 if REAL else 3):
        requests, send = test_schedules.requests(kind, random.Random(f"{kind} {number}"), pool), Sent()
        on_device = [r.__class__(send(r.calls), r.name, r.breaks) for r in requests]
        for model, given in ((host, requests), (compiled, on_device)):
            for request in given:
                run_requests(model, request)
        assert hits_of(host) == hits_of(compiled)
        hits += sum(map(len, hits_of(host)))
        fx_cache.reset()
    assert hits


class Untimed(nn.Module):
    """Blocks behind no embedding of a time: which input tells it, and which is denoised, is learned from the calls."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32), nn.GELU()) for _ in range(6))

    def forward(self, x: torch.Tensor, text: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        h = x + text.mean(1, keepdim=True) + t.reshape(-1, 1, 1)
        for block in self.blocks:
            h = h + 0.1 * block(h)
        return h


@pytest.mark.filterwarnings("ignore::fx_cache.CacheWarning")
def test_what_is_learned_first() -> None:
    """While it learns it has to wait more often; then once a step."""
    compiled = compile_cached(Untimed().to(device()), **REUSING)
    latent, text = (torch.randn(1, n, 32, device=device()) for n in (16, 5))
    late = []
    for i in range(90):
        t = torch.full((1,), 1.0 - 0.01 * i, device=device())
        with watched() as seen:
            latent = latent - 0.01 * compiled(latent, text, t)
        late.append(len(seen.waits))
    assert max(late[70:]) == 1, late
    assert hits_of(compiled)


def test_a_forward_in_several_graphs() -> None:
    """Behind what it takes to learn how the model runs, one wait a step beside those of code between the graphs."""
    send, model = Sent(), test_relay.Model().to(device())
    steps = [send(step) for step in test_relay.walk(0)]
    compiled = torch.compile(
        model, backend="dit_cache", options={**test_relay.OPTIONS, "residual_diff_threshold": 0.99}
    )
    for step in steps:
        compiled(**step)
    for step in steps:
        _, seen = called(compiled, step)
    assert last_branch(compiled)["spans"][0]["hits"][-1] == len(steps) - 1
    assert seen.waits.count("an event") == 1


@needs_standin
def test_memory_is_what_the_summary_says() -> None:
    send = Sent()
    steps = [send(step) for step in walk("dit", 6)]
    compiled = compile_cached(shallow("dit").to(device()), **REUSING)
    compiled(**steps[0])
    fx_cache.reset(compiled)
    before = torch.get_device_module(device()).memory_allocated()
    for step in steps:
        compiled(**step)
    branch = last_branch(compiled)
    said = branch["kept_bytes"] + sum(span["bytes"] for span in branch["spans"])
    grown = torch.get_device_module(device()).memory_allocated() - before
    # Beside it lies some of the latents that the request began with and came to, in float64.
    looked_at = 8 * 8 * steps[0]["hidden_states"].numel()
    assert said <= grown <= said + looked_at
