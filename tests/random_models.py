"""Random transformers: what real ones do in many ways, drawn together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

WIDTH = 8
TOKENS = (6, 5, 4)
TEXT_TOKENS = 24


@torch.library.custom_op("fx_cache_tests::add_into", mutates_args={"x"})
def add_into(x: Tensor, value: Tensor) -> None:
    """Writes, and returns nothing."""
    x.add_(value)


def _augmented(x: Tensor, value: Tensor) -> Tensor:
    x += value
    return x


def _addcmul(x: Tensor, value: Tensor) -> Tensor:
    x.addcmul_(value, value.new_ones(1))
    return x


def _slice(x: Tensor, value: Tensor) -> Tensor:
    x[:] = x + value
    return x


def _copy(x: Tensor, value: Tensor) -> Tensor:
    x.copy_(x + value)
    return x


def _out(x: Tensor, value: Tensor) -> Tensor:
    torch.add(x, value, out=x)
    return x


def _operator(x: Tensor, value: Tensor) -> Tensor:
    torch.ops.fx_cache_tests.add_into(x, value)
    return x


def _views(x: Tensor, value: Tensor) -> Tensor:
    half = x.shape[1] // 2
    x[:, :half] += value[:, :half]
    x[:, half:].add_(value[:, half:])
    return x


ADD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "": torch.add,
    "augmented": _augmented,
    "addcmul": _addcmul,
    "slice": _slice,
    "copy": _copy,
    "out": _out,
    "operator": _operator,
    "views": _views,
}
"""How a block adds to its stream: out of place, or by each form of a write."""

WRITES = tuple(ADD)[1:]


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
            again and again; ``"rounds"``: with an embedding of each round; ``"nested"``: a list that holds what
            embeds, the list of blocks and what puts out; ``"dict"``: a ModuleDict, each block a list of two parts.
        write: how blocks add to their streams, of `ADD`.
        join: ``"cat"``: the second list has all streams in one; ``"split"``: the first one has.
        over: what came into the first list is added behind it again.
        side: a network that sees the timestep only stands before the blocks.
        encoder: the context goes through blocks of its own first.
        wrap: blocks begin with ``"autocast"``, or run under ``"checkpoint"``.
        fn, bn, scope: options of the backend.
        seed: of the weights.
    """

    kinds: tuple[tuple[str, ...], ...] = (("a",) * 4,)
    streams: int = 1
    context: bool = False
    glue: int = 0
    skips: bool = False
    drops: bool = False
    holder: str = "list"
    write: str = ""
    join: str = ""
    over: bool = False
    side: bool = False
    encoder: bool = False
    wrap: str = ""
    fn: int = 1
    bn: int = 0
    scope: str = "model"
    seed: int = 0

    @property
    def depth(self) -> int:
        return sum(map(len, self.kinds))

    def joined(self, n: int) -> bool:
        """Whether all streams are one in a list of blocks."""
        return self.join == ("cat" if n > 0 else "split")

    def carried(self, n: int) -> int:
        """How many streams a list of blocks carries."""
        return 1 if self.joined(n) else self.streams


KINDS: dict[str, Spec] = {
    **{f"write {write}": Spec(write=write) for write in WRITES},
    "write augmented, two streams": Spec(kinds=(("b",) * 4,), streams=2, write="augmented"),
    "write views, glue": Spec(glue=2, holder="shared", write="views"),
    "join cat": Spec(kinds=(("b",) * 3, ("a",) * 3), streams=2, join="cat"),
    "join split": Spec(kinds=(("a",) * 3, ("b",) * 3), streams=2, join="split"),
    "join cat, written": Spec(kinds=(("b",) * 3, ("a",) * 3), streams=2, join="cat", write="augmented"),
    "join split, written": Spec(kinds=(("a",) * 3, ("b",) * 3), streams=2, join="split", write="augmented"),
    "over": Spec(kinds=(("a",) * 3, ("a",) * 3), over=True),
    "over, written": Spec(kinds=(("b",) * 3, ("b",) * 3), context=True, over=True, write="augmented"),
    "side": Spec(side=True),
    "encoder": Spec(context=True, encoder=True),
    "drops": Spec(kinds=(("b", "c", "b"),), streams=2, drops=True),
    "rounds": Spec(holder="rounds"),
    "attributes, written": Spec(kinds=(("a",) * 5,), context=True, glue=2, holder="attributes", write="augmented"),
    "shared, written": Spec(holder="shared", write="augmented"),
    "nested": Spec(holder="nested"),
    "dict": Spec(holder="dict"),
    "autocast": Spec(wrap="autocast"),
    "checkpoint": Spec(wrap="checkpoint"),
}
"""One model of each kind."""


