"""Several graphs: what ended, moved, or was replaced between two steps is not reused. Oracle: the model itself."""

from __future__ import annotations

import contextlib
import gc
import threading
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fx_cache
from fx_cache.runtime import legs
from fx_cache.runtime.front import Strangers
from fx_cache.runtime.identity import OwnWrites, StorageHold
from fx_cache.runtime.relay import ObservedForward
from fx_cache.runtime.slots import Times
from tests.running import last_branch, relative_error
from tests.test_relay import BLOCKS, STEPS, TOKENS, WIDTH, Block, Controlled, Model, compile_broken, walk

CHANGES = 5
"""The step at which something is another one."""

WITHIN = 8
"""The call of a forward that lies in the middle of its span."""


@pytest.fixture(autouse=True)
def many_graphs() -> Iterator[None]:
    with torch._dynamo.config.patch(recompile_limit=200), torch.no_grad():
        yield


def session(request: int, branch: str | None, step: int | None = None) -> Any:
    if branch == "unnamed":
        return contextlib.nullcontext()
    return fx_cache.session(f"request-{request}", branch=branch, step=step)


@pytest.mark.parametrize("how", ["end", "reset"])
def test_what_ended_behind_the_first_forward(how: str) -> None:
    model = Model()
    compiled = compile_broken(model, residual_diff_threshold=10.0)
    first, others = walk(1), walk(2)
    with fx_cache.session("first", branch="only"):
        compiled(**first[0])
    if how == "end":
        fx_cache.end("first")
    else:
        for weight in model.blocks[1:].parameters():
            weight.data.mul_(2.0)  # leaves no trace
        fx_cache.reset(compiled)
    for step in others[:4]:
        with fx_cache.session("other", branch="only"):
            compiled(**step)
    assert last_branch(compiled)["spans"][0]["hits"]
    with fx_cache.session("first", branch="only"):
        assert torch.equal(compiled(**first[1])[0], model(**first[1])[0])


def test_a_prompt_overwritten_behind_the_first_forward() -> None:
    """The pass that was called first is not found by what stands in its buffer at the next call."""
    model, steps = Model(), walk(1)
    compiled = compile_broken(model, residual_diff_threshold=10.0)
    prompts = steps[0]["text"], 5 * walk(2)[0]["text"]
    buffer = torch.empty_like(prompts[0])
    for step in steps:
        for prompt in prompts:
            with fx_cache.session("S"):
                output = compiled(**{**step, "text": buffer.copy_(prompt)})[0]
            assert relative_error(model(**{**step, "text": prompt})[0], output) < 0.5
    branches = fx_cache.summary(compiled).to_dict()["sessions"][-1]["branches"]
    assert [b["spans"][0]["hits"] for b in branches[-2:]] == [[2, 3, 4, 5, 6]] * 2


VALUES = {
    "few numbers jump": lambda i: torch.full((WIDTH,), 1.0 if i < CHANGES else 5.0),
    "a tensor jumps": lambda i: torch.tensor(1.0 if i < CHANGES else 5.0),
    "a tensor moves": lambda i: torch.tensor(float(2**i)),
    "a number moves": lambda i: float(2**i),
}


@pytest.mark.parametrize("branch", ["only", "unnamed"])
@pytest.mark.parametrize("kind", VALUES)
def test_what_looks_like_time_and_only_skipped_blocks_read(kind: str, branch: str) -> None:
    model, hits = Controlled(), []
    compiled = compile_broken(model, residual_diff_threshold=10.0)
    for request in range(3):
        for i, step in enumerate(walk(request)):
            added = VALUES[kind](i)
            with session(request, branch):
                output = compiled(**step, added=added)[0]
            if i == CHANGES or "moves" in kind:
                assert torch.equal(output, model(**step, added=added)[0]), (request, i)
        hits += last_branch(compiled)["spans"][0]["hits"]
    assert bool(hits) == ("jump" in kind)


