"""How much work each part of a graph is, in FLOPs."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from fx_cache.patterns.graph import hint, hinted_shape, value_of


class Work:
    """The FLOPs of a graph's operations, as ``torch.utils.flop_counter`` counts them; like operations once."""

    def __init__(self, graph: fx.Graph) -> None:
        self._counted: dict[Any, int] = {}
        self._counter = FlopCounterMode(display=False)
        with torch.no_grad(), self._counter:
            self._by_node = {n: self._count(n) for n in graph.nodes if n.op in ("call_function", "call_method")}
        self.total = sum(self._by_node.values())

    def of(self, node: fx.Node) -> int:
        """The FLOPs of one operation."""
        return self._by_node.get(node, 0)

    def share(self, nodes: Iterable[fx.Node]) -> float:
        """The part of the graph's FLOPs that lies in `nodes`, 0.0 to 1.0; 0.0 for a graph without any."""
        return sum(self._by_node.get(n, 0) for n in nodes) / self.total if self.total else 0.0

    def _count(self, node: fx.Node) -> int:
        if not _may_work(node):
            return 0
        key = (node.target, repr(tree_map(_form, (node.args, node.kwargs), is_leaf=_is_leaf)))
        if key not in self._counted:
            before = self._counter.get_total_flops()
            _try(node)
            self._counted[key] = int(self._counter.get_total_flops() - before)
        return self._counted[key]


def _is_leaf(value: Any) -> bool:
    return isinstance(value, fx.Node | torch.SymInt)


def _form(value: Any) -> Any:
    value = value_of(value) if isinstance(value, fx.Node) else value
    return (hinted_shape(value), value.dtype) if isinstance(value, torch.Tensor) else value


def _stand_in(value: Any) -> Any:
    """A tensor without data, or a number, in the place of a symbolic one."""
    value = value_of(value) if isinstance(value, fx.Node) else value
    if isinstance(value, torch.Tensor):
        return torch.empty(hinted_shape(value), dtype=value.dtype, device="meta")
    return tree_map(hint, value) if isinstance(value, torch.SymInt) else value


_METHODS = {"matmul", "mm", "bmm", "mv", "addmm", "addmv", "baddbmm", "addbmm", "__matmul__", "__rmatmul__"}


def _may_work(node: fx.Node) -> bool:
    """Whether an operation may be more than elementwise: only those are tried."""
    if node.op == "call_method":
        return node.target in _METHODS
    if getattr(node.target, "__module__", None) == "_operator":
        return node.target in (operator.matmul, operator.imatmul)
    return any(isinstance(value_of(a), torch.Tensor) and value_of(a).ndim > 1 for a in node.all_input_nodes)


def _try(node: fx.Node) -> None:
    """Runs an operation on tensors without data; one that cannot be run so, as a nested graph, counts as no work."""
    args, kwargs = tree_map(_stand_in, (node.args, node.kwargs), is_leaf=_is_leaf)
    with contextlib.suppress(Exception):
        if node.op == "call_method":
            getattr(args[0], str(node.target))(*args[1:], **kwargs)
        elif callable(node.target):
            node.target(*args, **kwargs)
