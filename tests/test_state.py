"""Sessions and branches. The oracle of every case: the same calls made alone, on a copy of the model."""

from __future__ import annotations

import contextlib
import copy
import gc
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch._dynamo import register_backend

import fx_cache
from fx_cache.runtime.gate import SpanGate
from tests.models import build, conditioning, walk
from tests.running import REUSING, compile_cached, hits_of, last_branch, relative_error
from tests.selection import few


class Alone:
    """Runs walks each as a fresh process would: a copy of the weights, its own compilation, its own cache."""

    def __init__(self, name: str, **options) -> None:
        self.model = build(name)
        self.options = {**REUSING, **options}

    def compiled(self):
        return compile_cached(copy.deepcopy(self.model), **self.options)

    def run(self, steps: list[dict]) -> list[torch.Tensor]:
        compiled = self.compiled()
        outputs = [compiled(**step)[0].clone() for step in steps]
        assert hits_of(compiled), "the oracle itself never reused"
        return outputs


def assert_equal(expected: list[torch.Tensor], got: list[torch.Tensor]) -> None:
    assert [torch.equal(a, b) for a, b in zip(expected, got, strict=True)] == [True] * len(expected)


@pytest.mark.parametrize("name", few(["flux", "dit", "wan"], 1))
def test_cond_and_uncond_interleaved(name: str) -> None:
    alone = Alone(name)
    cond, uncond = walk(name, 8, seed=0), walk(name, 8, seed=1)
    expected = [alone.run(cond), alone.run(uncond)]
    compiled = alone.compiled()
    got: list[list[torch.Tensor]] = [[], []]
    for a, b in zip(cond, uncond, strict=True):
        got[0].append(compiled(**a)[0].clone())
        got[1].append(compiled(**b)[0].clone())
    assert_equal(expected[0], got[0])
    assert_equal(expected[1], got[1])
    sessions = fx_cache.summary(compiled).to_dict()["sessions"]
    assert [len(s["branches"]) for s in sessions] == [2]


def test_order_of_branches_does_not_matter() -> None:
    alone = Alone("dit")
    walks = [walk("dit", 8, seed=s) for s in range(3)]
    expected = [alone.run(w) for w in walks]
    compiled = alone.compiled()
    got: list[list[torch.Tensor]] = [[], [], []]
    for i in range(8):
        for k in [(0, 1, 2), (2, 0, 1), (1, 0, 2)][i % 3]:
            got[k].append(compiled(**walks[k][i])[0].clone())
    for e, g in zip(expected, got, strict=True):
        assert_equal(e, g)


@pytest.mark.parametrize("name", few(["flux", "dit"], 1))
def test_prompts_one_after_another(name: str) -> None:
    alone = Alone(name)
    walks = [walk(name, 8, seed=s) for s in range(2)]
    expected = [alone.run(w) for w in walks]
    compiled = alone.compiled()
    for steps, reference in zip(walks, expected, strict=True):
        assert_equal(reference, [compiled(**s)[0].clone() for s in steps])


@pytest.mark.parametrize("name", few(["flux", "dit"], 1))
def test_same_prompt_with_another_seed(name: str) -> None:
    alone = Alone(name)
    prompt = conditioning(name)
    walks = [walk(name, 8, seed=s, conditioning=prompt) for s in range(3)]
    expected = [alone.run(w) for w in walks]
    compiled = alone.compiled()
    for steps, reference in zip(walks, expected, strict=True):
        assert_equal(reference, [compiled(**s)[0].clone() for s in steps])
    assert len(fx_cache.summary(compiled).to_dict()["sessions"]) == 3


def test_another_resolution_in_between() -> None:
    alone = Alone("dit")
    small, large = walk("dit", 8), walk("dit", 8, size=1)
    expected = [alone.run(small), alone.run(large)]
    compiled = alone.compiled()
    got = [[compiled(**s)[0].clone() for s in steps] for steps in (small, large, small)]
    assert_equal(expected[0], got[0])
    assert_equal(expected[1], got[1])
    assert_equal(expected[0], got[2])