def kinds_of(spec: Spec) -> set[str]:
    """The names, of `KINDS`, of what a model does."""
    found = {f"write {spec.write}"} if spec.write else set()
    if spec.write and spec.streams > 1:
        found.add("write augmented, two streams")
    if spec.write == "views" and spec.glue:
        found.add("write views, glue")
    if spec.join:
        found |= {f"join {spec.join}"} | ({f"join {spec.join}, written"} if spec.write else set())
    if spec.write:
        found.add(f"{spec.holder}, written")
    found |= {spec.holder, spec.wrap} | ({"over, written"} if spec.over and spec.write else set())
    if spec.drops and len(set(spec.kinds[-1][-2:])) > 1:
        found.add("drops")
    found |= {name for name in ("over", "side", "encoder") if getattr(spec, name)}
    return found & KINDS.keys()


def spec_of(number: int) -> Spec:
    """A rather small model, the same for the same number."""
    draw = Random(number)
    streams = draw.choice([1, 1, 2, 2, 3])
    holder = draw.choice(["list"] * 5 + ["attributes", "shared", "rounds", "nested", "dict"])
    palette = draw.choice(["a", "b", "ab", "abc"])
    lists = draw.randint(1, 2) if holder == "list" else 1
    counts = [draw.randint(3, 6 if lists == 1 else 4) for _ in range(lists)]
    mixed = palette if holder == "list" else palette[0]
    kinds = tuple(tuple(draw.choices(mixed, k=count)) for count in counts)
    join = draw.choice(["", "cat", "split"]) if lists == 2 and streams > 1 else ""
    wrap = draw.choice([""] * 4 + ["autocast", "checkpoint"])
    write = "" if wrap == "checkpoint" else draw.choice([""] * len(WRITES) + list(WRITES))
    scope = draw.choice(["model", "stack"])
    least = sum(counts) if scope == "model" else min(counts)
    # A probe is the difference of one stream before and behind the head: no other form of it in between.
    fn = draw.randint(1, (min(counts[0], least) if join else least) - 1)
    # Parts of one tensor that a tail writes to are not handed on to it: such a span is refused.
    most = 0 if write and join == "split" else max(0, least - 1 - fn)
    context = draw.random() < 0.5
    return Spec(
        kinds=kinds,
        streams=streams,
        context=context,
        glue=0 if join else draw.choice([0, 0, 1, 2]),
        skips=holder == "list" and not write and not join and draw.random() < 0.5,
        drops=streams > 1 and holder == "list" and not join and draw.random() < 0.5,
        holder=holder,
        write=write,
        join=join,
        over=lists == 2 and not join and draw.random() < 0.5,
        side=draw.random() < 0.25,
        encoder=context and draw.random() < 0.5,
        wrap=wrap,
        fn=fn,
        bn=draw.randint(0, most),
        scope=scope,
        seed=draw.randrange(1000),
    )


