"""Reads how a graph's tensors hold the samples of a batch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._pytree import tree_leaves

from fx_cache.patterns.graph import symbols_of, value_of


def count_samples(graph: fx.Graph, probe: fx.Node) -> Any:
    """How many samples the rows (dim 0) of a probe belong to, equally many to each; 1 where that is not seen.

    A batch is the size of the first output's dim 0, or the number of outputs where each sample has one of its own.
    """
    leaves = tree_leaves(next(iter(graph.find_nodes(op="output"))).args)
    outputs = [value_of(n) for n in leaves if isinstance(n, fx.Node)]
    outputs = [v for v in outputs if isinstance(v, torch.Tensor) and v.ndim]
    if max(v.ndim for v in (*outputs[:1], value_of(probe))) < 3:
        return 1  # [tokens, channels] throughout
    rows = value_of(probe).shape[0]
    for count in (outputs[0].shape[0], len(outputs)) if outputs else ():
        if not statically_known_true(count < 2) and statically_known_true(rows % count == 0):
            return count
    return 1


def one_row_each(values: Iterable[Any], count: Any) -> bool:
    """Whether every tensor holds one row of dim 0 for each of `count` samples, beyond doubt."""
    if statically_known_true(count < 2):
        return False
    return all(
        statically_known_true(v.shape[0] == count)
        and not any(_involves(size, count) for size in (*v.shape[1:], *(v.stride() if symbols_of(count) else ())))
        for v in values
    )


def taken_by_sample(operands: Iterable[Any], count: Any) -> tuple[bool, ...] | None:
    """Which operands of a branch hold one row for each sample (or are their number), where all others hold none.

    None: some hold samples otherwise, or the graph was captured for just one number of samples.
    """
    if not symbols_of(count):
        return None
    flags = []
    for operand in operands:
        if isinstance(operand, torch.Tensor):
            flags.append(operand.ndim > 0 and one_row_each([operand], count))
        else:
            flags.append(isinstance(operand, torch.SymInt) and statically_known_true(operand == count))
        if not flags[-1] and symbols_of(operand) & symbols_of(count):
            return None
    return tuple(flags)


def fewer_allowed(count: Any) -> bool:
    """Whether nothing was assumed of the number of samples at capture, but that there are two or more."""
    if not symbols_of(count):
        return False
    shapes = count.node.shape_env
    symbols = symbols_of(count)
    if any(shapes.var_to_range[s].lower > 2 for s in symbols):
        return False
    assumed = (shapes.simplify(guard.expr) for guard in shapes.guards)
    return not any(expr.free_symbols & symbols for expr in assumed if expr is not True)


def _involves(size: Any, count: Any) -> bool:
    symbols = symbols_of(count)
    return bool(symbols_of(size) & symbols) if symbols else statically_known_true(size == count)
