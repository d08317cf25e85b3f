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

from fx_cache.patterns.graph import hint, hinted_shape, is_weight, operation, value_of

MOVED = 64
"""FLOPs that reading and writing an element counts for, where an operation does little else or is not known."""

_KNOWN = {"aten", "prims", "prim"}
"""Namespaces of operators whose work the counter knows, or which have none."""


class _NoModules:
    """Stands for a counter's `ModuleTracker`: that hooks all modules of the process, those of other threads too."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


class Work:
    """The FLOPs of a graph's operations, as ``torch.utils.flop_counter`` counts them; like operations once.

    What the counter does not know (custom and fused operators, sub-graphs) is estimated by what it reads and writes: a
    product with each of its matrices of weights, and the elements that it moves. A size that depends on data is taken
    to be that of the largest sequence that the graph is given.

    Attributes:
        estimated: names of the operations whose work is an estimate.
    """

    def __init__(self, graph: fx.Graph) -> None:
        given = [n for n in graph.find_nodes(op="placeholder") if not is_weight(n)]
        self._unknown_size = max((_rows(n) for n in given), default=1)
        self.estimated: set[str] = set()
        self._counted: dict[Any, int] = {}
        self._counter = FlopCounterMode(display=False)
        self._counter.mod_tracker = _NoModules()  # type: ignore[assignment]
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
            ran = self._try(node)
            counted = int(self._counter.get_total_flops() - before)
            if not counted and _is_unknown(node, ran):
                counted = self._estimate(node)
                self.estimated.add(operation(node) or str(node.target))
            self._counted[key] = counted
        return self._counted[key]

    def _try(self, node: fx.Node) -> bool:
        """Runs an operation on tensors without data, and says whether that can be done."""
        args, kwargs = tree_map(self._stand_in, (node.args, node.kwargs), is_leaf=_is_leaf)
        with contextlib.suppress(Exception):
            if node.op == "call_method":
                getattr(args[0], str(node.target))(*args[1:], **kwargs)
            elif callable(node.target):
                node.target(*args, **kwargs)
            return True
        return False

    def _estimate(self, node: fx.Node) -> int:
        tensors = [n for n in (node, *node.all_input_nodes) if isinstance(value_of(n), torch.Tensor)]
        matrices = [n for n in tensors if is_weight(n) and value_of(n).ndim > 1]
        others = [n for n in tensors if n not in matrices]
        rows = max((self._numel(n) // max(1, self._shape(n)[-1]) for n in others if value_of(n).ndim > 1), default=1)
        return 2 * rows * sum(map(self._numel, matrices)) + MOVED * sum(map(self._numel, others))

    def _shape(self, node: fx.Node) -> tuple[int, ...]:
        return tuple(self._size(s) for s in value_of(node).shape)

    def _numel(self, node: fx.Node) -> int:
        return torch.Size(self._shape(node)).numel()

    def _size(self, size: Any) -> int:
        """A number for a size."""
        known = isinstance(size, int) or getattr(getattr(size, "node", None), "hint", None) is not None
        return hint(size) if known else self._unknown_size

    def _stand_in(self, value: Any) -> Any:
        """A tensor without data, or a number, in the place of a symbolic one."""
        node, value = (value, value_of(value)) if isinstance(value, fx.Node) else (None, value)
        if isinstance(value, torch.Tensor) and node is not None:
            return torch.empty(self._shape(node), dtype=value.dtype, device="meta")
        return tree_map(self._size, value) if isinstance(value, torch.SymInt) else value


def _is_leaf(value: Any) -> bool:
    return isinstance(value, fx.Node | torch.SymInt)


def _form(value: Any) -> Any:
    value = value_of(value) if isinstance(value, fx.Node) else value
    return (hinted_shape(value), value.dtype) if isinstance(value, torch.Tensor) else value


_METHODS = {"matmul", "mm", "bmm", "mv", "addmm", "addmv", "baddbmm", "addbmm", "__matmul__", "__rmatmul__"}


def _may_work(node: fx.Node) -> bool:
    """Whether an operation may be more than elementwise: only those are tried."""
    if node.op == "call_method":
        return node.target in _METHODS
    if getattr(node.target, "__module__", None) == "_operator":
        return node.target in (operator.matmul, operator.imatmul)
    return any(isinstance(value_of(a), torch.Tensor) and value_of(a).ndim > 1 for a in node.all_input_nodes)


def _is_unknown(node: fx.Node, ran: bool) -> bool:
    """Whether an operation without counted work may be some: a custom or fused operator, or a sub-graph."""
    target = node.target
    if isinstance(target, torch._ops.HigherOrderOperator):
        return True
    if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return str(target).split(".")[0] not in _KNOWN
    has_matrix = any(is_weight(n) and value_of(n).ndim > 1 for n in node.all_input_nodes if _is_tensor(n))
    fused = getattr(target, "__name__", "").startswith("_") and node.op == "call_function"
    return has_matrix and (fused or not ran) and getattr(target, "__module__", None) != "_operator"


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(value_of(node), torch.Tensor)


def _rows(node: fx.Node) -> int:
    """How many tokens, pixels or the like an input holds at most."""
    value = value_of(node)
    if not isinstance(value, torch.Tensor) or value.ndim < 2:
        return 1
    shape = hinted_shape(value)
    return max(shape[1:]) if value.ndim > 2 else shape[0]
