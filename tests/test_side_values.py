"""One graph: what blocks make beside the main stream, and what the main stream is not. Oracle: the rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fx_cache
from tests.running import compile_cached, hits_of

WIDTH, TOKENS, TEXT, BLOCKS, STEPS = 16, 24, 5, 5, 6
HITS = [2, 3, 4, 5]
OPTIONS = {"Fn_compute_blocks": 1, "max_warmup_steps": 2, "residual_diff_threshold": 10.0}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return x + torch.tanh(time) * self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.time, self.out = nn.Linear(4, WIDTH), nn.Linear(2, WIDTH), nn.Linear(WIDTH, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.how = how

    def begin(self, latent: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        return self.embed(latent), self.time(torch.stack([timestep.sin(), timestep.cos()], -1))[:, None]


def walk(seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    latent, text = random(1, TOKENS, 4), random(1, TEXT, WIDTH)
    latents = [latent + 0.1 * i * random(1, TOKENS, 4) for i in range(STEPS)]
    return [{"latent": x, "timestep": torch.tensor([1 - i / 8]), "text": text} for i, x in enumerate(latents)]


@torch.no_grad()
def cached(model: nn.Module) -> tuple[list[Any], list[list[int]]]:
    """What a named request gives, and the steps that were reused."""
    compiled = compile_cached(model, **OPTIONS)
    with fx_cache.session("request", branch="only"):
        outputs = [compiled(**step) for step in walk()]
    return outputs, hits_of(compiled)


SHAPED = {
    "type_as": lambda gate, x: gate.type_as(x),
    "to": lambda gate, x: gate.to(x),
    "ones_like": lambda gate, x: gate * torch.ones_like(x)[:, :1],
    "new_ones": lambda gate, x: gate * x.new_ones(1),
}


class Shaped(Model):
    """The tail reads what each block makes of the time, in the form of its stream."""

    chained = False

    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        x, time = self.begin(latent, timestep)
        for block in self.blocks:
            gate = SHAPED[self.how](block.gate(time), x)
            x = block(x, gate)
            time = time + torch.tanh(gate) if self.chained else time
        return self.out(x), gate


@pytest.mark.parametrize("chained", [False, True])
@pytest.mark.parametrize("how", SHAPED)
@torch.no_grad()
def test_what_reads_the_form_of_a_stream_alone(how: str, chained: bool) -> None:
    """It is none of it: it is made anew at every step."""
    model = Shaped(how)
    model.chained = chained
    outputs, hits = cached(model)
    added = torch.zeros(())
    for i, (step, (output, gate)) in enumerate(zip(walk(), outputs, strict=True)):
        x, time = model.begin(step["latent"], step["timestep"])
        begun = model.blocks[0](x, SHAPED[how](model.blocks[0].gate(time), x))
        if i < 2:
            own = model(**step)[0]
            added = x = begun
            for block in model.blocks:
                made = SHAPED[how](block.gate(time), x)
                x = block(x, made) if block is not model.blocks[0] else x
                time = time + torch.tanh(made) if chained else time
            added = x - begun
            assert torch.equal(output, own)
        assert torch.allclose(output, model.out(begun + added), atol=1e-5)
        assert torch.equal(gate, model(**step)[1])
    assert hits == [HITS]


class Both(Block):
    """The picture and the text, which reads the picture."""

    def __init__(self) -> None:
        super().__init__()
        self.next = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, text: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        made = super().forward(x, time) + text.mean(dim=-2, keepdim=True)
        return made, text + torch.tanh(self.next(text)) + 0.1 * x.mean(dim=-2, keepdim=True)


class Levels(Model):
    """A U-Net with one block a level; the text is of one shape everywhere."""

    def __init__(self, how: str) -> None:
        super().__init__(how)
        self.blocks = nn.ModuleList(Both() for _ in range(7))

    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor]:
        x, time = self.begin(latent, timestep)
        skips = []
        for i in range(3):
            x, text = self.blocks[i](x, text, time)
            skips.append(x)
            x = x.view(1, x.shape[1] // 2, 2, -1).mean(dim=2)
        x, text = self.blocks[3](x, text, time)
        for i in range(4, 7):
            x, text = self.blocks[i](x.repeat_interleave(2, dim=1) + skips.pop(), text, time)
        return (self.out(x),)


class Growing(Model):
    """More tokens behind every block: batched or packed, or as a map; the text may be longer than that."""

    def __init__(self, how: str) -> None:
        super().__init__(how)
        self.blocks = nn.ModuleList(Both() for _ in range(BLOCKS))

    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor]:
        x, time = self.begin(latent, timestep)
        text = text + 0.1 * x.mean(dim=1, keepdim=True)  # it shows what is denoised from the beginning
        if self.how == "a longer text":
            text = text.repeat(1, 8, 1)
        if self.how == "packed":
            x, text, time = x[0], text[0], time[0]
        for block in self.blocks:
            x = x.flatten(2).transpose(1, 2) if x.ndim == 4 else x
            x, text = block(x, text, time)
            x = torch.cat([x, x[..., :4, :]], dim=-2)
            x = x.transpose(1, 2).unflatten(2, (-1, 4)) if self.how == "a map" else x
        x = x.flatten(2).transpose(1, 2) if x.ndim == 4 else x
        x = (x if self.how != "packed" else x[None])[:, :TOKENS]
        return (self.out(x) + 0.01 * text.mean(),)


COPIES = {
    "flattened": lambda x: x.flatten(1) * 1.0,
    "another dtype": lambda x: x.double(),
    "a map": lambda x: x.transpose(1, 2).unflatten(2, (-1, 4)) * 1.0,
    "some tokens": lambda x: x[:, :12] * 1.0,
    "numbers": lambda x: (1000 * x).int(),
}


class Copying(Block):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x = super().forward(x, time)
        return x, COPIES[self.how](x)


class Copied(Model):
    """The tail takes a copy of the stream that the last block makes, and something of the stream itself."""

    def __init__(self, how: str) -> None:
        super().__init__(how)
        self.blocks = nn.ModuleList(Copying(how) for _ in range(BLOCKS))

    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor]:
        x, time = self.begin(latent, timestep)
        for block in self.blocks:
            x, copy = block(x, time)
        return (self.out(copy.float().flatten()[: 12 * WIDTH].view(1, 12, WIDTH)) + 0.01 * x.mean(),)


class Added(Model):
    """Code in the loop makes something of each block's delta, or of its stream, and hands the last of it on."""

    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor]:
        x, time = self.begin(latent, timestep)
        found, kept = torch.zeros_like(x), []
        at = torch.arange(TOKENS)[None, :, None] % BLOCKS
        for i, block in enumerate(self.blocks):
            delta = block(x, time) - x
            x = x + delta
            kept.append(delta)
            if self.how == "early exit":
                found = torch.where(at == i, x, found)
            elif self.how == "sum of views":
                found = (found.flatten(1) + x.flatten(1)).view_as(found)
            elif self.how == "queries":
                found = torch.tanh(found) + 0.3 * torch.tanh(x)
        return (self.out(found),) if self.how != "a delta" else (self.out(x) + self.out(kept[3]),)


