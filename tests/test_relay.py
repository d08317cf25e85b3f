"""Spans over several graphs: a graph break in every block, against the caching rule in plain Python."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fx_cache
from fx_cache.runtime import legs, net
from fx_cache.runtime.forwards import Forward
from fx_cache.runtime.relay import Relay
from fx_cache.runtime.sessions import Store
from tests import models
from tests.running import last_branch, relative_error
from tests.selection import few

WIDTH, TOKENS, BLOCKS, STEPS = 16, 24, 5, 8
WARMUP = 2
OPTIONS = {"compiler": "eager", "Fn_compute_blocks": 1, "max_warmup_steps": WARMUP}


class Experts(nn.Module):
    """Routes tokens to experts on the host, as mixtures of experts do: a graph break, and calls that hang on data."""

    def __init__(self) -> None:
        super().__init__()
        self.route = nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        chosen = self.route(flat).argmax(dim=-1)
        out = torch.zeros_like(flat)
        for i, count in enumerate(torch.bincount(chosen, minlength=3).tolist()):
            if count:
                mine = chosen == i
                out[mine] = self.experts[i](flat[mine])
        return out.view_as(x)


class Block(nn.Module):
    """Two streams; the first goes through experts."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(WIDTH, WIDTH)
        self.norm, self.mix, self.text = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.experts = Experts()

    def forward(self, x: Tensor, text: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.time(time)[:, None] * self.mix(self.norm(x)) + text.mean(dim=1, keepdim=True)
        x = x + self.experts(x)
        return x, text + torch.tanh(self.text(text)) * x.mean(dim=1, keepdim=True)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 4)
        self.time = nn.Linear(2, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))

    def begin(self, latent: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        return self.embed(latent), self.time(torch.stack([timestep.sin(), timestep.cos()], dim=-1))

    def window(self, i: int, x: Tensor, text: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        return self.blocks[i](x, text, time)

    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor]:
        x, time = self.begin(latent, timestep)
        for block in self.blocks:
            x, text = block(x, text, time)
        return (self.out(x + text.mean(dim=1, keepdim=True)),)


class Joining(Model):
    """Before every block tokens of its own are joined to the stream, and cut off behind it, between the graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("own", torch.randn(BLOCKS, 1, 7, WIDTH))

    def window(self, i: int, x: Tensor, text: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        x, text = self.blocks[i](torch.cat([x, self.own[i]], dim=1), text, time)
        return x[:, :TOKENS], text

    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor]:
        x, time = self.begin(latent, timestep)
        for own, block in zip(self.own, self.blocks, strict=True):
            x = torch.cat([x, own], dim=1)
            x, text = block(x, text, time)
            x = x[:, :TOKENS]
        return (self.out(x + text.mean(dim=1, keepdim=True)),)


class Oracle:
    """The caching rule of `Model`, block by block, for one request and branch."""

    def __init__(self, model: Model, fn: int, bn: int, threshold: float) -> None:
        self.model, self.fn, self.bn, self.threshold = model, fn, bn, threshold
        self.probe: Tensor | None = None
        self.added: tuple[Tensor, Tensor] | None = None
        self.hits: list[int] = []
        self.diffs: list[float] = []

    def __call__(self, step: int, latent: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        x, time = self.model.begin(latent, timestep)
        begin = x
        for i in range(self.fn):
            x, text = self.model.window(i, x, text, time)
        probe, start = x - begin, (x, text)
        hit = False
        if step >= WARMUP and self.probe is not None:
            self.diffs.append(float((self.probe - probe).abs().mean() / self.probe.abs().mean()))
            hit = self.diffs[-1] < self.threshold
        if hit and self.added is not None:
            self.hits.append(step)
            x, text = x + self.added[0], text + self.added[1]
        else:
            for i in range(self.fn, BLOCKS - self.bn):
                x, text = self.model.window(i, x, text, time)
            self.probe, self.added = probe, (x - start[0], text - start[1])
        for i in range(BLOCKS - self.bn, BLOCKS):
            x, text = self.model.window(i, x, text, time)
        return self.model.out(x + text.mean(dim=1, keepdim=True))


def walk(seed: int, text: Tensor | None = None) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    text = random(1, 6, WIDTH) if text is None else text
    latent, found = random(1, TOKENS, 4), []
    for i in range(STEPS):
        found.append({"latent": latent, "timestep": torch.tensor([1.0 - i / 20]), "text": text})
        latent = latent + 0.15 * random(1, TOKENS, 4)
    return found


def compile_broken(model: nn.Module, **options: object) -> nn.Module:
    return torch.compile(model, backend="dit_cache", options={**OPTIONS, **options})


def run_in(model: nn.Module, seed: int = 99) -> None:
    """A request, so that all graphs are compiled and what is cached where is known."""
    for step in walk(seed):
        model(**step)


def threshold_of(model: Model, steps: list[dict[str, Tensor]], fn: int = 1, bn: int = 0) -> float:
    never = Oracle(model, fn, bn, 0.0)
    for i, step in enumerate(steps):
        never(i, **step)
    return 1.001 * sorted(never.diffs)[len(never.diffs) // 2]


def test_never_reusing_is_the_model_itself() -> None:
    model, steps = Model(), walk(1)
    compiled = compile_broken(model, residual_diff_threshold=0.0)
    run_in(compiled)
    assert all(torch.equal(model(**step)[0], compiled(**step)[0]) for step in steps)
    (span,) = last_branch(compiled)["spans"]
    assert span["steps"] == STEPS and not span["hits"]


class MaskedBlock(Block):
    """Hands on which tokens are left, too."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor, text: Tensor, time: Tensor, kept: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        x, text = super().forward(torch.where(kept.bool(), x, 0.0), text, time)
        return x, text, kept & (x.amax(dim=-1, keepdim=True) < 1e9).to(self.dtype)


class Masking(Model):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        masked = nn.ModuleList(MaskedBlock(dtype) for _ in range(BLOCKS))
        masked.load_state_dict(self.blocks.state_dict())
        self.masked = masked

    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor]:
        x, time = self.begin(latent, timestep)
        kept = (latent.amax(dim=-1, keepdim=True) < 1e9).to(self.dtype)
        for block in self.masked:
            x, text, kept = block(x, text, time, kept)
        return (self.out(torch.where(kept.bool(), x, 0.0) + text.mean(dim=1, keepdim=True)),)