class Referring(Controlled):
    """A second input of the latents' shape, which only skipped blocks read."""

    def __init__(self) -> None:
        super().__init__()
        self.reference = nn.Linear(4, WIDTH)

    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor, reference: Tensor) -> tuple[Tensor]:  # type: ignore[override]
        x, time = self.begin(latent, timestep)
        for i, block in enumerate(self.blocks):
            x, text = block(x, text, time)
            if 0 < i < BLOCKS - 1:
                torch._dynamo.graph_break()
                x = x + self.reference(reference)
        return (self.out(x + text.mean(dim=1, keepdim=True)),)


@pytest.mark.parametrize("branch", ["only", "unnamed"])
def test_two_inputs_that_may_be_denoised(branch: str) -> None:
    model = Referring()
    compiled = compile_broken(model, residual_diff_threshold=10.0)
    generator = torch.Generator().manual_seed(0)
    for request in range(4):
        reference = torch.randn(walk(0)[0]["latent"].shape, generator=generator)
        for i, step in enumerate(walk(request)):
            with session(request, branch):
                output = compiled(**step, reference=reference)[0]
            assert torch.equal(output, model(**step, reference=reference)[0]), (request, i)
            reference = 1.3 * reference + 0.05 * torch.randn(reference.shape, generator=generator)


class Doubling(Controlled):
    """Puts a number in the place of the user's."""

    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor, options: dict[str, float]) -> tuple[Tensor]:  # type: ignore[override]
        options["scale"] = 2 * options["scale"]
        return super().forward(latent, timestep, text, options["scale"])  # type: ignore[arg-type]


def test_the_user_gives_a_number_that_a_forward_has_put_there() -> None:
    model = Doubling()
    compiled = compile_broken(model, residual_diff_threshold=10.0)
    for request in range(3):
        for i, step in enumerate(walk(request)):
            scale = 1.0 if i < CHANGES else 2.0
            with session(request, "only"):
                output = compiled(**step, options={"scale": scale})[0]
            if i == CHANGES:
                assert torch.equal(output, model(**step, options={"scale": scale})[0])
    assert last_branch(compiled)["spans"][0]["hits"] == [2, 3, 4, 6, 7]


