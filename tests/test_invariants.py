"""What is the same at every step of a request is computed once, and never used for anything else."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

import fx_cache
from fx_cache.config import CacheConfig
from fx_cache.runtime.identity import StorageHold
from fx_cache.runtime.keep import Keep
from fx_cache.runtime.slots import Branch
from fx_cache.testing import Request, assert_bytes_accounted
from tests.models import build, conditioning, walk
from tests.oracles import run_eager
from tests.running import compile_cached, layers, run_cached

TEXT = {"pixart": "encoder_hidden_states", "wan": "encoder_hidden_states", "flux": "encoder_hidden_states"}
"""Models with a prompt that whole linear layers see alone, and how it is called."""


@pytest.mark.parametrize("name", [*TEXT, "cogvideox", "sana"])
def test_hits_and_misses_are_those_without(name: str) -> None:
    steps = [*walk(name, 6), *walk(name, 6, seed=1)]
    policy = {"residual_diff_threshold": 1.0, "max_continuous_cached_steps": 2}
    with_them = run_cached(build(name), steps, **policy)
    without = run_cached(build(name), steps, hoist_invariants=False, **policy)
    assert with_them.hits == without.hits
    assert with_them.hits[0]
    assert all(torch.equal(a, b) for a, b in zip(with_them.outputs, without.outputs, strict=True))


@pytest.mark.parametrize(("name", "saved"), [("pixart", 2 + 2 * 5), ("wan", 2 + 2 * 5), ("flux", 3)])
def test_layers_that_see_the_prompt_alone_are_computed_once(name: str, saved: int) -> None:
    """The projections of the prompt, and its keys and values in each block."""
    model = build(name)
    compiled = compile_cached(model, residual_diff_threshold=0.0)
    steps = walk(name, 3)
    compiled(**steps[0])
    fx_cache.reset(model)
    first, second, third = (layers(compiled, step) for step in steps)
    plain = layers(model, steps[0])
    assert (first, second, third) == (plain, plain - saved, plain - saved)


@pytest.mark.parametrize("name", TEXT)
def test_another_prompt_in_the_same_session_is_computed_anew(name: str) -> None:
    model = build(name)
    compiled = compile_cached(model, residual_diff_threshold=0.0)
    steps = walk(name, 4)
    for step, other in zip(steps[2:], walk(name, 4, seed=9)[2:], strict=True):
        step[TEXT[name]] = other[TEXT[name]]
    expected = run_eager(model, steps).outputs
    with fx_cache.session("one", branch="cond"):
        outputs = [compiled(**step)[0].clone() for step in steps]
    assert all(torch.equal(a, b) for a, b in zip(expected, outputs, strict=True))


@pytest.mark.parametrize("name", TEXT)
def test_a_prompt_that_is_written_to_is_computed_anew(name: str) -> None:
    model = build(name)
    compiled = compile_cached(model, residual_diff_threshold=0.0)
    steps = walk(name, 4)
    for i, step in enumerate(steps):
        if i == 2:
            step[TEXT[name]].mul_(1.5)
        assert torch.equal(compiled(**step)[0], model(**step)[0])


@pytest.mark.parametrize("named", [False, True])
def test_tensors_whose_changes_cannot_be_seen(named: bool) -> None:
    """Made in inference mode, they have no version: only within a named request that goes on they are the same."""
    model = build("pixart")
    compiled = compile_cached(model, residual_diff_threshold=0.0)
    with torch.inference_mode():
        steps = walk("pixart", 4)
        compiled(**steps[0])
        fx_cache.reset(model)
        with fx_cache.session("request") if named else contextlib.nullcontext():
            counts = [layers(compiled, step) for step in steps]
    assert counts[0] == counts[1]
    assert (counts[1] > counts[2]) == named
    assert counts[2] == counts[3]


def test_weights_that_change_are_noticed() -> None:
    model = build("pixart")
    compiled = compile_cached(model, residual_diff_threshold=0.0)
    steps = walk("pixart", 4)
    for step in steps[:2]:
        compiled(**step)
    with torch.no_grad():
        model.caption_projection.linear_1.weight.mul_(2.0)
        model.transformer_blocks[3].attn2.to_k.weight.mul_(2.0)
    for step in steps[2:]:
        assert torch.equal(compiled(**step)[0], model(**step)[0])


def test_nothing_is_moved_out_of_autocast() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text = nn.Linear(16, 32)
            self.model = build("dit")
            self.blocks = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))

        def forward(self, latent: torch.Tensor, timestep: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                text = self.text(prompt)
            for block in self.blocks:
                latent = latent + block(latent) * text
            return latent * torch.cos(timestep)

    torch.manual_seed(0)
    model = Mixed().eval()
    compiled = compile_cached(model, residual_diff_threshold=0.0)
    prompt = torch.randn(1, 1, 16)
    for i in range(3):
        given = torch.randn(1, 8, 32), torch.tensor([1.0 - 0.1 * i]), prompt
        assert torch.equal(compiled(*given), model(*given))


def test_each_graph_keeps_its_own() -> None:
    """The static and the dynamic graph of one forward go on with each other's requests; what they keep may differ."""
    branch = Branch("key", "form", StorageHold(()), 1, CacheConfig())
    prompt = torch.randn(100)
    graphs = object(), object()
    results = [
        Keep(branch, g, torch.clone, known=True)(lambda p, i=i: (p + i,), (prompt,), (0,)) for i, g in enumerate(graphs)
    ]
    again = Keep(branch, graphs[1], torch.clone, known=True)(lambda p: (p + 2,), (prompt,), (0,))
    assert torch.equal(results[0][0], prompt) and torch.equal(results[1][0], prompt + 1)
    assert again[0] is results[1][0]