@pytest.mark.filterwarnings("error::fx_cache.CacheWarning")
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8])
def test_a_mask_that_blocks_hand_on(dtype: torch.dtype) -> None:
    model, steps = Masking(dtype), walk(2)
    threshold = threshold_of(model, steps)
    compiled = compile_broken(model, residual_diff_threshold=threshold)
    run_in(compiled)
    oracle = Oracle(model, 1, 0, threshold)
    for i, step in enumerate(steps):
        assert relative_error(oracle(i, **step), compiled(**step)[0]) < 1e-6, f"step {i}"
    (span,) = last_branch(compiled)["spans"]
    assert span["hits"] == oracle.hits and 0 < len(oracle.hits) < STEPS - 1


@pytest.mark.parametrize(("fn", "bn"), [(1, 0), (2, 1), (1, 2)])
@pytest.mark.parametrize("kind", [Model, Joining])
def test_the_caching_rule(kind: type[Model], fn: int, bn: int) -> None:
    model, steps = kind(), walk(2)
    threshold = threshold_of(model, steps, fn, bn)
    compiled = compile_broken(model, Fn_compute_blocks=fn, Bn_compute_blocks=bn, residual_diff_threshold=threshold)
    run_in(compiled)
    oracle = Oracle(model, fn, bn, threshold)
    for i, step in enumerate(steps):
        assert relative_error(oracle(i, **step), compiled(**step)[0]) < 1e-6, f"step {i}"
    (span,) = last_branch(compiled)["spans"]
    assert span["hits"] == oracle.hits and 0 < len(oracle.hits) < STEPS - 1
    assert list(span["diffs"].values()) == pytest.approx(oracle.diffs)


def test_branches_and_requests_are_told_apart() -> None:
    model, steps, uncond = Model(), walk(3), walk(4)
    threshold = threshold_of(model, steps)
    compiled = compile_broken(model, residual_diff_threshold=threshold)
    run_in(compiled)
    oracles = [Oracle(model, 1, 0, threshold) for _ in range(2)]
    for i, step in enumerate(steps):
        for oracle, text in zip(oracles, (step["text"], uncond[0]["text"]), strict=True):
            given = {**step, "text": text}
            assert relative_error(oracle(i, **given), compiled(**given)[0]) < 1e-6, f"step {i}"
    session = fx_cache.summary(compiled).to_dict()["sessions"][-1]
    assert [b["spans"][0]["hits"] for b in session["branches"]] == [o.hits for o in oracles]
    # The same prompt from another seed, and another prompt: fresh requests.
    for following in (walk(5, steps[0]["text"]), walk(6)):
        oracle = Oracle(model, 1, 0, threshold)
        for i, step in enumerate(following):
            assert relative_error(oracle(i, **step), compiled(**step)[0]) < 1e-6, f"step {i}"


def test_the_forward_that_is_watched_stays_in_its_session() -> None:
    """What is cached of it is known only when the next forward begins, and that may be another request's."""
    model, steps = Model(), walk(10)
    compiled = compile_broken(model, residual_diff_threshold=2.0, max_warmup_steps=0)
    with fx_cache.session("first", branch="only"):
        compiled(**steps[0])
    with fx_cache.session("second", branch="only"):
        assert torch.equal(compiled(**steps[1])[0], model(**steps[1])[0])
    names = [s["name"] for s in fx_cache.summary(compiled).to_dict()["sessions"]]
    assert names == ["first", "second"]