class Detouring(Block):
    """Code between two graphs of a block may put something else into the stream."""

    detour = False

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def between(self, x: Tensor) -> Tensor:
        return 3 * self.mix(x) if self.detour else x

    def forward(self, x: Tensor, text: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(self.between(x + torch.tanh(self.mix(x))), text, time)


def test_code_between_the_graphs_goes_another_way() -> None:
    model = Model()
    model.blocks = nn.ModuleList(Detouring() for _ in range(BLOCKS))
    compiled = compile_broken(model, residual_diff_threshold=10.0)
    for request in range(2):
        for i, step in enumerate(walk(request)):
            model.blocks[2].detour = request == 1 and i == CHANGES
            with session(request, "only"):
                output = compiled(**step)[0]
            if model.blocks[2].detour:
                assert torch.equal(output, model(**step)[0])
    assert {2, 3, 4, 7} <= set(last_branch(compiled)["spans"][0]["hits"])


class Joint(nn.Module):
    """Two streams that see each other; one graph."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text, self.time = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, text: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.tanh(self.image(x).mean(dim=1, keepdim=True) + self.text(text).mean(dim=1, keepdim=True))
        shift = self.time(time)[:, None]
        return text + torch.sin(self.text(text) * both), x + torch.sin(self.image(x) * both + shift)


WAYS = {
    "added": lambda x, before, first, sample: x + sample,
    "in place": lambda x, before, first, sample: x.add_(sample),
    "of the first": lambda x, before, first, sample: x + 0.3 * first,
    "blended": lambda x, before, first, sample: before + 0.5 * (x - before) + sample,
}


class Sampled(Model):
    """Code between the blocks makes something of the image stream, as ControlNets do."""

    def __init__(self, way: str, breaks: bool, in_head: bool) -> None:
        super().__init__()
        self.way = torch._dynamo.disable(WAYS[way]) if breaks else WAYS[way]
        self.breaks, self.in_head = breaks, in_head
        self.blocks = nn.ModuleList(Joint() for _ in range(BLOCKS))

    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor, sample: Tensor) -> tuple[Tensor]:  # type: ignore[override]
        x, time = self.begin(latent, timestep)
        first = x
        for i, block in enumerate(self.blocks):
            if self.breaks:
                torch._dynamo.graph_break()
            before = x
            text, x = block(x, text, time)
            if i or self.in_head:
                x = self.way(x, before, first, sample)
        return (self.out(x),)


@pytest.mark.parametrize("tokens", ["as many", "fewer"])
@pytest.mark.parametrize("in_head", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_code_between_the_blocks_changes_a_stream(way: str, in_head: bool, tokens: str) -> None:
    """Oracle: the same model in one graph, whose hits follow the latents."""
    given = walk(1)
    generator = torch.Generator().manual_seed(3)
    text = torch.randn(1, given[0]["latent"].shape[1] if tokens == "as many" else 6, WIDTH, generator=generator)
    sample = 0.3 * torch.randn(1, given[0]["latent"].shape[1], WIDTH, generator=generator)
    found = {}
    for breaks in (True, False):
        torch._dynamo.reset()
        compiled = compile_broken(Sampled(way, breaks, in_head), residual_diff_threshold=10.0)
        for request in range(2):
            outputs = []
            for i, step in enumerate(given):
                step = {**step, "latent": (1 + (i > CHANGES)) * step["latent"], "text": text, "sample": sample}
                with session(request, "only"):
                    outputs.append(compiled(**step)[0].clone())
        found[breaks] = outputs, [span["hits"] for span in last_branch(compiled)["spans"]]
    assert found[True][1] == found[False][1] == [[2, 3, 4, 5, 6, 7]]
    limit = 0.2 if way == "of the first" else 1e-5  # in one graph what is added of that is a part of the residual
    assert all(relative_error(a, b) < limit for a, b in zip(found[False][0], found[True][0], strict=True))


HELD = torch.zeros(1, 24, WIDTH)


class Holding(Block):
    """Reads a tensor that a global variable, or it itself, holds."""

    held = "global"

    def forward(self, x: Tensor, text: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x + (HELD if self.held == "global" else self.tensor), text, time)


@pytest.mark.parametrize("writes", [True, False])
@pytest.mark.parametrize("branch", ["only", "unnamed"])
@pytest.mark.parametrize("held", ["global", "attribute"])
def test_a_tensor_held_outside_the_forward(
    held: str, branch: str, writes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model()
    model.blocks = nn.ModuleList([Block(), *(Holding() for _ in range(BLOCKS - 1))])
    for block in model.blocks[1:]:
        block.held, block.tensor = held, torch.zeros(1, 24, WIDTH)
    monkeypatch.setitem(globals(), "HELD", torch.zeros(1, 24, WIDTH))
    compiled, hits = compile_broken(model, residual_diff_threshold=10.0), []
    for request in range(3):
        for i, step in enumerate(walk(request)):
            if i == CHANGES and writes:
                HELD.add_(1.0)
                for block in model.blocks[1:]:
                    block.tensor.add_(1.0)
            elif i == CHANGES:
                globals()["HELD"] = HELD + 1.0
                for block in model.blocks[1:]:
                    block.tensor = block.tensor + 1.0
            with session(request, branch):
                output = compiled(**step)[0]
            assert i != CHANGES or torch.equal(output, model(**step)[0])
        hits += last_branch(compiled)["spans"][0]["hits"]
    assert hits


class Counting(Block):
    """Code between its graphs writes to a tensor of the user's."""

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def between(self, x: Tensor, count: Tensor) -> Tensor:
        count.add_(1.0)
        return x * 1.0

    def forward(self, x: Tensor, text: Tensor, time: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(self.between(x + torch.tanh(self.mix(x)), count), text, time)


class Counted(Model):
    strays = False

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Counting() for _ in range(BLOCKS))

    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor, count: Tensor) -> tuple[Tensor]:  # type: ignore[override]
        x, time = self.begin(latent, timestep)
        for i, block in enumerate(self.blocks):
            x, text = block(x, text, time, count)
            if i == 3 and self.strays:
                x = self.blocks[0].experts(x)
        return (self.out(x + text.mean(dim=1, keepdim=True)),)


