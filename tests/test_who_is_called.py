"""Who a call belongs to, where the graph does not say it plainly. Oracles: the model itself, and counted hits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fx_cache
from tests.running import compile_cached, hits_of

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
