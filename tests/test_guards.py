"""What ends a request or bounds what is kept: weights that change, limits, and what is said when nothing was reused."""

from __future__ import annotations

import copy
import threading
import warnings
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.testing._internal.two_tensor import TwoTensor

import fx_cache
from fx_cache.runtime import follow, sessions, slots
from fx_cache.runtime.gate import SpanGate
from fx_cache.runtime.weights import Weights
from tests.models import build, conditioning, walk
from tests.running import REUSING, compile_cached, last_branch, schedule_on_a_device

PARTS = [
    (sessions.Store, "begin"),
    (sessions.Store, "release"),
    (sessions.Store, "read_pending"),
    (SpanGate, "decide"),
    (SpanGate, "record"),
    (SpanGate, "remember_control"),
    (follow.Look, "came_out"),
    (slots.Slot, "load"),
]


@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError])
@pytest.mark.parametrize(("kind", "function"), PARTS, ids=lambda v: v if isinstance(v, str) else v.__name__)
def test_an_error_of_ours_in_a_step(
    kind: type, function: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second call raises: that step and all that follow are the model's own, and one warning says so."""
    model, steps = build("dit"), walk("dit", 6)
    compiled, plain, called = compile_cached(model, residual_diff_threshold=2.0), getattr(kind, function), []

    def broken(*args: Any, **kwargs: Any) -> Any:
        called.append(function)
        if len(called) == 2:
            raise error("on purpose")
        return plain(*args, **kwargs)

    monkeypatch.setattr(kind, function, broken)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in steps:
            before = len(called)
            output = compiled(**step)
            if len(called) >= 2 and not (before < 2 and function in ("record", "release", "came_out")):
                assert torch.equal(output[0], model(**step)[0])
    assert len(called) >= 2
    (said,) = [str(w.message) for w in caught if issubclass(w.category, fx_cache.CacheWarning)]
    assert f"got {error.__name__}: on purpose" in said


def first_weight(model: torch.nn.Module) -> torch.nn.Parameter:
    return next(p for n, p in model.named_parameters() if "blocks.2" in n and p.ndim == 2)


def add_in_place(model: torch.nn.Module) -> None:
    first_weight(model).add_(0.5)


def other_parameter(model: torch.nn.Module) -> None:
    weight = first_weight(model)
    name = next(n for n, p in model.named_parameters() if p is weight)
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(weight + 0.5, requires_grad=False))


def other_data(model: torch.nn.Module) -> None:
    weight = first_weight(model)
    weight.data = weight.detach() + 0.5


@pytest.mark.parametrize("change", [add_in_place, other_parameter, other_data])
def test_weights_that_change_end_the_request(change) -> None:
    model = build("dit")
    compiled = compile_cached(model, **REUSING)
    steps = walk("dit", 8)
    for step in steps[:4]:
        compiled(**step)
    assert last_branch(model)["spans"][0]["hits"]
    change(model)
    changed = compile_cached(copy.deepcopy(model), **REUSING)
    for step in steps[4:]:
        assert torch.equal(changed(**step)[0], compiled(**step)[0])
    assert [s["branches"][0]["spans"][0]["steps"] for s in fx_cache.summary(model).to_dict()["sessions"]] == [4, 4]


