"""Every transformer class that diffusers exports, through the backend and its peers: ``python benchmarks/zoo.py``.

A row for each class and variant: in how many graphs it is captured, what was found, whether a computed step is the
model's own bit for bit, whether a reused step on equal inputs is, whether both detectors see the same blocks, and
whether cache-dit and diffusers' First Block Cache reuse at the same steps with the same outputs.

Options:
    --json FILE     where the rows go
    --only PATTERN  classes by shell pattern; may be given several times
"""

from __future__ import annotations

import argparse
import copy
import datetime
import fnmatch
import json
import logging
import platform
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import fx_cache
from fx_cache.backend import rewrite
from fx_cache.config import CacheConfig
from fx_cache.passes.name_inputs import name_inputs
from fx_cache.passes.separate_sequences import separate_sequences
from fx_cache.patterns.chains import Chain, chains, read_stacks
from fx_cache.patterns.inputs import classify_inputs
from fx_cache.patterns.repeats import GLUE, find_repeats
from fx_cache.patterns.spans import plan_spans
from fx_cache.patterns.streams import StackStreams
from fx_cache.patterns.work import Work
from tests.models import MODELS, build, walk
from tests.oracles import MEASURE_ONLY, run_cache_dit, run_eager, run_first_block_cache, tensors, thresholds_with_both
from tests.running import last_branch, relative_error

ZOO = tuple(MODELS)

NOT_FULLGRAPH = {
    "BriaFibo2Transformer2DModel",
    "HiDreamImageTransformer2DModel",
    "HunyuanImageTransformer2DModel",
    "HunyuanVideo15Transformer3DModel",
    "Lumina2Transformer2DModel",
    "OmniGenTransformer2DModel",
    "QwenImage21Transformer2DModel",
    "QwenImage21Transformer2DModel+kv-cached",
    "WanAnimate2Transformer3DModel",
    "WanAnimate2Transformer3DModel+kv-extract",
}
"""Classes whose forward has a graph break, in or before their blocks."""

if torch.__version__ < "2.12":
    NOT_FULLGRAPH.add("AceStepTransformer1DModel")  # Dynamo cannot capture how it looks up its attention backend yet

OWN_BEGINNING = {"WanVACETransformer3DModel"}
"""Classes whose first block holds operations that only the module paths show to be its own, not what it is given."""

STEPS = 8
CONFIGS = {
    "F1B0": {"Fn": 1, "Bn": 0, "max_warmup_steps": 1},
    "F2B2": {"Fn": 2, "Bn": 2, "max_warmup_steps": 2},
    "MC1": {"Fn": 1, "Bn": 0, "max_warmup_steps": 1, "max_continuous_cached_steps": 1},
}
INDUCTOR = (
    "dit",
    "flux",
    "wan",
    "sd3",
    "pixart",
    "qwenimage",
    "sana",
    "HunyuanDiT2DModel",
    "LatteTransformer3DModel",
    "LTX2VideoTransformer3DModel",
    "Lumina2Transformer2DModel",
    "ZImageTransformer2DModel",
)
"""A dozen, of all shapes, that go through Inductor too."""

SEPARATE = {"flux", "auraflow", "FluxTransformer2DModel+controlnet"}
"""Classes for which cache-dit merges lists, or leaves one out: here each list gets a context."""


def compile_zoo(name: str, model: nn.Module | None = None, **options: Any) -> nn.Module:
    """A model of the zoo through the backend, with ``eager`` as inner compiler; it computes every step at first."""
    options = {"compiler": "eager", "Fn_compute_blocks": 1, "max_warmup_steps": 0, **options}
    options.setdefault("residual_diff_threshold", 0.0)
    model = build(name) if model is None else model
    return torch.compile(model, backend="dit_cache", fullgraph=name not in NOT_FULLGRAPH, options=options)


def fresh() -> None:
    """Nothing compiled, nothing cached."""
    torch._dynamo.reset()
    fx_cache.reset()


@dataclass
class Row:
    """What was seen of one class or variant."""

    name: str
    graphs: int = 0
    fullgraph: bool = False
    stacks: list[tuple[str, int, str]] = field(default_factory=list)
    spans: int = 0
    share: float | None = None
    reason: str | None = None
    detectors_agree: bool | None = None
    same_without_metadata: bool | None = None
    exact: bool = False
    reused_error: float | None = None
    hits_unnamed: bool | None = None
    inductor_error: float | None = None
    cache_dit: dict[str, str] = field(default_factory=dict)
    first_block_cache: str = ""
    nodes: int = 0
    rewrite_seconds: float = 0.0


def measure(name: str) -> Row:
    """Everything about one model of the zoo."""
    model = build(name)
    variant = name.partition("+")[2]
    row = Row(type(model).__name__.removesuffix("Controlled") + (f"+{variant}" if variant else ""))
    steps = walk(name, STEPS)
    _look(name, row, steps)
    _exactness(name, row, model, steps)
    if name in INDUCTOR:
        row.inductor_error = _inductor_error(name, model, steps[:3])
    if row.spans:
        row.cache_dit = _against_cache_dit(name, model, steps)
        row.first_block_cache = _against_first_block_cache(name, model, steps)
    return row


