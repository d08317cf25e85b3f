"""Who a call belongs to, where the graph does not say it plainly. Oracles: the model itself, and counted hits."""

from __future__ import annotations

import contextlib
import copy
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.cache_utils import CacheMixin
from torch import Tensor, nn

import fx_cache
from tests.running import compile_cached, hits_of, schedule_on_a_device

A, B = False, True
"""Ways of computing, as a flag says."""

REUSING = {"compiler": "eager", "Fn_compute_blocks": 1, "max_warmup_steps": 1, "residual_diff_threshold": 10.0}

STEPS = 8
LAST = list(range(2, STEPS))
"""The steps that are reused where a request is known from its first call on: the second shows no direction yet."""


class Block(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.scale = nn.Linear(width, width)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        h = self.norm(x) * (1 + self.scale(e)[:, None])
        x = x + self.out(F.scaled_dot_product_attention(*self.qkv(h).chunk(3, -1)))
        return x + self.mlp(self.norm(x))


class Dit(nn.Module):
    """Text, latent and, if there is one, a picture of the latent's shape in one sequence."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch, self.patch2, self.text = nn.Linear(16, width), nn.Linear(16, width), nn.Linear(24, width)
        self.time, self.pool = nn.Linear(width, width), nn.Linear(8, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(4))
        self.last = nn.Linear(width, 16)
        self.requires_grad_(False)

    def embedded(self, t: Tensor) -> Tensor:
        frequencies = torch.exp(-torch.arange(16) / 4.0)
        return self.time(torch.cat([torch.sin(t[:, None] * frequencies), torch.cos(t[:, None] * frequencies)], -1))

    def begin(self, latent: Tensor, t: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """What goes through the blocks, and the embedding of the time."""
        return torch.cat([self.text(text), self.patch(latent)], 1), self.embedded(t)

    def added(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        """What the first block makes, and what the others add to that."""
        x, e = self.begin(*inputs)
        first = x = self.blocks[0](x, e)
        for block in self.blocks[1:]:
            x = block(x, e)
        return first, x - first

    def forward(
        self, latent: Tensor, t: Any, text: Tensor, reference: Tensor | None = None, pooled: Tensor | None = None
    ) -> Tensor:
        e = self.embedded(t)
        if pooled is not None:
            e = e + self.pool(pooled)
        pictures = [self.patch(latent)] + ([] if reference is None else [self.patch2(reference)])
        x = torch.cat([self.text(text), *pictures], 1)
        for block in self.blocks:
            x = block(x, e)
        return self.last(x[:, text.shape[1] :])


class TypeAs(Dit):
    def forward(self, latent: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return super().forward(latent, t.type_as(latent), text)


class NewOnes(Dit):
    def forward(self, latent: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return super().forward(latent, latent.new_ones(latent.shape[0]) * t, text)


class OnesLike(Dit):
    def forward(self, latent: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return super().forward(latent, (torch.ones_like(latent) * t)[:, 0, 0], text)


class Looked(Dit):
    """The timestep chooses a row of a table: no sinusoid."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(1000, 32).requires_grad_(False)

    def embedded(self, t: Tensor) -> Tensor:
        return self.table(t)


class Straight(Dit):
    """The timestep goes straight into a linear layer."""

    def embedded(self, t: Tensor) -> Tensor:
        return self.time((t.float() / 1000)[:, None].expand(-1, 32))


class EachToken(Dit):
    """A timestep for each of 100 tokens, through no sinusoid."""

    def embedded(self, t: Tensor) -> Tensor:
        return self.time((t.float() / 1000).mean(1, keepdim=True).expand(-1, 32))


class PythonTime(Dit):
    def forward(self, latent: Tensor, t: int, text: Tensor) -> Tensor:
        return super().forward(latent, torch.full((latent.shape[0],), t / 1000), text)


class Masking(Dit):
    """Writes to its prompt."""

    def forward(self, latent: Tensor, t: Tensor, text: Tensor) -> Tensor:
        text[:, 5:] = 0
        return super().forward(latent, t, text)


def random(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator)


def sampled(compiled: nn.Module, t_of: Callable[[int], Any], r: Callable[..., Tensor]) -> None:
    """A request of a prompt and noise of its own."""
    x, text = r(1, 16, 16), r(1, 7, 24)
    for i in range(STEPS):
        x = x + 0.05 * compiled(x, t_of(i), text)


def falling(i: int) -> Tensor:
    return torch.tensor([0.9 - 0.05 * i])


@pytest.mark.parametrize(
    ("model", "t_of", "hits"),
    [
        (Dit, falling, [LAST, LAST]),
        (TypeAs, lambda i: falling(i).double(), [LAST, LAST]),
        (NewOnes, lambda i: falling(i)[0], [LAST, LAST]),
        (OnesLike, falling, [LAST, LAST]),
        (Masking, falling, [LAST, LAST]),
        # Its first call is specialised on the number, and so another program.
        (PythonTime, lambda i: 900 - 20 * i, [LAST[:-1], LAST]),
        # Two steps behind the first show what tells the time: there the request begins.
        (Looked, lambda i: torch.tensor([900 - 20 * i]), [LAST[:-2], LAST]),
        (Straight, lambda i: torch.tensor([900 - 20 * i]), [LAST[:-2], LAST]),
        (EachToken, lambda i: torch.full((1, 100), 900.0 - 20 * i), [LAST[:-2], LAST]),
    ],
)
def test_the_latent_is_denoised_and_the_timestep_tells_the_time(
    model: type[Dit], t_of: Callable[[int], Any], hits: list[list[int]]
) -> None:
    compiled, r = compile_cached(model(), residual_diff_threshold=10.0), random(1)
    for _ in hits:
        sampled(compiled, t_of, r)
    assert hits_of(compiled) == hits


@pytest.mark.parametrize("times", [(0.5, 0.9), (0.9, 0.5), (0.9, 0.9)])
@pytest.mark.parametrize("batches", [(), (1, 1), (1, 2)])
@pytest.mark.parametrize("threshold", [0.24, 2.0])
def test_given_up_at_its_first_call(times: tuple[float, float], batches: tuple[int, ...], threshold: float) -> None:
    """Then another one with its prompt object: its first step is the model's own, whatever was before."""
    model, r = Dit(), random(9)
    compiled = compile_cached(model, residual_diff_threshold=threshold)
    for batch in batches:
        text, x = r(batch, 7, 24), r(batch, 16, 16)
        for i in range(6):
            compiled(x + 0.05 * i, torch.full((batch,), 0.9 - 0.05 * i), text)
    text, given_up, noise = r(1, 7, 24), r(1, 16, 16), r(1, 16, 16)
    compiled(given_up, torch.tensor([times[0]]), text)
    for x in (noise, given_up + 0.3 * noise):
        assert torch.equal(compiled(x, torch.tensor([times[1]]), text), model(x, torch.tensor([times[1]]), text))
        fx_cache.reset(compiled)
        compiled(given_up, torch.tensor([times[0]]), text)


@pytest.mark.parametrize(
    "options",
    [
        {"residual_diff_threshold": 2.0},
        {"steps_computation_mask": (1, 1, *[0] * 20), "steps_computation_policy": "static"},
    ],
)
@pytest.mark.parametrize("begins", [0.45, 0.3])
@pytest.mark.parametrize("noisy", [1.0, 0.5])
def test_a_second_sampler_below_the_first(options: dict[str, Any], begins: float, noisy: float) -> None:
    """On one prompt, with a latent that is another one, or the last one with noise added."""
    model, r = Dit(), random(3)
    compiled, text, x = compile_cached(model, **options), r(1, 7, 24), r(1, 16, 16)
    for i in range(5):
        x = x - 0.05 * compiled(x, torch.tensor([0.7 - 0.05 * i]), text)
    assert hits_of(compiled)
    x = (1 - noisy) * x + noisy * r(1, 16, 16)
    alone = compile_cached(copy.deepcopy(model), **options)
    for i in range(5):
        t = torch.tensor([begins - 0.05 * i])
        expected = alone(x, t, text)
        assert torch.equal(compiled(x, t, text), expected), i
        x = x - 0.05 * expected
    assert hits_of(alone)


@pytest.mark.parametrize("name", [None, "request"])
@pytest.mark.parametrize("passes", [2, 3])
@pytest.mark.parametrize("pooled", [False, True])
def test_passes_of_a_model_that_edits(name: str | None, passes: int, pooled: bool) -> None:
    """The graph does not show which picture is denoised. No pass goes on with what another one computed."""
    model, r = Dit(), random(1)
    options = {"residual_diff_threshold": 2.0}
    compiled, x, reference = compile_cached(model, **options), r(1, 16, 16), r(1, 16, 16)
    prompts = [(r(1, 7, 24), r(1, 8) if pooled else None) for _ in range(passes)]
    walks: list[list[tuple[Any, ...]]] = [[] for _ in prompts]
    outputs: list[list[Tensor]] = [[] for _ in prompts]
    for i in range(7):
        t = torch.tensor([0.9 - 0.05 * i])
        for k, (text, pool) in enumerate(prompts):
            args = (x, t, text, reference, pool)
            walks[k].append(args)
            if name is None:
                outputs[k].append(compiled(*args).clone())
            else:
                with fx_cache.session(name):
                    outputs[k].append(compiled(*args).clone())
        x = x - 0.05 * outputs[0][-1][:, :16]
    assert len(hits_of(compiled)) == passes
    for calls, got in zip(walks, outputs, strict=True):
        for i, (args, output) in enumerate(zip(calls, got, strict=True)):
            computed = [j for j in range(i) if torch.equal(got[j], model(*calls[j]))]
            assert torch.equal(output, model(*args)) or any(
                torch.allclose(output, reused(model, args, calls[j]), atol=1e-5) for j in computed
            ), i


def reused(model: Dit, now: tuple[Any, ...], then: tuple[Any, ...]) -> Tensor:
    """The rule in plain Python: the first block, and what the others added at an earlier call of the pass."""
    begin, then_embedded = behind(model, then)
    first, _ = behind(model, now)
    end = begin
    for block in model.blocks[1:]:
        end = block(end, then_embedded)
    return model.last((first + (end - begin))[:, now[2].shape[1] :])


def behind(model: Dit, given: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """The stream behind the first block, and the embedding."""
    latent, t, text, reference, pooled = given
    e = model.embedded(t)
    e = e if pooled is None else e + model.pool(pooled)
    x = torch.cat([model.text(text), model.patch(latent), model.patch2(reference)], 1)
    return model.blocks[0](x, e), e


def test_windows_of_one_time_in_a_session() -> None:
    model, r = Dit(), random(5)
    compiled, text = compile_cached(model, residual_diff_threshold=2.0, max_warmup_steps=0), r(1, 7, 24)
    windows = [r(1, 16, 16) for _ in range(3)]
    with fx_cache.session("video"):
        for i in range(5):
            for k, x in enumerate(windows):
                t = torch.tensor([0.9 - 0.05 * i])
                output = compiled(x, t, text)
                assert torch.equal(output, model(x, t, text)), (i, k)
                windows[k] = x - 0.05 * output
    for i in range(5):
        for k, x in enumerate(windows):
            with fx_cache.session("video", branch=f"window-{k}"):
                windows[k] = x - 0.05 * compiled(x, torch.tensor([0.9 - 0.05 * i]), text)
    assert hits_of(compiled) == [[1, 2, 3, 4]] * 3


def test_what_is_configured_ends_with_the_compilation() -> None:
    model, options = Dit(), {"residual_diff_threshold": 0.0}
    compiled, r = compile_cached(model, **options), random(1)
    sampled(compiled, falling, r)
    fx_cache.configure(model, residual_diff_threshold=10.0)
    sampled(compiled, falling, r)
    assert hits_of(compiled) == [LAST]
    beside = compile_cached(model, **options)
    sampled(beside, falling, r)
    assert hits_of(model) == [LAST], "options say that nothing is reused"
    del compiled, beside
    torch._dynamo.reset()
    again = compile_cached(model, **options)
    sampled(again, falling, r)
    assert not hits_of(again)
    handle = fx_cache.enable(model, compiler="eager", Fn_compute_blocks=1, max_warmup_steps=1, **options)
    sampled(model, falling, r)
    handle.configure(residual_diff_threshold=10.0)
    sampled(model, falling, r)
    handle.disable()
    assert handle.summary().sessions
    handle = fx_cache.enable(model, compiler="eager", Fn_compute_blocks=1, max_warmup_steps=1, **options)
    sampled(model, falling, r)
    assert all(not b["spans"][0]["hits"] for s in handle.summary().sessions for b in s["branches"])


def test_no_schedule_is_told() -> None:
    r = random(1)
    found = fx_cache.explain(compile_cached(Straight()), r(1, 16, 16), torch.tensor([900]), r(1, 7, 24))
    assert "schedule: none seen" in str(found)


class Guided(Dit):
    """Beside the time a guidance scale goes through the same sinusoid, and a float through none."""

    def forward(self, latent: Tensor, t: Tensor, text: Tensor, guidance: Tensor, scale: Any = 1.0) -> Tensor:
        e = self.embedded(t) + self.embedded(guidance) + scale * self.embedded(0.1 * t)
        x = torch.cat([self.text(text), self.patch(latent)], 1)
        for block in self.blocks:
            x = block(x, e)
        return self.last(x[:, text.shape[1] :])


@pytest.mark.parametrize("threshold", [0.9, 10.0])
@pytest.mark.parametrize("name", [None, "request"])
@pytest.mark.parametrize(
    "passes",
    [
        [(3.5, 1.0), (1.0, 1.0)],
        [(1.0, 1.0), (3.0, 1.0), (5.0, 1.0)],
        [(3.5, 1.0), (3.5, 0.3)],
        [(3.5, 0.2), (3.5, 0.4), (3.5, 0.6), (3.5, 0.8)],
    ],
)
def test_passes_that_differ_in_a_number_alone(passes: list, name: str | None, threshold: float) -> None:
    """One prompt, one latent, one timestep: guidance, or a float, that moves is no step. All compute."""
    model = Guided().eval()
    compiled = compile_cached(model, residual_diff_threshold=threshold, max_warmup_steps=1)
    text, x = torch.randn(1, 6, 24), torch.randn(1, 32, 16)
    with pytest.warns(fx_cache.CacheWarning, match="name it and its passes|name the request and its branch"):
        for i in range(STEPS):
            t, outputs = torch.tensor([0.9 - 0.1 * i]), []
            for guidance, scale in passes:
                inputs = x, t, text, torch.tensor([guidance]), torch.tensor(scale)
                with fx_cache.session(name) if name else contextlib.nullcontext():
                    outputs.append(compiled(*inputs))
                assert torch.equal(outputs[-1], model(*inputs))
            x = x - 0.1 * outputs[0]


class Boxed(Dit):
    """Boxes are embedded as the time is."""

    def forward(self, latent: Tensor, t: Tensor, text: Tensor, boxes: Tensor, mask: Tensor) -> Tensor:
        e = self.embedded(t) + self.embedded(boxes.flatten()).mean(0, keepdim=True)
        words = self.text(text) * mask[None, :, None] + self.embedded(boxes.flatten())[None]
        x = torch.cat([words, self.patch(latent)], 1)
        for block in self.blocks:
            x = block(x, e)
        return self.last(x[:, text.shape[1] :])


@pytest.mark.parametrize("name", [None, "request"])
@pytest.mark.parametrize("changed", ["boxes", "mask"])
def test_numbers_that_change_places_on_the_way(changed: str, name: str | None) -> None:
    """The least and the largest stay: what is embedded as a time, or looks like one, is known by all of it."""
    model = Boxed().eval()
    compiled = compile_cached(model, residual_diff_threshold=10.0, max_warmup_steps=1)
    given = {"boxes": torch.linspace(0.0, 1.0, 6), "mask": torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 0.0])}
    text, x = torch.randn(1, 6, 24), torch.randn(1, 32, 16)
    hits = []
    for i in range(STEPS):
        if i == 4:
            given[changed] = given[changed].flip(0)
        inputs = x, torch.tensor([0.9 - 0.1 * i]), text, given["boxes"], given["mask"]
        with fx_cache.session(name) if name else contextlib.nullcontext():
            output = compiled(*inputs)
        hits += [] if torch.equal(output, model(*inputs)) else [i]
        x = x - 0.1 * output
    assert 3 in hits and 4 not in hits
    # Boxes are embedded as a time is: now either may be the time.
    assert (7 in hits) == (changed == "mask")


