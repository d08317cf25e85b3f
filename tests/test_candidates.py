"""Which stacks are cached: those that the denoised input goes through; no refusal hides another."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fx_cache
from tests.running import compile_cached, last_branch, relative_error
from tests.selection import few

WIDTH, TOKENS = 16, 9


class Block(nn.Module):
    def __init__(self, wide: int = 2) -> None:
        super().__init__()
        self.shift = nn.Linear(WIDTH, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, wide * WIDTH), nn.Linear(wide * WIDTH, WIDTH)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        h = F.layer_norm(x, (WIDTH,)) + self.shift(c)
        x = x + F.scaled_dot_product_attention(h, h, self.mix(h))
        return x + self.down(torch.tanh(self.up(h)))


class Parallel(nn.Module):
    """A block of two streams."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text, self.cross = Block(), Block(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, y: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return self.image(x + self.cross(y).mean(1, keepdim=True), c), self.text(y, c)


class Counting(Block):
    """It writes to a buffer of its own: a hit would not."""

    def __init__(self) -> None:
        super().__init__(4)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        self.seen.add_(1.0)
        return super().forward(x, c) + self.seen


class Shrinking(nn.Module):
    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.conv, self.norm, self.same = (
            nn.Conv2d(a, b, 3, padding=1),
            nn.GroupNorm(1, b),
            nn.Conv2d(b, b, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.same(torch.tanh(self.norm(self.conv(x))))


def blocks(count: int, wide: int = 2) -> nn.ModuleList:
    return nn.ModuleList(Block(wide) for _ in range(count))


class Base(nn.Module):
    """`rule`, where there is one, runs stacks as the rule of caching says; a forward without is the model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.time = nn.Linear(4, WIDTH), nn.Linear(2, WIDTH)
        self.text, self.out = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 4)
        self.rule: Rule | None = None

    def at(self, t: Tensor) -> Tensor:
        return self.time(torch.stack([torch.sin(t), torch.cos(t)], dim=-1))[:, None]

    def run(self, name: str, x: Tensor, c: Tensor) -> Tensor:
        if self.rule is not None:
            return self.rule(name, list(getattr(self, name)), x, c)
        for block in getattr(self, name):
            x = block(x, c)
        return x


class Rule:
    """The head's block is computed; behind it comes what the others added when they were computed last."""

    def __init__(self, cached: set[str]) -> None:
        self.cached = cached
        self.added: dict[str, Tensor] = {}
        self.hit: set[str] = set()

    def __call__(self, name: str, stack: list[nn.Module], x: Tensor, c: Tensor) -> Tensor:
        first = stack[0](x, c)
        if name in self.hit:
            return first + self.added[name]
        x = first
        for block in stack[1:]:
            x = block(x, c)
        if name in self.cached:
            self.added[name] = x - first
        return x


class TextEncoder(Base):
    """An encoder of the text within the forward, with more work than the blocks."""

    def __init__(self, to_form: bool = False, latent_first: bool = False) -> None:
        super().__init__()
        self.encoder, self.blocks = blocks(6, 8), blocks(5)
        self.to_form, self.latent_first = to_form, latent_first

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        h = self.embed(x) if self.latent_first else None
        y = text.type_as(x) if self.to_form else text
        y = self.text(F.pad(y, (0, 6 - y.shape[-1])))
        y = self.run("encoder", y, torch.zeros_like(y[:, :1]))
        h = self.embed(x) if h is None else h
        return self.out(self.run("blocks", h, self.at(t) + y.mean(1, keepdim=True)))


class TimeNetwork(Base):
    """A side network that sees only the timestep makes what modulates the blocks."""

    def __init__(self, depth: int, wide: int, tokens: int) -> None:
        super().__init__()
        self.side, self.blocks = blocks(depth, wide), blocks(5)
        self.tokens = tokens

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        c = self.run("side", self.at(t).expand(-1, self.tokens, -1), self.at(t))
        return self.out(
            self.run("blocks", self.embed(x), c.mean(1, keepdim=True) + self.text(text).mean(1, keepdim=True))
        )


class Pyramid(Base):
    """Convolutions of growing width, with more work than the blocks, before them."""

    def __init__(self) -> None:
        super().__init__()
        self.levels = nn.ModuleList(Shrinking(a, b) for a, b in ((4, 8), (8, 16), (16, 32), (32, 64)))
        self.narrow, self.blocks = nn.Linear(64, WIDTH), blocks(10)

    def image(self, x: Tensor) -> Tensor:
        h = x.transpose(1, 2).reshape(x.shape[0], 4, 3, 3)
        for level in self.levels:
            h = level(h)
        return self.narrow(h.flatten(2).transpose(1, 2))

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        c = self.at(t) + self.text(text).mean(1, keepdim=True)
        return self.out(self.run("blocks", self.image(x), c))


class TwoRefused(Pyramid):
    """Convolutions and then blocks that write to buffers, each with more work than the blocks behind."""

    def __init__(self) -> None:
        super().__init__()
        self.counting = nn.ModuleList(Counting() for _ in range(6))
        self.blocks = blocks(7)

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        c = self.at(t) + self.text(text).mean(1, keepdim=True)
        h = self.run("counting", self.image(x), c)
        return self.out(self.run("blocks", self.embed(x), h))


class RefusedWithinAChain(Base):
    """Two stacks, one behind the other; the blocks of the heavier one write to buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.counting, self.blocks = nn.ModuleList(Counting() for _ in range(6)), blocks(5)

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        c = self.at(t) + self.text(text).mean(1, keepdim=True)
        return self.out(self.run("blocks", self.run("counting", self.embed(x), c), c))


class EncoderDecoder(Base):
    """The second stack starts from the latent again; the first makes its condition."""

    def __init__(self, first: int, second: int, behind: int = WIDTH) -> None:
        super().__init__()
        self.out = nn.Sequential(nn.Linear(WIDTH, behind), nn.Tanh(), nn.Linear(behind, 4))
        self.encoder, self.decoder, self.again = blocks(first), blocks(second), nn.Linear(4, WIDTH)

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        c = self.at(t) + self.text(text).mean(1, keepdim=True)
        z = torch.tanh(self.run("encoder", self.embed(x), c) + c)
        return self.out(self.run("decoder", self.again(x), z))


class Patches(Base):
    """No input has the output's shape: what is denoised the graph does not say at once."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.blocks, self.wide = blocks(6, 8), blocks(5), nn.Linear(WIDTH, 7)

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        y = self.run("encoder", self.text(text), torch.zeros(1, 1, WIDTH))
        h = self.run("blocks", self.embed(x), self.at(t) + y.mean(1, keepdim=True))
        return self.wide(h).reshape(x.shape[0], TOKENS * 7)


CASES: dict[str, tuple[Callable[[], Base], set[str], tuple[int, int]]] = {
    "text encoder": (TextEncoder, {"blocks"}, (40, 6)),
    "text encoder, small": (TextEncoder, {"blocks"}, (2, 6)),
    "text encoder, huge": (TextEncoder, {"blocks"}, (800, 6)),
    "text of the latent's shape": (lambda: TextEncoder(latent_first=True), {"blocks"}, (TOKENS, 4)),
    "text in the latent's dtype": (lambda: TextEncoder(to_form=True), {"blocks"}, (9, 6)),
    "time network, narrow": (lambda: TimeNetwork(6, 2, 1), {"blocks"}, (7, 6)),
    "time network, wide": (lambda: TimeNetwork(4, 128, 1), {"blocks"}, (7, 6)),
    "time network, of tokens": (lambda: TimeNetwork(8, 8, TOKENS), {"blocks"}, (7, 6)),
    "pyramid": (Pyramid, {"blocks"}, (7, 6)),
    "two refused": (TwoRefused, {"blocks"}, (7, 6)),
    "one of a chain refused": (RefusedWithinAChain, {"blocks"}, (7, 6)),
    "encoder and decoder": (lambda: EncoderDecoder(8, 4), {"encoder", "decoder"}, (7, 6)),
    "encoder and larger decoder": (lambda: EncoderDecoder(4, 9), {"encoder", "decoder"}, (7, 6)),
    "encoder and tiny decoder": (lambda: EncoderDecoder(12, 2, 512), {"encoder"}, (7, 6)),
    "unknown latent": (Patches, {"blocks"}, (40, 6)),
}


def steps(text: tuple[int, int], count: int = 4) -> list[tuple[Tensor, Tensor, Tensor]]:
    prompt = torch.randn(1, *text)
    x, drift = torch.randn(1, TOKENS, 4), torch.randn(1, TOKENS, 4)
    return [(x + 0.1 * i * drift, torch.tensor([1.0 - 0.1 * i]), prompt) for i in range(count)]


BY_STACK = ("text encoder", "one of a chain refused", "encoder and decoder")


@pytest.mark.parametrize(("case", "scope"), [(c, "model") for c in CASES] + few([(c, "stack") for c in BY_STACK], 1))
def test_which_stacks_are_cached(case: str, scope: str) -> None:
    torch.manual_seed(0)
    kind, cached, text = CASES[case]
    model = kind().eval()
    never, always = copy.deepcopy(model), copy.deepcopy(model)
    oracle = copy.deepcopy(model)
    walk = steps(text)
    found = fx_cache.explain(compile_cached(copy.deepcopy(model), scope=scope), *walk[0])
    assert {s.name for s in found.stacks if s.span is not None} == cached
    assert all(s.reason for s in found.stacks if s.span is None)
    compiled = compile_cached(never, residual_diff_threshold=0.0, scope=scope)
    for step in walk:
        assert torch.equal(compiled(*step), model(*step))
    compiled = compile_cached(always, residual_diff_threshold=10.0, scope=scope)
    with fx_cache.session("request", "only"):
        outputs = [compiled(*step).clone() for step in walk]
    spans = last_branch(always)["spans"]
    hits = dict(zip([s.name for s in found.stacks if s.span is not None], (s["hits"] for s in spans), strict=True))
    assert all(hits.values())
    oracle.rule = Rule(cached)
    for i, (step, output) in enumerate(zip(walk, outputs, strict=True)):
        oracle.rule.hit = {name for name, at in hits.items() if i in at}
        assert relative_error(oracle(*step), output) < 1e-6, f"step {i}"


def test_what_the_text_encoder_makes_is_computed_once() -> None:
    torch.manual_seed(0)
    model = TextEncoder().eval()
    found = fx_cache.explain(compile_cached(model), *steps((40, 6))[0])
    assert found.invariants
    (reason,) = [s.reason for s in found.stacks if s.name == "encoder"]
    assert reason is not None and "do not depend on" in reason


def test_where_the_text_is_taken_for_the_latent() -> None:
    """It has the latent's shape and is read first: what sees both of them comes before what sees one."""
    model = TextEncoder().eval()
    walk = steps((TOKENS, 4))
    compiled = compile_cached(model, residual_diff_threshold=10.0)
    assert "blocks" in {s.name for s in fx_cache.explain(compiled, *walk[0]).stacks if s.span is not None}


class Skipping(Base):
    """Three stacks: of two streams, of the image alone, of both joined. The text goes round the second one."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs = nn.ModuleList(Parallel() for _ in range(3))
        self.middle, self.single = blocks(3), blocks(3)

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        c = self.at(t)
        x, y = self.embed(x), self.text(text)
        for pair in self.pairs:
            x, y = pair(x, y, c)
        joined = torch.cat([y, self.run("middle", x, c)], dim=1)
        return self.out(self.run("single", joined, c)[:, -TOKENS:])


class SkippingThrice(Base):
    """In, middle, out: each block of the last stack adds what one of the first made."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.middle, self.up = blocks(4), blocks(3), blocks(4)

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        c = self.at(t) + self.text(text).mean(1, keepdim=True)
        x, kept = self.embed(x), []
        for block in self.down:
            x = block(x, c)
            kept.append(x)
        x = self.run("middle", x, c)
        for block in self.up:
            x = block(x + kept.pop(), c)
        return self.out(x)


class Beside(Base):
    """A stack that starts from the latent runs between two others; its result is added to what the first made."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.side, self.last, self.again = blocks(4), blocks(3), blocks(4), nn.Linear(4, WIDTH)

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        c = self.at(t) + self.text(text).mean(1, keepdim=True)
        h = self.run("first", self.embed(x), c)
        return self.out(self.run("last", h + self.run("side", self.again(x), c), c))


@pytest.mark.parametrize("kind", [Skipping, SkippingThrice, Beside])
def test_one_decision_for_stacks_on_one_path(kind: type[Base]) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    walk = steps((7, 6))
    found = fx_cache.explain(compile_cached(copy.deepcopy(model)), *walk[0])
    assert len(found.spans) == 1 and found.shares[0] is not None and found.shares[0] > 0.75
    compiled = compile_cached(model, residual_diff_threshold=0.0)
    for step in walk:
        assert torch.equal(compiled(*step), model(*step))
    fx_cache.configure(model, residual_diff_threshold=10.0)
    with fx_cache.session("again", "only"):
        for _ in range(3):
            output = compiled(*walk[0])
    assert [s["hits"] for s in last_branch(model)["spans"]] == [[1, 2]]
    assert relative_error(model(*walk[0]), output) < 1e-6