def test_an_exception_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = Alone("dit")
    prompt = conditioning("dit")
    first, second = (walk("dit", 8, seed=s, conditioning=prompt) for s in range(2))
    expected = alone.run(second)
    compiled = alone.compiled()
    for step in first[:4]:
        compiled(**step)
    branch = next(iter(fx_cache.runtime.registry.stores(compiled)[0]._branches.values()))
    assert branch.slots[0].tensors

    def interrupted(*_: Any, **__: Any) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SpanGate, "decide", interrupted)  # in the middle of the step
        compiled(**first[4])
    assert not branch.slots[0].tensors
    assert_equal(expected, [compiled(**s)[0].clone() for s in second])


def test_a_probe_that_is_not_finite_is_a_miss() -> None:
    model = build("dit")
    compiled = compile_cached(model, residual_diff_threshold=0.9, max_warmup_steps=1)
    steps = walk("dit", 4)
    for key, value in steps[2].items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim == 4:
            steps[2][key] = value * float("nan")
    with fx_cache.session("request", branch="only"):
        for step in steps:
            compiled(**step)
    span = fx_cache.summary(model).to_dict()["sessions"][0]["branches"][0]["spans"][0]
    assert span["misses"][2] == "probe not finite"
    # The probe that is compared with next is not finite either.
    assert span["misses"][3] == "probe not finite"


def test_named_sessions_with_one_prompt_interleaved() -> None:
    alone = Alone("dit")
    prompt = conditioning("dit")
    walks = {f"request-{s}": walk("dit", 8, seed=s, conditioning=prompt) for s in range(3)}
    expected = {name: alone.run(steps) for name, steps in walks.items()}
    compiled = alone.compiled()
    got: dict[str, list[torch.Tensor]] = {name: [] for name in walks}
    for i in range(8):
        for name, steps in walks.items():
            with fx_cache.session(name):
                got[name].append(compiled(**steps[i])[0].clone())
    for name in walks:
        assert_equal(expected[name], got[name])
    assert {s["name"] for s in fx_cache.summary(compiled).to_dict()["sessions"]} == set(walks)


def test_branches_by_name_with_one_prompt_object() -> None:
    alone = Alone("dit")
    prompt = conditioning("dit")
    walks = [walk("dit", 8, seed=s, conditioning=prompt) for s in range(2)]
    expected = [alone.run(w) for w in walks]
    compiled = alone.compiled()
    got: list[list[torch.Tensor]] = [[], []]
    for i in range(8):
        for k, branch in enumerate(["cond", "uncond"]):
            with fx_cache.session("r", branch):
                got[k].append(compiled(**walks[k][i])[0].clone())
    assert_equal(expected[0], got[0])
    assert_equal(expected[1], got[1])
    branches = fx_cache.summary(compiled).to_dict()["sessions"][0]["branches"]
    assert [b["name"] for b in branches] == ["cond", "uncond"]


def test_one_prompt_object_for_two_requests_computes() -> None:
    model, prompt = build("dit"), conditioning("dit")
    walks = [walk("dit", 6, seed=s, conditioning=prompt) for s in range(2)]
    compiled = compile_cached(model, residual_diff_threshold=1.0, max_warmup_steps=1)
    for a, b in zip(*walks, strict=True):
        for step in (a, b):
            assert torch.equal(compiled(**step)[0], model(**step)[0])


def test_conditioning_of_the_same_address_is_not_the_same() -> None:
    model = build("wan")
    compiled = compile_cached(model, residual_diff_threshold=1.0, max_warmup_steps=1)
    first = walk("wan", 4)
    name, text = next((k, v) for k, v in first[0].items() if isinstance(v, torch.Tensor) and v.ndim == 3)
    for step in first:
        compiled(**step)
    same_place = text.data_ptr()
    storage = text.untyped_storage()
    # In place: same object, same address, other content; the timestep goes on.
    text.mul_(2.0)
    later = walk("wan", 8)[6]
    later[name] = text
    assert text.data_ptr() == same_place and text.untyped_storage()._cdata == storage._cdata
    assert torch.equal(compiled(**later)[0], model(**later)[0])


def test_slots_die_with_their_conditioning() -> None:
    model = build("wan")
    compiled = compile_cached(model, **REUSING)
    steps = walk("wan", 3)
    for step in steps:
        compiled(**step)
    assert held_bytes(model) > 0
    del steps, step
    gc.collect()
    other = walk("wan", 1, seed=5)
    compiled(**other[0])
    sessions = fx_cache.summary(model).to_dict()["sessions"]
    assert sessions[0]["branches"][0]["spans"][0]["bytes"] == 0
    assert sessions[1]["branches"][0]["spans"][0]["bytes"] > 0


