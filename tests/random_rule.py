"""The caching rule applied to random transformers block by block, in plain Python."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tests.random_models import RandomModel

Place = tuple[int, int]
"""A block: its list, and its number there."""


@dataclass
class Slot:
    """What the oracle remembers of one span."""

    probe: Tensor | None = None
    residuals: list[Tensor] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)
    hits: list[int] = field(default_factory=list)
    diffs: dict[int, float] = field(default_factory=dict)


class Oracle:
    """The caching rule of one model: F(n) blocks, a probe, then what was added last time, or everything."""

    def __init__(self, model: RandomModel, threshold: float) -> None:
        self.model, self.spec, self.threshold = model, model.spec, threshold
        lists = [[(n, i) for i in range(len(kinds))] for n, kinds in enumerate(self.spec.kinds)]
        self.groups = [[p for places in lists for p in places]] if self.spec.scope == "model" else lists
        self.slots = [Slot() for _ in self.groups]

    def __call__(self, step: int, **inputs: Any) -> Tensor:
        streams, at = self.model.begin(**inputs)
        kept: list[Tensor] = []
        for group, slot in zip(self.groups, self.slots, strict=True):
            streams = self._group(step, group, slot, self.model.enter(group[0][0], streams, at), kept, at)
        return self.model.finish(streams, at["time"])

    def _group(
        self, step: int, group: list[Place], slot: Slot, streams: list[Tensor], kept: list[Tensor], at: dict
    ) -> list[Tensor]:
        """A group of lists that one decision is for, from its first block on."""
        spec = self.spec
        head, span, tail = group[: spec.fn], group[spec.fn : len(group) - spec.bn], group[len(group) - spec.bn :]
        before = streams[0].clone()
        streams = self._run(head[:-1], True, streams, kept, at)
        n, i = head[-1]
        if i == 0 and head[-1] != group[0]:
            streams = self.model.enter(n, streams, at)
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
        # What stands before the first block of the tail is glue behind the span's last one.
        ends = bool(tail) and tail[0][1] == 0
        first = self._form(span + tail[:ends], streams)
        if hit:
            slot.hits.append(step)
            streams = [x + r for x, r in zip(first, slot.residuals, strict=False)]
            kept += [first[0] + r for r in slot.kept]
        else:
            start = len(kept)
            streams = self.model.glue(i, streams, at) if joint else streams
            streams = self._run(span, False, streams, kept, at)
            streams = self.model.enter(tail[0][0], streams, at) if ends else streams
            slot.probe = probe
            slot.residuals = [x - b for x, b in zip(streams, first, strict=False)]
            # What a later block reads of the stream as it was within is that stream, and goes on by a residual too.
            slot.kept = [x - first[0] for x in kept[start:]]
        return self._run(tail, ends, streams, kept, at)

    def _run(
        self, places: list[Place], entered: bool, streams: list[Tensor], kept: list[Tensor], at: dict
    ) -> list[Tensor]:
        """The model's own blocks, of the first of which the list may be entered; their writes are not seen outside."""
        streams = [x.clone() for x in streams] if self.spec.write else streams
        for n, i in places:
            if i == 0 and not (entered and (n, i) == places[0]):
                streams = self.model.enter(n, streams, at)
            streams = self.model.window(n, i, streams, kept, at)
        return streams

    def _form(self, span: list[Place], streams: list[Tensor]) -> list[Tensor]:
        """The streams in the form that they have behind some blocks."""
        for n, i in span:
            if i == 0:
                streams = self.model.reform(n, streams)
        return [x.clone() for x in streams] if self.spec.write else streams