def test_what_is_written_within_a_span_is_written_once() -> None:
    model, counts = Counted(), (torch.zeros(100), torch.zeros(100))
    compiled = compile_broken(model, residual_diff_threshold=10.0)
    for request in range(3):
        for i, step in enumerate(walk(request)):
            model.strays = request == 2 and i == CHANGES
            with session(request, "only"):
                compiled(**step, count=counts[0])
            model(**step, count=counts[1])
            assert torch.equal(*counts), (request, i)


@pytest.mark.parametrize("breaks", [False, True])
@pytest.mark.parametrize("anew", [False, True])
@pytest.mark.parametrize("branched", [False, True])
@pytest.mark.parametrize("stepped", [False, True])
def test_a_session_begun_afresh_begins_for_all_its_passes(
    stepped: bool, branched: bool, anew: bool, breaks: bool
) -> None:
    """Given up at step 2; the pass that joins later finds nothing of before."""
    model = Model()
    compiled = compile_broken(model, residual_diff_threshold=10.0) if breaks else compile_whole(model)
    prompts = {"cond": walk(1)[0]["text"], "uncond": walk(2)[0]["text"]}

    def call(step: dict[str, Tensor], i: int, branch: str) -> bool:
        given = {**step, "text": prompts[branch].clone() if anew else prompts[branch]}
        with fx_cache.session("S", branch=branch if branched else None, step=i if stepped else None):
            return torch.equal(compiled(**given)[0], model(**given)[0])

    for step in walk(0) if breaks else ():
        with fx_cache.session("compiles", branch="only"):
            compiled(**step)
    for i, step in enumerate(walk(3)[:3]):
        for branch in prompts:
            call(step, i, branch)
    again = walk(4)
    computed = [call(step, i, "cond") for i, step in enumerate(again[:CHANGES])]
    assert not all(computed)
    assert call(again[CHANGES], CHANGES, "uncond")


def compile_whole(model: nn.Module) -> nn.Module:
    for block in model.blocks:  # type: ignore[union-attr]
        block.experts = nn.Identity()
    options = {"compiler": "eager", "Fn_compute_blocks": 1, "max_warmup_steps": 1, "residual_diff_threshold": 10.0}
    return torch.compile(model, backend="dit_cache", fullgraph=True, options=options)


class Rewriting(Model):
    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor]:
        return super().forward(latent, timestep, text.mul_(1.0))


@pytest.mark.parametrize("what", ["wrote", "origin"])
def test_an_error_where_writes_are_noted(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, step = Rewriting(), walk(1)[0]
    compiled = compile_whole(model)

    def fails(*_: Any) -> None:
        raise RuntimeError("on purpose")

    monkeypatch.setattr(OwnWrites, what, fails)
    with pytest.warns(fx_cache.CacheWarning, match="on purpose"):
        output = compiled(**step)[0]
    assert torch.equal(output, model(**step)[0])


class Embedding(Model):
    """Time and guidance, embedded alike or not; guidance is read by the blocks that are skipped alone."""

    def __init__(self, graphs: int, plain: bool) -> None:
        super().__init__()
        self.graphs, self.plain, self.guided = graphs, plain, nn.Linear(2, WIDTH)

    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor, guidance: Tensor) -> tuple[Tensor]:  # type: ignore[override]
        x, time = self.begin(latent, timestep)
        if self.plain:
            time = self.time(torch.stack([timestep, 1 - timestep], dim=-1))
        return self.through(x, time, text, guidance)

    def through(self, x: Tensor, time: Tensor, text: Tensor, guidance: Tensor) -> tuple[Tensor]:
        other = self.guided(torch.stack([guidance.sin(), guidance.cos()], dim=-1))
        x = x + text.mean(dim=1, keepdim=True)
        for i, block in enumerate(self.blocks):
            if self.graphs > 1:
                torch._dynamo.graph_break()
            x = self.layer(block, x, self.given(i, time, other))
        return (self.out(x),)

    def given(self, i: int, time: Tensor, other: Tensor) -> Tensor:
        return time if i < 2 else time + other

    def layer(self, block: Block, x: Tensor, time: Tensor) -> Tensor:
        return x + block.time(time)[:, None] * block.mix(block.norm(x))