def held_bytes(model) -> int:
    sessions = fx_cache.summary(model).to_dict()["sessions"]
    return sum(span["bytes"] for s in sessions for b in s["branches"] for span in b["spans"])


def test_reset_forgets() -> None:
    model = build("dit")
    compiled = compile_cached(model, residual_diff_threshold=1.0, max_warmup_steps=1)
    steps = walk("dit", 6)
    for step in steps[:4]:
        compiled(**step)
    assert held_bytes(model) > 0
    fx_cache.reset(model)
    assert held_bytes(model) == 0
    assert torch.equal(compiled(**steps[4])[0], model(**steps[4])[0])


def test_two_models_of_one_class_share_code_but_no_state() -> None:
    models = [build("dit", seed=s) for s in range(2)]
    compiled = [compile_cached(m, **REUSING) for m in models]
    steps = walk("dit", 8)
    expected = [[compile_cached(copy.deepcopy(m), **REUSING)(**s)[0].clone() for s in steps[:1]] for m in models]
    got: list[list[torch.Tensor]] = [[], []]
    for step in steps:
        for k in range(2):
            got[k].append(compiled[k](**step)[0].clone())
    assert_equal(expected[0], got[0][:1])
    assert_equal(expected[1], got[1][:1])
    for k in range(2):
        steps_seen = [
            span["steps"]
            for s in fx_cache.summary(models[k]).to_dict()["sessions"]
            for b in s["branches"]
            for span in b["spans"]
        ]
        assert steps_seen == [8]


def test_num_inference_steps_ends_a_request() -> None:
    model = build("dit")
    compiled = compile_cached(model, residual_diff_threshold=1.0, max_warmup_steps=1, num_inference_steps=4)
    for step in walk("dit", 8):
        compiled(**step)
    sessions = fx_cache.summary(model).to_dict()["sessions"]
    assert [s["branches"][0]["spans"][0]["hits"] for s in sessions] == [[2, 3], [2, 3]]


def test_diffs_are_those_of_the_oracle_formula() -> None:
    model = build("dit")
    compiled = compile_cached(model, residual_diff_threshold=1e-12, max_warmup_steps=1)
    steps = walk("dit", 4)
    probes = []

    def keep(module, args, kwargs, output):
        first = args[0] if args else kwargs["hidden_states"]
        probes.append((output if isinstance(output, torch.Tensor) else output[0]) - first)

    handle = model.transformer_blocks[0].register_forward_hook(keep, with_kwargs=True)
    for step in steps:
        model(**step)
    handle.remove()
    with fx_cache.session("request", branch="only"):
        for step in steps:
            compiled(**step)
    diffs = fx_cache.summary(model).to_dict()["sessions"][0]["branches"][0]["spans"][0]["diffs"]
    for i in range(1, 4):
        reference = (probes[i - 1] - probes[i]).abs().mean() / probes[i - 1].abs().mean()
        assert relative_error(reference, torch.tensor(diffs[i])) < 1e-6


def test_branches_told_apart_by_a_python_number() -> None:
    """Graphs specialised on a number, and the dynamic one that follows, are different branches by its value."""

    class Indexed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Parameter(torch.randn(3, 8))
            self.blocks = torch.nn.ModuleList([torch.nn.Linear(8, 8) for _ in range(4)])

        def forward(self, x, t, index: int):
            shift = self.table[index] * torch.sin(t)[:, None, None]
            for block in self.blocks:
                x = x + torch.tanh(block(x) + shift)
            return (x,)

    torch.manual_seed(0)
    model = Indexed()
    noise = torch.randn(1, 5, 8)
    latents = [noise + 0.02 * i for i in range(8)]
    options = {"residual_diff_threshold": 1.0, "max_warmup_steps": 2}

    def steps(index: int) -> list[tuple]:
        return [(latents[i], torch.tensor([9.0 - i]), index) for i in range(8)]

    expected = []
    for index in range(3):
        torch._dynamo.reset()
        alone = compile_cached(copy.deepcopy(model), **options)
        expected.append([alone(*s)[0].clone() for s in steps(index)])
    torch._dynamo.reset()
    compiled = compile_cached(model, **options)
    for index in range(3):  # every graph there will be
        compiled(*steps(index)[0])
    fx_cache.reset(model)
    got: list[list[torch.Tensor]] = [[], [], []]
    for i in range(8):
        for index in range(3):
            got[index].append(compiled(*steps(index)[i])[0].clone())
    for e, g in zip(expected, got, strict=True):
        assert_equal(e, g)
    assert hits_of(compiled)