class Scaled(torch.nn.Module):
    """Blocks whose strength is a number that the module holds, as that of an adapter is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(4))
        self.scale = 0.5

    def forward(self, latent: torch.Tensor, timestep: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        text = prompt * self.scale
        for block in self.blocks:
            latent = latent + self.scale * torch.tanh(block(latent) + text)
        return latent * (1.0 + 0.01 * torch.cos(timestep))


def test_a_number_that_the_module_holds_ends_the_request() -> None:
    model = Scaled().eval()
    options = {"compiler": "eager", "Fn_compute_blocks": 1, **REUSING}
    compiled = torch.compile(model, backend="dit_cache", fullgraph=True, dynamic=True, options=options)
    prompt = torch.randn(1, 1, 16)
    start = torch.randn(1, 80, 16)
    with fx_cache.session("request", branch="cond"):
        for i in range(8):
            if i == 4:
                assert last_branch(model)["spans"][0]["hits"]
                model.scale = 0.75
            latent, timestep = start + 0.01 * i, torch.tensor([1.0 - 0.1 * i])
            output = compiled(latent, timestep, prompt)
            if i == 4:
                assert torch.equal(output, model(latent, timestep, prompt))


def test_weights_that_are_moved_away_and_back_have_not_changed() -> None:
    model = build("dit")
    compiled = compile_cached(model, **REUSING)
    for step in walk("dit", 8):
        for weight in model.parameters():
            weight.data = weight.detach().clone()  # as hooks do that keep weights on the host between calls
        compiled(**step)
    span = last_branch(model)["spans"][0]
    assert span["steps"] == 8
    assert span["hits"]


class WithOneOfNoStorage(torch.nn.Module):
    """Holds a buffer beside its weights whose elements lie nowhere by themselves."""

    def __init__(self, layout: torch.layout) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(4))
        self.register_buffer("mixing", torch.randn(16, 16).to_sparse(layout=layout))

    @torch.compiler.disable
    def mixed(self, prompt: torch.Tensor) -> torch.Tensor:
        return torch.sparse.mm(self.mixing, prompt.T).T

    def forward(self, latent: torch.Tensor, timestep: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        latent = latent + torch.cos(timestep) + self.mixed(prompt)
        for block in self.blocks:
            latent = latent + torch.tanh(block(latent))
        return latent


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_weights_that_change_beside_one_without_storage(layout: torch.layout) -> None:
    model = WithOneOfNoStorage(layout).eval().requires_grad_(False)
    options = {"compiler": "eager", "Fn_compute_blocks": 1, "max_warmup_steps": 1, "residual_diff_threshold": 10.0}
    compiled = torch.compile(model, backend="dit_cache", options=options)
    latent, prompt = torch.randn(4, 16), torch.randn(4, 16)
    for i in range(8):
        if i == 4:
            assert last_branch(model)["spans"][0]["hits"] == [1, 2, 3]
            model.blocks[2].weight.data = model.blocks[2].weight.detach() + 0.5
        given = latent, torch.tensor([0.9 - 0.1 * i]), prompt
        with fx_cache.session("request", "only"):
            output = compiled(*given)
        if i == 4:
            assert torch.equal(output, model(*given))
        latent = latent - 0.1 * output


@pytest.mark.parametrize("change", ["write", "data", "replace"])
def test_weights_that_are_made_of_others(change: str) -> None:
    """Of such a subclass PyTorch says that it lies at 0, and counts no writes to what it is made of."""
    weight = TwoTensor(torch.randn(4, 4), torch.randn(4, 4))
    weights = [weight, torch.randn(4)]
    known = Weights(weights, [])
    assert known.same(weights, [])
    if change == "write":
        weight.b.add_(1)
    elif change == "data":
        weight.a.data = torch.randn(4, 4)
    else:
        weight.a = torch.randn(4, 4)
    assert not known.same(weights, [])


def test_the_reason_is_told() -> None:
    model = build("dit")
    compiled = compile_cached(model, **{**REUSING, "max_warmup_steps": 0})
    steps = walk("dit", 3)
    compiled(**steps[0])
    add_in_place(model)
    compiled(**steps[1])
    assert last_branch(model)["spans"][0]["misses"] == {0: "weights changed"}


def test_a_request_that_comes_back_where_another_began_computes() -> None:
    """Two unnamed requests with one prompt, out of step: its latent shows that the call is not the other one's."""
    model = build("flux")
    prompt = conditioning("flux")
    one, other = (walk("flux", 8, seed=s, conditioning=prompt) for s in range(2))
    compiled = compile_cached(model, **REUSING)
    for step in [*one[:5], *other[:2]]:
        compiled(**step)
    with torch.no_grad():
        assert torch.equal(compiled(**one[5])[0], model(**one[5])[0])
    assert last_branch(model)["spans"][0]["misses"] == {0: "warm-up"}


