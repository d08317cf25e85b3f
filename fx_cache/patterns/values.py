"""Which inputs an operation's value depends on: not those of which it reads the shape, dtype or device alone."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.utils._pytree import tree_leaves

from fx_cache.patterns.graph import operation

_MADE_LIKE = {"zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like"}
_MADE_LIKE |= {"new_zeros", "new_ones", "new_empty", "new_full", "new_tensor", "new_empty_strided"}
"""Operations that make something new in the form of their first argument."""

_BROUGHT_LIKE = {"type_as", "expand_as", "view_as", "reshape_as", "to", "broadcast_to"}
"""Operations that bring their first argument into the form of the second."""

_ASKED = {"size", "shape", "dim", "ndim", "ndimension", "numel", "nelement", "stride", "storage_offset", "dtype"}
_ASKED |= {"device", "layout", "element_size", "itemsize", "nbytes", "is_floating_point", "is_complex", "get_device"}
_ASKED |= {"sym_size", "sym_stride", "sym_numel", "sym_storage_offset", "is_contiguous", "result_type", "__len__"}
"""What is asked of a tensor's form."""


def form_inputs(node: fx.Node) -> set[fx.Node]:
    """The inputs of which a node reads nothing but the form: shape, dtype, device."""
    name = operation(node)
    if name == "getattr" or name in _ASKED:
        asked = node.args[1] if name == "getattr" and len(node.args) > 1 else name
        return set(node.all_input_nodes) if asked in _ASKED else set()
    if name in _MADE_LIKE:
        form = _nodes_in((node.args[:1], [node.kwargs.get(name) for name in ("input", "self")]))
        return form - _nodes_in((node.args[1:], {k: v for k, v in node.kwargs.items() if k not in ("input", "self")}))
    if name in _BROUGHT_LIKE:
        return _nodes_in((node.args[1:2], node.kwargs.get("other"))) - _nodes_in(node.args[:1])
    return set()


def data_inputs(node: fx.Node) -> list[fx.Node]:
    """The inputs of which a node reads more than the form."""
    form = form_inputs(node)
    return [n for n in node.all_input_nodes if n not in form]


def _nodes_in(values: Any) -> set[fx.Node]:
    return {leaf for leaf in tree_leaves(values) if isinstance(leaf, fx.Node)}