def test_the_prompt_of_the_forward_that_is_watched_is_overwritten() -> None:
    model, steps = Model(), walk(11)
    compiled = compile_broken(model, residual_diff_threshold=2.0, max_warmup_steps=0)
    text = steps[0]["text"].clone()
    for step in (0, 1):
        text.copy_(torch.randn(text.shape, generator=torch.Generator().manual_seed(step)))
        given = {**steps[step], "text": text}
        assert torch.equal(compiled(**given)[0], model(**given)[0])


def test_a_forward_that_is_broken_off_leaves_nothing_behind() -> None:
    model, steps = Model(), walk(7)
    compiled = compile_broken(model, residual_diff_threshold=2.0)
    expected = [model(**step)[0] for step in steps]
    run_in(compiled)
    for step in steps[:3]:
        compiled(**step)
    assert last_branch(compiled)["spans"][0]["hits"] == [2]  # at step 1 the direction of the timestep is not known
    fx_cache.configure(compiled, residual_diff_threshold=0.0)
    block = model.blocks[3].experts.experts[1]
    handle = block.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        compiled(**steps[3])
    handle.remove()
    fx_cache.configure(compiled, residual_diff_threshold=2.0)
    assert torch.equal(compiled(**steps[4])[0], expected[4])


class Counting(Model):
    """Writes to what it is given, and now and then goes another way within the blocks."""

    detour = False

    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor, seen: Tensor) -> tuple[Tensor]:
        seen += 1.0
        return self.denoised(latent, timestep, text, seen)

    def denoised(self, latent: Tensor, timestep: Tensor, text: Tensor, seen: Tensor | float = 0.0) -> tuple[Tensor]:
        x, time = self.begin(latent, timestep)
        for i, block in enumerate(self.blocks):
            x, text = block(x, text, time)
            if self.detour and i == 3:
                torch._dynamo.graph_break()
                x = self.blocks[0](x, text, time)[0]
        return (self.out(x + text.mean(dim=1, keepdim=True) + seen),)


def test_what_a_forward_writes_to_is_written_once() -> None:
    model, seen = Counting().eval(), torch.zeros(1, TOKENS, WIDTH)
    compiled = compile_broken(model, residual_diff_threshold=10.0)
    with torch.no_grad():
        for request in range(2):
            for i, step in enumerate(walk(request)):
                model.detour = request == 1 and i == 5
                with fx_cache.session(f"request-{request}", branch="only"):
                    before = seen.clone()
                    compiled(**step, seen=seen)
                assert torch.equal(seen, before + 1.0)


class Noting(Counting):
    """Notes in a cache that it is given, in code of its own, and only then runs its first graph."""

    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor, seen: Any) -> tuple[Tensor]:
        torch._dynamo.graph_break()
        seen.note()
        torch._dynamo.graph_break()
        return self.denoised(latent, timestep, text)


class Notes:
    def __init__(self) -> None:
        self.count = torch.zeros(3)
        self.written = True

    @torch._dynamo.disable
    def note(self) -> None:
        if self.written:
            self.count += 1.0


@pytest.mark.parametrize("written", [True, False])
def test_what_code_of_a_forward_writes_to_is_written_once(written: bool) -> None:
    model, seen = Noting().eval(), Notes()
    seen.written = written
    compiled = compile_broken(model, residual_diff_threshold=10.0)
    with torch.no_grad():
        for request in range(2):
            for i, step in enumerate(walk(request)):
                model.detour = request == 1 and i == 5
                with fx_cache.session(f"request-{request}", branch="only"):
                    compiled(**step, seen=seen)
        assert torch.equal(seen.count, torch.full((3,), 2.0 * STEPS * written))
    assert bool(last_branch(compiled)["spans"][0]["hits"]) is not written


class Controlled(Model):
    """Only the blocks in the middle read what is added."""

    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor, added: Any) -> tuple[Tensor]:
        x, time = self.begin(latent, timestep)
        for i, block in enumerate(self.blocks):
            x, text = block(x, text, time)
            if 0 < i < BLOCKS - 1:
                torch._dynamo.graph_break()
                x = x + added
        return (self.out(x + text.mean(dim=1, keepdim=True)),)