FORMS = {
    "zeros_like": torch.zeros_like,
    "new_zeros": lambda other: other.new_zeros(other.shape),
    "zeros": lambda other: torch.zeros(other.shape, dtype=other.dtype),
    "brought": lambda other: torch.zeros(()).type_as(other).expand_as(other),
}


class Formed(Embedding):
    """The first blocks read of guidance what shape it has."""

    form = "zeros_like"

    def given(self, i: int, time: Tensor, other: Tensor) -> Tensor:
        return time + (FORMS[self.form](other) if i < 2 else other)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("branch", ["only", "unnamed"])
@pytest.mark.parametrize("graphs", [1, 2])
@pytest.mark.filterwarnings("ignore::fx_cache.CacheWarning")
def test_a_head_that_reads_of_an_input_its_form(graphs: int, branch: str, form: str) -> None:
    """It does not show it."""
    model = Formed(graphs, False)
    model.form = form
    compiled = compile_broken(model, residual_diff_threshold=10.0)
    for request in range(3):
        for i, step in enumerate(walk(request)):
            guidance = torch.tensor([3.5 + i / 10])
            with session(request, branch):
                output = compiled(**step, guidance=guidance)[0]
            assert torch.equal(output, model(**step, guidance=guidance)[0])


class Timed(Embedding):
    """The time comes as an embedding; guidance alone looks like one."""

    def forward(self, latent: Tensor, time: Tensor, text: Tensor, guidance: Tensor) -> tuple[Tensor]:  # type: ignore[override]
        return self.through(self.embed(latent), self.time(time), text, guidance)


@pytest.mark.parametrize("way", ["up", "always"])
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("branch", ["only", None])
@pytest.mark.parametrize("graphs", [1, 2])
@pytest.mark.filterwarnings("ignore::fx_cache.CacheWarning")
def test_what_alone_is_embedded_like_a_time(graphs: int, branch: str | None, named: bool, way: str) -> None:
    """It is no time for that: it rests from step to step, or something else moves as well.

    Over several graphs it is not known that the embedding is the time: it may feed only the span.
    """
    model, hits = Timed(graphs, False), 0
    compiled = compile_broken(model, residual_diff_threshold=10.0)
    for request in range(3):
        for i, step in enumerate(walk(request)):
            time, guidance = step["timestep"], torch.tensor([GUIDANCE[way](i)])
            given = step["latent"], torch.stack([time.sin(), time.cos()], -1), step["text"], guidance
            with session(request, branch, i if named else None):
                output = compiled(*given)[0]
            same = torch.equal(output, model(*given)[0])
            assert same or (i != CHANGES and way == "up")
            hits += not same
    # Other conditioning at each call, and no time, is another request's each time, if nobody counts the steps.
    assert bool(hits) == (named and way == "up" and graphs == 1) or branch is None


GUIDANCE = {
    "up": lambda i: 3.5 if i < CHANGES else 900.0,
    "down": lambda i: 900.0 if i < CHANGES else 3.5,
    "by little": lambda i: 3.5 if i < CHANGES else 3.6,
    "always": lambda i: 3.5 + i / 10,
    "at every step": lambda i: 900.0 - 50 * i if i < CHANGES else 3.5,
}