def captured(name: str) -> list[fx.GraphModule]:
    """The graphs of a model's forward."""
    graphs: list[fx.GraphModule] = []

    def look(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        del example_inputs
        graphs.append(gm)
        return gm.forward

    fresh()
    torch.compile(build(name), backend=look, fullgraph=name not in NOT_FULLGRAPH)(**walk(name, 1)[0])
    return graphs


def _look(name: str, row: Row, steps: Sequence[dict[str, Any]]) -> None:
    fresh()
    found = fx_cache.explain(compile_zoo(name), **steps[0])
    row.graphs, row.spans, row.reason = found.graphs, len(found.spans), found.reason
    row.fullgraph = name not in NOT_FULLGRAPH
    row.stacks = [(s.name, s.blocks, s.pattern) for s in found.stacks if s.span is not None]
    shares = [s for s in found.shares if s is not None]
    row.share = sum(shares) if shares else None
    graphs = captured(name)
    config = CacheConfig(Fn_compute_blocks=1, compiler="eager")
    begin = time.perf_counter()
    for gm in graphs:
        rewrite(gm, config)
    row.rewrite_seconds = time.perf_counter() - begin
    row.nodes = sum(len(gm.graph.nodes) for gm in graphs)
    cached = {s.graph for s in found.stacks if s.span is not None and s.graph is not None}
    if cached:
        row.detectors_agree = all(detectors_agree(graphs[i]) for i in cached)
        row.same_without_metadata = all(cuts(graphs[i], strip=False) == cuts(graphs[i], strip=True) for i in cached)


def detectors_agree(gm: fx.GraphModule) -> bool:
    """Whether the module paths and the structure alone show the same blocks of the chain worth caching.

    Each boundary of one lies within a few operations of glue of one of the other's. Stacks that lie between those of
    the chain are not looked at.
    """
    prepared = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    name_inputs(prepared, None)
    separate_sequences(prepared, None)
    graph = prepared.graph
    roles = classify_inputs(graph)
    chain = chains(graph, read_stacks(graph, roles), Work(graph))[0]
    named = _starts(chain)
    found = [StackStreams(graph, s, roles).starts for s in find_repeats(graph)]
    ranges = [(r.range[0] - GLUE, r.range[1] + GLUE) for r in chain]
    repeated = sorted({p for starts in found for p in starts if any(a <= p <= b for a, b in ranges)})
    return all(
        any(abs(a - b) <= GLUE for b in other) for one, other in ((named, repeated), (repeated, named)) for a in one
    )


METADATA = ("nn_module_stack", "stack_trace", "source_fn_stack", "torch_fn", "from_node")


def cuts(gm: fx.GraphModule, *, strip: bool) -> list[tuple[Any, ...]]:
    """For each span what is compared and what is stored, by name; with `strip` of a graph without metadata."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    for node in graph.nodes if strip else ():
        for key in METADATA:
            node.meta.pop(key, None)
    prepared = fx.GraphModule(gm, graph)
    name_inputs(prepared, None)
    separate_sequences(prepared, None)
    plan = plan_spans(prepared.graph, CacheConfig(Fn_compute_blocks=1, compiler="eager"))
    return [
        (s.probe[0].name, s.probe[1].name, sorted((lo.value.name, lo.rule) for lo in s.live_outs)) for s in plan.spans
    ]


def _starts(chain: Chain) -> list[int]:
    return sorted({p for report in chain for p in report.streams.starts})


def _exactness(name: str, row: Row, model: nn.Module, steps: Sequence[dict[str, Any]]) -> None:
    fresh()
    expected = [[t.clone() for t in tensors(model(**step))] for step in steps[:6]]
    compiled = compile_zoo(name)
    outputs = [[t.clone() for t in tensors(compiled(**step))] for step in steps[:6]]
    row.exact = all(_equal(a, b) for a, b in zip(expected, outputs, strict=True))
    if row.spans:
        fx_cache.configure(compiled, residual_diff_threshold=2.0)
        with fx_cache.session("again", branch="only"):
            compiled(**steps[0])
            again = tensors(compiled(**steps[0]))
        assert all(span["hits"] == [1] for span in last_branch(compiled)["spans"]), name
        # A walk without a session: the request is found from the data, and goes on from step to step.
        fx_cache.configure(compiled, max_warmup_steps=1)
        fx_cache.reset(compiled)
        for step in steps:
            compiled(**step)
        row.hits_unnamed = all(len(span["hits"]) >= STEPS - 3 for span in last_branch(compiled)["spans"])
        row.reused_error = max(relative_error(a, b) for a, b in zip(expected[0], again, strict=True) if a.any())


def _inductor_error(name: str, model: nn.Module, steps: Sequence[dict[str, Any]]) -> float:
    """The largest relative error of computed steps with Inductor as inner compiler."""
    fresh()
    compiled = compile_zoo(name, copy.deepcopy(model), compiler="inductor")
    pairs = [(a, b) for step in steps for a, b in zip(tensors(model(**step)), tensors(compiled(**step)), strict=True)]
    return max(relative_error(a, b) for a, b in pairs if a.any())


def _equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _against_cache_dit(name: str, model: nn.Module, steps: Sequence[dict[str, Any]]) -> dict[str, str]:
    """For each configuration ``"same"``, or what is different."""
    found = {}
    for label, settings in CONFIGS.items():
        try:
            found[label] = _one_configuration(name, model, steps, dict(settings))
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            found[label] = f"cache-dit: {type(error).__name__}: {lines[0][:120]}"
            if ("not " in lines[0] and "allowed classes" in lines[0]) or "register" in lines[0]:
                return {"all": "not registered"}
    return found


def _one_configuration(name: str, model: nn.Module, steps: Sequence[dict[str, Any]], settings: dict[str, Any]) -> str:
    separate = name in SEPARATE
    measured = run_cache_dit(model, steps, threshold=MEASURE_ONLY, separate_lists=separate, **settings)
    # A peer that reuses nothing must give the model's own output.
    error = max(relative_error(a, b) for a, b in zip(run_eager(model, steps).outputs, measured.outputs, strict=True))
    if error > 1e-5:
        return f"cache-dit: computes another output than the model, by {error:.1e}"
    threshold = thresholds_with_both(measured.diffs)
    expected = run_cache_dit(model, steps, threshold=threshold, separate_lists=separate, **settings)
    fresh()
    fn, bn = settings.pop("Fn"), settings.pop("Bn")
    compiled = compile_zoo(
        name,
        copy.deepcopy(model),
        scope="stack",
        Fn_compute_blocks=fn,
        Bn_compute_blocks=bn,
        residual_diff_threshold=threshold,
        **settings,
    )
    outputs = [tensors(compiled(**step))[0].clone() for step in steps]
    lists = [s.name for s in fx_cache.explain(compiled, **steps[0]).stacks if s.span is not None]
    if sorted(lists) != sorted(expected.hits):
        return f"caches {', '.join(expected.hits)}; here {', '.join(lists)}"
    hits = dict(zip(lists, (span["hits"] for span in last_branch(compiled)["spans"]), strict=True))
    if hits != expected.hits:
        return f"reuses at {expected.hits}; here {hits}"
    error = max(relative_error(a, b) for a, b in zip(expected.outputs, outputs, strict=True))
    if not any(hits.values()):
        return "no hit"
    return "same" if error < 1e-5 else f"outputs differ by {error:.1e}"


def _against_first_block_cache(name: str, model: nn.Module, steps: Sequence[dict[str, Any]]) -> str:
    try:
        measured = run_first_block_cache(model, steps, threshold=MEASURE_ONLY)
        if measured is None:
            return "not supported"
        threshold = thresholds_with_both(measured.diffs)
        expected = run_first_block_cache(model, steps, threshold=threshold)
    except Exception as error:
        return f"First Block Cache: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
    assert expected is not None
    fresh()
    compiled = compile_zoo(name, copy.deepcopy(model), residual_diff_threshold=threshold)
    outputs = [tensors(compiled(**step))[0].clone() for step in steps]
    hits = [span["hits"] for span in last_branch(compiled)["spans"]]
    if hits != list(expected.hits.values()):
        return f"reuses at {list(expected.hits.values())}; here {hits}"
    error = max(relative_error(a, b) for a, b in zip(expected.outputs, outputs, strict=True))
    return "same" if error < 1e-5 else f"outputs differ by {error:.1e}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", action="append")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)
    versions = {"torch": torch.__version__, "diffusers": _version("diffusers"), "cache-dit": _version("cache-dit")}
    record: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} thread",
        "versions": versions,
        "rows": [],
    }
    with torch.no_grad():
        for name in ZOO:
            if not any(fnmatch.fnmatch(name, pattern) for pattern in args.only or ["*"]):
                continue
            begin = time.perf_counter()
            row = measure(name)
            record["rows"].append(asdict(row))
            print(f"{row.name}: {_line(row)} [{time.perf_counter() - begin:.0f} s]", flush=True)
            if args.json:
                args.json.write_text(json.dumps(record, indent=1) + "\n")


def _line(row: Row) -> str:
    parts = ["exact" if row.exact else "NOT EXACT", f"{row.graphs} graph(s)", f"{row.spans} span(s)"]
    if row.spans and row.detectors_agree is not None:
        parts += ["detectors agree" if row.detectors_agree else "DETECTORS DIFFER"]
        parts += [] if row.same_without_metadata else ["OTHER WITHOUT METADATA"]
    parts += [] if row.spans else [str(row.reason)[:80]]
    if row.spans:
        parts += [] if row.hits_unnamed else ["NO HITS UNNAMED"]
        parts += [] if row.inductor_error is None else [f"inductor {row.inductor_error:.0e}"]
        parts += [f"reused {row.reused_error:.0e}", f"{row.share or 0:.0%}"]
        peers = {**row.cache_dit, "FBC": row.first_block_cache}
        parts += [f"{k}: {v}" for k, v in peers.items()]
    return "; ".join(parts)


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


if __name__ == "__main__":
    main()