@pytest.mark.parametrize(
    "values",
    [(2, 5), (1.0, 3.0), (torch.ones(1, TOKENS, WIDTH), torch.full((1, TOKENS, WIDTH), 3.0))],
    ids=["int", "float", "tensor"],
)
def test_what_only_skipped_blocks_are_given(values: tuple[Any, Any]) -> None:
    """In a branch that has a name: a step with another value computes."""
    model = Controlled().eval()
    compiled = compile_broken(model, residual_diff_threshold=10.0)
    with torch.no_grad():
        for request in range(3):
            for i, step in enumerate(walk(request)):
                with fx_cache.session(f"request-{request}", branch="only"):
                    output = compiled(**step, added=values[i >= 5])[0]
                if i == 5:
                    assert torch.equal(output, model(**step, added=values[1])[0])
    assert {3, 6} <= set(last_branch(compiled)["spans"][0]["hits"])


@pytest.mark.parametrize("first", [1, 3, BLOCKS - 1])
@pytest.mark.parametrize("how", ["written to", "replaced"])
def test_weights_of_blocks_that_change_in_the_middle(how: str, first: int) -> None:
    """From the block of that number on; the head is the same. The step computes, and what is reused then is new."""
    model = Model().eval()
    compiled = compile_broken(model, residual_diff_threshold=10.0)
    with torch.no_grad():
        run_in(compiled)
        for i, step in enumerate(walk(1)):
            if i == 5:
                for block in model.blocks[first:]:
                    old = block.experts.experts[1].weight
                    if how == "written to":
                        old.mul_(-2.0)
                    else:
                        block.experts.experts[1].weight = nn.Parameter(-2.0 * old)
            output = compiled(**step)[0]
            if i == 5:
                assert torch.equal(output, model(**step)[0])
    before, behind = (s["branches"][0]["spans"][0] for s in fx_cache.summary(compiled).to_dict()["sessions"][-2:])
    # What has changed ends the request; the next one has to warm up, and learn which way the time goes.
    assert before["hits"] == [2, 3, 4]
    assert behind["hits"] == [2]


class Holding(Block):
    """Holds a number that is read behind a graph break."""

    held: Any = 0.0

    def forward(self, x: Tensor, text: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        x, text = super().forward(x, text, time)
        torch._dynamo.graph_break()
        return x + self.held * torch.tanh(x), text


@pytest.mark.parametrize("kind", [float, int, torch.tensor])
def test_numbers_that_the_model_holds(kind: Any) -> None:
    model = Model()
    model.blocks = nn.ModuleList(Holding() for _ in range(BLOCKS))
    compiled = compile_broken(model, residual_diff_threshold=10.0)
    hits = 0
    for request in range(3):
        for i, step in enumerate(walk(request)):
            for block in model.blocks[2:]:
                block.held = kind(4.0) if i >= 5 else kind(2.0)
            with fx_cache.session(f"request-{request}", branch="only"):
                output = compiled(**step)[0]
            if i == 5:
                assert torch.equal(output, model(**step)[0]), request
        hits += len(last_branch(compiled)["spans"][0]["hits"])
    assert hits >= 8


class SteppedBlock(Block):
    def forward(self, x: Tensor, text: Tensor, time: Tensor, step: float) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(x + 0.001 * step * x, text, time)


class Stepped(Model):
    """A number moves with the time: its blocks read it, or code between them, where nobody sees it."""

    def __init__(self, between: bool) -> None:
        super().__init__()
        self.between = between
        self.blocks = nn.ModuleList(SteppedBlock() for _ in range(BLOCKS))

    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor, step: float) -> tuple[Tensor]:  # type: ignore[override]
        x, time = self.begin(latent, timestep)
        for block in self.blocks:
            x, text = block(x, text, time, 1.0 if self.between else step)
            torch._dynamo.graph_break()
            x = x + 0.001 * step * x if self.between else x
        return (self.out(x + text.mean(dim=1, keepdim=True)),)


@pytest.mark.parametrize("between", [False, True])
@pytest.mark.parametrize("branch", [None, "only"])
@pytest.mark.parametrize("kind", [int, float])
def test_a_number_that_moves_with_the_time(kind: type, branch: str | None, between: bool) -> None:
    """It is the schedule where the head reads it; where that is not known, every step computes."""
    model = Stepped(between)
    compiled = compile_broken(model, residual_diff_threshold=10.0)
    for request in range(3):
        for i, step in enumerate(walk(request)):
            with fx_cache.session(f"request-{request}", branch=branch):
                output = compiled(**step, step=kind(100 - i))[0]
            assert not between or torch.equal(output, model(**step, step=kind(100 - i))[0])
    assert last_branch(compiled)["spans"][0]["hits"] == ([] if between else [2, 3, 4, 5, 6, 7])