class Block(nn.Module):
    """One block of kind ``a`` (feed-forward and a mean of all streams), ``b`` (joint attention), ``c`` (both)."""

    def __init__(self, kind: str, spec: Spec, streams: int, skip: bool = False, drops: bool = False) -> None:
        super().__init__()
        self.kind, self.drops, self.autocast = kind, drops, spec.wrap == "autocast"
        self.add = ADD[spec.write]
        self.modulation = nn.Linear(WIDTH, 2 * WIDTH)
        self.skip = nn.Linear(2 * WIDTH, WIDTH) if skip else None
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(streams))
        self.context = nn.Linear(WIDTH, WIDTH) if spec.context else None
        if kind in "ac":
            self.up = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(streams))
            self.down = nn.ModuleList(nn.Linear(3 * WIDTH, WIDTH) for _ in range(streams))
            self.share = nn.Linear(WIDTH, WIDTH)
        if kind in "bc":
            self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(streams))
            self.out = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(streams))

    def forward(
        self, streams: list[Tensor], time: Tensor, context: Tensor | None, skip: Tensor | None = None
    ) -> list[Tensor]:
        if self.autocast:
            with torch.autocast("cpu", dtype=torch.float32, enabled=False):
                modulation = self.modulation(time.float())
        else:
            modulation = self.modulation(time)
        shift, scale = modulation.unsqueeze(1).chunk(2, dim=-1)
        streams = list(streams)
        if self.skip is not None and skip is not None:
            streams[0] = self.skip(torch.cat([streams[0], skip], dim=-1))
        if self.kind in "bc":
            normed = [norm(x) * (1 + scale) + shift for norm, x in zip(self.norms, streams, strict=True)]
            q, k, v = torch.cat([p(x) for p, x in zip(self.qkv, normed, strict=True)], dim=1).chunk(3, dim=-1)
            parts = F.scaled_dot_product_attention(q, k, v).split([x.shape[1] for x in streams], dim=1)
            streams = [self.add(x, out(p)) for x, out, p in zip(streams, self.out, parts, strict=True)]
        if self.kind in "ac":
            shared = self.share(torch.cat(streams, dim=1).mean(dim=1, keepdim=True))
            streams = [
                self.add(x, scale * down(F.gelu(up(norm(x) + shared))))
                for x, norm, up, down in zip(streams, self.norms, self.up, self.down, strict=True)
            ]
        if self.context is not None and context is not None:
            keys = self.context(context)
            streams[0] = self.add(streams[0], F.scaled_dot_product_attention(streams[0], keys, keys))
        return streams[:1] if self.drops else streams