def test_what_is_kept_is_counted_and_freed() -> None:
    model = build("pixart")
    compiled = compile_cached(model, residual_diff_threshold=1.0)
    steps = walk("pixart", 4)
    with fx_cache.session("r"):
        for step in steps[:3]:
            compiled(**step)
    (branch,) = fx_cache.summary(model).to_dict()["sessions"][0]["branches"]
    text = conditioning("pixart")["encoder_hidden_states"].shape
    inner, blocks = model.inner_dim, len(model.transformer_blocks)
    keys_and_values = 2 * blocks * text[0] * text[1] * inner * 4
    assert keys_and_values <= branch["kept_bytes"] <= 2 * keys_and_values
    fx_cache.end("r")
    (branch,) = fx_cache.summary(model).to_dict()["sessions"][0]["branches"]
    assert branch["kept_bytes"] == 0
    fx_cache.configure(model, max_bytes=0)
    with fx_cache.session("r"):
        expected = [layers(compiled, step) for step in steps]
    assert len(set(expected)) == 1, "with no room for it everything is computed at every step"


def test_bytes_are_what_the_allocator_says() -> None:
    model = build("pixart")
    compiled = compile_cached(model, residual_diff_threshold=1.0)
    walks = [walk("pixart", 3, seed=i) for i in range(3)]
    for i, steps in enumerate(walks):
        long = torch.randn(1, 8192, 24, generator=torch.Generator().manual_seed(i)), torch.ones(1, 8192)
        for step in steps:
            step["encoder_hidden_states"], step["encoder_attention_mask"] = long
    requests = [Request([("cond", step) for step in steps], f"r{i}") for i, steps in enumerate(walks)]
    for i in range(3):
        requests[0].call(compiled, i)
    fx_cache.end("r0")
    assert assert_bytes_accounted(compiled, requests) > 0


