from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from fx_cache.passes.outline import REGION, mark
from fx_cache.passes.runner import RewriteContext
from fx_cache.patterns.contexts import within_contexts
from fx_cache.patterns.graph import is_tensor, storage_key, value_of, written_inputs, written_storages
from fx_cache.patterns.spans import SpanPlan


def align_layouts(gm: fx.GraphModule, context: RewriteContext) -> int:
    """Lays a stream out in front of a stack's first block as the blocks after it take it: contiguous.

    Before::

        x0 = conv(latent).flatten(2).transpose(1, 2);  x1 = block(x0);  x2 = block(x1)

    After::

        x0 = conv(latent).flatten(2).transpose(1, 2).contiguous();  x1 = block(x0);  x2 = block(x1)

    Only where the inner compiler chooses layouts itself, within a piece: with any other one the results stay bit for
    bit the model's own, and operations may compute otherwise on other strides.

    Requires: `mark_regions`.
    Ensures: blocks that differ in nothing but how the first one's streams lie are one kind, compiled once.
    """
    assert context.plan is not None
    if context.config.compiler != "inductor":
        return 0
    cached = {name for span in context.plan.spans for name in span.stacks}
    written = written_storages(gm.graph.nodes)
    count = 0
    for report in context.plan.stacks:
        if report.stack.name not in cached or len(set(report.streams.kinds[:2])) > 1:
            continue
        for stream in report.streams.streams:
            first, second = stream.values[:2]
            if first is None or second is None or storage_key(first) in written or not _apart(first, second):
                continue
            laid = _insert(gm, first)
            values = _values_behind(gm, laid, written)
            if values is None:
                laid.replace_all_uses_with(first)
                gm.graph.erase_node(laid)
                continue
            for node, value in values.items():
                node.meta["example_value"] = value
            spans = tuple(_with(span, first, laid) for span in context.plan.spans)
            context.plan = replace(context.plan, spans=spans)
            count += 1
    return count


def _apart(first: fx.Node, second: fx.Node) -> bool:
    """Whether the first is laid out otherwise than the second, which is contiguous, and nothing else is different."""
    a, b = value_of(first), value_of(second)
    return (
        first.op != "placeholder"
        and tuple(map(str, a.shape)) == tuple(map(str, b.shape))
        and tuple(map(str, a.stride())) != tuple(map(str, b.stride()))
        and (a.dtype, a.device) == (b.dtype, b.device)
        and b.is_contiguous()
        and not a.is_contiguous()
    )


def _insert(gm: fx.GraphModule, stream: fx.Node) -> fx.Node:
    with gm.graph.inserting_after(stream):
        laid = gm.graph.call_method("contiguous", (stream,))
    value: Any = value_of(stream)
    with torch.no_grad(), value.fake_mode:
        mark(laid, stream.meta.get(REGION), value.contiguous())
    stream.replace_all_uses_with(laid, delete_user_cb=lambda u: u is not laid)
    return laid


def _values_behind(gm: fx.GraphModule, laid: fx.Node, written: set[Any]) -> dict[fx.Node, Any] | None:
    """The values that what comes of `laid` has now, as far as they lie otherwise; None where that is not to be told."""
    mode = value_of(laid).fake_mode
    contexts = within_contexts(laid.graph)
    changed: dict[fx.Node, Any] = {laid: value_of(laid)}

    def now(node: fx.Node) -> Any:
        return changed.get(node, value_of(node))

    for node in _behind(laid):
        if not any(a in changed for a in node.all_input_nodes):
            continue
        if node.op not in ("call_function", "call_method") or node in contexts:
            return None
        if storage_key(node) in written or written_inputs(node):
            return None
        args, kwargs = map_arg((node.args, node.kwargs), now)
        try:
            with torch.no_grad(), mode:
                if node.op == "call_method":
                    value = getattr(args[0], str(node.target))(*args[1:], **kwargs)
                else:
                    value = node.target(*args, **kwargs)  # type: ignore[operator]
        except Exception:
            return None
        if isinstance(value, torch.Tensor) != is_tensor(node):
            return None
        if is_tensor(node):
            if not _alike(value, value_of(node)):
                return None
            if _same(value, value_of(node)) and not _shares(value, changed.values()):
                continue
        changed[node] = value
    return changed


def _behind(node: fx.Node) -> Iterator[fx.Node]:
    while (node := node.next).op != "root":
        yield node


def _alike(value: Any, other: Any) -> bool:
    """Whether they differ in how they lie at most."""
    return tuple(map(str, value.shape)) == tuple(map(str, other.shape)) and value.dtype == other.dtype


def _same(value: Any, other: Any) -> bool:
    return (
        tuple(map(str, value.stride())) == tuple(map(str, other.stride()))
        and value.storage_offset() == other.storage_offset()
    )


def _shares(value: torch.Tensor, others: Any) -> bool:
    storage = value.untyped_storage()._cdata
    return any(isinstance(o, torch.Tensor) and o.untyped_storage()._cdata == storage for o in others)


def _with(span: SpanPlan, old: fx.Node, new: fx.Node) -> SpanPlan:
    """A plan with one node in the place of another."""
    before, after = (new if n is old else n for n in span.probe)
    outs = tuple(
        lo if lo.continues is None else replace(lo, continues=lo.continues.with_parts(lambda n: new if n is old else n))
        for lo in span.live_outs
    )
    return replace(span, probe=(before, after), live_outs=outs)
