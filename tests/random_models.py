"""Random transformers, and the caching rule applied to them block by block in plain Python."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 8
TOKENS = (6, 5, 4)


@dataclass(frozen=True)
class Spec:
    """What a random model looks like, and how it is cached.

    Attributes:
        kinds: for each list of blocks the kind of each block.
        streams: tensors carried from block to block; of the first the output is made.
        context: whether blocks read a step-invariant sequence.
        glue: add an input behind every n-th block; 0: nothing.
        skips: blocks of the second half of the first list read what one of the first half made.
        drops: the last block of all gives back the first stream only.
        holder: ``"list"``: blocks in a ModuleList; ``"attributes"``: each an attribute; ``"shared"``: one block, run
            again and again.
        fn, bn, scope: options of the backend.
        seed: of the weights.
    """

    kinds: tuple[tuple[str, ...], ...]
    streams: int
    context: bool
    glue: int
    skips: bool
    drops: bool
    holder: str
    fn: int
    bn: int
    scope: str
    seed: int

    @property
    def depth(self) -> int:
        return sum(map(len, self.kinds))


@st.composite
def specs(draw: Any) -> Spec:
    streams = draw(st.integers(1, 3))
    holder = draw(st.sampled_from(["list", "list", "list", "attributes", "shared"]))
    palette = draw(st.sampled_from(["a", "b", "ab", "abc"]))
    lists = draw(st.integers(1, 2)) if holder == "list" else 1
    kinds = []
    for _ in range(lists):
        count = draw(st.integers(3, 12 // lists))
        if holder == "list":
            kinds.append(tuple(draw(st.sampled_from(palette)) for _ in range(count)))
        else:
            kinds.append((palette[0],) * count)
    depth = sum(map(len, kinds))
    scope = draw(st.sampled_from(["model", "stack"]))
    least = depth if scope == "model" else min(map(len, kinds))
    fn = draw(st.integers(1, least - 1))
    skips = holder == "list" and draw(st.booleans())
    return Spec(
        kinds=tuple(kinds),
        streams=streams,
        context=draw(st.booleans()),
        glue=draw(st.sampled_from([0, 0, 1, 2])),
        skips=skips,
        drops=streams > 1 and holder == "list" and draw(st.booleans()),
        holder=holder,
        fn=fn,
        bn=draw(st.integers(0, least - 1 - fn)),
        scope=scope,
        seed=draw(st.integers(0, 99)),
    )


class Block(nn.Module):
    """One block of kind ``a`` (feed-forward and a mean of all streams), ``b`` (joint attention), ``c`` (both)."""

    def __init__(self, kind: str, spec: Spec, skip: bool, drops: bool) -> None:
        super().__init__()
        self.kind, self.drops = kind, drops
        n = spec.streams
        self.modulation = nn.Linear(WIDTH, 2 * WIDTH)
        self.skip = nn.Linear(2 * WIDTH, WIDTH) if skip else None
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(n))
        self.context = nn.Linear(WIDTH, WIDTH) if spec.context else None
        if kind in "ac":
            self.up = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(n))
            self.down = nn.ModuleList(nn.Linear(3 * WIDTH, WIDTH) for _ in range(n))
            self.share = nn.Linear(WIDTH, WIDTH)
        if kind in "bc":
            self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(n))
            self.out = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(n))

    def forward(
        self, streams: list[Tensor], time: Tensor, context: Tensor | None, skip: Tensor | None = None
    ) -> list[Tensor]:
        streams = list(streams)
        if self.skip is not None and skip is not None:
            streams[0] = self.skip(torch.cat([streams[0], skip], dim=-1))
        shift, scale = self.modulation(time).unsqueeze(1).chunk(2, dim=-1)
        if self.kind in "bc":
            normed = [norm(x) * (1 + scale) + shift for norm, x in zip(self.norms, streams, strict=True)]
            q, k, v = torch.cat([p(x) for p, x in zip(self.qkv, normed, strict=True)], dim=1).chunk(3, dim=-1)
            parts = F.scaled_dot_product_attention(q, k, v).split([x.shape[1] for x in streams], dim=1)
            streams = [x + out(p) for x, out, p in zip(streams, self.out, parts, strict=True)]
        if self.kind in "ac":
            shared = self.share(torch.cat(streams, dim=1).mean(dim=1, keepdim=True))
            streams = [
                x + scale * down(F.gelu(up(norm(x) + shared)))
                for x, norm, up, down in zip(streams, self.norms, self.up, self.down, strict=True)
            ]
        if self.context is not None and context is not None:
            keys = self.context(context)
            streams[0] = streams[0] + F.scaled_dot_product_attention(streams[0], keys, keys)
        return streams[:1] if self.drops else streams


class RandomModel(nn.Module):
    """A transformer as a `Spec` says."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        torch.manual_seed(spec.seed)
        self.spec = spec
        self.embed = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(spec.streams))
        self.time = nn.Linear(2, WIDTH)
        self.lists = nn.ModuleList()
        count = 0
        for n, kinds in enumerate(spec.kinds):
            blocks = []
            for i, kind in enumerate(kinds):
                count += 1
                skip = spec.skips and n == 0 and i >= (len(kinds) + 1) // 2
                blocks.append(Block(kind, spec, skip, spec.drops and count == spec.depth))
            if spec.holder == "list":
                self.lists.append(nn.ModuleList(blocks))
            elif spec.holder == "shared":
                self.block = blocks[0]
            else:
                for i, block in enumerate(blocks):
                    setattr(self, f"block_{i}", block)
        self.norm = nn.LayerNorm(WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        for p in self.parameters():
            nn.init.normal_(p, std=0.3)

    def blocks(self, n: int) -> list[Block]:
        count = len(self.spec.kinds[n])
        if self.spec.holder == "list":
            return list(self.lists[n])
        if self.spec.holder == "shared":
            return [self.block] * count
        return [getattr(self, f"block_{i}") for i in range(count)]

    def begin(self, hidden: Tensor, timestep: Tensor, others: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        streams = [e(x) for e, x in zip(self.embed, [hidden, *others], strict=False)]
        wave = torch.stack([torch.sin(timestep), torch.cos(timestep)], dim=-1)
        return streams, F.silu(self.time(wave))

    def finish(self, streams: list[Tensor], time: Tensor) -> Tensor:
        return self.out(self.norm(streams[0]) * (1 + time.unsqueeze(1)))

    def window(self, n: int, i: int, streams: list[Tensor], kept: list[Tensor], at: dict[str, Any]) -> list[Tensor]:
        """Block i of list n and the glue behind it; appends to `kept` what a later block may read."""
        return self.glue(i, self.block_alone(n, i, streams, kept, at), at)

    def block_alone(self, n: int, i: int, streams: list[Tensor], kept: list[Tensor], at: dict) -> list[Tensor]:
        spec = self.spec
        count = len(spec.kinds[n])
        skip = None
        if spec.skips and n == 0 and i >= (count + 1) // 2:
            skip = kept[count - 1 - i]
        streams = self.blocks(n)[i](streams, at["time"], at["context"], skip)
        if spec.skips and n == 0:
            kept.append(streams[0])
        return streams

    def glue(self, i: int, streams: list[Tensor], at: dict[str, Any]) -> list[Tensor]:
        if self.spec.glue and i % self.spec.glue == 0:
            streams = [streams[0] + at["glue"], *streams[1:]]
        return streams

    def forward(
        self, hidden: Tensor, timestep: Tensor, others: list[Tensor], context: Tensor | None, glue: Tensor | None
    ) -> tuple[Tensor]:
        streams, time = self.begin(hidden, timestep, others)
        at = {"time": time, "context": context, "glue": glue}
        kept: list[Tensor] = []
        for n, kinds in enumerate(self.spec.kinds):
            for i in range(len(kinds)):
                streams = self.window(n, i, streams, kept, at)
        return (self.finish(streams, time),)


def steps_of(spec: Spec, count: int) -> list[dict[str, Any]]:
    """A walk: a latent and a timestep that change, all else the same objects."""
    generator = torch.Generator().manual_seed(spec.seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    fixed = {
        "others": [random(1, TOKENS[k], WIDTH) for k in range(1, spec.streams)],
        "context": random(1, 3, WIDTH) if spec.context else None,
        "glue": 0.5 * random(1, TOKENS[0], WIDTH) if spec.glue else None,
    }
    hidden, drift = random(1, TOKENS[0], WIDTH), random(1, TOKENS[0], WIDTH)
    found = []
    for i in range(count):
        found.append({"hidden": hidden, "timestep": torch.tensor([1.0 - 0.05 * i]), **fixed})
        hidden = hidden + 0.1 * (drift + random(1, TOKENS[0], WIDTH))
    return found


@dataclass
class Slot:
    """What the oracle remembers of one span."""

    probe: Tensor | None = None
    residuals: list[Tensor] = field(default_factory=list)
    kept: list[Tensor | None] = field(default_factory=list)
    hits: list[int] = field(default_factory=list)
    diffs: dict[int, float] = field(default_factory=dict)


class Oracle:
    """The caching rule of one model: F(n) blocks, a probe, then what was added last time, or everything."""

    def __init__(self, model: RandomModel, threshold: float) -> None:
        self.model, self.spec, self.threshold = model, model.spec, threshold
        spec = self.spec
        whole = [(n, i) for n, kinds in enumerate(spec.kinds) for i in range(len(kinds))]
        by_list = [[(n, i) for i in range(len(kinds))] for n, kinds in enumerate(spec.kinds)]
        self.groups = [whole] if spec.scope == "model" else by_list
        self.slots = [Slot() for _ in self.groups]

    def __call__(self, step: int, hidden: Tensor, timestep: Tensor, others: list, context: Any, glue: Any) -> Tensor:
        streams, time = self.model.begin(hidden, timestep, others)
        at = {"time": time, "context": context, "glue": glue}
        kept: list[Tensor] = []
        for group, slot in zip(self.groups, self.slots, strict=True):
            streams = self._group(step, group, slot, streams, kept, at)
        return self.model.finish(streams, time)

    def _group(self, step: int, group: list, slot: Slot, streams: list[Tensor], kept: list[Tensor], at: dict) -> list:
        spec = self.spec
        head, span, tail = group[: spec.fn], group[spec.fn : len(group) - spec.bn], group[len(group) - spec.bn :]
        before = streams[0]
        for n, i in head[:-1]:
            streams = self.model.window(n, i, streams, kept, at)
        n, i = head[-1]
        streams = self.model.block_alone(n, i, streams, kept, at)
        # Glue between two lists is no part of the head that ends there, unless it stands behind every block.
        joint = spec.glue > 1 and i + 1 == len(spec.kinds[n]) and bool(span) and span[0][0] != n
        if not joint:
            streams = self.model.glue(i, streams, at)
        probe = streams[0] - before
        hit = False
        if step > 0 and slot.probe is not None:
            slot.diffs[step] = float((slot.probe - probe).abs().mean() / slot.probe.abs().mean())
            hit = slot.diffs[step] < self.threshold
        if hit:
            slot.hits.append(step)
            streams = [x + r for x, r in zip(streams, slot.residuals, strict=False)]
            for value in slot.kept:
                kept.append(streams[0] if value is None else value)
        else:
            first, start = list(streams), len(kept)
            streams = self.model.glue(i, streams, at) if joint else streams
            for n, i in span:
                streams = self.model.window(n, i, streams, kept, at)
            slot.probe = probe
            slot.residuals = [x - b for x, b in zip(streams, first, strict=False)]
            # What a later block reads of the stream's last value is that stream, which goes on by its residual.
            slot.kept = [None if value is streams[0] else value for value in kept[start:]]
        for n, i in tail:
            streams = self.model.window(n, i, streams, kept, at)
        return streams