def test_options_of_one_session() -> None:
    alone = {threshold: Alone("wan", residual_diff_threshold=threshold) for threshold in (0.6, 0.5)}
    steps = {threshold: walk("wan", 8, seed=k) for k, threshold in enumerate(alone)}
    expected = {threshold: a.run(steps[threshold]) for threshold, a in alone.items()}
    compiled = compile_cached(alone[0.6].model, max_warmup_steps=2, residual_diff_threshold=0.0)
    got: dict[float, list[torch.Tensor]] = {threshold: [] for threshold in alone}
    for i in range(8):
        for threshold in alone:
            with fx_cache.session(f"at {threshold}", config={"residual_diff_threshold": threshold}):
                got[threshold].append(compiled(**steps[threshold][i])[0].clone())
    for threshold in alone:
        assert_equal(expected[threshold], got[threshold])
    assert torch.equal(compiled(**steps[0.6][7])[0], alone[0.6].model(**steps[0.6][7])[0])  # outside: never


def test_steps_by_number() -> None:
    alone = Alone("dit")
    steps = walk("dit", 8)
    expected, compiled = alone.run(steps), alone.compiled()

    def run(numbers: list[int]) -> list[torch.Tensor]:
        outputs = []
        for i in numbers:
            with fx_cache.session("request", branch="only", step=i):
                outputs.append(compiled(**steps[i])[0].clone())
        return outputs

    assert_equal(expected, run(list(range(8))))
    # A smaller number starts afresh; the same number twice, as samplers of second order do, computes.
    assert_equal(expected, run(list(range(8))))
    assert_equal(expected[:4], run([0, 1, 2, 3]))
    (again,) = run([3])
    assert torch.equal(again, alone.model(**steps[3])[0])
    sessions = fx_cache.summary(compiled).to_dict()["sessions"]
    assert sessions[-1]["branches"][0]["spans"][0]["misses"][3] == "same step twice"


def test_num_inference_steps_of_one_session() -> None:
    alone = Alone("dit")
    steps = walk("dit", 8)
    first, second, compiled = alone.run(steps[:4]), alone.run(steps[4:]), alone.compiled()
    with fx_cache.session("request", branch="only", num_inference_steps=4):
        got = [compiled(**step)[0].clone() for step in steps]
    assert_equal([*first, *second], got)


def test_an_ended_session_is_freed_and_starts_afresh() -> None:
    alone = Alone("flux", residual_diff_threshold=1.0)
    steps = walk("flux", 4)
    compiled = alone.compiled()
    with fx_cache.session("gone", branch="only"):
        for step in steps[:3]:
            compiled(**step)
    with fx_cache.session("stays", branch="only"):
        compiled(**steps[0])
    fx_cache.end("gone")
    fx_cache.end("never seen")
    spans = {s["name"]: s["branches"][0]["spans"][0] for s in fx_cache.summary(compiled).to_dict()["sessions"]}
    assert spans["gone"]["bytes"] == 0 and spans["gone"]["hits"] == [2]
    assert spans["stays"]["bytes"] > 0
    with fx_cache.session("gone", branch="only"):
        assert torch.equal(compiled(**steps[3])[0], alone.model(**steps[3])[0])


def test_requests_may_go_either_way() -> None:
    """A picture is inverted, with rising timesteps, and then denoised."""
    model = build("dit")
    compiled = compile_cached(model, **REUSING)
    up, down = walk("dit", 8)[::-1], walk("dit", 8, seed=1)
    for number, request in enumerate((up, down, up, down)):
        alone = compile_cached(copy.deepcopy(model), **REUSING)
        expected = [alone(**step)[0].clone() for step in request]
        outputs = [compiled(**step)[0].clone() for step in request]
        assert all(torch.equal(a, b) for a, b in zip(expected, outputs, strict=True)), number
        assert last_branch(model)["spans"][0]["hits"]