def test_a_request_begun_afresh_goes_past_where_it_was_left() -> None:
    model = build("flux")
    prompt = conditioning("flux")
    one, other = (walk("flux", 8, seed=s, conditioning=prompt) for s in range(2))
    compiled = compile_cached(model, **REUSING)
    for step in [*one[:4], *other]:
        compiled(**step)
    span = last_branch(model)["spans"][0]
    assert span["hits"] == run_alone(other, model)


def run_alone(steps: list[dict], model: torch.nn.Module) -> list[int]:
    alone = copy.deepcopy(model)
    compiled = compile_cached(alone, **REUSING)
    for step in steps:
        compiled(**step)
    return last_branch(alone)["spans"][0]["hits"]


def test_max_sessions() -> None:
    model = build("dit")
    compiled = compile_cached(model, **REUSING, max_sessions=2)
    walks = [walk("dit", 6, seed=s) for s in range(3)]
    for k in range(3):
        with fx_cache.session(f"request-{k}"):
            compiled(**walks[k][0])
    held = {s["name"]: s["branches"][0]["spans"][0]["bytes"] > 0 for s in fx_cache.summary(model).to_dict()["sessions"]}
    assert held == {"request-0": False, "request-1": True, "request-2": True}
    # The one that was dropped computes, and is as good as new.
    expected = compile_cached(copy.deepcopy(model), **REUSING)
    for step in walks[0]:
        with fx_cache.session("request-0"):
            assert torch.equal(expected(**step)[0], compiled(**step)[0])


def test_max_bytes() -> None:
    model = build("dit")
    compiled = compile_cached(model, **{**REUSING, "max_warmup_steps": 1})
    walks = [walk("dit", 4, seed=s) for s in range(2)]

    def call(k: int, i: int) -> int:
        with fx_cache.session(f"request-{k}", step=i):
            compiled(**walks[k][i])
        return sum(s["branches"][0]["spans"][0]["bytes"] for s in fx_cache.summary(model).to_dict()["sessions"])

    one = call(0, 0)
    assert call(1, 0) == 2 * one
    fx_cache.configure(model, max_bytes=2 * one - 1)
    assert call(0, 1) == one
    assert call(1, 1) == one
    misses = {
        s["name"]: s["branches"][0]["spans"][0]["misses"].get(1) for s in fx_cache.summary(model).to_dict()["sessions"]
    }
    assert misses == {"request-0": None, "request-1": "max_bytes"}
    fx_cache.configure(model, max_bytes=0)
    assert call(0, 2) == 0


def test_offloaded_slots_come_back() -> None:
    model = build("dit")
    steps = walk("dit", 8)
    expected = compile_cached(copy.deepcopy(model), **REUSING)
    compiled = compile_cached(model, **REUSING)
    for step in steps:
        with fx_cache.session("request"):
            assert torch.equal(expected(**step)[0], compiled(**step)[0])
        store = next(iter(fx_cache.runtime.registry.stores(model)))
        (branch,) = store._branches.values()
        fx_cache.offload("request")
        assert all(t.device.type == "cpu" for t in branch.slots[0].tensors)
        assert branch.slots[0].home == tuple(t.device for t in branch.slots[0].tensors)
    assert last_branch(model)["spans"][0]["hits"]
    fx_cache.offload("a name that nobody used")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_offloaded_slots_leave_the_device() -> None:
    model = build("dit").to("cuda")
    compiled = compile_cached(model, **REUSING)
    steps = [{k: v.to("cuda") if isinstance(v, torch.Tensor) else v for k, v in s.items()} for s in walk("dit", 3)]
    with fx_cache.session("request"):
        compiled(**steps[0])
        before = torch.cuda.memory_allocated()
        fx_cache.offload("request")
        assert torch.cuda.memory_allocated() < before
        compiled(**steps[1])
    assert last_branch(model)["spans"][0]["hits"] == [1]