@pytest.mark.parametrize("writes", [(), (1,), range(STEPS)], ids=str)
def test_what_a_forward_writes_to_may_be_another_one_later(writes: Sequence[int]) -> None:
    """Oracle: the model's own output at the step from which on it is."""

    class Writing(Controlled):
        writes = False

        def forward(self, *args: Any) -> tuple[Tensor]:
            out = super().forward(*args)
            if self.writes:
                args[-1].mul_(1.0)
            return out

    model = Writing()
    compiled = compile_broken(model, residual_diff_threshold=10.0)
    for request in range(3):
        values = [k * torch.ones(1, TOKENS, WIDTH) for k in (1.0, 3.0)]
        for i, step in enumerate(walk(request)):
            model.writes = i in writes
            inputs = (*step.values(), values[i >= 5])
            with fx_cache.session(f"request-{request}", branch="only"):
                output = compiled(*inputs)[0]
            model.writes = False
            if i == 5:
                assert torch.equal(output, model(*inputs)[0]), request
    assert last_branch(compiled)["spans"][0]["hits"] == [2, 3, 4, 6, 7]


class Broken(Exception):
    """What is raised on purpose."""


ONCE = ("begin", "release", "open", "decide", "came_back", "know", "control", "versions")
"""What is called once a step."""


@pytest.mark.parametrize(
    ("kind", "function"),
    [
        (Store, "begin"),
        (Store, "release"),
        (Relay, "open"),
        (Relay, "ran"),
        (legs.Leg, "decide"),
        (legs.Leg, "take"),
        (legs.Script, "add"),
        (legs.Script, "goes_on"),
        (legs.WatchRun, "_before"),
        (legs.WatchRun, "_behind"),
        (Forward, "note"),
        (Forward, "came_back"),
        (Forward, "see_schedule"),
        (Forward, "know"),
        (Forward, "control"),
        (net, "versions"),
    ],
)
@pytest.mark.singly
@pytest.mark.parametrize("late", [False, True])
def test_an_error_of_ours(kind: Any, function: str, late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first call on, or once in the middle of a step that is reused: that step is the model's own."""
    model, plain = Model().eval(), getattr(kind, function)
    failed, here = [0], [False]

    def broken(*args: Any, **kwargs: Any) -> Any:
        here[0] += late and step_is_reused
        if not late or here[0] == (1 if function in ONCE else 5):
            failed[0] += 1
            raise Broken("on purpose")
        return plain(*args, **kwargs)

    monkeypatch.setattr(kind, function, broken)
    compiled = compile_broken(model, residual_diff_threshold=10.0)
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i, step in enumerate(walk(0)):
            step_is_reused, before = i == 5, failed[0]
            with fx_cache.session("request", branch="only"):
                output = compiled(**step)[0]
            # By these it only learns, or is over.
            if function not in ("came_back", "release") and (not late or failed[0] > before):
                assert torch.equal(output, model(**step)[0])
    said = [str(w.message) for w in caught if issubclass(w.category, fx_cache.CacheWarning)]
    assert bool(failed[0]) == any("got Broken: on purpose" in text for text in said)
    assert failed[0] or (late and function in ("add", "_before", "_behind"))  # not called where a step is reused


def test_explain_names_the_block_list_and_its_share() -> None:
    model, step = Model(), walk(8)[0]
    found = fx_cache.explain(compile_broken(model, Bn_compute_blocks=1), **step)
    (stack,) = [s for s in found.stacks if s.span is not None]
    assert (stack.name, stack.blocks, stack.head, stack.span, stack.tail) == ("blocks", 5, (0, 1), (1, 4), (4, 5))
    assert [s.role for s in stack.streams] == ["main", "carried"]
    assert found.reason is None and found.graphs > 1
    assert 0.3 < found.shares[0] < 0.8


def _detour(x: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return torch.sin(x)


class Wayward(Model):
    """Goes another way behind some block, at some steps."""

    def __init__(self) -> None:
        super().__init__()
        self.way, self.at = "", 0

    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor]:
        x, time = self.begin(latent, timestep)
        for i, block in enumerate(self.blocks):
            if i == self.at and self.way == "detour":
                x = _detour(x)
            if i == self.at and self.way == "other weights":
                block = self.blocks[0]
            if i == self.at and self.way == "left out":
                continue
            x, text = block(x, text, time)
            if i == self.at and self.way == "over":
                break
        return (self.out(x),)


WAYS = [(way, at) for way in ("detour", "other weights", "left out") for at in (1, BLOCKS - 1)]


@pytest.mark.parametrize(("way", "at"), [*WAYS, ("over", 1), ("over", 3)])
def test_a_forward_that_goes_another_way_computes(way: str, at: int) -> None:
    """Though calls were skipped already when that shows: the forward is begun anew."""
    model, steps = Wayward(), walk(9)
    compiled = compile_broken(model, residual_diff_threshold=2.0)
    model.at = at
    run_in(compiled)
    for step in steps[:4]:
        compiled(**step)
    assert last_branch(compiled)["spans"][0]["hits"] == [2, 3]
    model.way = way
    expected = model(**steps[4])[0]
    assert torch.equal(compiled(**steps[4])[0], expected)
    model.way = ""
    assert torch.equal(compiled(**steps[5])[0], model(**steps[5])[0])
    compiled(**steps[6])
    compiled(**steps[7])
    assert last_branch(compiled)["spans"][0]["hits"] == [2, 3, 6, 7]


def test_a_model_that_always_goes_another_way_is_left_alone() -> None:
    model, steps = Wayward(), walk(9)
    compiled = compile_broken(model, residual_diff_threshold=2.0)
    ways, wrong = ["detour", "", "left out", "over"], []
    with pytest.warns(fx_cache.CacheWarning, match="uncached.*calls of other graphs"):
        for i in range(5 * STEPS):
            model.way, model.at = ways[i % 4], 2 + i % 3
            expected = model(**steps[i % STEPS])[0]
            wrong += [] if torch.equal(compiled(**steps[i % STEPS])[0], expected) else [i]
    assert not wrong


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_blocks_of_two_kinds_of_which_the_last_ends_in_another_graph() -> None:
    """The last block's experts run in the graph behind it. Oracle: on the same input reuse changes nothing."""
    name = "NucleusMoEImageTransformer2DModel+moe"
    model, steps = models.build(name), models.walk(name, 5)
    compiled = compile_broken(copy.deepcopy(model), residual_diff_threshold=2.0)
    for step in steps:
        compiled(**step)
    expected = model(**steps[0])[0]
    with fx_cache.session("again", branch="only"):
        outputs = [compiled(**steps[0])[0] for _ in range(WARMUP + 1)]
    assert [span["hits"] for span in last_branch(compiled)["spans"]] == [[WARMUP], [WARMUP]]
    assert all(torch.equal(out, expected) for out in outputs[:WARMUP])
    assert relative_error(expected, outputs[WARMUP]) < 1e-5


OFFLOADED = [
    ("MochiTransformer3DModel", "block"),
    ("HiDreamImageTransformer2DModel", "block"),  # the time is what Python has made
    ("SD3Transformer2DModel+controlnet", "block"),  # and so is the stream, between the blocks
    ("MochiTransformer3DModel", "leaf"),  # the second stream is taken later in a block
    ("cogvideox", "leaf"),  # writes within the blocks
    ("NucleusMoEImageTransformer2DModel+moe", "leaf"),
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("name", "kind"), few(OFFLOADED, 2))
def test_a_hit_is_what_it_is_in_one_graph(name: str, kind: str) -> None:
    """However finely offloading cuts a forward. Oracle: the same without offloading, bit for bit."""

    def request(offloaded: bool) -> tuple[list[Tensor], list[int]]:
        torch._dynamo.reset()
        model, prompts = models.build(name), [models.conditioning(name, seed) for seed in (0, 1)]
        if offloaded:
            cpu, blocks = torch.device("cpu"), {"num_blocks_per_group": 1} if kind == "block" else {}
            model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type=f"{kind}_level", **blocks)
        fx_cache.enable(model, dict(OPTIONS), residual_diff_threshold=2.0)
        with fx_cache.session("first"):
            for step in models.walk(name, 6, seed=3):
                model(**{**step, **prompts[0]})
        with fx_cache.session("second"):
            outputs = [model(**{**step, **prompts[1]})[0].clone() for step in models.walk(name, 5)]
        sessions = fx_cache.summary(model).to_dict()["sessions"]
        (branch,) = next(s["branches"] for s in sessions if s["name"] == "second")
        return outputs, sorted({hit for span in branch["spans"] for hit in span["hits"]})

    with torch._dynamo.config.patch(recompile_limit=64):
        (ours, hits), (expected, as_well) = request(True), request(False)
    assert hits == as_well and hits
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