@pytest.mark.parametrize("way", [way for way in GUIDANCE if way != "always"])
@pytest.mark.parametrize(("branch", "named"), [("only", True), ("only", False), (None, True), ("unnamed", False)])
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("graphs", [1, 2])
@pytest.mark.filterwarnings("ignore::fx_cache.CacheWarning")
def test_what_is_embedded_like_the_time(graphs: int, plain: bool, branch: str, named: bool, way: str) -> None:
    model, hits = Embedding(graphs, plain), 0
    compiled = compile_broken(model, residual_diff_threshold=10.0)
    for request in range(3):
        for i, step in enumerate(walk(request)):
            guidance = torch.tensor([GUIDANCE[way](i)])
            with session(request, branch, i if named else None):
                output = compiled(**step, guidance=guidance)[0]
            same = torch.equal(output, model(**step, guidance=guidance)[0])
            assert same or (i != CHANGES and (way != "at every step" or i > CHANGES))
            hits += not same
    # Unnamed, the latents would have to show which of the two is the time, and no sampler made these.
    assert hits or plain or way == "at every step" or branch == "unnamed"


@pytest.mark.parametrize("together", [2, 8])
def test_guidance_of_its_own_for_each_of_several_requests(together: int) -> None:
    """On a server: what differs between requests at one time is not the time."""
    model = Embedding(2, False)
    compiled = compile_broken(model, residual_diff_threshold=10.0)
    for turn in range(3):
        walks = [walk(10 * turn + k) for k in range(together)]
        for i in range(STEPS):
            for k, steps in enumerate(walks):
                guidance = torch.tensor([1.0 + k + (50.0 if (turn, k) == (2, 0) and i >= CHANGES else 0.0)])
                with fx_cache.session(f"{turn}-{k}", branch="only", step=i):
                    output = compiled(**steps[i], guidance=guidance)[0]
                if (turn, k) == (2, 0):
                    assert torch.equal(output, model(**steps[i], guidance=guidance)[0]) == (i < 2 or i == CHANGES)


def test_which_of_several_inputs_is_the_time() -> None:
    """By hand: each row is what a request is given at its steps, and whether it is as when the span was computed."""
    table = {
        ((0, 5), (1, 5), (2, 5), (3, 5)): [True, True, False, False],
        ((0, 5), (1, 5), (2, 5), (3, 6)): [True, True, False, True],
        ((0, 5), (1, 6), (2, 7), (3, 8)): [True, True, True, True],  # both move
        ((0, 5), (0, 5), (0, 6), (0, 7)): [True, False, True, True],  # neither moves at every step
        ((0, 5), (1, 5), (1, 6), (2, 6)): [True, True, True, True],
    }
    for steps, expected in table.items():
        times, found = Times(), []
        for step in steps:
            now = StorageHold(step)
            found.append(times.changed(now, frozenset({0, 1})))
            if found[-1]:
                times.computed(now)
            times.over(now)
        assert found == expected, steps


class Added(Block):
    def forward(self, x: Tensor, text: Tensor, time: Tensor, added: Any) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, text = super().forward(x, text, time)
        return x + added, text