class Placed(Dit):
    """A window of a video, told apart by where it begins.

    The time goes through sinusoids, if need be scaled by Python, a table or straight into a linear layer, or the caller
    embeds it.
    """

    def __init__(self, time: str, broken: bool, embedded: bool = False) -> None:
        super().__init__()
        self.place, self.table, self.embeds_place = nn.Linear(1, 32), nn.Embedding(1000, 32), embedded
        self.straight, self.given = nn.Linear(1, 32), nn.Linear(128, 32)
        self.requires_grad_(False)
        self.kind, self.broken = time, broken

    def begin(self, latent: Tensor, t: Tensor, text: Tensor, offset: Any) -> tuple[Tensor, Tensor]:
        if self.kind in ("sinusoids", "scaled", "turned"):
            e = self.embedded(t if self.kind == "sinusoids" else scaled(t) if self.kind == "scaled" else turned(t))
        elif self.kind == "table":
            e = self.table(t)
        else:
            e = self.straight(t[:, None]) if self.kind == "straight" else self.given(t.flatten(1)[:, -128:])
        offset = offset.float() if isinstance(offset, Tensor) else torch.ones(()) * offset
        if self.embeds_place:
            e = e + self.embedded(offset.reshape(1))
        return torch.cat([self.text(text), self.patch(latent) + self.place(offset.reshape(1, 1, 1) / 8)], 1), e

    def forward(self, latent: Tensor, t: Tensor, text: Tensor, offset: Any) -> Tensor:
        x, e = self.begin(latent, t, text, offset)
        for block in self.blocks:
            if self.broken:
                torch._dynamo.graph_break()
            x = block(x, e)
        return self.last(x[:, 6:])


