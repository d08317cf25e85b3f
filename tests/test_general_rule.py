"""Models that no pattern names: whatever crosses a cut, nothing changes, and a hit on equal inputs is exact."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fx_cache
from tests.running import compile_cached, last_branch, relative_error

WIDTH = 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x) + shift)))


class Base(nn.Module):
    def __init__(self, depth: int = 6) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.time = nn.Linear(2, 2 * WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(depth)])
        self.table = nn.Parameter(torch.randn(depth, WIDTH))

    def condition(self, t: torch.Tensor) -> torch.Tensor:
        return self.time(torch.stack([torch.sin(t), torch.cos(t)], dim=-1))[:, None]


class ChunkInTheHead(Base):
    """Parts of a tuple that is made once are read by every block."""

    def forward(self, x, t):
        parts = self.condition(t).chunk(2, dim=-1)
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, parts[0]) * (1.0 + 0.1 * parts[1])
        return (x + torch.cat(parts, dim=-1).mean(),)


class SideTableReadByTheTail(Base):
    """Slices of a table between the blocks; those of all blocks are read behind them as well."""

    def forward(self, x, t):
        shift = self.condition(t)[..., :WIDTH]
        x, seen = self.embed(x), 0.0
        for i, block in enumerate(self.blocks):
            row = self.table[i] * shift
            seen = seen + row
            x = block(x, row)
        return (x + seen,)


class SidePairSharedWithTheTail(Base):
    """A pair made between two blocks: the next block reads one half, the tail the other."""

    def forward(self, x, t):
        x, seen = self.embed(x), 0.0
        for i, block in enumerate(self.blocks):
            near, far = (self.condition(t) + self.table[i].repeat(2)).chunk(2, dim=-1)
            seen = seen + far
            x = block(x, near)
        return (x + seen,)


class LongSkips(Base):
    """U-shaped: what an early block made is added before a late one."""

    def forward(self, x, t):
        shift = self.condition(t)[..., :WIDTH]
        x, kept = self.embed(x), []
        for i, block in enumerate(self.blocks):
            if i >= len(self.blocks) // 2:
                x = x + kept.pop()
            x = block(x, shift)
            if i < len(self.blocks) // 2:
                kept.append(x)
        return (x,)


class SecondStreamEverySecondBlock(Base):
    """A second stream that only some blocks change."""

    def forward(self, x, t):
        shift = self.condition(t)[..., :WIDTH]
        x = self.embed(x)
        y = x.mean(dim=1, keepdim=True).expand(-1, 3, -1) * 1.0
        for i, block in enumerate(self.blocks):
            x = block(x, shift + y.mean(dim=1, keepdim=True))
            if i % 2:
                y = y + torch.tanh(x.mean(dim=1, keepdim=True))
        return (x + y.mean(dim=1, keepdim=True),)


class FirstBlockDiffers(Base):
    """A stack need not be of one kind."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[0] = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x, t):
        shift = self.condition(t)[..., :WIDTH]
        x = self.embed(x)
        for i, block in enumerate(self.blocks):
            x = x + block(x) if i == 0 else block(x, shift)
        return (x,)


class ResidualOutsideTheBlock(Base):
    """The parent adds: glue that is repeated behind the last block too."""

    def forward(self, x, t):
        shift = self.condition(t)[..., :WIDTH]
        x = self.embed(x)
        for block in self.blocks:
            x = x + 0.1 * block(x, shift)
        return (x,)


class SharedWeights(Base):
    """One block at every depth."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([self.blocks[0]] * 6)

    def forward(self, x, t):
        shift = self.condition(t)[..., :WIDTH]
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, shift)
        return (x,)


MODELS = [
    ChunkInTheHead,
    SideTableReadByTheTail,
    SidePairSharedWithTheTail,
    LongSkips,
    SecondStreamEverySecondBlock,
    FirstBlockDiffers,
    ResidualOutsideTheBlock,
    SharedWeights,
]


@pytest.mark.parametrize(("fn", "bn"), [(1, 0), (2, 1), (1, 2), (3, 2)])
@pytest.mark.parametrize("kind", MODELS)
def test_never_reusing_and_reusing_on_equal_inputs(kind: type[Base], fn: int, bn: int) -> None:
    torch.manual_seed(0)
    model = kind()
    compiled = compile_cached(model, residual_diff_threshold=0.0, Fn_compute_blocks=fn, Bn_compute_blocks=bn)
    steps = [(torch.randn(2, 5, WIDTH), torch.full((2,), 9.0 - i)) for i in range(4)]
    for step in steps:
        assert torch.equal(compiled(*step)[0], model(*step)[0])
    fx_cache.configure(model, residual_diff_threshold=1.0)
    with fx_cache.session("replay", "only"):
        outputs = [compiled(*steps[0])[0].clone() for _ in range(3)]
    assert last_branch(model)["spans"][0]["hits"] == [1, 2]
    assert all(relative_error(model(*steps[0])[0], output) < 1e-5 for output in outputs)


def test_what_does_not_depend_on_the_streams_is_never_stale() -> None:
    torch.manual_seed(0)
    model = SideTableReadByTheTail()
    compiled = compile_cached(model, residual_diff_threshold=1.0)
    x, (t0, t1) = torch.randn(1, 5, WIDTH), (torch.tensor([2.0]), torch.tensor([1.0]))
    with fx_cache.session("s", "only"):
        compiled(x, t0)
        hit = compiled(x, t1)[0]
    shifts = [model.condition(t)[..., :WIDTH] for t in (t0, t1)]
    first, residual = [], None
    for shift in shifts:
        stream = model.blocks[0](model.embed(x), model.table[0] * shift)
        first.append(stream)
        if residual is None:
            for i in range(1, 6):
                stream = model.blocks[i](stream, model.table[i] * shift)
            residual = stream - first[0]
    expected = first[1] + residual + sum(model.table[i] * shifts[1] for i in range(6))
    assert last_branch(model)["spans"][0]["hits"] == [1]
    assert relative_error(expected, hit) < 1e-6
