"""Writes graphs, pieces and the report to a folder, one sub-folder a captured graph."""

from __future__ import annotations

import contextlib
import json
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import fx

from fx_cache.errors import Failure
from fx_cache.ops import cond
from fx_cache.passes.runner import PassRecord
from fx_cache.patterns.explanation import Explanation
from fx_cache.patterns.graph import is_weight


@dataclass
class Dump:
    """A folder for one captured graph.

    Holds ``00_captured.py``, ``NN_<pass>.py`` after each pass that changed something, ``pieces/<name>.py``,
    ``explain.txt``, ``skeleton.txt`` (the rewritten graph without its weights) and ``report.json``; ``error.txt``
    where an error of ours kept it from being cached.
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

    def report(self, gm: fx.GraphModule, explanation: Explanation, records: Sequence[PassRecord]) -> None:
        """Writes what was found, the rewritten graph without its weights, and how long each pass took."""
        (self.folder / "explain.txt").write_text(f"{explanation}\n")
        (self.folder / "skeleton.txt").write_text(skeleton(gm))
        passes = [{"pass": r.name, "rewrites": r.rewrites, "seconds": round(r.seconds, 6)} for r in records]
        report = {"passes": passes, "explanation": explanation.to_dict()}
        (self.folder / "report.json").write_text(json.dumps(report, indent=2))

    def failure(self, failure: Failure) -> None:
        """Writes what was raised, and where; the graphs written before show what it was raised over."""
        with contextlib.suppress(OSError):  # it may be the very disk that is full
            (self.folder / "error.txt").write_text(f"{failure}\n\n{failure.trace}")


def readable(gm: fx.GraphModule) -> str:
    """A graph as Python, with the shapes of its values, and its sub-modules."""
    return str(gm.print_readable(print_output=False))


def skeleton(gm: fx.GraphModule) -> str:
    """A rewritten graph and the branches of its conditionals as Python, with ``...`` for weights."""
    branches = [
        (str(a.target), getattr(gm, str(a.target)))
        for n in gm.graph.find_nodes(op="call_function", target=cond)
        for a in n.args[1:3]
        if isinstance(a, fx.Node)
    ]
    weights = {n for n in gm.graph.find_nodes(op="placeholder") if is_weight(n)}
    names = {n.name for n in weights}
    text = _function("forward", gm.graph, names)
    for name, branch in branches:
        text += "\n\n" + _function(name, branch.graph, names)
    return text + "\n"


def _function(name: str, graph: fx.Graph, hidden: set[str]) -> str:
    lines = []
    inputs = _elided(list(graph.find_nodes(op="placeholder")), hidden)
    for node in graph.nodes:
        if node.op == "call_module":
            lines.append(f"{node.name} = self.{node.target}({_elided(node.args, hidden)})")
        elif node.op == "get_attr":
            lines.append(f"{node.name} = self.{node.target}")
        elif node.target is operator.getitem:
            lines.append(f"{node.name} = {node.args[0]}[{node.args[1]}]")
        elif node.op in ("call_function", "call_method"):
            function = getattr(node.target, "__name__", str(node.target))
            lines.append(f"{node.name} = {function}({_elided(node.args, hidden)})")
        elif node.op == "output":
            lines.append(f"return {_elided(node.args, hidden)}")
    return f"def {name}({inputs}):\n" + "\n".join(f"    {line}" for line in lines)


def _elided(values: Sequence[Any], hidden: set[str]) -> str:
    """The values as arguments; runs of weights become one ``...``."""
    shown: list[str] = []
    for value in values:
        if isinstance(value, tuple | list):
            text = f"({_elided(value, hidden)}{',' if len(value) == 1 else ''})"
        elif isinstance(value, fx.Node) and value.name in hidden:
            text = "..."
        else:
            text = str(value)
        if text != "..." or shown[-1:] != ["..."]:
            shown.append(text)
    return ", ".join(shown)