@torch.compiler.disable
def scaled(t: Tensor) -> Tensor:
    return 8 * t


@torch.compiler.disable
def turned(t: Tensor) -> Tensor:
    return 1 - t


def time_of(kind: str, i: int) -> Tensor:
    """The time of a step as a kind of `Placed` takes it."""
    if kind in ("given", "modulated", "rows"):
        angles = torch.exp(-torch.arange(64) / 8.0) * (900 - 100 * i)
        given = torch.cat([angles.sin(), angles.cos()])[None]
        return given if kind == "given" else given[:, None].repeat(1, 6 if kind == "rows" else 1, 1)
    return torch.tensor([900 - 100 * i]) if kind == "table" else torch.tensor([0.9 - 0.1 * i])


PLACES: dict[str, Callable[[int], Any]] = {
    "int": lambda k: 2 * k,
    "float": lambda k: 2.0 * k + 0.5,
    "tensor": lambda k: torch.tensor(2.0 * k),
    "each": lambda k: torch.tensor([2.0 * k]),
    "each int": lambda k: torch.tensor([2 * k]),
}


@pytest.mark.singly
@pytest.mark.filterwarnings("ignore::fx_cache.CacheWarning")
@pytest.mark.parametrize(
    ("count", "alike", "name"), [(3, 0.4, None), (12, 0.4, "video"), (12, 0.01, "video"), (4, 0.1, None)]
)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("time", "broken"),
    [
        *itertools.product(["sinusoids", "table", "straight", "given", "modulated", "rows"], [False, True]),
        ("scaled", True),
    ],
)
def test_windows_that_look_alike(
    time: str, broken: bool, place: str, count: int, alike: float, name: str | None
) -> None:
    """Where they begin rises from window to window at one timestep. What a window reuses is its own, or it computes."""
    model = Placed(time, broken).eval()
    windows = Windows(model, count, alike)
    windows.walk(4, time, PLACES[place], name)
    for i in range(6):
        for k, x in enumerate(windows.latents):
            with fx_cache.session("by name", branch=f"window {k}"):
                windows.latents[k] = x - 0.1 * windows.call(k, x, time_of(time, i), windows.text, PLACES[place](k))
    # Over several graphs an embedding that the caller makes is not known to be the time's.
    assert windows.hits or (broken and time in ("given", "modulated", "rows")), "with names they do hit"


class Windows:
    """Windows of one video, called one after another at each timestep. What one reuses is its own, or it computes."""

    def __init__(self, model: Placed, count: int, alike: float) -> None:
        with torch._dynamo.config.patch(recompile_limit=64):
            self.compiled = torch.compile(model, backend="dit_cache", options=REUSING)
        self.model, self.hits = model, 0
        base = torch.randn(1, 32, 16)
        self.latents = [0.9 * base + alike * torch.randn(1, 32, 16) for _ in range(count)]
        self.residuals: dict[int, Tensor] = {}
        self.text = torch.randn(1, 6, 24)

    def walk(self, steps: int, time: str, place: Callable[[int], Any], name: str | None, slide: int = 0) -> None:
        """A request, with Euler's steps; the windows slide from step to step."""
        for i in range(steps):
            for k, x in enumerate(self.latents):
                inputs = x, time_of(time, i), self.text, place(k + slide * i)
                with fx_cache.session(name) if name else contextlib.nullcontext():
                    self.latents[k] = x - 0.1 * self.call(k, *inputs)

    def call(self, k: int, *inputs: Any) -> Tensor:
        """A call, held against the rule in plain Python."""
        with torch._dynamo.config.patch(recompile_limit=64):
            output = self.compiled(*inputs)
        h, e = self.model.begin(*inputs)
        first = last = self.model.blocks[0](h, e)
        for block in self.model.blocks[1:]:
            last = block(last, e)
        if torch.equal(output, self.model(*inputs)):
            self.residuals[k] = last - first
        else:
            self.hits += 1
            assert torch.allclose(output, self.model.last((first + self.residuals[k])[:, 6:]), atol=1e-5)
        return output


@pytest.mark.filterwarnings("ignore::fx_cache.CacheWarning")
@pytest.mark.parametrize("name", [None, "video"])
@pytest.mark.parametrize("alike", [0.4, 0.1, 0.01])
@pytest.mark.parametrize(("time", "broken"), [("sinusoids", False), ("sinusoids", True), ("scaled", True)])
def test_windows_numbered_by_what_is_embedded(time: str, broken: bool, alike: float, name: str | None) -> None:
    """As the time is: which of the two tells it, only the latents show."""
    windows = Windows(Placed(time, broken, embedded=True).eval(), 4, alike)
    windows.walk(6, time, PLACES["each"], name)
    windows.latents, windows.text, before = windows.latents[:1], torch.randn(1, 6, 24), windows.hits
    windows.walk(6, time, PLACES["each"], name and f"{name} alone")
    assert windows.hits > before, "one window alone does hit"


@pytest.mark.filterwarnings("ignore::fx_cache.CacheWarning")
@pytest.mark.parametrize(("name", "branch"), [(None, False), ("request", False), ("request", True)])
@pytest.mark.parametrize("broken", [False, True])
def test_passes_whose_embedded_guidance_differs(broken: bool, name: str | None, branch: bool) -> None:
    """Each has a prompt of its own, and the latent of the others: its guidance rests."""
    windows = Windows(Placed("sinusoids", broken, embedded=True).eval(), 1, 0.4)
    (x,) = windows.latents
    for request in range(2):
        before, prompts = windows.hits, [torch.randn(1, 6, 24) for _ in range(2)]
        for i in range(STEPS):
            outputs = []
            for k, text in enumerate(prompts):
                told = {"branch": f"pass {k}"} if branch else {}
                with fx_cache.session(f"{name}-{request}", **told) if name else contextlib.nullcontext():
                    outputs.append(windows.call(k, x, time_of("sinusoids", i), text, torch.tensor([3.5 - 2 * k])))
            x = x - 0.1 * (2 * outputs[0] - outputs[1])
        assert windows.hits - before >= 2 * (STEPS - 4)
        x = torch.randn_like(x)


@pytest.mark.filterwarnings("ignore::fx_cache.CacheWarning")
@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("apart", [0.1, 2.0])
@pytest.mark.parametrize("name", [None, "video"])
def test_one_noise_and_numbers_that_are_embedded(apart: float, broken: bool, name: str | None) -> None:
    """Requests for several strengths of guidance, or windows, from one noise: their latents lie on one way, too."""
    windows = Windows(Placed("sinusoids", broken, embedded=True).eval(), 4, 0.0)
    windows.walk(8, "sinusoids", lambda k: torch.tensor([apart * k]), name)


