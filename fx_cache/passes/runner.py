"""Runs the pipeline: times each pass, lints after it, writes the graph before and after, stops at a refusal."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import fx

from fx_cache.config import CacheConfig
from fx_cache.errors import Refusal, stage
from fx_cache.passes.outline import Templates
from fx_cache.passes.spec import check_rewritten
from fx_cache.patterns.spans import Plan


@dataclass
class RewriteContext:
    """What passes share.

    Attributes:
        config: the user's configuration.
        without: stacks that a pass has refused before, by name, and why: they are left alone.
        plan: what the analysis found; set by the planning pass.
        templates: the sub-modules made so far.
        probes: for each span, the node of its probe.
        rests: nodes of blocks that are outlined apart from the rest of their block.
    """

    config: CacheConfig
    without: Mapping[str, Refusal] = field(default_factory=dict)
    plan: Plan | None = None
    templates: Templates = field(default_factory=Templates)
    probes: list[fx.Node] = field(default_factory=list)
    rests: set[fx.Node] = field(default_factory=set)


Pass = Callable[[fx.GraphModule, RewriteContext], int]
Observer = Callable[[str, fx.GraphModule], None]


@dataclass(frozen=True)
class PassRecord:
    """One line of the report: a pass, how many rewrites it made, and how long it took in seconds."""

    name: str
    rewrites: int
    seconds: float


def run_passes(
    gm: fx.GraphModule, pipeline: Sequence[Pass], context: RewriteContext, observe: Observer | None = None
) -> list[PassRecord]:
    """Applies each pass of `pipeline` to `gm`, in place.

    The code of `gm` is not made anew. A plan that refuses ends the run. With ``FX_CACHE_CHECK=1`` the spec of the
    rewritten graph is checked after each pass, as the tests do.

    Raises:
        StageError: a pass, or a check behind it; it says which.
    """
    check = os.environ.get("FX_CACHE_CHECK") == "1"
    records = []
    if observe is not None:
        observe("captured", gm)
    for rewrite in pipeline:
        name = rewrite.__name__
        begin = time.perf_counter()
        with stage(f"the pass {name}"):
            count = rewrite(gm, context)
            if count:
                gm.graph.lint()
            records.append(PassRecord(name, count, time.perf_counter() - begin))
            if check:
                check_rewritten(gm)
        if observe is not None and count:
            observe(name, gm)
        if context.plan is not None and context.plan.refusal is not None:
            break
    return records
