"""Operations that put elements in other places, and whether a tensor has those of an earlier one in theirs."""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from fx_cache.ops import version
from fx_cache.patterns.graph import (
    hint,
    hinted_shape,
    is_tensor,
    is_tensor_sequence,
    operation,
    value_of,
    written_inputs,
)
from fx_cache.patterns.values import data_inputs

JOINS = {"cat", "concat", "concatenate"}
_DIVIDES = {"chunk", "split", "split_with_sizes", "tensor_split", "unbind", "narrow", "select", "slice"}
COPIES = {"contiguous", "clone"}
_FORMS = {"view", "reshape", "flatten", "unflatten", "transpose", "permute", "movedim", "swapaxes", "swapdims", "t"}
_FORMS |= {"squeeze", "unsqueeze", "expand", "expand_as", "view_as", "reshape_as", "stack", "flip", "roll", "pad"}
_FORMS |= {"repeat", "repeat_interleave", "tile", "rot90", "rearrange", "fliplr", "flipud", "moveaxis", "adjoint"}
_FORMS |= {"hstack", "vstack", "dstack", "column_stack", "row_stack", "hsplit", "vsplit", "dsplit", "as_strided"}
_FORMS |= {"pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "_unsafe_view", "fft_fftshift", "fft_ifftshift"}
_TURNS = {"T", "mT", "H", "mH"}
"""Attributes that turn a tensor."""
_PICKS = {"index_select", "gather", "take_along_dim", "take"}
_BUFFERS = {"arange", "empty", "zeros", "ones", "full", "new_empty", "new_zeros", "new_ones", "new_full"}
_BUFFERS |= {"empty_like", "zeros_like", "ones_like", "full_like"}
_FILLS = {"setitem", "copy_", "index_copy_", "index_put_", "index_add_", "scatter_", "scatter_add_", "masked_scatter_"}
_FILLS |= {"index_reduce_", "scatter_reduce_"}
_PUTS = {"slice_scatter", "select_scatter", "index_copy", "index_put", "scatter", "masked_scatter", "where"}
_PUTS |= {"index_add", "scatter_add", "index_reduce", "scatter_reduce"}
_LAYOUT = JOINS | _DIVIDES | COPIES | _FORMS | _PICKS | _BUFFERS | _FILLS | _PUTS
_CASTS = {"to", "type", "type_as", "float", "half", "bfloat16", "double", "_to_copy", "detach", "alias"}
_SORTS = {"sort", "msort", "topk"}
_CHOOSES = {"where", "masked_scatter", "masked_scatter_"}
"""What puts elements where a mask says, each in its own place."""
_ADDS = {"index_add", "index_add_", "scatter_add", "scatter_add_"}
_RESHAPES = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "_unsafe_view"}
_TOKENWISE = _RESHAPES | JOINS | _DIVIDES | COPIES | {"transpose", "permute", "movedim", "swapaxes", "swapdims"}
"""What leaves channels where they are, if it makes a tensor of as many out of such ones."""

_ACCUMULATES = {"add", "add_", "iadd", "sub", "sub_", "isub", "rsub", "mul", "mul_", "imul", "truediv", "div", "div_"}
_ACCUMULATES |= {"lerp", "lerp_", "addcmul", "addcmul_", "neg", "sum", "mean", "maximum", "minimum", "max", "min"}
_ACCUMULATES |= {"masked_fill", "masked_fill_", "getitem", "version", "alias", "detach", "_unsafe_view", "_to_copy"}
_ACCUMULATES |= {"to", "type", "type_as", "float", "half", "bfloat16", "double"}
"""Operations by which something is added to a sum, or that leave it as it is; so do those that put elements in places
(`is_layout`)."""

MOST = 2**28
"""Elements of the largest tensor whose places are followed."""

THIN = 2
"""Channels that are followed where all of them go the same way."""


def is_layout(node: fx.Node) -> bool:
    """Whether a node puts elements in other places, puts them beside others, or adds them to what is there."""
    if node.target is operator.getitem:
        return is_tensor_sequence(node.args[0]) or _indexed(node)  # type: ignore[arg-type]
    if written_inputs(node):
        return operation(node) in _FILLS and not _reduces(node)
    if operation(node) == "getattr":
        return node.args[1] in _TURNS
    return operation(node) in _LAYOUT and not _reduces(node)


def _reduces(node: fx.Node) -> bool:
    """Whether what is put somewhere is multiplied with what is there, or the like."""
    reduce = node.kwargs.get("reduce", node.args[4] if len(node.args) > 4 else None)
    return operation(node) in ("scatter", "scatter_") and reduce not in (None, "add")


def _indexed(node: fx.Node) -> bool:
    """Whether elements or a slice are taken, or dimensions are added; not as many as a mask says."""
    items = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    return all(
        isinstance(i, int | slice | list)
        or i is None
        or i is Ellipsis
        or (isinstance(i, fx.Node) and is_tensor(i) and value_of(i).dtype in (torch.int64, torch.int32))
        for i in items
    )