class Unmasking(Dit):
    """Tokens are denoised, and each has a time of its own, which goes through a table."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.times = nn.Embedding(50, 16), nn.Embedding(1000, 32)
        self.requires_grad_(False)

    def forward(self, tokens: Tensor, t: Tensor, text: Tensor) -> Tensor:  # type: ignore[override]
        e = self.times(t).mean(1)
        x = torch.cat([self.text(text), self.patch(self.words(tokens))], 1)
        for block in self.blocks:
            x = block(x, e)
        return self.last(x[:, text.shape[1] :])


@pytest.mark.filterwarnings("ignore::fx_cache.CacheWarning")
@pytest.mark.parametrize("branch", [None, "only"])
@pytest.mark.parametrize("written", ["tokens", "times"])
def test_what_moves_in_place_in_inference_mode(written: str, branch: str | None) -> None:
    """It has no version there. Nothing made of it is kept, whoever names the request."""
    model = Unmasking().eval()
    compiled = compile_cached(model, residual_diff_threshold=0.0)
    with torch.inference_mode():
        tokens, t, text = torch.randint(0, 50, (1, 100)), torch.full((1, 100), 900), torch.randn(1, 6, 24)
        for _ in range(4):
            with fx_cache.session("request", branch=branch):
                assert torch.equal(compiled(tokens, t, text), model(tokens, t, text))
            if written == "tokens":
                tokens[:, torch.randperm(100)[:20]] = torch.randint(0, 50, (20,))
            else:
                t -= 100


class TimeOfEachToken(Dit):
    """Denoises floats; the time of each token goes through a table, and guidance, if any, is embedded as a time is."""

    def __init__(self) -> None:
        super().__init__()
        self.times = nn.Embedding(1000, 32)
        self.deep = nn.Sequential(*(nn.Linear(32, 32) for _ in range(40)))
        self.requires_grad_(False)

    def forward(self, latent: Tensor, t: Tensor, text: Tensor, guidance: Any = None) -> Tensor:
        e = self.deep(self.times(t)).mean(1)
        if guidance is not None:
            e = e + self.embedded(guidance)
        x = torch.cat([self.text(text), self.patch(latent)], 1)
        for block in self.blocks:
            x = block(x, e)
        return self.last(x[:, text.shape[1] :])


@pytest.mark.filterwarnings("ignore::fx_cache.CacheWarning")
@pytest.mark.parametrize("guidance", [(), (torch.tensor([3.5]),)])
def test_a_time_that_is_learned_and_written_in_place_in_inference_mode(guidance: tuple[Tensor, ...]) -> None:
    """One request shows which input is the time; the next ones write to theirs. What is made of it is not kept."""
    model = TimeOfEachToken().eval()
    compiled = compile_cached(model, residual_diff_threshold=0.0)
    with torch.inference_mode():
        for request in range(3):
            x, t, text = torch.randn(1, 32, 16), torch.full((1, 100), 900), torch.randn(1, 6, 24)
            for _ in range(STEPS):
                with fx_cache.session(f"request {request}", branch="only"):
                    output = compiled(x, t, text, *guidance)
                assert torch.equal(output, model(x, t, text, *guidance))
                x = x - 0.05 * output
                t = t.sub_(20) if request else t - 20


class Timeless(Placed):
    """No time is given, nor anything made of it."""

    def forward(self, latent: Tensor, text: Tensor) -> Tensor:  # type: ignore[override]
        x, e = self.begin(latent, torch.ones(1), text, 2)
        for block in self.blocks:
            if self.broken:
                torch._dynamo.graph_break()
            x = block(x, e)
        return self.last(x[:, 6:])


@pytest.mark.filterwarnings("ignore::fx_cache.CacheWarning")
@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize(("name", "count"), [("video", 1), ("video", 3), (None, 1)])
@pytest.mark.parametrize("alike", [0.4, 0.1, 0.01])
def test_without_a_time(alike: float, name: str | None, count: int, broken: bool) -> None:
    """A request that is named goes on where its latent does; that of another window does not."""
    model = Timeless("sinusoids", broken).eval()
    compiled = torch.compile(model, backend="dit_cache", options=REUSING)
    text, base = torch.randn(1, 6, 24), torch.randn(1, 32, 16)
    latents, hits = [0.9 * base + alike * torch.randn(1, 32, 16) for _ in range(count)], 0
    for _ in range(STEPS):
        for k, x in enumerate(latents):
            with fx_cache.session(name) if name else contextlib.nullcontext():
                output = compiled(x, text)
            hits += not torch.equal(output, model(x, text))
            latents[k] = x - 0.1 * output
    assert bool(hits) == (name is not None and count == 1)


@pytest.mark.filterwarnings("ignore::fx_cache.CacheWarning")
@pytest.mark.parametrize("broken", [False, True])
def test_steps_that_are_counted_begin_a_request(broken: bool) -> None:
    """Its prompt is made anew at every step. A longer request of the same name reuses nothing of the one before."""
    model, hits = Timeless("sinusoids", broken).eval(), []
    compiled = torch.compile(model, backend="dit_cache", options=REUSING)
    text = torch.randn(1, 6, 24)
    for steps in (4, 8):
        x, own = torch.randn(1, 32, 16), None
        for i in range(steps):
            with fx_cache.session("request", step=i):
                output = compiled(x, text.clone())
            h, e = model.begin(x, torch.ones(1), text, 2)
            first = last = model.blocks[0](h, e)
            for block in model.blocks[1:]:
                last = block(last, e)
            if torch.equal(output, model(x, text)):
                own = last - first
            else:
                assert own is not None
                torch.testing.assert_close(output, model.last((first + own)[:, 6:]))
                hits.append((steps, i))
            x = x - 0.1 * output
    assert (8, 7) in hits


@pytest.mark.filterwarnings("ignore::fx_cache.CacheWarning")
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("alike", [0.0, 0.4])
@pytest.mark.parametrize(("model", "kind"), [(PythonTime, int), (PythonTime, float), (Looked, torch.tensor)])
def test_given_up_and_begun_again_while_the_time_becomes_known(
    model: type[Dit], kind: Callable[[Any], Any], alike: float, passes: int
) -> None:
    """By a second program, or by what is learned: in the middle of a named request, whose name then begins afresh."""
    dit, noise, texts, hits = model().eval(), torch.randn(1, 16, 16), torch.randn(passes, 1, 7, 24).unbind(), 0
    for given_up in (1, 2, 3, 4):
        torch._dynamo.reset()
        compiled = torch.compile(dit, backend="dit_cache", options=REUSING)
        for steps in (given_up, STEPS):
            x, own = noise + alike * torch.randn(noise.shape), {}
            for i, p in itertools.product(range(steps), range(passes)):
                time, text = 900 - 50 * i, texts[p]
                t = kind([time]) if kind is torch.tensor else kind(time)
                with fx_cache.session("request"):
                    output = compiled(x, t, text)
                first, added = dit.added(x, torch.tensor([time / 1000 if model is PythonTime else time]), text)
                if torch.equal(output, dit(x, t, text)):
                    own[p] = added
                else:
                    assert p in own, f"given up behind {given_up}: step {i} of the next one reuses"
                    torch.testing.assert_close(output, dit.last((first + own[p])[:, 7:]))
                    hits += 1
                x = x - 0.1 / passes * output if p == passes - 1 else x
    assert hits


class Otherwise(Dit):
    """Computes in two ways, as a flag says."""

    def __init__(self, broken: bool = False) -> None:
        super().__init__()
        self.broken = broken

    def begin(self, latent: Tensor, t: Tensor | None, text: Tensor, late: bool) -> tuple[Tensor, Tensor]:
        x = torch.cat([self.text(text), self.patch(latent)], 1)
        return x * 1.01 if late else x, torch.ones(1, 32) if t is None else self.embedded(t)

    def forward(self, latent: Tensor, t: Tensor | None, text: Tensor, late: bool) -> Tensor:
        x, e = self.begin(latent, t, text, late)
        for block in self.blocks:
            if self.broken:
                torch._dynamo.graph_break()
            x = block(x, e)
        return self.last(x[:, text.shape[1] :])


@pytest.mark.parametrize("broken", [False, True])
def test_a_request_that_begins_one_way_begins_the_other_way_too(broken: bool) -> None:
    """One is given up where it computes the other way; the next one, of one prompt and seed, gets there later."""
    model, text, noise = Otherwise(broken).eval(), torch.randn(1, 7, 24), torch.randn(1, 16, 16)
    compiled, found = torch.compile(model, backend="dit_cache", options=REUSING), []
    for steps, late_from in ((5, 0), (STEPS, 5)):
        x = noise
        for i in range(steps):
            t, late = torch.tensor([0.9 - 0.05 * i]), i >= late_from
            output = compiled(x, t, text, late)
            found.append(not torch.equal(output, model(x, t, text, late)))
            x = x - 0.1 * output
    assert found[5:] == [False, False, True, True, True, False, False, True]
    assert found[4]


@pytest.mark.parametrize("anew", [False, True])
@pytest.mark.parametrize("branch", ["only", None])
@pytest.mark.parametrize("flags", [0, 4, 8])
def test_the_number_of_steps_is_that_of_a_pass_whatever_computes_it(flags: int, branch: str | None, anew: bool) -> None:
    """No time is given: that a request is over shows by how many calls it had, here of two programs.

    Without a branch, requests go on with one picture, and have one prompt.
    """
    model, x, text = Otherwise().eval(), torch.randn(1, 16, 16), torch.randn(1, 7, 24)
    compiled, found = torch.compile(model, backend="dit_cache", options=REUSING), []
    for _ in range(3):
        x, text = (torch.randn(1, 16, 16), torch.randn(1, 7, 24)) if branch else (x, text)
        for i in range(STEPS):
            with fx_cache.session("request", branch, num_inference_steps=STEPS):
                output = compiled(x, None, text.clone() if anew else text, i >= flags)
            found.append(not torch.equal(output, model(x, None, text, i >= flags)))
            x = x - 0.1 * output
    # Without a branch the first move is no evidence.
    computed = {0, flags} if branch else {0, 1, flags, flags + 1}
    assert found == [i not in computed for i in range(STEPS)] * 3


@pytest.mark.parametrize("branch", ["only", None])
def test_programs_that_take_turns_without_a_time(branch: str | None) -> None:
    """Each goes on with its own where the pass is named; else its request may have ended in the other one."""
    model, x, text = Otherwise().eval(), torch.randn(1, 16, 16), torch.randn(1, 7, 24)
    compiled, found = torch.compile(model, backend="dit_cache", options=REUSING), []
    for i in range(STEPS):
        inputs = x, None, text, bool(i % 2)
        with fx_cache.session("request", branch):
            output = compiled(*inputs)
        found.append(not torch.equal(output, model(*inputs)))
        x = x - 0.1 * output
    assert found == [i > 3 and branch is not None for i in range(STEPS)]  # one move of each is no evidence


def _computed(requests: Sequence[Sequence[int]], late: int, anew: bool) -> list[bool]:
    """Which calls of a pass compute whose requests are known to have `STEPS` steps; for each its number of tokens.

    A call may begin a request where the shape becomes another one, and `STEPS` calls, or twice as many, after that. If
    those are of one program, and conditioning is another one at their begin and end and not between, it does begin one.
    """
    begins, computed = {0}, []
    cached: set[bool] = set()  # the programs that have computed since
    given: dict[bool, int] = {}  # of each in this shape, the request whose conditioning it had last
    calls = [(r, i, tokens) for r, request in enumerate(requests) for i, tokens in enumerate(request)]
    before, renewed = (requests[0][0], False), -STEPS - 1
    for n, (r, i, tokens) in enumerate(calls):
        now = tokens, tokens == 16 and i >= late
        if tokens != before[0]:
            begins.add(n % STEPS)
            given = {}
        renewed = renewed if now == before else -STEPS - 1
        if anew or given.get(now[1]) != r:
            if n % STEPS in begins and n and renewed == n - STEPS:
                begins = {n % STEPS}
            renewed = n
        if n % STEPS in begins:
            cached = set()
        computed.append(now[1] not in cached)
        cached.add(now[1])
        given[now[1]], before = r, now
    return computed


@pytest.mark.filterwarnings("ignore::fx_cache.CacheWarning")
@pytest.mark.parametrize("anew", [False, True])
@pytest.mark.parametrize("late", [STEPS, 3])
@pytest.mark.parametrize(
    "requests",
    [
        ([16] * STEPS, [16] * 5, [24] * STEPS, [24] * STEPS),  # the second one is given up
        ([16] * STEPS, [24] * STEPS, [16] * STEPS),
        ([16] * 4 + [24] * 4, [24] * STEPS, [24] * STEPS),  # the first one goes on
        ([16] * 4 + [24] * 4, [16] * 4 + [24] * 4),
        ([16] * 3, [24] * 4 + [16] * 4, [24] * STEPS, [24] * STEPS),
        ([16] * 4 + [24] * 4, [24] * 4 + [16] * 4, [16] * STEPS, [16] * STEPS),
        (*([16 + 8 * (k % 2)] * (k + 1) for k in range(7)), *[[24] * STEPS] * 4),
    ],
)
def test_steps_are_counted_in_another_shape(requests: Sequence[Sequence[int]], late: int, anew: bool) -> None:
    """No time is given: whether a request was given up where the shape changes, or goes on, cannot be told."""
    model = Otherwise().eval()
    compiled = torch.compile(model, backend="dit_cache", options=REUSING)
    found: dict[str, list[bool]] = {"cond": [], "uncond": []}
    for request in requests:
        latents = {name: torch.randn(1, 24, 16) for name in found}
        texts = {name: torch.randn(1, 7, 24) for name in found}
        for (i, tokens), (name, text) in itertools.product(enumerate(request), texts.items()):
            text = text.clone() if anew else text
            inputs = latents[name][:, :tokens].contiguous(), None, text, tokens == 16 and i >= late
            with fx_cache.session("request", name, num_inference_steps=STEPS):
                output = compiled(*inputs)
            found[name].append(torch.equal(output, model(*inputs)))
            latents[name] = torch.cat([latents[name][:, :tokens] - 0.1 * output, latents[name][:, tokens:]], 1)
    assert found == dict.fromkeys(found, _computed(requests, late, anew))


def test_another_number_of_steps_is_another_request() -> None:
    model, found = Otherwise().eval(), []
    compiled = torch.compile(model, backend="dit_cache", options=REUSING)
    for steps in (STEPS, 12, STEPS):
        x, text = torch.randn(1, 16, 16), torch.randn(1, 7, 24)
        for _ in range(steps):
            with fx_cache.session("request", "only", num_inference_steps=steps):
                output = compiled(x, None, text, False)
            found.append(torch.equal(output, model(x, None, text, False)))
            x = x - 0.1 * output
    assert [i for i, computed in enumerate(found) if computed] == [0, STEPS, STEPS + 12]


@pytest.mark.parametrize("forget", [fx_cache.reset, lambda: fx_cache.end("request")])
def test_steps_are_counted_anew_where_a_request_was_ended(forget: Callable[[], Any]) -> None:
    """Within `except` the frames of the call that failed still hold all that belonged to it."""

    class Failing(Otherwise):
        def forward(self, *inputs: Any) -> Tensor:
            return _maybe(super().forward(*inputs))

    model = Failing().eval()
    compiled = torch.compile(model, backend="dit_cache", options=REUSING)

    def request(fails_at: int | None = None) -> Iterator[bool]:
        x, text = torch.randn(1, 16, 16), torch.randn(1, 7, 24)
        for i in range(STEPS):
            _FAILS[:] = [True] * (i == fails_at)
            with fx_cache.session("request", "only", num_inference_steps=STEPS):
                output = compiled(x, None, text, False)
            yield torch.equal(output, model(x, None, text, False))
            x = x - 0.1 * output

    with pytest.raises(RuntimeError, match="on purpose"):
        list(request(fails_at=5))
    try:
        list(request(fails_at=5))
    except RuntimeError:
        _FAILS.clear()
        forget()
        for _ in range(2):
            assert list(request()) == [True] + [False] * (STEPS - 1)


_FAILS: list[bool] = []


@torch.library.custom_op("fx_cache_tests::maybe", mutates_args=())
def _maybe(x: Tensor) -> Tensor:
    if _FAILS:
        raise RuntimeError("on purpose")
    return x.clone()


@_maybe.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@pytest.mark.parametrize(
    "turns",
    [
        ([A, A, A, B, B], [A, A, A, A, A, B, B]),
        ([A, B, A, A], [B, B, B, B, A, A, A]),
        ([A, B, A, A, A], [B, B, B, B, B, A, A]),
        ([A, B, A, B, A], [B, B, B, B, B, A, A]),
    ],
)
@pytest.mark.parametrize("others", [0, 2])
@pytest.mark.parametrize("said", [True, False])
def test_programs_of_a_pass_that_is_heard_late(said: bool, others: int, turns: tuple[list[bool], ...]) -> None:
    """Nobody listens at a process's first call. Its request, of one seed and prompt with the next, is given up."""

    class Told(CacheMixin, Otherwise): ...

    model, text, noise = Told().eval(), torch.randn(1, 7, 24), torch.randn(1, 16, 16)
    compiled, own, hits = torch.compile(model, backend="dit_cache", options=REUSING), {}, 0
    before = torch.randn(1, 7, 24)
    for i in range(others):
        with model.cache_context("cond") if said else contextlib.nullcontext():
            compiled(torch.randn(1, 16, 16), torch.tensor([0.9 - 0.05 * i]), before, A)
    for request, flags in enumerate(turns):
        x = noise
        for i, late in enumerate(flags):
            inputs = x, torch.tensor([0.9 - 0.05 * i]), text, late
            with model.cache_context("cond") if said else contextlib.nullcontext():
                output = compiled(*inputs)
            first, added = model.added(*inputs)
            hits += not torch.equal(output, model(*inputs))
            if torch.equal(output, model(*inputs)):
                own[request, late] = added
            else:
                torch.testing.assert_close(output, model.last((first + own[request, late])[:, 7:]))
            x = x - 0.1 * output
    assert hits