class Mixed(nn.Module):
    """A block that is captured whole, and computes something else in another pass."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, text: Tensor, edits: bool) -> Tensor:
        y = self.mix(x) * text.mean(dim=1, keepdim=True)
        return x + torch.tanh(torch.sin(y) if edits else y)


class Noted(Model):
    """One graph break, in front of all blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Mixed() for _ in range(BLOCKS))

    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor, edits: bool) -> tuple[Tensor]:
        x, time = self.begin(latent, timestep)
        torch._dynamo.graph_break()
        x = x + time[:, None]
        for block in self.blocks:
            x = block(x, text, edits)
        return (self.out(x),)


def test_another_pass_at_another_size_caches_like_what_was_watched() -> None:
    """However little work it is by itself."""
    model = Noted()
    compiled = compile_broken(model, residual_diff_threshold=2.0)
    for name, times, edits in [("large", 16, False), ("small", 1, True)]:
        with fx_cache.session(name, branch="only"):
            for step in walk(0):
                compiled(step["latent"].repeat(1, times, 1), step["timestep"], step["text"], edits)
    sessions = fx_cache.summary(model).to_dict()["sessions"]
    hits = {s["name"]: [b["spans"][0]["hits"] for b in s["branches"]] for s in sessions}
    assert hits["small"] == [[*range(WARMUP, STEPS)]]