class Parts(nn.Module):
    """A block that is a list of two."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Block(kind, spec, spec.streams) for kind in ("b", "a"))

    def forward(
        self, streams: list[Tensor], time: Tensor, context: Tensor | None, skip: Tensor | None = None
    ) -> list[Tensor]:
        for part in self.parts:
            streams = part(streams, time, context, skip)
        return streams


class FeedForward(nn.Module):
    """A layer of a network beside the blocks."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, factor * WIDTH)
        self.down = nn.Linear(factor * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class RandomModel(nn.Module):
    """A transformer as a `Spec` says."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        torch.manual_seed(spec.seed)
        self.spec = spec
        self.embed = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(spec.streams))
        self.time = nn.Linear(2, WIDTH)
        self.side = nn.ModuleList(FeedForward(8) for _ in range(4 if spec.side else 0))
        self.encoder = nn.ModuleList(FeedForward(4) for _ in range(4 if spec.encoder else 0))
        self.lists = nn.ModuleList()
        self.rounds = nn.Embedding(spec.depth, WIDTH) if spec.holder == "rounds" else None
        self.norm = nn.LayerNorm(WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.hold([self.made(n) for n in range(len(spec.kinds))])
        for p in self.parameters():
            nn.init.normal_(p, std=0.3)

    def made(self, n: int) -> list[nn.Module]:
        """New blocks of list n."""
        spec, kinds = self.spec, self.spec.kinds[n]
        if spec.holder == "dict":
            return [Parts(spec) for _ in kinds]
        last = n == len(spec.kinds) - 1
        return [
            Block(
                kind,
                spec,
                spec.carried(n),
                skip=spec.skips and n == 0 and i >= (len(kinds) + 1) // 2,
                drops=spec.drops and last and i == len(kinds) - 1,
            )
            for i, kind in enumerate(kinds)
        ]

    def hold(self, lists: list[list[nn.Module]]) -> None:
        """Puts the blocks where the model has them."""
        holder = self.spec.holder
        if holder == "list":
            self.lists.extend(nn.ModuleList(blocks) for blocks in lists)
        elif holder == "nested":
            self.net = nn.ModuleList([self.embed, nn.ModuleList(lists[0]), self.out])
            del self.embed, self.out
        elif holder == "dict":
            self.parts = nn.ModuleDict({f"block_{i}": block for i, block in enumerate(lists[0])})
        elif holder in ("shared", "rounds"):
            self.block = lists[0][0]
        else:
            for i, block in enumerate(lists[0]):
                setattr(self, f"block_{i}", block)

    def block_at(self, n: int, i: int) -> nn.Module:
        holder = self.spec.holder
        if holder == "list":
            return self.lists[n][i]
        if holder == "nested":
            return self.net[1][i]
        if holder == "dict":
            return self.parts[f"block_{i}"]
        return self.block if holder in ("shared", "rounds") else getattr(self, f"block_{i}")

    def begin(
        self, hidden: Tensor, timestep: Tensor, others: list[Tensor], context: Tensor | None, glue: Tensor | None
    ) -> tuple[list[Tensor], dict[str, Any]]:
        """The streams as the first list gets them, and what all blocks see."""
        embed = self.net[0] if self.spec.holder == "nested" else self.embed
        streams = [e(x) for e, x in zip(embed, [hidden, *others], strict=False)]
        time = F.silu(self.time(torch.stack([torch.sin(timestep), torch.cos(timestep)], dim=-1)))
        for layer in self.side:
            time = layer(time)
        for layer in self.encoder:
            context = layer(context)
        at = {"time": time, "context": context, "glue": glue}
        if self.spec.over:
            at["first"] = streams[0].clone() if self.spec.write else streams[0]
        return (self.cat(streams) if self.spec.joined(0) else streams), at

    def finish(self, streams: list[Tensor], time: Tensor) -> Tensor:
        out = self.net[2] if self.spec.holder == "nested" else self.out
        x = streams[0][:, -TOKENS[0] :] if self.spec.joined(len(self.spec.kinds) - 1) else streams[0]
        return out(self.norm(x) * (1 + time.unsqueeze(1)))

    def cat(self, streams: list[Tensor]) -> list[Tensor]:
        """All streams in one, the first at the end."""
        return [torch.cat([*streams[1:], streams[0]], dim=1)]

    def reform(self, n: int, streams: list[Tensor]) -> list[Tensor]:
        """The streams in the form that list n has them in, given that of the list before."""
        if n == 0 or self.spec.joined(n) == self.spec.joined(n - 1):
            return streams
        if self.spec.joined(n):
            return self.cat(streams)
        sizes = TOKENS[: self.spec.streams]
        *others, first = streams[0].split([*sizes[1:], sizes[0]], dim=1)
        return [first, *others]

    def enter(self, n: int, streams: list[Tensor], at: dict[str, Any]) -> list[Tensor]:
        """What happens before the first block of list n."""
        streams = self.reform(n, streams)
        if self.spec.over and n > 0:
            streams = [streams[0] + 0.5 * at["first"], *streams[1:]]
        return streams

    def window(self, n: int, i: int, streams: list[Tensor], kept: list[Tensor], at: dict[str, Any]) -> list[Tensor]:
        """Block i of list n and the glue behind it; appends to `kept` what a later block may read."""
        return self.glue(i, self.block_alone(n, i, streams, kept, at), at)

    def block_alone(self, n: int, i: int, streams: list[Tensor], kept: list[Tensor], at: dict) -> list[Tensor]:
        spec = self.spec
        count = len(spec.kinds[n])
        skip = None
        if spec.skips and n == 0 and i >= (count + 1) // 2:
            skip = kept[count - 1 - i]
        time = at["time"] if self.rounds is None else at["time"] + self.rounds.weight[i]
        block = self.block_at(n, i)
        if spec.wrap == "checkpoint":
            streams = checkpoint(block, streams, time, at["context"], skip, use_reentrant=False)
        else:
            streams = block(streams, time, at["context"], skip)
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
        streams, at = self.begin(hidden, timestep, others, context, glue)
        kept: list[Tensor] = []
        for n, kinds in enumerate(self.spec.kinds):
            streams = self.enter(n, streams, at)
            for i in range(len(kinds)):
                streams = self.window(n, i, streams, kept, at)
        return (self.finish(streams, at["time"]),)


def steps_of(spec: Spec, count: int) -> list[dict[str, Any]]:
    """A walk: a latent and a timestep that change, all else the same objects."""
    generator = torch.Generator().manual_seed(spec.seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    fixed = {
        "others": [random(1, TOKENS[k], WIDTH) for k in range(1, spec.streams)],
        "context": random(1, TEXT_TOKENS if spec.encoder else 3, WIDTH) if spec.context else None,
        "glue": 0.5 * random(1, TOKENS[0], WIDTH) if spec.glue else None,
    }
    hidden, drift = random(1, TOKENS[0], WIDTH), random(1, TOKENS[0], WIDTH)
    found = []
    for i in range(count):
        found.append({"hidden": hidden, "timestep": torch.tensor([1.0 - 0.05 * i]), **fixed})
        hidden = hidden + 0.1 * (drift + random(1, TOKENS[0], WIDTH))
    return found
