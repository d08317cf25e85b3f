from __future__ import annotations

import re

from torch import fx

from fx_cache.passes.runner import RewriteContext


def name_inputs(gm: fx.GraphModule, context: RewriteContext) -> int:
    """Names graph inputs as a person would: by argument, or by the path of the weight.

    Before: ``l_self_modules_blocks_modules_0_modules_attn_modules_to_q_parameters_weight_``
    After:  ``blocks_0_attn_to_q_weight``

    Requires: sources recorded by the capture; inputs without one keep their name.
    Ensures: the same inputs in the same order.
    """
    del context
    taken = {n.name for n in gm.graph.nodes}
    count = 0
    for node in gm.graph.find_nodes(op="placeholder"):
        source = getattr(node.meta.get("grapharg"), "source", None)
        if source is None:
            continue
        text = source.name if isinstance(source.name, str) else source.name()
        name = readable(text)
        if name in taken:
            name = f"{name}_input"
        if not name or name == node.name or name in taken:
            continue
        taken.add(name)
        node._rename(name)
        node.target = node.name
        count += 1
    return count


def readable(source: str) -> str:
    """``L['self']._modules['norm']._parameters['weight']`` -> ``norm_weight``; ``L['x']`` -> ``x``."""
    source = re.sub(r"\.?_parameters|\.?_buffers", "", source)
    path = re.sub(r"__dict__\['_modules'\]|_modules", "", source)
    parts = [p for p in re.split(r"[^0-9A-Za-z]*[.\[\]'()]+[^0-9A-Za-z_]*", path) if p]
    if parts[:1] == ["L"]:
        parts = parts[1:]
    if parts[:1] in (["self"], ["kwargs"]) and len(parts) > 1:
        parts = parts[1:]
    name = re.sub(r"\W+", "_", "_".join(parts)).strip("_")
    return f"_{name}" if name[:1].isdigit() else name