class Halves(nn.Module):
    """A block with a graph break between its halves, if wanted."""

    def __init__(self, breaks: bool) -> None:
        super().__init__()
        self.breaks = breaks
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, text: Tensor, time: Tensor) -> Tensor:
        x = x + torch.tanh(self.first(x) * time) + text.mean(dim=1, keepdim=True)
        if self.breaks:
            torch._dynamo.graph_break()
        return x + torch.tanh(self.second(x))


class Split(nn.Module):
    """Takes the latents and the time as they come."""

    def __init__(self, breaks: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out, self.time = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 4), nn.Linear(2 * WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Halves(breaks) for _ in range(BLOCKS))

    def forward(self, latent: Any, timestep: Any, text: Tensor) -> Any:
        x = torch.stack(latent) if isinstance(latent, list) else latent
        if not isinstance(timestep, Tensor):
            timestep = torch.full((len(x),), timestep, dtype=torch.float32)
        angles = (timestep if timestep.ndim == 2 else timestep[:, None])[..., None] * torch.arange(WIDTH) / 50
        time = self.time(torch.cat([angles.sin(), angles.cos()], dim=-1))
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, text, time)
        x = self.out(x)
        return list(x) if isinstance(latent, list) else x


def times(kind: str, i: int) -> Any:
    """The timestep of a step, of a kind."""
    if kind == "tokens":
        return torch.full((1, 80), 1000.0 - 40 * i)
    return 1000 - 40 * i if kind == "int" else torch.tensor([1000.0 - 40 * i])


def split_walk(kind: str, seed: int, as_seen: str = "") -> list[dict[str, Any]]:
    """Latents go straight on: that shows which calls are steps of one request, where the time alone does not."""
    generator = torch.Generator().manual_seed(seed)
    count = 2 if kind in ("list", "batch") else 1
    latent, text = torch.randn(count, 80, 4, generator=generator), torch.randn(1, 6, WIDTH, generator=generator)
    way, found = torch.randn(latent.shape, generator=generator), []
    for i in range(STEPS):
        given = [*latent.clone()] if (as_seen or kind) == "list" else latent
        found.append({"latent": given, "timestep": times(as_seen or kind, i), "text": text})
        latent = latent + 0.15 * way
    return found


@pytest.mark.parametrize(("kind", "as_seen"), [("tokens", "tokens"), ("list", "batch"), ("int", "float")])
def test_time_and_latents_in_every_form(kind: str, as_seen: str) -> None:
    """Oracle: the same blocks in one graph, given the latents as one tensor and the time as a float."""
    outputs, hits = {}, {}
    for breaks, form in ((True, kind), (False, as_seen)):
        torch._dynamo.reset()
        model = Split(breaks)
        compiled = compile_broken(model, residual_diff_threshold=2.0)
        for seed in (1, 2):
            steps = split_walk(kind, seed, form)
            outputs[breaks] = [torch.stack([*compiled(**step)]) for step in steps]
        hits[breaks] = last_branch(model)["spans"][0]["hits"]
    assert hits[True] == hits[False] == [*range(WARMUP, STEPS)]
    assert max(relative_error(a, b) for a, b in zip(outputs[False], outputs[True], strict=True)) < 1e-5


class Scaling(Split):
    """What it embeds, time and guidance, Python has scaled before."""

    def __init__(self, breaks: bool) -> None:
        super().__init__(breaks)
        self.embedder = Embedder()

    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor, guidance: Tensor) -> Tensor:
        scaled = torch.compiler.disable(_thousandfold) if self.blocks[0].breaks else _thousandfold
        time, guidance = scaled(timestep, guidance)
        embedded = self.embedder(time, guidance)
        x = self.embed(latent)
        for block in self.blocks:
            x = block(x, text, embedded)
        return self.out(x)


class Embedder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, *numbers: Tensor) -> Tensor:
        angles = [number[:, None, None] * torch.arange(WIDTH) / 50 for number in numbers]
        return sum(self.time(torch.cat([a.sin(), a.cos()], dim=-1)) for a in angles)


def _thousandfold(*values: Tensor) -> list[Tensor]:
    return [1000 * value for value in values]