PICTURES = [
    Levels(""),
    *(Growing(how) for how in ("", "a longer text", "packed", "a map")),
    *(Copied(how) for how in COPIES),
    *(Added(how) for how in ("early exit", "sum of views", "a delta", "queries")),
]


@pytest.mark.filterwarnings("ignore::fx_cache.CacheWarning")
@pytest.mark.parametrize("model", PICTURES, ids=lambda model: f"{type(model).__name__} {model.how}".strip())
@torch.no_grad()
def test_a_picture_that_is_no_stream(model: Model) -> None:
    """It would be given back as it was: nothing is cached."""
    outputs, hits = cached(model)
    assert not hits
    assert all(torch.equal(a, model(**step)[0]) for step, (a,) in zip(walk(), outputs, strict=True))


class Refined(Model):
    """Blocks that refine the text, then blocks on text and picture."""

    def __init__(self, how: str) -> None:
        super().__init__(how)
        self.refiner = nn.ModuleList(Block() for _ in range(3))

    def joined(self, latent: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        x, time = self.begin(latent, timestep)
        for block in self.refiner:
            text = block(text, time if self.how == "by time" else text.mean(dim=1, keepdim=True))
        return torch.cat([text, x], dim=1), time

    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor]:
        x, time = self.joined(latent, timestep, text)
        for block in self.blocks:
            x = block(x, time)
        return (self.out(x[:, TEXT:]),)


@pytest.mark.parametrize("how", ["by time", "of itself"])
@torch.no_grad()
def test_blocks_on_the_text_come_first(how: str) -> None:
    """The picture is not what they carry on: behind them a span of its own begins."""
    model = Refined(how)
    outputs, hits = cached(model)
    added = torch.zeros(())
    for i, (step, (output,)) in enumerate(zip(walk(), outputs, strict=True)):
        x, time = model.joined(**step)
        begun = x = model.blocks[0](x, time)
        if i < 2:
            for block in model.blocks[1:]:
                x = block(x, time)
            added = x - begun
        assert torch.allclose(output, model.out((begun + added)[:, TEXT:]), atol=1e-5)
    assert hits == [HITS]


