from __future__ import annotations

import operator
from collections.abc import Callable

from torch import fx

from fx_cache.ops import check, cond, once
from fx_cache.passes.outline import REGION, Templates, outline
from fx_cache.passes.runner import RewriteContext
from fx_cache.patterns.graph import is_scalar


def outline_glue(gm: fx.GraphModule, context: RewriteContext) -> int:
    """Makes a call of every run of operations between blocks, so that a graph and its branches hold calls only.

    Before::

        x = conv(latent);  x = x + table;  blocks_0 = self.blocks(x, ...);  y = norm(blocks_0[0]);  return y

    After::

        head = self.head(latent, table);  blocks_0 = self.blocks(head[0], ...);  tail = self.tail(blocks_0[0])

    Requires: `insert_conditionals`.
    Ensures: every operation on tensors lies in a sub-module without sub-modules of its own: the pieces to compile.
    """
    assert context.plan is not None
    last = 2 * len(context.plan.spans)
    count = _outline_runs(gm, lambda r: "head" if r == 0 else "tail" if r == last else "between")
    for k in range(len(context.plan.spans)):
        compute, reuse = (getattr(gm, f"{b}_{k}") for b in ("compute", "reuse"))
        count += _outline_runs(compute, lambda r: "glue" if context.config.regional else "span")
        count += _outline_runs(reuse, lambda r: "restore")
    if context.plan.invariants.kept:
        invariants = gm.get_submodule("invariants")
        assert isinstance(invariants, fx.GraphModule)
        count += _outline_runs(invariants, lambda r: "prepare")
    return count


def _outline_runs(gm: fx.GraphModule, name_of: Callable[[int], str]) -> int:
    """Outlines the runs of `gm`, each under the name that `name_of` gives its region."""
    templates = Templates()
    runs: list[list[fx.Node]] = []
    current: list[fx.Node] = []
    calls: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            continue
        if node.op == "call_module" or node.target in (check, cond, once):
            calls.add(node)
        if node.op in ("output", "call_module") or node.target in (check, cond, once):
            if current:
                runs.append(current)
            current = []
        elif not (node.target is operator.getitem and node.args[0] in calls):
            current.append(node)
    for run in runs:
        _outline_run(gm, run, templates, name_of(run[0].meta.get(REGION, 0)))
    gm.graph.lint()
    return len(runs)


def _outline_run(gm: fx.GraphModule, run: list[fx.Node], templates: Templates, name: str) -> None:
    if all(is_scalar(n) for n in run):
        return
    # Elements taken of earlier calls may stand inside the run: they go in front of it.
    inside, node = set(run), run[0]
    between: list[fx.Node] = []
    while node is not run[-1]:
        node = node.next
        if node not in inside:
            between.append(node)
    for node in between:
        run[0].prepend(node)
    if all(n.name.startswith("probe_") for n in run):
        name = f"residual_of_{name}"
    outline(gm, run, name, templates, name)