def only_accumulated(value: fx.Node, nodes: Iterable[fx.Node]) -> bool:
    """Whether nothing is made of a value but what something is added to, or put into.

    Args:
        value: made before the nodes.
        nodes: in the order in which they run.
    """
    reached = {value}
    for node in nodes:
        if any(a in reached for a in data_inputs(node)):
            reached.add(node)
            if operation(node) not in _ACCUMULATES and not is_layout(node):
                return False
    return True


def distances(source: fx.Node, nodes: Sequence[fx.Node]) -> dict[fx.Node, int]:
    """For each node that depends on an earlier one, through how many operations it does so at least.

    Those that put elements elsewhere, and casts, do not count.
    """
    found = {source: 0}
    for node in nodes:
        near = [found[a] for a in data_inputs(node) if a in found]
        tensors = is_tensor(node) or is_tensor_sequence(node) or written_inputs(node)
        if near and tensors and node not in found:
            free = node.target is version or is_layout(node) or operation(node) in _CASTS
            found[node] = min(near) + (0 if free else 1)
    return found


def in_place(value: fx.Node, source: fx.Node, nodes: Sequence[fx.Node]) -> bool:
    """Whether a value's elements are what has become of an earlier one's, each in its place; False in doubt.

    On the nearest way from one to the other, as a residual goes through an addition and not through an attention. What
    is joined, cut and moved on it is done to the numbers of the elements; where that leaves channels alone, to a few.

    Args:
        value: made by the nodes.
        source: of the same shape, made before them.
        nodes: in the order in which they run.
    """
    distance = distances(source, nodes)
    if value not in distance:
        return False
    needed, todo, moves = {value}, [value], False
    while todo:
        node = todo.pop()
        if node is source:
            continue
        if _is_followed(node):
            moves = moves or not (node.target is version or operation(node) in COPIES)
            inputs = [a for a in node.all_input_nodes if a in distance and not _says_where(a)]
            inputs = inputs[:1] if _adds_to(node, inputs) else inputs
        else:
            inputs = _nearest(node, distance)
            if not inputs and _may_move(node, distance):
                return False
        todo += [a for a in inputs if a not in needed]
        needed.update(inputs)
    if not moves:
        return True
    run = [n for n in nodes if n in needed and n is not source]
    thin = all(_leaves_channels(n, source) for n in run if _is_followed(n))
    for channels in (THIN, None) if thin else (None,):
        numbers = _numbers(source, channels)
        if numbers is None:
            return False
        try:
            with torch.device("cpu"):
                found = _followed(value, source, run, distance, channels)
        except Exception:  # elements go where tensors say, or an operation has no meaning for numbers of elements
            continue
        if found is None:
            return True  # on the way it has another shape: no element is in a place
        return bool(found.any()) and bool(((found == numbers) | (found == 0)).all())
    return False


def _numbers(source: fx.Node, channels: int | None) -> Tensor | None:
    """Its elements, numbered from 1, or those of so many channels; None for too many."""
    shape = _shape(source, channels)
    return None if math.prod(shape) > MOST else _counted(shape)


def _counted(shape: tuple[int, ...]) -> Tensor:
    return torch.arange(1, math.prod(shape) + 1, dtype=torch.int32, device="cpu").view(shape)


def _shape(node: fx.Node, channels: int | None) -> tuple[int, ...]:
    """The shape of a tensor, or of so many channels of it."""
    shape = tuple(hinted_shape(value_of(node)))
    return shape if channels is None or not shape else (*shape[:-1], min(channels, shape[-1]))


def _leaves_channels(node: fx.Node, source: fx.Node) -> bool:
    """Whether a node may leave all channels where they are: it is of a kind that does, and has as many."""
    if node.target is version or node.target is operator.getitem:
        known = node.target is version or not is_tensor(node.all_input_nodes[0]) or _keeps_last(node)
    else:
        known = operation(node) in _TOKENWISE and not written_inputs(node)
    width = hinted_shape(value_of(source))[-1:]
    return known and all(hinted_shape(t)[-1:] == width for t in tree_leaves(value_of(node)) if isinstance(t, Tensor))


def _keeps_last(node: fx.Node) -> bool:
    """Whether indexing leaves the last dimension whole: it names fewer, or takes all of it."""
    items = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    named = [i for i in items if i is not None and i is not Ellipsis]
    whole = named and named[-1] == slice(None)
    return bool(whole) or (Ellipsis not in items and len(named) < value_of(node.args[0]).ndim)  # type: ignore[arg-type]


def _is_followed(node: fx.Node) -> bool:
    """Whether what a node makes is followed element by element."""
    alone = operation(node) == "einsum" and len([a for a in node.all_input_nodes if is_tensor(a)]) == 1
    layout = is_layout(node) and operation(node) not in _CHOOSES
    return layout or alone or operation(node) in _SORTS or node.target is version