@pytest.mark.parametrize("threshold", [0.6, 1.0])
def test_what_was_learned_of_one_request_changes_no_other(threshold: float) -> None:
    model = build("dit")
    options = {"residual_diff_threshold": threshold, "max_warmup_steps": 1}
    compiled = compile_cached(model, **options)
    for seed in range(3):
        alone = compile_cached(copy.deepcopy(model), **options)
        for step in walk("dit", 6, seed=seed):
            assert torch.equal(alone(**step)[0], compiled(**step)[0])


def in_threads(calls: list[Callable[[], object]]) -> list[object]:
    with ThreadPoolExecutor(len(calls)) as pool:
        return [f.result() for f in [pool.submit(call) for call in calls]]


def test_threads_with_sessions_of_their_own() -> None:
    alone = Alone("dit")
    walks = [walk("dit", 8, seed=k) for k in range(3)]
    expected, compiled = [alone.run(steps) for steps in walks], alone.compiled()
    compiled(**walks[0][0])
    fx_cache.reset(compiled)

    def run(k: int) -> list[torch.Tensor]:
        with torch.no_grad(), fx_cache.session(f"thread {k}"):
            return [compiled(**step)[0].clone() for step in walks[k]]

    for outputs, got in zip(expected, in_threads([partial(run, k) for k in range(3)]), strict=True):
        assert_equal(outputs, got)


@pytest.mark.parametrize("name", ["request", None])
def test_two_threads_in_one_request(name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name that is an error; by the data the second one computes, and leaves the first one's state alone."""
    alone = Alone("dit", residual_diff_threshold=1.0)
    steps, compiled = walk("dit", 4), alone.compiled()
    named = partial(fx_cache.session, name, branch="only") if name else contextlib.nullcontext
    with named():
        expected = [compiled(**step)[0].clone() for step in steps[:2]]
    inside, go_on = threading.Event(), threading.Event()
    decide = SpanGate.__call__

    def wait(gate: SpanGate, *seen: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            assert go_on.wait(60)
        return decide(gate, *seen)

    def third() -> torch.Tensor:
        with torch.no_grad(), named():
            return compiled(**steps[2])[0].clone()

    with monkeypatch.context() as patch, ThreadPoolExecutor(1) as pool:
        patch.setattr(SpanGate, "__call__", wait)
        running = pool.submit(third)
        assert inside.wait(60)
        if name:
            with named(), pytest.raises(fx_cache.SessionError, match="another thread"):
                compiled(**steps[3])
        else:
            assert torch.equal(compiled(**steps[3])[0], alone.model(**steps[3])[0])
        go_on.set()
        got = running.result()
    fresh = alone.compiled()
    with named():
        assert_equal([*expected, got], [fresh(**step)[0].clone() for step in steps[:3]])


alive: list[tuple[bool, ...]] = []
old_state: list[weakref.ref[torch.Tensor]] = []


@register_backend
def watching(gm, example_inputs):
    """Notes at each run of a piece which tensors of the state before still take up memory."""

    def piece(*args: Any) -> Any:
        alive.append(tuple(r() is not None for r in old_state))
        return gm.forward(*args)

    return piece


def test_old_state_is_freed_before_its_span_is_computed_anew() -> None:
    """A step never holds two states: head and measure see the old one, the blocks of the span do not."""
    model, steps = build("wan"), walk("wan", 3)
    compiled = compile_cached(model, compiler="watching", residual_diff_threshold=1e-9, max_warmup_steps=1)
    for step in steps[:2]:
        compiled(**step)
    (branch,) = fx_cache.runtime.registry.stores(compiled)[0]._branches.values()
    old_state[:] = map(weakref.ref, branch.slots[0].tensors)
    alive.clear()
    compiled(**steps[2])
    assert last_branch(model)["spans"][0]["hits"] == []
    assert len(old_state) == 2
    assert alive[:3] == [(True, True)] * 3
    assert set(alive[3:]) == {(False, False)} and len(alive) - 3 >= len(model.blocks) - 1