@pytest.mark.parametrize("passes", [1, 2])
def test_the_time_is_known_where_python_scales_it(passes: int) -> None:
    """Though guidance stands beside it, and what is returned made no latents. Oracle: the same in one graph."""
    outputs, hits = {}, {}
    for breaks in (True, False):
        torch._dynamo.reset()
        model = Scaling(breaks)
        compiled = compile_broken(model, residual_diff_threshold=2.0)
        outputs[breaks] = []
        for request in range(3):
            prompts = [split_walk("float", 10 * request + k) for k in range(passes)]
            for i, steps in enumerate(zip(*prompts, strict=True)):
                for step in steps:
                    time = torch.tensor([1.0 - 0.04 * i])
                    given = {**steps[0], "text": step["text"], "timestep": time, "guidance": torch.tensor([3.5])}
                    with fx_cache.session(f"request {request}"):
                        outputs[breaks].append(compiled(**given))
        branches = [b for s in fx_cache.summary(model).to_dict()["sessions"][-1:] for b in s["branches"]]
        hits[breaks] = [b["spans"][0]["hits"] for b in branches]
    assert hits[True] == hits[False] == [[*range(WARMUP, STEPS)]] * passes
    last = slice(-STEPS * passes, None)  # in the first ones several graphs are still watched
    assert max(relative_error(a, b) for a, b in zip(outputs[False][last], outputs[True][last], strict=True)) < 1e-5


class Other(Halves):
    """A block of another kind."""

    def forward(self, x: Tensor, text: Tensor, time: Tensor) -> Tensor:
        x = x + torch.sin(self.first(x)) * text.mean(dim=1, keepdim=True)
        torch._dynamo.graph_break()
        return x + torch.tanh(self.second(x) * time)


class Glued(Split):
    """Blocks of two kinds, and glue behind one of them."""

    def __init__(self, kinds: str, glue: int | None, captured: bool) -> None:
        super().__init__(breaks=True)
        self.blocks = nn.ModuleList(Halves(True) if kind == "h" else Other(True) for kind in kinds)
        self.glue, self.captured = glue, captured

    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        angles = timestep[:, None, None] * torch.arange(WIDTH) / 50
        time = self.time(torch.cat([angles.sin(), angles.cos()], dim=-1))
        x = self.embed(latent)
        for i, block in enumerate(self.blocks):
            x = block(x, text, time)
            if i == self.glue:
                x = (_glue if self.captured else torch.compiler.disable(_glue))(x)
        return self.out(x)


def _glue(x: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return x * 1.5 + 0.25


@pytest.mark.parametrize("captured", [True, False])
@pytest.mark.parametrize(
    ("kinds", "glue", "blocks"),
    [
        ("hhhhh", 1, [2, 3]),
        ("hhhhh", 3, [4]),
        ("hhhho", None, [4]),
        ("hhhoo", None, [3, 2]),
        ("ohhhh", 2, [2, 2]),
    ],
)
def test_uniform_stretches(kinds: str, glue: int | None, blocks: list[int], captured: bool) -> None:
    """Glue behind some block, or blocks of another kind, end a stack: behind glue outside all graphs may go on another
    stream. Oracle: on the same input it changes nothing.
    """
    model, steps = Glued(kinds, glue, captured), split_walk("one", 6)
    found = fx_cache.explain(compile_broken(model), **steps[0])
    assert [s.blocks for s in found.stacks if s.span is not None] == blocks
    compiled = compile_broken(model, residual_diff_threshold=100.0)
    for step in split_walk("one", 5):
        compiled(**step)
    with fx_cache.session("again", branch="only"):
        outputs = [compiled(**steps[0]) for _ in range(WARMUP + 1)]
    assert all(span["hits"] == [WARMUP] for span in last_branch(model)["spans"])
    expected = model(**steps[0])
    assert all(torch.equal(out, expected) for out in outputs[:WARMUP])
    assert relative_error(expected, outputs[WARMUP]) < 1e-5


class Edited(Split):
    """Takes a picture of the latents' shape beside them, and joins both in one stream."""

    def forward(self, picture: Tensor, latent: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        x = torch.compiler.disable(torch.cat)([latent, picture], dim=1)
        return super().forward(x, timestep, text)[:, : latent.shape[1]]


def test_two_inputs_of_the_shape_of_what_is_returned() -> None:
    """What rests while the other moves with the time is not denoised. Oracle: each pass alone in a fresh copy."""
    steps, pictures = split_walk("one", 3), [torch.randn(1, 80, 4) for _ in range(2)]

    def request(pictures: list[Tensor]) -> list[list[Tensor]]:
        torch._dynamo.reset()
        compiled = compile_broken(Edited(breaks=True), residual_diff_threshold=2.0)
        for step in split_walk("one", 4):
            compiled(pictures[0], **step)
        with fx_cache.session("request"):
            return [[compiled(picture, **step) for picture in pictures] for step in steps]

    together = request(pictures)
    for i, picture in enumerate(pictures):
        for step, both, (own,) in zip(steps, together, request([picture]), strict=True):
            computed = Edited(breaks=True)(picture, **step)
            assert torch.equal(both[i], own) or torch.equal(both[i], computed)
    assert not torch.equal(together[-1][1], Edited(breaks=True)(pictures[1], **steps[-1]))