class Adding(Model):
    """Some blocks are given a number, or tensor, that code between the graphs finds outside."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Added() for _ in range(BLOCKS))
        self.held: Any = None

    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor]:
        x, time = self.begin(latent, timestep)
        for i, block in enumerate(self.blocks):
            torch._dynamo.graph_break()
            x, text = block(x, text, time, self.held if i == BLOCKS - 2 else 0 * self.held)
        return (self.out(x + text.mean(dim=1, keepdim=True)),)


HANDED: dict[str, Any] = {}
"""What code that is not captured finds."""


class AddingHanded(Adding):
    """The same, from code that Dynamo does not look into."""

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def hands(self) -> tuple[Any, Any]:
        return HANDED["held"], HANDED["zero"]

    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor]:
        x, time = self.begin(latent, timestep)
        held, zero = self.hands()
        for i, block in enumerate(self.blocks):
            torch._dynamo.graph_break()
            x, text = block(x, text, time, held if i == BLOCKS - 2 else zero)
        return (self.out(x + text.mean(dim=1, keepdim=True)),)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["another tensor", "written to"])
@pytest.mark.parametrize("model", [Adding, AddingHanded])
def test_a_tensor_without_dimensions_found_outside(model: type[Adding], kind: str, dtype: torch.dtype) -> None:
    net = model()
    compiled, held = compile_broken(net, residual_diff_threshold=10.0), torch.zeros((), dtype=dtype)
    HANDED["zero"] = torch.zeros((), dtype=dtype)
    for request in range(3):
        for i, step in enumerate(walk(request)):
            value = 1.0 if i < CHANGES else 5.0
            if i in (0, CHANGES):
                held = held.fill_(value) if kind == "written to" else torch.full((), value, dtype=dtype)
                net.held = HANDED["held"] = held
            with session(request, "only"):
                output = compiled(**step)[0]
            if i == CHANGES:
                assert torch.equal(output, net(**step)[0])
    assert last_branch(compiled)["spans"][0]["hits"][:3] == [2, 3, 4]


@pytest.mark.parametrize("kind", ["number", "another tensor", "written to"])
def test_what_code_between_the_graphs_finds_outside(kind: str) -> None:
    model = Adding()
    compiled = compile_broken(model, residual_diff_threshold=10.0)
    for request in range(4):
        for i, step in enumerate(walk(request)):
            value = 1.0 if i < CHANGES else 5.0
            if i in (0, CHANGES) and kind == "written to" and model.held is not None:
                model.held.fill_(value)
            elif i in (0, CHANGES):
                model.held = value if kind == "number" else torch.full((1, TOKENS, WIDTH), value)
            with session(request, "only"):
                output = compiled(**step)[0]
            if i == CHANGES:
                assert torch.equal(output, model(**step)[0])
    assert last_branch(compiled)["spans"][0]["hits"][:3] == [2, 3, 4]


@pytest.mark.parametrize("branch", ["only", None, "unnamed"])
def test_another_thread_begins_a_request_within_a_span(branch: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the first one's span computes does not get into the request that has begun."""
    model = Model()
    compiled = compile_broken(model, residual_diff_threshold=10.0)
    text = walk(0)[0]["text"]
    first, second = walk(10, text), walk(20, text)

    def step(given: dict[str, Tensor]) -> Tensor:
        with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=200), session(0, branch):
            return compiled(**given)[0].clone()

    for given in (*walk(3, text)[:4], *walk(4, text)[:4]):
        step(given)
    alone = [step(given) for given in second]
    inside, go_on, calls = threading.Event(), threading.Event(), [0]
    plain = ObservedForward.compute

    def compute(self: ObservedForward, *args: Any) -> Any:
        if threading.current_thread() is thread:
            calls[0] += 1
            if calls[0] == WITHIN:
                inside.set()
                assert go_on.wait(60)
        return plain(self, *args)

    monkeypatch.setattr(ObservedForward, "compute", compute)
    thread = threading.Thread(target=lambda: step(first[0]))
    thread.start()
    assert inside.wait(60)
    outputs = []
    for i, given in enumerate(second):
        outputs.append(step(given))
        if i == 2:
            go_on.set()
            thread.join()
    assert all(torch.equal(a, b) for a, b in zip(outputs, alone, strict=True))
    assert last_branch(compiled)["spans"][0]["hits"] == [2, 3, 4, 5, 6, 7]


def test_weights_replaced_by_others() -> None:
    """What is cached is still found, and ended, when no weight is left that it was found by."""
    model = Model()
    compiled = compile_broken(model, residual_diff_threshold=10.0)
    for request in range(2):
        for step in walk(request):
            with session(request, "only"):
                compiled(**step)
    fx_cache.configure(compiled, max_cached_steps=3)
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    gc.collect()
    steps = walk(5)
    for step in steps[:5]:
        with session(5, "only"):
            compiled(**step)
    assert last_branch(compiled)["spans"][0]["hits"] == [2, 3, 4]
    fx_cache.configure(compiled, max_cached_steps=-1)
    fx_cache.end("request-5")
    with session(5, "only"):
        assert torch.equal(compiled(**steps[5])[0], model(**steps[5])[0])