class Writing(nn.Module):
    """Reads the prompt, writes to it, and reads it again."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out = nn.Linear(4, 16), nn.Linear(16, 4)
        self.before, self.behind = nn.Linear(16, 16), nn.Linear(16, 16)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.GELU()) for _ in range(6))

    def forward(self, latent: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        first = self.before(text)
        text.add_(1)
        second = self.behind(text)
        x = self.embed(latent) + torch.sin(timestep)[:, None, None]
        for block in self.blocks:
            x = x + block(x + first.mean(1, keepdim=True) - second.mean(1, keepdim=True))
        return self.out(x)


def test_a_prompt_that_is_written_to_is_read_in_turn() -> None:
    torch.manual_seed(1)
    latent, text = torch.randn(1, 64, 4), torch.randn(1, 64, 16)
    model = Writing().eval()
    steps = [{"latent": latent + 0.1 * i, "timestep": torch.tensor([1.0 - 0.1 * i])} for i in range(3)]
    expected = [model(**step, text=text.clone()) for step in steps]
    compiled = compile_cached(model, residual_diff_threshold=0.0)
    assert all(torch.equal(compiled(**s, text=text.clone()), e) for s, e in zip(steps, expected, strict=True))


class Filled(nn.Module):
    """Blocks read a tensor that is filled by slices, of the prompt and of something else."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.embed, self.time, self.text = nn.Linear(4, 16), nn.Linear(1, 16), nn.Linear(8, 16)
        self.pooled = nn.Parameter(torch.randn(1, 1, 16))
        layers = {"kv": 32, "mlp": 16}
        self.blocks = nn.ModuleList(nn.ModuleDict({k: nn.Linear(16, n) for k, n in layers.items()}) for _ in range(5))
        self.out = nn.Linear(16, 4)
        self.eval().requires_grad_(False)

    def context(self, prompt: torch.Tensor, h: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        text = self.text(prompt)
        count = text.shape[1]
        if self.how == "cat":
            return torch.cat([text, self.pooled], dim=1)
        filled = torch.zeros(1, count + 1, 16)
        if self.how == "one by one":
            for i in range(count):
                filled[:, i] = text[:, i]
            filled[:, count:].copy_(self.pooled)
            return filled
        filled[:, :count] = text
        before = filled.clone() if self.how == "read in between" else None
        filled[:, count:] = self.pooled if self.how != "with the time" else self.pooled + time
        if self.how == "twice":
            filled[:, :2].mul_(0.5)
        return filled if before is None else filled + before

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, prompt: torch.Tensor) -> tuple[torch.Tensor]:
        h, time = self.embed(x), self.time(torch.sin(timestep)[:, None])[:, None]
        context = self.context(prompt, h, time)
        h = h + time
        for block in self.blocks:
            k, v = block["kv"](context).chunk(2, dim=-1)
            h = h + nn.functional.scaled_dot_product_attention(h, k, v)
            h = h + block["mlp"](h + time)
        if self.how == "written later":
            context[:, :1].add_(h[:, :1])
            h = h + context.mean(dim=1, keepdim=True)
        return (self.out(h),)


@pytest.mark.parametrize(
    ("how", "saved"),
    [
        *[(how, 1 + 5) for how in ("cat", "slices", "one by one", "twice", "read in between")],
        *[(how, 1) for how in ("with the time", "written later")],
    ],
)
def test_a_tensor_filled_by_slices_is_kept_when_it_is_finished(how: str, saved: int) -> None:
    model = Filled(how)
    compiled = compile_cached(model, residual_diff_threshold=0.0)
    prompts = torch.randn(1, 6, 8), torch.randn(1, 6, 8)
    steps = []
    for prompt in prompts:
        x = torch.randn(1, 8, 4)
        for i in range(3):
            steps.append({"x": x, "timestep": torch.tensor([0.9 - 0.1 * i]), "prompt": prompt})
            x = x - 0.1 * model(**steps[-1])[0]
    for step in steps:
        assert torch.equal(compiled(**step)[0], model(**step)[0])
    fx_cache.reset(model)
    plain = layers(model, steps[0])
    assert [layers(compiled, step) for step in steps[:3]] == [plain, plain - saved, plain - saved]