def test_a_request_without_a_hit_is_told_of_once() -> None:
    compiled = compile_cached(build("dit"), residual_diff_threshold=1e-9)
    for step in walk("dit", 10):
        compiled(**step)
    with pytest.warns(fx_cache.CacheWarning, match=r"10 steps: got no .* \(8 times: diff >= threshold, the least"):
        fx_cache.reset(compiled)
    for step in walk("dit", 10):
        compiled(**step)
    fx_cache.reset(compiled)


def test_requests_by_step_that_reuse_are_not_told_of() -> None:
    """An engine that numbers its steps: many requests begin, and every one of them goes on."""
    compiled = compile_cached(build("dit"), **REUSING)
    steps = walk("dit", 2)
    for request in range(70):
        for i, step in enumerate(steps):
            with fx_cache.session(f"request-{request}", branch="only", step=i):
                compiled(**step)
        fx_cache.end(f"request-{request}")


def test_one_that_was_not_to_reuse_is_not() -> None:
    compiled = compile_cached(build("dit"), residual_diff_threshold=0.0)
    for step in walk("dit", 12):
        compiled(**step)
    fx_cache.reset(compiled)


def test_passes_that_cannot_be_told_apart_are_told_of_at_once() -> None:
    compiled = compile_cached(build("dit"), **REUSING)
    told = []
    for i, step in enumerate(walk("dit", 12)):
        for _ in range(2):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                compiled(**step)
            told += [(i, str(w.message)) for w in caught]
    ((i, text),) = told
    assert i < 8 and "same timestep twice" in text and "name it and its passes" in text


def test_conditioning_made_anew_at_every_step_is_told_of() -> None:
    compiled = compile_cached(build("flux"), **REUSING)
    prompt = conditioning("flux")
    told = []
    for step in walk("flux", 70, conditioning=prompt):
        anew = {k: v.clone() if k in prompt and isinstance(v, torch.Tensor) else v for k, v in step.items()}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            compiled(**anew)
        told += [str(w.message) for w in caught]
    assert len(told) == 1
    assert "a request of its own from each" in told[0]


@pytest.mark.filterwarnings("error::fx_cache.CacheWarning")
@pytest.mark.parametrize("steps", [1, 4])
def test_requests_side_by_side_are_not(steps: int) -> None:
    """Many that begin at one time, as a queue makes them: nothing is said."""
    compiled = compile_cached(build("flux"), **REUSING)
    requests = [walk("flux", steps, seed=seed, conditioning=conditioning("flux", seed)) for seed in range(20)]
    for i in range(steps):
        for request in requests:
            compiled(**request[i])