def test_weights_of_a_function() -> None:
    model = Model()
    compiled = compile_broken(lambda **given: model(**given), residual_diff_threshold=10.0)
    for request in range(3):
        for i, step in enumerate(walk(request)):
            if i == CHANGES:
                model.embed.weight.mul_(1.5)
            with session(request, "only"):
                output = compiled(**step)[0]
            if i == CHANGES:
                assert torch.equal(output, model(**step)[0])
    assert last_branch(model)["spans"][0]["hits"] == [2, 3, 4, 6, 7]


def test_a_function_that_calls_another_model() -> None:
    """It is found by the model that it calls now as well, while the first one lives."""
    first, second = Model(), Model()
    called = [first]
    compiled = compile_broken(lambda **given: called[0](**given), residual_diff_threshold=10.0)
    for request, model in enumerate([first, first, second, second]):
        called[0] = model
        for step in walk(request):
            with session(request, "only"):
                compiled(**step)
    fx_cache.configure(second, max_cached_steps=3)
    steps = walk(9)
    for i, step in enumerate(steps):
        if i == 4:
            second.blocks[2].mix.weight.data.mul_(1.5)  # leaves no trace
            fx_cache.reset(second)
        with session(9, "only"):
            output = compiled(**step)[0]
        assert i != 4 or torch.equal(output, second(**step)[0])
        if i == 3:
            assert last_branch(second)["spans"][0]["hits"] == [2, 3]


def test_which_call_it_was_while_its_forward_ends() -> None:
    """Another thread may ask meanwhile: what it looks at is not written to."""
    strangers = Strangers({name: torch.zeros(1) for name in "ab"})
    before = strangers._kept
    strangers.over()
    assert len(before) == 2 and not strangers._kept


def test_what_ended_is_not_begun_again_by_the_forward_that_was_watched() -> None:
    model = Model()
    compiled = compile_broken(model, residual_diff_threshold=10.0)
    step = walk(0)[0]
    held = weakref.ref(step["text"])
    with session(0, "only"):
        compiled(**step)
    fx_cache.end("request-0")
    del step
    gc.collect()
    assert held() is None
    for given in walk(1):
        with session(1, "only"):
            compiled(**given)
    names = [s["name"] for s in fx_cache.summary(compiled).to_dict()["sessions"]]
    assert "request-0" not in names


def test_ended_while_a_step_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    model, measure = Model(), legs.residual_diff

    def ends(*args: Any) -> Tensor:
        fx_cache.end("request-1")
        return measure(*args)

    compiled = compile_broken(model, residual_diff_threshold=0.9)
    for request in range(3):
        for i, step in enumerate(walk(request)):
            with monkeypatch.context() as patch, session(request, "only"):
                if (request, i) == (1, CHANGES):
                    patch.setattr(legs, "residual_diff", ends)
                compiled(**step)
    assert len(last_branch(compiled)["spans"][0]["hits"]) == STEPS - 2


class Within:
    """Holds a dict that holds itself: nobody can say what it holds."""

    def __init__(self) -> None:
        self.own: dict[str, Any] = {}
        self.own["self"] = self.own


def test_given_what_holds_itself() -> None:
    class Given(Model):
        def forward(self, latent: Tensor, timestep: Tensor, text: Tensor, other: Any) -> tuple[Tensor]:  # type: ignore[override]
            return super().forward(latent, timestep, text)

    model = Given()
    compiled = compile_broken(model, residual_diff_threshold=10.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in walk(0):
            other = {"it": Within().own}
            assert torch.equal(compiled(**step, other=other)[0], model(**step, other=other)[0])