class Deep(Dit):
    """What it makes of its prompt alone is worth keeping."""

    def __init__(self) -> None:
        super().__init__()
        self.deep = nn.Sequential(*(nn.Linear(24, 24) for _ in range(40))).requires_grad_(False)

    def forward(self, latent: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return super().forward(latent, t, self.deep(text))


@pytest.mark.filterwarnings("ignore::fx_cache.CacheWarning")
@pytest.mark.parametrize("on_a_device", [False, True])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("said", [{}, {"branch": "only"}, {"step": 0}, {"branch": "only", "step": 0}], ids=str)
def test_a_prompt_in_the_place_of_the_last_one_in_inference_mode(
    said: dict[str, Any], steps: int, on_a_device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is made of it is used by the request alone that it was made for, and where that is sure."""
    model = Deep().eval()
    compiled = compile_cached(model, residual_diff_threshold=0.0)
    if on_a_device:
        schedule_on_a_device(monkeypatch)
    with torch.inference_mode():
        text = torch.empty(1, 200, 24)
        for begins in (0.9, 0.9, 0.8, 0.3):
            text.normal_()
            x = torch.randn(1, 8, 16)
            for i in range(steps):
                t, named = torch.tensor([begins - 0.1 * i]), {**said, "step": i} if "step" in said else said
                with fx_cache.session("slot", **named):
                    output = compiled(x, t, text)
                assert torch.equal(output, model(x, t, text)), (begins, i)
                x = x - 0.1 * output
        kept = fx_cache.summary(compiled).to_dict()["sessions"][-1]["branches"][-1]["kept_bytes"]
    assert bool(kept) == ("step" in said or "branch" not in said)


FULL = [(0, 0.9 - 0.1 * i, A) for i in range(5)]
AGAIN = {
    "first call": [(0, 0.9, A)],
    "first call, otherwise": [(0, 0.9, B)],
    "on the way": [(0, 0.9, A), (0, 0.85, A), (0, 0.8, A), (1, 0.8, A), (1, 0.75, A)],
    "otherwise in between": [(0, 0.9, A), (0, 0.85, A), (0, 0.8, A), (1, 0.9, B), (2, 0.9, A), (2, 0.85, B)],
    "first calls at one time": [(0, 0.9, A), (0, 0.85, A), (1, 0.9, A), (2, 0.9, A)],
    "first calls, then back": [*FULL, (1, 0.7, A), (2, 0.7, A)],
    "first calls that rise": [*FULL, (1, 0.6, A), (2, 0.7, A), (3, 0.8, A)],
    "first calls that rise, two at one time": [*FULL, (1, 0.6, A), (2, 0.7, A), (3, 0.7, A), (4, 0.8, A)],
    "otherwise at the second call": [(0, 0.9, A), (0, 0.85, B), (1, 0.85, A), (1, 0.8, A)],
    "one that did not get so far": [
        *((0, t, t < 0.8) for t in (0.9, 0.85, 0.8, 0.75)),
        *((1, t, B) for t in (0.9, 0.85)),
        *((2, t, t < 0.8) for t in (0.9, 0.85, 0.8, 0.75)),
    ],
    "where it went on otherwise": [(0, 0.9, A), (0, 0.85, A), (0, 0.8, B), (1, 0.8, A), (1, 0.75, A)],
}
"""Requests of one name before the last one: number, time and flag of each call."""


@pytest.mark.filterwarnings("ignore::fx_cache.CacheWarning")
@pytest.mark.parametrize("anew", [False, True])
@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize(
    ("before", "branch"),
    # One prompt in rising calls is one request that rises.
    [*((k, None) for k in AGAIN if "rise" not in k), *((k, "only") for k in [*AGAIN][:-1])],
)
def test_a_name_that_is_used_again(before: str, branch: str | None, broken: bool, anew: bool) -> None:
    """Its requests have prompts that are equal, or with a branch their own, and latents that are alike."""
    model, noise, text, own = Otherwise(broken).eval(), torch.randn(1, 16, 16), torch.randn(1, 7, 24), {}
    compiled = torch.compile(model, backend="dit_cache", options=REUSING)
    last, found = AGAIN[before][-1][0] + 1, []
    texts = [text if branch is None else torch.randn(1, 7, 24) for _ in range(last + 1)]
    latents = [noise + 0.4 * torch.randn(noise.shape) for _ in range(last + 1)]
    for request, time, late in [*AGAIN[before], *((last, 0.9 - 0.05 * i, False) for i in range(STEPS))]:
        inputs = latents[request], torch.tensor([time]), texts[request], late
        with fx_cache.session("request", branch):
            output = compiled(*inputs[:2], inputs[2].clone() if anew else inputs[2], late)
        first, added = model.added(*inputs)
        found.append((request, not torch.equal(output, model(*inputs))))
        if found[-1][1]:
            assert request in own, f"first call of request {request}"
            torch.testing.assert_close(output, model.last((first + own[request])[:, 7:]))
        else:
            own[request] = added
        latents[request] = latents[request] - 0.1 * output
    # Over several graphs another prompt object may compute, in a branch that has a name.
    assert found[-1] == (last, True) or (broken and anew and branch)


def weights_change(model: Dit, compiled: Any) -> None:
    model.blocks[2].mlp[0].weight.mul_(1.01)


def others_come(model: Dit, compiled: Any) -> None:
    for k in range(3):
        with fx_cache.session(f"other {k}", "only"):
            compiled(torch.randn(1, 16, 16), torch.tensor([0.9]), torch.randn(1, 7, 24))


class Resting(Dit):
    """The time is not looked at."""

    def embedded(self, t: Tensor) -> Tensor:
        return super().embedded(torch.ones(1))


class Broken(Dit):
    def forward(self, latent: Tensor, t: Tensor, text: Tensor) -> Tensor:  # type: ignore[override]
        x, e = self.begin(latent, t, text)
        for block in self.blocks:
            torch._dynamo.graph_break()
            x = block(x, e)
        return self.last(x[:, text.shape[1] :])


class Failing(Resting):
    """Its first block may raise."""

    def embedded(self, t: Tensor) -> Tensor:
        return torch.ops.fx_cache_tests.may_raise(super().embedded(t))


_RAISES = [False]


@torch.library.custom_op("fx_cache_tests::may_raise", mutates_args=())
def _may_raise(x: Tensor) -> Tensor:
    if _RAISES[0]:
        raise RuntimeError("out of memory, say")
    return x.clone()


_may_raise.register_fake(torch.empty_like)


def as_from_nothing(model: Dit, call: Callable[..., Tensor], known: list[Tensor], *inputs: Tensor) -> bool:
    """Whether a call computed; else it reused what was added at one that is known."""
    output = call(*inputs)
    first, added = model.added(*inputs)
    if torch.equal(output, model(*inputs)):
        known.append(added)
        return True
    found = [(output - model.last((first + a)[:, 7:])).abs().max() for a in known]
    assert found
    assert min(found) < 1e-5
    return False


def weights_are_others(model: Dit, compiled: Any) -> None:
    """The old ones stay alive, as those of an adapter do."""
    model.kept = list(model.parameters())
    for module in model.modules():
        for name, weight in list(module._parameters.items()):
            module._parameters[name] = nn.Parameter(weight * 1.01, requires_grad=False)


FORGETS = [weights_change, weights_are_others, others_come]


def _used_again(
    forgets: Callable[[Dit, Any], None], kind: type[Dit], branch: str | None, more: int, *, rests: bool
) -> list[list[int]]:
    """The steps that three requests of one name reused; of the first one those before all was forgotten are known."""
    model, text = kind().eval(), torch.randn(1, 7, 24)
    compiled = torch.compile(model, backend="dit_cache", options={**REUSING, "max_sessions": 2})
    steps = STEPS if rests else None
    hits: list[list[int]] = []
    for request in range(3):
        x, known, reused = torch.randn(1, 16, 16), list[Tensor](), list[int]()
        for i in range(STEPS if request or rests else 3 + more):
            if request == 0 and i == 3:
                forgets(model, compiled)
                known.clear()
            inputs = x, torch.tensor([0.9 - (0.0 if rests else 0.05 * i)]), text
            with fx_cache.session("request", branch, num_inference_steps=steps):
                if not as_from_nothing(model, compiled, known, *inputs):
                    reused.append(i)
            x = x - 0.1 * model(*inputs)
        hits.append(reused)
    return hits


@pytest.mark.filterwarnings("ignore::fx_cache.CacheWarning")
@pytest.mark.parametrize("branch", [None, "only"])
@pytest.mark.parametrize("kind", [Dit, Broken])
@pytest.mark.parametrize("forgets", FORGETS)
@pytest.mark.parametrize("more", [1, 2, 5])
def test_a_name_that_is_used_again_behind_a_request_that_was_forgotten(
    more: int, forgets: Callable[[Dit, Any], None], kind: type[Dit], branch: str | None
) -> None:
    """It goes on for some calls, and is given up."""
    hits = _used_again(forgets, kind, branch, more, rests=False)
    assert 0 not in hits[1]
    assert hits[2] == list(range(1, STEPS))


@pytest.mark.filterwarnings("ignore::fx_cache.CacheWarning")
@pytest.mark.parametrize("kind", [Dit, Broken])
@pytest.mark.parametrize("forgets", FORGETS)
def test_a_request_that_was_forgotten_goes_on_for_one_call(
    forgets: Callable[[Dit, Any], None], kind: type[Dit]
) -> None:
    """Its pass has a name: no latent tells that the next call begins another request."""
    assert 0 not in _used_again(forgets, kind, "only", 1, rests=False)[1]


@pytest.mark.filterwarnings("ignore::fx_cache.CacheWarning")
@pytest.mark.parametrize("kind", [Dit, Resting])
@pytest.mark.parametrize("forgets", FORGETS)
def test_requests_are_counted_on_behind_one_that_was_forgotten(
    forgets: Callable[[Dit, Any], None], kind: type[Dit]
) -> None:
    """Nothing but the number of steps tells where one begins: there is no time, or all that is embedded rests."""
    hits = _used_again(forgets, kind, "only", STEPS - 3, rests=True)
    assert all(reused and 0 not in reused for reused in hits)


@pytest.mark.filterwarnings("ignore::fx_cache.CacheWarning")
@pytest.mark.parametrize("kind", [Dit, Resting])
def test_requests_are_counted_where_one_was_given_up_and_forgotten(kind: type[Dit]) -> None:
    """Its weights change before the next one begins. Which pass is called first is not always the same."""
    model, texts = kind().eval(), {"cond": torch.randn(1, 7, 24), "uncond": torch.randn(1, 7, 24)}
    compiled = torch.compile(model, backend="dit_cache", options=REUSING)
    for request, names in enumerate([("cond", "uncond"), ("cond", "uncond"), ("uncond", "cond"), ("cond", "uncond")]):
        x = torch.randn(1, 16, 16)
        known: dict[str, list[Tensor]] = {name: [] for name in names}
        for i in range(STEPS if request else 3):
            for name in names:
                with fx_cache.session("request", name, num_inference_steps=STEPS):
                    assert as_from_nothing(model, compiled, known[name], x, torch.tensor([0.9]), texts[name]) or i
            x = x - 0.1 * model(x, torch.tensor([0.9]), texts["cond"])
        if request == 0:
            weights_change(model, compiled)


@pytest.mark.filterwarnings("ignore::fx_cache.CacheWarning")
@pytest.mark.parametrize("kind", [Dit, Resting])
def test_requests_are_counted_on_where_inputs_get_another_shape(kind: type[Dit]) -> None:
    model, text = kind().eval(), torch.randn(1, 7, 24)
    compiled = torch.compile(model, backend="dit_cache", dynamic=True, options=REUSING)
    for request in range(3):
        x = torch.randn(1, 16 if request else 8, 16)
        known: list[Tensor] = []
        for i in range(STEPS):
            if request == 0 and i == 3:
                x = torch.randn(1, 16, 16)
                known.clear()
            with fx_cache.session("request", "only", num_inference_steps=STEPS):
                assert as_from_nothing(model, compiled, known, x, torch.tensor([0.9]), text) or i
            x = x - 0.1 * model(x, torch.tensor([0.9]), text)


@pytest.mark.filterwarnings("ignore::fx_cache.CacheWarning")
@pytest.mark.parametrize("again", [["only"], [], ["cond", "only"]])
def test_requests_are_counted_on_where_a_step_failed(again: list[str]) -> None:
    """And is tried again, or not; alone, or with the passes before it."""
    model, text = Failing().eval(), torch.randn(1, 7, 24)
    compiled = torch.compile(model, backend="dit_cache", options=REUSING)
    names = again if len(again) == 2 else ["only"]
    for request in range(3):
        x = torch.randn(1, 16, 16)
        known: dict[str, list[Tensor]] = {name: [] for name in names}
        hits = 0
        for i in range(STEPS):
            order = [*names, *again] if request == 0 and i == 3 else names
            for k, name in enumerate(order):
                _RAISES[0] = request == 0 and i == 3 and k == len(names) - 1
                raises = pytest.raises(RuntimeError) if _RAISES[0] else contextlib.nullcontext()
                with raises, fx_cache.session("request", name, num_inference_steps=STEPS):
                    try:
                        output = compiled(x, torch.tensor([0.9]), text)
                    finally:
                        _RAISES[0] = False
                    computed = as_from_nothing(model, lambda *_, o=output: o, known[name], x, torch.tensor([0.9]), text)
                    assert computed or i
                    hits += not computed
            x = x - 0.1 * model(x, torch.tensor([0.9]), text)
        assert hits


@pytest.mark.parametrize("policy", ["once", "repeat"])
@pytest.mark.parametrize("hint", [3, 4, 6])
@pytest.mark.parametrize("again", [("cond", "uncond"), ("uncond", "cond")])
def test_calls_are_counted_on_where_a_request_starts_afresh(again: tuple[str, str], hint: int, policy: str) -> None:
    """Nothing but the number of steps tells where a request begins; in later ones the passes come in another order."""
    model, texts = Resting().eval(), {"cond": torch.randn(1, 7, 24), "uncond": torch.randn(1, 7, 24)}
    options = {**REUSING, "force_refresh_step_hint": hint, "force_refresh_step_policy": policy}
    compiled = torch.compile(model, backend="dit_cache", options=options)
    for request in range(3):
        x, hits = torch.randn(1, 16, 16), 0
        for i in range(STEPS):
            for name in again if request else texts:
                inputs = x, torch.tensor([0.9]), texts[name]
                with fx_cache.session("request", name, num_inference_steps=STEPS):
                    output = compiled(*inputs)
                reused = not torch.equal(output, model(*inputs))
                assert i > 0 or not reused, (request, name)
                hits += reused
            x = x - 0.1 * output
        assert hits, request


@pytest.mark.parametrize("hint", [1, 2, 3])
def test_a_pass_that_starts_afresh_knows_where_it_is_in_time(hint: int) -> None:
    """The request is given up behind one more call of it; no pass has shown yet which way time goes."""
    model, texts = Dit().eval(), {"cond": torch.randn(1, 7, 24), "uncond": torch.randn(1, 7, 24)}
    compiled = torch.compile(model, backend="dit_cache", options={**REUSING, "force_refresh_step_hint": hint})
    for request, calls in enumerate([3, 2 * STEPS]):
        x = torch.randn(1, 16, 16)
        for i, name in itertools.islice(itertools.product(range(STEPS), texts), calls):
            inputs = x, torch.tensor([0.9 - 0.05 * i]), texts[name]
            with fx_cache.session("request", name):
                output = compiled(*inputs)
            assert i or torch.equal(output, model(*inputs)), (request, name)
            x = x - 0.1 * output if name == "uncond" else x


def test_a_name_that_is_used_again_by_a_model_that_edits() -> None:
    """It is not known yet which of its pictures is denoised."""
    model = Dit().eval()
    compiled = compile_cached(model, residual_diff_threshold=10.0)
    for _ in range(4):
        inputs = torch.randn(1, 16, 16), torch.tensor([0.9]), torch.randn(1, 7, 24), torch.randn(1, 16, 16)
        with fx_cache.session("request", "only"):
            assert torch.equal(compiled(*inputs), model(*inputs))


_ENTERED = threading.Barrier(2)


@torch.library.custom_op("fx_cache_tests::together", mutates_args=())
def _together(x: Tensor) -> Tensor:
    with contextlib.suppress(threading.BrokenBarrierError):
        _ENTERED.wait(2)
    return x.clone()


@_together.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_branches_of_a_session_in_threads_of_their_own() -> None:
    """Each is at a step while the other one is."""

    class Together(Dit):
        def forward(self, latent: Tensor, t: Tensor, text: Tensor) -> Tensor:  # type: ignore[override]
            return _together(super().forward(latent, t, text))

    compiled = compile_cached(Together().eval(), residual_diff_threshold=10.0)

    def passes(name: str) -> None:
        for _ in range(2):
            x, text = torch.randn(1, 16, 16), torch.randn(1, 7, 24)
            for i in range(STEPS):
                with torch.no_grad(), fx_cache.session("request", name):
                    x = x - 0.1 * compiled(x, torch.tensor([0.9 - 0.05 * i]), text)

    threads = [threading.Thread(target=passes, args=(name,)) for name in ("cond", "uncond")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # At first moves it may not be known whether the other one has begun a request.
    hits = hits_of(compiled)
    assert len(hits) == 4
    assert all(set(h) >= {*LAST} for h in hits)


def test_a_branch_that_was_never_named_begins() -> None:
    """It has a prompt equal to that of the pass without a name beside it, which is made anew at every step."""
    model, text = Dit().eval(), torch.randn(1, 7, 24)
    compiled, found = compile_cached(model, residual_diff_threshold=10.0), []
    latents = {"": torch.randn(1, 16, 16), "window": torch.randn(1, 16, 16)}
    for i in range(STEPS):
        t = torch.tensor([0.9 - 0.05 * i])
        for k in ("window", "") if i >= 4 else ("",):
            with fx_cache.session("request", k or None):
                output = compiled(latents[k], t, text.clone())
            found.append((k, not torch.equal(output, model(latents[k], t, text))))
            latents[k] = latents[k] - 0.1 * output
    windows = [hit for k, hit in found if k]
    assert windows == [False, True, True, True]
    assert [hit for k, hit in found if not k][:4] == [False, True, True, True]


@pytest.mark.parametrize("said", [True, False])
def test_other_conditioning_at_every_call_of_a_branch(said: bool) -> None:
    """At one time: nothing shows but that each call is another request's, and a warning says so."""
    model, found = Dit().eval(), []
    compiled = compile_cached(model, residual_diff_threshold=10.0)
    with contextlib.nullcontext() if said else pytest.warns(fx_cache.CacheWarning, match="other conditioning"):
        for i in range(20):
            inputs = torch.randn(1, 16, 16), torch.tensor([0.5]), torch.randn(1, 7, 24)
            with fx_cache.session("request", "only", step=i if said else None):
                found.append(not torch.equal(compiled(*inputs), model(*inputs)))
    assert any(found) == said


@pytest.mark.filterwarnings("error::fx_cache.CacheWarning")
@pytest.mark.parametrize("warmup", [1, 8])
def test_requests_of_two_steps_are_nothing_to_warn_of(warmup: int) -> None:
    compiled = compile_cached(Dit().eval(), residual_diff_threshold=10.0, max_warmup_steps=warmup)
    for _ in range(20):
        x, text = torch.randn(1, 16, 16), torch.randn(1, 7, 24)
        for t in (0.9, 0.5):
            x = x - 0.1 * compiled(x, torch.tensor([t]), text)
    assert not hits_of(compiled)


@pytest.mark.filterwarnings("ignore::fx_cache.CacheWarning")
def test_who_counts_the_steps_needs_no_time() -> None:
    """Of a sampler that adds much noise nothing shows which input tells it."""
    model = Straight().eval()
    compiled = compile_cached(model, residual_diff_threshold=10.0)
    x, text, hits = torch.randn(1, 32, 16), torch.randn(1, 6, 24), []
    for i in range(STEPS):
        with fx_cache.session("request", step=i):
            output = compiled(x, torch.tensor([900.0 - 20 * i]), text)
        hits.append(not torch.equal(output, model(x, torch.tensor([900.0 - 20 * i]), text)))
        x = 0.9 * x - 0.05 * output + 0.4 * torch.randn(x.shape)
    assert hits == [False, *[True] * (STEPS - 1)]


@pytest.mark.filterwarnings("ignore::fx_cache.CacheWarning")
@pytest.mark.parametrize("name", [None, "video"])
@pytest.mark.parametrize("place", ["int", "tensor", "each int"])
@pytest.mark.parametrize(
    ("time", "broken"), [("table", False), ("straight", False), ("table", True), ("sinusoids", True)]
)
def test_windows_that_slid_before(time: str, broken: bool, place: str, name: str | None) -> None:
    """One that slides on with the time shows two numbers that move together; then one of them alone is no step."""
    windows = Windows(Placed(time, broken).eval(), 4, 0.4)
    several, windows.latents = windows.latents, windows.latents[:1]
    windows.walk(8, time, PLACES[place], name, slide=1)
    windows.latents, before = several, windows.hits
    windows.walk(6, time, PLACES[place], name and f"{name} behind")
    assert before


@pytest.mark.filterwarnings("ignore::fx_cache.CacheWarning")
@pytest.mark.parametrize("name", [None, "video"])
def test_what_is_in_proportion_once(name: str | None) -> None:
    """Python makes what is embedded, and not in proportion to the time; the places of two windows are, by chance."""
    windows = Windows(Placed("turned", broken=True).eval(), 3, 0.4)
    windows.walk(7, "turned", lambda k: torch.tensor([8.0 - 2 * k]), name)


class Turning(Placed):
    """Its positions turn queries, by sinusoids that another graph is given; each int64, one for each token."""

    def begin(self, latent: Tensor, t: Tensor, text: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        angles = offset[:, None] * torch.exp(-torch.arange(32) / 8.0)
        turn = angles.cos(), angles.sin()
        torch._dynamo.graph_break()
        e = self.table(t) if self.kind == "table" else self.embedded(t)
        x = self.patch(latent)
        return torch.cat([self.text(text), x * turn[0] + x.flip(-1) * turn[1]], 1), e


@pytest.mark.filterwarnings("ignore::fx_cache.CacheWarning")
@pytest.mark.parametrize("name", [None, "video"])
@pytest.mark.parametrize("time", ["sinusoids", "table"])
def test_positions_are_no_time(time: str, name: str | None) -> None:
    windows = Windows(Turning(time, broken=True).eval(), 4, 0.4)
    windows.walk(6, time, lambda k: torch.arange(32) + 16 * k, name)


@pytest.mark.filterwarnings("ignore::fx_cache.CacheWarning")
@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("time", ["table", "given", "modulated", "rows"])
@pytest.mark.parametrize("alike", [0.4, 0.1, 0.01])
def test_windows_with_no_number_in_a_session(alike: float, time: str, broken: bool) -> None:
    """Of the time nothing is known yet: that it rests is not either."""
    windows = Windows(Placed(time, broken).eval(), 4, alike)
    windows.walk(5, time, lambda k: 1, "video")


class Scaled(Dit):
    """Guidance rests, one float a sample; the integer timestep goes through a table, or sinusoids handed to a graph."""

    def __init__(self, table: bool, broken: bool) -> None:
        super().__init__()
        self.guidance, self.table = nn.Linear(1, 32), nn.Embedding(1000, 32) if table else None
        self.broken = broken

    def begin(self, latent: Tensor, t: Tensor, text: Tensor, guidance: Tensor) -> tuple[Tensor, Tensor]:
        if self.table is None:
            angles = t[:, None] * torch.exp(-torch.arange(16) / 4.0)
            e = torch.cat([angles.sin(), angles.cos()], -1)
            self.cut()
            e = self.time(e)
        else:
            e = self.table(t)
        e = e + self.guidance(guidance[:, None])
        self.cut()
        return torch.cat([self.text(text), self.patch(latent)], 1), e

    def forward(self, latent: Tensor, t: Tensor, text: Tensor, guidance: Tensor) -> Tensor:
        x, e = self.begin(latent, t, text, guidance)
        for block in self.blocks:
            self.cut()
            x = block(x, e)
        return self.last(x[:, text.shape[1] :])

    def cut(self) -> None:
        if self.broken:
            torch._dynamo.graph_break()


@pytest.mark.parametrize("name", [None, "request"])
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize(("table", "broken"), [(True, False), (True, True), (False, True)])
def test_guidance_that_rests_beside_an_integer_timestep(
    table: bool, broken: bool, passes: int, name: str | None
) -> None:
    """Guidance looks like a time and is none. The second request is known from its first step on."""
    model = Scaled(table, broken).eval()
    options = {"compiler": "eager", "Fn_compute_blocks": 1, "max_warmup_steps": 2, "residual_diff_threshold": 10.0}
    with torch._dynamo.config.patch(recompile_limit=64):
        compiled = torch.compile(model, backend="dit_cache", options=options)
        for request in range(2):
            x, guidance, hits = torch.randn(1, 32, 16), torch.tensor([3.5]), 0
            prompts, residuals = [torch.randn(1, 6, 24) for _ in range(passes)], {}
            for i in range(2 * STEPS):
                for k, text in enumerate(prompts):
                    inputs = x, torch.tensor([900 - 40 * i]), text, guidance
                    with fx_cache.session(f"{name}-{request}") if name else contextlib.nullcontext():
                        output = compiled(*inputs)
                    h, e = model.begin(*inputs)
                    first = last = model.blocks[0](h, e)
                    for block in model.blocks[1:]:
                        last = block(last, e)
                    if torch.equal(output, model(*inputs)):
                        residuals[k] = last - first
                    else:
                        hits += 1
                        assert torch.allclose(output, model.last((first + residuals[k])[:, 6:]), atol=1e-5)
                x = x - 0.05 * output
        assert hits >= passes * (2 * STEPS - 4)


@pytest.mark.parametrize("steps", [(50, 20), (20, 8), (50, 10)])
def test_given_up_and_begun_again_with_one_seed_and_prompt(steps: tuple[int, int]) -> None:
    """The first one is given up at its second call or later; the next one begins where the time would have gone on."""
    model = Dit().eval()
    compiled = compile_cached(model, residual_diff_threshold=10.0, max_warmup_steps=1)
    text, first = torch.randn(1, 6, 24), torch.randn(1, 32, 16)
    for count, calls in zip(steps, (3, 5), strict=True):
        x = first
        for i in range(calls):
            inputs = x, torch.tensor([1.0 - (i + 1) / count]), text
            output = compiled(*inputs)
            if i == 0:
                assert torch.equal(output, model(*inputs))
            x = x - output / count


@pytest.mark.parametrize("step", [0.02, 0.05, 0.1])
@pytest.mark.parametrize("again", [0, 1])
def test_given_up_and_begun_again_behind_two_calls_at_one_time(again: int, step: float) -> None:
    """Heun's method calls twice at a time; the next request begins with the latent of its first call, or the second."""
    model = Dit().eval()
    compiled = compile_cached(model, residual_diff_threshold=10.0, max_warmup_steps=1)
    text, first = torch.randn(1, 6, 24), torch.randn(1, 32, 16)
    one = compiled(first, torch.tensor([0.6]), text)
    second = first - step * one
    x = first - step / 2 * (one + compiled(second, torch.tensor([0.6]), text))
    compiled(x, torch.tensor([0.55]), text)
    inputs = (first, second)[again], torch.tensor([0.3]), text
    assert torch.equal(compiled(*inputs), model(*inputs))


def test_a_model_whose_weights_change_at_every_call_is_told_of() -> None:
    class Set(Dit):
        def forward(self, latent: Tensor, t: Tensor, text: Tensor) -> Tensor:
            return super().forward(latent, t, text) * self.scale

    model = Set().eval()
    model.scale = torch.tensor([1.0])
    compiled = compile_cached(model, residual_diff_threshold=10.0, max_warmup_steps=1)
    text, x = torch.randn(1, 6, 24), torch.randn(1, 32, 16)
    with pytest.warns(fx_cache.CacheWarning, match="weights or tensors of the model that others were set in"):
        for i in range(12):
            model.scale = torch.tensor([1.0 + 0.1 * i])
            x = x - 0.1 * compiled(x, torch.tensor([0.99 - 0.05 * i]), text)
