"""A transformer whose blocks work on several ranks: its heads and widths are divided, or its tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed import _functional_collectives as collectives
from torch.nn import functional

WIDTH, HEADS, TOKENS = 32, 4, 24


def add_up(x: Tensor, group: str) -> Tensor:
    return collectives.all_reduce(x, "sum", group)


class Block(nn.Module):
    """Attention and feed-forward, modulated by the time; written for one rank's part of them.

    Args:
        parts: into how many the heads, or the tokens, are divided; one rank has one of them.
        group: the ranks.
        tokens: whether it is the tokens.
    """

    def __init__(self, parts: int, group: str, tokens: bool) -> None:
        super().__init__()
        self.group, self.tokens = group, tokens
        self.heads = HEADS if tokens else HEADS // parts
        inner = self.heads * (WIDTH // HEADS)
        up = 4 * WIDTH if tokens else 4 * WIDTH // parts
        self.norm = nn.LayerNorm(WIDTH)
        self.modulation = nn.Linear(WIDTH, 2 * WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * inner, bias=False)
        self.out = nn.Linear(inner, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, up, bias=False)
        self.down = nn.Linear(up, WIDTH, bias=False)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        scale, gate = self.modulation(time)[:, None].chunk(2, dim=-1)
        h = self.norm(x) * (1 + scale)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(h).chunk(3, dim=-1))
        if self.tokens:
            k, v = (collectives.all_gather_tensor(t.contiguous(), 2, self.group) for t in (k, v))
        h = self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + gate * (h if self.tokens else add_up(h, self.group))
        h = self.down(functional.gelu(self.up(self.norm(x))))
        return x + gate * (h if self.tokens else add_up(h, self.group))


class Divided(nn.Module):
    """The transformer: latents [batch, tokens, 8], of which a rank is given all or its own, and times [batch]."""

    def __init__(self, parts: int, group: str, tokens: bool, depth: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(8, WIDTH)
        self.time = nn.Linear(1, WIDTH)
        self.blocks = nn.ModuleList(Block(parts, group, tokens) for _ in range(depth))
        self.out = nn.Linear(WIDTH, 8)

    def forward(self, latent: Tensor, timestep: Tensor) -> tuple[Tensor]:
        time = functional.silu(self.time(timestep[:, None].sin()))
        x = self.embed(latent)
        for block in self.blocks:
            x = block(x, time)
        return (self.out(x),)


def part_of(weights: dict[str, Tensor], rank: int, parts: int, tokens: bool) -> dict[str, Tensor]:
    """One rank's part of the weights of the model on one rank."""
    if tokens:
        return weights

    def cut(name: str, weight: Tensor) -> Tensor:
        if name.endswith("qkv.weight"):
            return torch.cat([w.chunk(parts)[rank] for w in weight.chunk(3)])
        if name.endswith("up.weight"):
            return weight.chunk(parts)[rank]
        if name.endswith(("blocks.out.weight", "down.weight")) or (name.startswith("blocks") and ".out." in name):
            return weight.chunk(parts, dim=1)[rank]
        return weight

    return {name: cut(name, weight) for name, weight in weights.items()}
