"""Writes graphs, pieces and the report to a folder, one sub-folder a captured graph."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import fx

from fx_cache.passes.runner import PassRecord
from fx_cache.patterns.explanation import Explanation


@dataclass
class Dump:
    """A folder for one captured graph.

    Holds ``00_captured.py``, ``NN_<pass>.py`` after each pass that changed something, ``pieces/<name>.py``,
    ``explain.txt`` and ``report.json``.
    """

    folder: Path
    _count: int = field(default=0)

    @classmethod
    def open(cls, dump_dir: str | None) -> Dump | None:
        """A new sub-folder ``graph_N`` of `dump_dir`; None if that is None."""
        if dump_dir is None:
            return None
        root = Path(dump_dir)
        number = 0
        while (root / f"graph_{number}").exists():
            number += 1
        folder = root / f"graph_{number}"
        (folder / "pieces").mkdir(parents=True)
        return cls(folder)

    def graph(self, name: str, gm: fx.GraphModule) -> None:
        """Writes a graph as it is after the step `name`; the last one written is the rewritten graph."""
        (self.folder / f"{self._count:02}_{name}.py").write_text(readable(gm))
        self._count += 1
        for target, piece in gm.named_children():
            if isinstance(piece, fx.GraphModule):
                (self.folder / "pieces" / f"{target}.py").write_text(readable(piece))

    def report(self, explanation: Explanation, records: Sequence[PassRecord]) -> None:
        (self.folder / "explain.txt").write_text(f"{explanation}\n")
        passes = [{"pass": r.name, "rewrites": r.rewrites, "seconds": round(r.seconds, 6)} for r in records]
        report = {"passes": passes, "explanation": explanation.to_dict()}
        (self.folder / "report.json").write_text(json.dumps(report, indent=2))


def readable(gm: fx.GraphModule) -> str:
    """A graph as Python, with the shapes of its values, and its sub-modules."""
    return str(gm.print_readable(print_output=False))