def test_what_is_denoised_is_learned_where_the_graph_does_not_show_it() -> None:
    """Two inputs are joined in the stream; only from call to call it shows which of them is denoised."""

    class Joined(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.blocks = torch.nn.ModuleList([torch.nn.Linear(16, 16) for _ in range(5)])

        def forward(self, x: torch.Tensor, reference: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            h = torch.cat([reference, x], dim=1) + torch.sin(t).reshape(-1, 1, 1)
            for block in self.blocks:
                h = h + torch.tanh(block(h))
            return h.mean(dim=1)

    def steps(seed: int) -> list[tuple[torch.Tensor, ...]]:
        generator = torch.Generator().manual_seed(seed)
        reference, x = (torch.randn(1, 8, 16, generator=generator) for _ in range(2))
        return [(x + 0.02 * i, reference, torch.tensor([1.0 - 0.1 * i])) for i in range(8)]

    model = Joined().eval().requires_grad_(False)
    compiled = compile_cached(model, **REUSING)
    for args in steps(0):
        compiled(*args)
    first = last_branch(model)["spans"][0]
    assert first["hits"], "by the third step it is known"
    expected = [compiled(*args).clone() for args in steps(1)]
    again = compile_cached(copy.deepcopy(model), **REUSING)
    with fx_cache.session("named", branch="only"):
        assert all(torch.equal(e, again(*args)) for e, args in zip(expected, steps(1), strict=True))
    assert last_branch(model)["spans"][0]["hits"] == last_branch(again)["spans"][0]["hits"]


class TestCacheContext:
    """diffusers' ``cache_context`` tells passes apart that the data cannot."""

    def run(self, compiled, steps: dict[str, list[dict]], say: bool = True) -> dict[str, list[torch.Tensor]]:
        found: dict[str, list[torch.Tensor]] = {name: [] for name in steps}
        for i in range(8):
            for name, own in steps.items():
                if say:
                    with compiled.cache_context(name):
                        found[name].append(compiled(**own[i])[0].clone())
                else:
                    found[name].append(compiled(**own[i])[0].clone())
        return found

    @pytest.mark.parametrize("kind", ["flux", "AllegroTransformer3DModel"])
    def test_one_prompt_in_two_passes(self, kind: str) -> None:
        model = build(kind)
        prompt = conditioning(kind)
        steps = {name: walk(kind, 8, seed=s, conditioning=prompt) for s, name in enumerate(("cond", "uncond"))}
        expected = {}
        for name, own in steps.items():
            alone = compile_cached(copy.deepcopy(model), **REUSING)
            expected[name] = [alone(**step)[0].clone() for step in own]
            assert last_branch(alone)["spans"][0]["hits"]
        compiled = compile_cached(model, **REUSING)
        torch._dynamo.reset()
        counters.clear()
        for _ in range(2):
            found = self.run(compiled, steps)
            for name in steps:
                assert all(torch.equal(a, b) for a, b in zip(expected[name], found[name], strict=True)), name
        assert counters["stats"]["unique_graphs"] == 1
        sessions = fx_cache.summary(model).to_dict()["sessions"]
        assert [len(s["branches"]) for s in sessions] == [2, 2]

    def test_the_step_is_heard(self) -> None:
        model = build("flux")
        compiled = compile_cached(model, **REUSING)
        steps = walk("flux", 4)
        for i, step in enumerate(steps):
            with compiled.cache_context("cond", step_index=i):
                compiled(**step)
        with compiled.cache_context("cond", step_index=3):
            compiled(**steps[3])
        assert last_branch(model)["spans"][0]["misses"][4] == "same step twice"

    def test_the_first_call_belongs_to_its_pass_on_a_device_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nobody listens before it: its pass is known by its timestep, for which the host then waits, once."""
        model, steps = build("flux"), walk("flux", 8)
        expected = compile_cached(copy.deepcopy(model), **REUSING)
        outputs = [expected(**step)[0] for step in steps]
        schedule_on_a_device(monkeypatch)
        found = self.run(compile_cached(model, **REUSING), {"cond": steps})
        assert all(torch.equal(a, b) for a, b in zip(outputs, found["cond"], strict=True))
        assert last_branch(model)["spans"][0]["hits"] == last_branch(expected)["spans"][0]["hits"]
        assert len(fx_cache.summary(model).to_dict()["sessions"]) == 1

    def test_other_hooks_come_and_go(self) -> None:
        from diffusers.hooks import HookRegistry, ModelHook

        model = build("flux")
        step = walk("flux", 1)[0]
        with torch.no_grad():
            expected = model(**step)[0]
            compile_cached(model, **REUSING)(**step)
            registry = HookRegistry.check_if_exists_or_initialize(model)

            class Counting(ModelHook):
                calls = 0

                def pre_forward(self, module, *args, **kwargs):
                    self.calls += 1
                    return args, kwargs

            hooks = [Counting(), Counting()]
            for k, hook in enumerate(hooks):
                registry.register_hook(hook, f"counting_{k}")
            assert torch.equal(model(**step)[0], expected)
            registry.remove_hook("counting_0")
            model(**step)
            registry.remove_hook("counting_1")
            assert torch.equal(model(**step)[0], expected)
            assert [h.calls for h in hooks] == [1, 2]


class TestAmbientModes:
    """What is in force around a call and is none of its inputs."""

    def test_autocast_that_comes_and_goes(self) -> None:
        model = build("dit")
        compiled = compile_cached(model, **{**REUSING, "residual_diff_threshold": 1.0})
        for i, step in enumerate(walk("dit", 9)):
            with torch.autocast("cpu", torch.bfloat16, enabled=i in (4, 5, 6)):
                output = compiled(**step)[0].clone()
                if i in (0, 4):  # what was computed in another precision is not reused
                    assert torch.equal(output, model(**step)[0]), i
        hits = sum(len(b["spans"][0]["hits"]) for s in sessions_of(model) for b in s["branches"])
        assert hits >= 3

    def test_inference_mode_and_no_grad_mixed(self) -> None:
        model = build("flux")
        steps = walk("flux", 8)
        expected = compile_cached(copy.deepcopy(model), **REUSING)
        outputs = [expected(**step)[0].clone() for step in steps]
        torch._dynamo.reset()
        compiled = compile_cached(model, **REUSING)
        for i, step in enumerate(steps):
            with torch.inference_mode() if i % 3 else torch.no_grad():
                assert torch.equal(outputs[i], compiled(**step)[0].clone())
        assert last_branch(model)["spans"][0]["hits"] == last_branch(expected)["spans"][0]["hits"] != []


def sessions_of(model: torch.nn.Module) -> list[dict]:
    return fx_cache.summary(model).to_dict()["sessions"]


class TestNames:
    """Whatever is said in an unusual order."""

    def test_a_branch_never_named_before_begins(self) -> None:
        model, steps = build("dit"), walk("dit", 6)
        compiled = compile_cached(model, **{**REUSING, "residual_diff_threshold": 1.0})
        for step in steps[:4]:
            with fx_cache.session("request", branch="cond"):
                compiled(**step)
        with fx_cache.session("request", branch="other"):
            assert torch.equal(compiled(**steps[4])[0], model(**steps[4])[0])
        assert [b["name"] for b in sessions_of(model)[0]["branches"]] == ["cond", "other"]

    def test_named_and_found_share_nothing(self) -> None:
        model = build("flux")
        prompt = conditioning("flux")
        walks = [walk("flux", 6, seed=s, conditioning=prompt) for s in range(3)]
        expected = []
        for steps in walks:
            alone = compile_cached(copy.deepcopy(model), **REUSING)
            expected.append([alone(**step)[0].clone() for step in steps])
        compiled = compile_cached(model, **REUSING)
        for i in range(6):
            outputs = [compiled(**walks[0][i])[0].clone()]
            with fx_cache.session("outer", branch="cond"):
                outputs.append(compiled(**walks[1][i])[0].clone())
                with fx_cache.session("inner"):
                    outputs.append(compiled(**walks[2][i])[0].clone())
            assert all(torch.equal(e[i], o) for e, o in zip(expected, outputs, strict=True)), i

    @pytest.mark.parametrize("end", ["end", "reset"])
    def test_the_only_session_ended_while_another_thread_is_at_a_step(
        self, end: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The call goes on, is right, and keeps nothing; the next one computes."""
        model, steps = build("dit"), walk("dit", 6)
        expected = compile_cached(copy.deepcopy(model), **REUSING)
        outputs = [expected(**step)[0].clone() for step in steps[:4]]
        compiled = compile_cached(model, **REUSING)
        decide = SpanGate.__call__

        def ended_meanwhile(gate: SpanGate, *seen: object) -> object:
            decision = decide(gate, *seen)
            thread = threading.Thread(target=fx_cache.end if end == "end" else fx_cache.reset, args=names)
            thread.start()
            thread.join()
            return decision

        names = ("request",) if end == "end" else ()
        with fx_cache.session("request", branch="cond"):
            for step in steps[:3]:
                compiled(**step)
            with monkeypatch.context() as patch:
                patch.setattr(SpanGate, "__call__", ended_meanwhile)
                assert torch.equal(compiled(**steps[3])[0], outputs[3])
            assert sum(b["spans"][0]["bytes"] for s in sessions_of(model) for b in s["branches"]) == 0
            assert torch.equal(compiled(**steps[4])[0], model(**steps[4])[0])