def _may_move(node: fx.Node, distance: Mapping[fx.Node, int]) -> bool:
    """Whether an operation has as many elements as something that it is made of, in another shape."""
    if not is_tensor(node):
        return False
    inputs = [a for a in node.all_input_nodes if a in distance and is_tensor(a)]
    return any(math.prod(hinted_shape(value_of(a))) == math.prod(hinted_shape(value_of(node))) for a in inputs)


def _adds_to(node: fx.Node, inputs: Sequence[fx.Node]) -> bool:
    """Whether something is added to the first input, wherever, as to a residual."""
    adds = operation(node) in _ADDS or node.kwargs.get("accumulate") is True
    return adds and bool(inputs) and inputs[0] is node.all_input_nodes[0]


def _nearest(node: fx.Node, distance: Mapping[fx.Node, int]) -> list[fx.Node]:
    """Of what an operation computes with, what it changes: of the tensors of its own shape the nearest ones."""
    if written_inputs(node):
        return written_inputs(node)[:1]
    inputs = [a for a in node.all_input_nodes if a in distance]
    if is_tensor(node):
        shape = hinted_shape(value_of(node))
        inputs = [a for a in inputs if not is_tensor(a) or hinted_shape(value_of(a)) == shape]
    least = min((distance[a] for a in inputs), default=0)
    return [a for a in inputs if distance[a] == least]


def _followed(
    value: fx.Node,
    source: fx.Node,
    needed: Sequence[fx.Node],
    distance: Mapping[fx.Node, int],
    channels: int | None,
) -> Tensor | None:
    """The numbers of the source's elements where they are in a value, 0 for others; None if it has none of them.

    Raises:
        ValueError: an operation is made of elements that are in different places, or see `_moved`.
    """
    env: dict[fx.Node, Any] = {source: _numbers(source, channels)}
    writes = any(map(written_inputs, needed))
    readers = Counter(a for n in needed for a in n.all_input_nodes)
    for node in needed:
        if _is_followed(node):
            if any(a in env for a in node.all_input_nodes):
                env[node] = _moved(node, env, channels)
        else:
            found = [env[a] for a in _nearest(node, distance) if a in env]
            if found:
                if not all(other is found[0] or torch.equal(other, found[0]) for other in found[1:]):
                    raise ValueError(node)
                copied = writes and not written_inputs(node) and isinstance(found[0], Tensor)
                env[node] = found[0].clone() if copied else found[0]
        for a in node.all_input_nodes:
            readers[a] -= 1
            if not (readers[a] or writes):
                env.pop(a, None)
    return env.get(value)


def _moved(node: fx.Node, env: Mapping[fx.Node, Any], channels: int | None) -> Any:
    """What a node does to the numbers of elements. What it writes to is written to.

    Raises:
        ValueError: elements go where tensors say whose numbers are not known, or into a part of something unknown; or
            it does something to channels, where only some are followed.
    """
    if node.target is version:
        whole, write = node.all_input_nodes
        found = env[whole] if whole in env else env[write]
        if found.shape != _shape(node, channels):
            raise ValueError(node)
        return found
    first = node.all_input_nodes[0]
    if node.target is operator.getitem and not is_tensor(first) and isinstance(env.get(first), Tensor):
        return env[first]
    if operation(node) in _SORTS:
        raise ValueError(node)
    if any(map(_says_where, node.all_input_nodes)):
        given = [a for a in tree_leaves((node.args, node.kwargs)) if isinstance(a, fx.Node)]
        put = [a for a in given[1:] if a in env]
        if operation(node) in _FILLS | _PUTS and first in env and (not put or _adds_to(node, [first])):
            return env[first]
        raise ValueError(node)

    def now(a: fx.Node) -> Any:
        value = value_of(a)
        if a in env:
            return env[a]
        if isinstance(value, Tensor):
            return torch.zeros(_shape(a, channels), dtype=torch.int32, device="cpu")
        return hint(value) if isinstance(value, torch.SymInt) else value

    args, kwargs = map_arg(node.args, now), map_arg(node.kwargs, now)
    kwargs = {k: v for k, v in kwargs.items() if k not in ("dtype", "device", "memory_format", "value")}
    if channels is not None and operation(node) in _RESHAPES:
        made = env[first].reshape(_shape(node, channels))
    elif node.op == "call_method":
        made = getattr(args[0], str(node.target))(*args[1:], **kwargs)
    else:
        made = node.target(*args, **kwargs)  # type: ignore[operator]
        made = args[0] if written_inputs(node) else made
    if channels is not None:
        pairs = zip(tree_leaves(made), tree_leaves(value_of(node)), strict=True)
        if any(t.shape != (*hinted_shape(v)[:-1], min(channels, hinted_shape(v)[-1])) for t, v in pairs):
            raise ValueError(node)
    return made


def _says_where(node: fx.Node) -> bool:
    """Whether a tensor holds indices, or a mask."""
    return is_tensor(node) and value_of(node).dtype in (torch.int64, torch.int32, torch.bool)