class Shapes(Model):
    """Blocks on one form of the picture, then on another, and perhaps on the first again."""

    def __init__(self, how: str) -> None:
        super().__init__(how)
        self.others = nn.ModuleList(Block() for _ in range(4))
        self.last = nn.ModuleList(Block() for _ in range(3))

    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor]:
        x, time = self.begin(latent, timestep)
        for block in self.blocks:
            x = block(x, time)
        kept = x
        x = x.view(1, x.shape[1] // 2, 2, -1).mean(dim=2)
        for block in self.others:
            x = block(x, time)
        x = x.repeat_interleave(2, dim=1)
        if self.how == "U-net":
            x = x + kept
            for block in self.last:
                x = block(x, time)
        return (self.out(x),)


@pytest.mark.parametrize("how", ["fewer tokens", "U-net"])
@torch.no_grad()
def test_stacks_of_other_shapes(how: str) -> None:
    """What they give moves with the latents."""
    model = Shapes(how)
    outputs, hits = cached(model)
    own = [model(**step)[0] for step in walk()]
    for i in HITS:
        assert (outputs[i][0] - outputs[1][0]).norm() > 0.2 * (own[i] - own[1]).norm()
    assert hits == [HITS, HITS]  # a stack of each form; the third one is too little work


ORDERS = {
    "turned": lambda x: x.flip(1),
    "turned by half": lambda x: torch.cat([x[:, 12:], x[:, :12]], dim=1) + 0.1,
    "half and half": lambda x: (0.5 * (x[:, :12] + x[:, 12:])).repeat(1, 2, 1),
    "even and odd": lambda x: (0.5 * (x[:, ::2] + x[:, 1::2])).repeat_interleave(2, dim=1),
    "with itself turned": lambda x: 0.5 * (x + x.flip(1)),
}


class Ordered(Model):
    """Between two stacks the tokens change places, or several become one."""

    def __init__(self, how: str) -> None:
        super().__init__(how)
        self.others = nn.ModuleList(Block() for _ in range(BLOCKS))

    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor]:
        x, time = self.begin(latent, timestep)
        for block in self.blocks:
            x = block(x, time)
        x = ORDERS[self.how](x)
        for block in self.others:
            x = block(x, time)
        return (self.out(x),)


@pytest.mark.parametrize("how", ORDERS)
@torch.no_grad()
def test_tokens_change_places_between_two_stacks(how: str) -> None:
    """The second stack goes on from what it is given: in one span with the first one, or in one of its own."""
    model = Ordered(how)
    outputs, hits = cached(model)
    added = [torch.zeros(()), torch.zeros(())]
    for i, (step, (output,)) in enumerate(zip(walk(), outputs, strict=True)):
        x, time = model.begin(step["latent"], step["timestep"])
        begun = x = model.blocks[0](x, time)
        if len(hits) == 1:  # from the first block of all to the last one
            if i < 2:
                for block in model.blocks[1:]:
                    x = block(x, time)
                x = ORDERS[how](x)
                for block in model.others:
                    x = block(x, time)
                added[0] = x - ORDERS[how](begun)
            found = ORDERS[how](begun) + added[0]
        else:
            if i < 2:
                for block in model.blocks[1:]:
                    x = block(x, time)
                added[0] = x - begun
            second = x = model.others[0](ORDERS[how](begun + added[0]), time)
            if i < 2:
                for block in model.others[1:]:
                    x = block(x, time)
                added[1] = x - second
            found = second + added[1]
        assert torch.allclose(output, model.out(found), atol=1e-5)
    assert hits == ([HITS] if "turned" in how and "itself" not in how else [HITS, HITS])


class Normed(Model):
    """A norm behind every block, of which the last one is taken."""

    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor]:
        x, time = self.begin(6 * latent, timestep)
        found = []
        for block in self.blocks:
            x = block(x, time)
            found.append(nn.functional.layer_norm(x, (WIDTH,)))
        return (self.out(found[-1]),)


@torch.no_grad()
def test_glue_that_no_block_goes_on_with() -> None:
    """It is no part of the span: the stream ends before it."""
    model = Normed("")
    outputs, hits = cached(model)
    added = torch.zeros(())
    for i, (step, (output,)) in enumerate(zip(walk(), outputs, strict=True)):
        x, time = model.begin(6 * step["latent"], step["timestep"])
        begun = x = model.blocks[0](x, time)
        if i < 2:
            for block in model.blocks[1:]:
                x = block(x, time)
            added = x - begun
        assert torch.allclose(output, model.out(nn.functional.layer_norm(begun + added, (WIDTH,))), atol=1e-5)
    assert hits == [HITS]


class Features(Model):
    """What every block hands on is given back too, or the mean of it is what the tail takes."""

    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor, ...]:
        x, time = self.begin(latent, timestep)
        found = []
        for block in self.blocks:
            x = block(x, time)
            found.append(x)
        return (self.out(sum(found)),) if self.how == "mean" else (self.out(x), *found)


@pytest.mark.parametrize("how", ["mean", "all"])
@torch.no_grad()
def test_what_streams_are_on_their_way(how: str) -> None:
    """They have come as far as they had, from where they begin now."""
    model = Features(how)
    outputs, hits = cached(model)
    added: list[Tensor] = []
    for i, (step, found) in enumerate(zip(walk(), outputs, strict=True)):
        x, time = model.begin(step["latent"], step["timestep"])
        begun = x = model.blocks[0](x, time)
        if i < 2:
            added = [torch.zeros_like(x)]
            for block in model.blocks[1:]:
                x = block(x, time)
                added.append(x - begun)
        way = [begun + a for a in added]
        expected = (model.out(sum(way)),) if how == "mean" else (model.out(way[-1]), *way)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))
    assert hits == [HITS]
