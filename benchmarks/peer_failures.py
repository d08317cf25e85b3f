"""Where cached models go wrong, shown on the peers and here: ``python benchmarks/peer_failures.py``.

Every case runs the same calls of the same small model, with random weights, through cache-dit (or diffusers' First
Block Cache) and through `dit_cache`, with the same options. What a request gets alone, on a fresh copy, is what it
should get among others.

Options:
    --json FILE     where the figures go
    --only PATTERN  cases by shell pattern; may be given several times
"""

from __future__ import annotations

import argparse
import copy
import datetime
import fnmatch
import importlib
import json
import logging
import platform
import sys
import time
import types
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from diffusers.models.attention import BasicTransformerBlock
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import fx_cache
from benchmarks.zoo import fresh
from fx_cache.demo.sheet import psnr
from tests.models import MODELS, build, conditioning, walk
from tests.oracles import MEASURE_ONLY, run_cache_dit, run_eager, run_first_block_cache
from tests.running import compile_cached, last_branch, relative_error

Step = dict[str, Any]
Run = Callable[[Sequence[Step]], "Seen"]

THRESHOLD = 0.6
CACHE_DIT: dict[str, Any] = {"Fn": 1, "Bn": 0, "max_warmup_steps": 2}
HERE = {"max_warmup_steps": 2}
ALWAYS = {"residual_diff_threshold": 2.0}


@dataclass(frozen=True)
class Seen:
    """What came of a series of calls: the output of each, and whether it reused."""

    outputs: list[Tensor]
    hits: list[bool]


@dataclass(frozen=True)
class Share:
    """What one of several that share a model got, and what it gets alone: the steps that reused, and how far the
    outputs are apart at most."""

    hits: list[int]
    alone: list[int]
    equal: bool
    error: float


@dataclass
class Case:
    """One failure: where it was seen, what the peer gives, and what comes of the same calls here."""

    failure: str
    seen: str
    peer: str = ""
    here: str = ""
    figures: dict[str, Any] = field(default_factory=dict)


# --- Running


def watched(name: str, model: nn.Module) -> tuple[nn.Module, list[bool]]:
    """A copy of `model`, and for each call of it whether it reused: whether block 1 did not run.

    The hooks hold no module, so they go along with the copy that a peer works on.
    """
    model = copy.deepcopy(model)
    hits: list[bool] = []
    model.register_forward_pre_hook(lambda module, args: hits.append(True))
    inside = next(model.get_submodule(f"{MODELS[name].stacks[0]}.1").children())
    inside.register_forward_pre_hook(lambda module, args: hits.__setitem__(-1, False))
    return model, hits


def with_cache_dit(name: str, model: nn.Module, *, refresh: int | None = None, **settings: Any) -> Run:
    """Runs calls through cache-dit on a fresh copy; with `refresh` its context is renewed every so many calls."""

    def run(calls: Sequence[Step]) -> Seen:
        copied, hits = watched(name, model)
        if refresh is not None:

            def renew(module: nn.Module, args: Any) -> None:
                import cache_dit

                if len(hits) % refresh == 1:
                    cache_dit.refresh_context(module)

            copied.register_forward_pre_hook(renew)
        return Seen(run_cache_dit(copied, calls, **{**CACHE_DIT, "threshold": THRESHOLD, **settings}).outputs, hits)

    return run


def with_dit_cache(model: nn.Module, **options: Any) -> Run:
    """Runs calls through the backend on one copy, without a word about requests or branches; each run begins afresh."""
    compiled = compile_cached(copy.deepcopy(model), **{**HERE, "residual_diff_threshold": THRESHOLD, **options})

    def run(calls: Sequence[Step]) -> Seen:
        fx_cache.reset(compiled)
        seen = Seen([], [])
        for step in calls:
            before = count_hits(compiled)
            seen.outputs.append(compiled(**step)[0].clone())
            seen.hits.append(count_hits(compiled) > before)
        return seen

    return run


def on_a_fresh_copy(model: nn.Module, **options: Any) -> Run:
    """The same on a new copy each time."""
    return lambda calls: with_dit_cache(model, **options)(calls)


def remembered(run: Run) -> Run:
    """`run`, which runs the same calls once only."""
    seen: dict[tuple[int, ...], tuple[Sequence[Step], Seen]] = {}

    def again(calls: Sequence[Step]) -> Seen:
        key = tuple(map(id, calls))
        if key not in seen:
            seen[key] = calls, run(calls)
        return seen[key][1]

    return again


def count_hits(compiled: nn.Module) -> int:
    """Hits of all requests of a model so far."""
    sessions = fx_cache.summary(compiled).to_dict()["sessions"]
    return sum(len(span["hits"]) for s in sessions for b in s["branches"] for span in b["spans"])


def shares(order: Sequence[tuple[str, Step]], together: Seen, alone: Run) -> dict[str, Share]:
    """For each caller in `order` what it got among the others, and what it gets alone."""
    found = {}
    for caller in dict.fromkeys(caller for caller, _ in order):
        places = [i for i, (other, _) in enumerate(order) if other == caller]
        reference = alone([order[i][1] for i in places])
        pairs = [(a, together.outputs[i]) for a, i in zip(reference.outputs, places, strict=True)]
        found[caller] = Share(
            [step for step, i in enumerate(places) if together.hits[i]],
            [step for step, hit in enumerate(reference.hits) if hit],
            all(torch.equal(a, b) for a, b in pairs),
            max(relative_error(a, b) for a, b in pairs),
        )
    return found


def from_others(order: Sequence[tuple[str, Step]], hits: Sequence[bool], slots: int) -> int:
    """Hits that added what another caller had computed, where calls take turns in `slots` slots."""
    computed: dict[int, str] = {}
    count = 0
    for i, ((caller, _), hit) in enumerate(zip(order, hits, strict=True)):
        if not hit:
            computed[i % slots] = caller
        elif computed[i % slots] != caller:
            count += 1
    return count


def told(found: dict[str, Share]) -> str:
    """In words: how the callers fared."""
    reused = f"{sum(len(s.hits) for s in found.values())} hits, alone {sum(len(s.alone) for s in found.values())}"
    if all(share.equal for share in found.values()):
        return f"bit for bit as alone; {reused}"
    apart = ", ".join(f"{caller}: {share.error:.0%}" for caller, share in found.items())
    return f"off what it is alone by {apart}; {reused}"


# --- The cases


def second_request() -> Case:
    """Requests one after another, of as many steps as the peer was told."""
    name, steps = "dit", 10
    model = build(name)
    order = [(f"request {k + 1}", step) for k in range(3) for step in walk(name, steps, seed=k)]
    calls = [step for _, step in order]
    fixed = with_cache_dit(name, model, num_inference_steps=steps)
    peer = shares(order, fixed(calls), fixed)
    renewed = shares(order, with_cache_dit(name, model, num_inference_steps=steps, refresh=steps)(calls), fixed)
    here = shares(order, with_dit_cache(model)(calls), on_a_fresh_copy(model))
    computed = ", ".join(f"{caller}: {_others(share.hits, steps)}" for caller, share in peer.items())
    return Case(
        "the second request starts in the first one's context",
        "",
        f"cache-dit, transformer only, `num_inference_steps={steps}`, 2 warm-up steps: computed are the steps of "
        f"{computed}; {told(peer)}. With its `refresh_context` before each request: {told(renewed)}",
        told(here),
        {"peer": _dicts(peer), "renewed": _dicts(renewed), "here": _dicts(here)},
    )


def second_request_by_mask() -> Case:
    """The same where steps reuse without looking: by a static mask there, at a threshold above 1 here."""
    name, steps = "dit", 10
    model = build(name)
    order = [(f"request {k + 1}", step) for k in range(2) for step in walk(name, steps, seed=k)]
    calls = [step for _, step in order]
    mask: dict[str, Any] = {
        "steps_computation_mask": [1, 1, 0, 0, 0, 1, 0, 0, 0, 0],
        "steps_computation_policy": "static",
    }
    masked = with_cache_dit(name, model, num_inference_steps=steps, **mask)
    seen, seen_here = masked(calls), with_dit_cache(model, **ALWAYS)(calls)
    peer, here = shares(order, seen, masked), shares(order, seen_here, on_a_fresh_copy(model, **ALWAYS))
    expected = run_eager(model, [calls[steps]]).outputs[0]
    error, error_here = (relative_error(expected, s.outputs[steps]) for s in (seen, seen_here))
    return Case(
        "the same, where steps reuse without looking",
        "",
        f"cache-dit with a static step mask: the first step of request 2 {_reuses(seen.hits[steps])}, from request 1, "
        f"and is {error:.0%} off what the model computes",
        f"with a threshold above 1: the first step of request 2 {_reuses(seen_here.hits[steps])}; {told(here)}",
        {
            "peer": {"first_step_reused": seen.hits[steps], "error": error, "requests": _dicts(peer)},
            "here": {"first_step_reused": seen_here.hits[steps], "error": error_here, "requests": _dicts(here)},
        },
    )


def _orders() -> dict[str, list[tuple[str, Step]]]:
    """Passes of guidance over one latent: what is called by whom at each step."""
    count = 12
    passes = {c: walk("wan", count, seed=0, conditioning=conditioning("wan", k)) for k, c in enumerate("ABC")}
    turns = {
        "in turns": lambda i: "AB",
        "three branches": lambda i: "ABC",
        "a branch skips steps": lambda i: "A" if 4 <= i < 9 else "AB",
        "the order is turned": lambda i: "AB"[:: 1 if i < 6 else -1],
    }
    return {label: [(c, passes[c][i]) for i in range(count) for c in turn(i)] for label, turn in turns.items()}


def branches() -> list[Case]:
    """Passes of classifier-free guidance, each a call: as the peer expects them, and otherwise."""
    name = "wan"
    model = build(name)
    alone, alone_here = remembered(with_cache_dit(name, model)), remembered(on_a_fresh_copy(model))
    run = with_dit_cache(model)
    cases = []
    for label, order in _orders().items():
        calls = [step for _, step in order]
        together = with_cache_dit(name, model, enable_separate_cfg=True)(calls)
        peer, here = shares(order, together, alone), shares(order, run(calls), alone_here)
        foreign = from_others(order, together.hits, slots=2)
        others = f"; hits with what another branch computed: {foreign}" if foreign else ""
        cases.append(
            Case(
                f"guidance in passes: {label}",
                "" if label == "in turns" else "vllm-omni #2371 (its TeaCache), sglang #35054",
                f"cache-dit, `enable_separate_cfg=True`: {told(peer)}{others}",
                told(here),
                {"peer": _dicts(peer), "from_other_branches": foreign, "here": _dicts(here)},
            )
        )
    return cases


def batch() -> Case:
    """A request alone, and the same request in a batch with two that change faster, and with two that change slower."""
    name, steps, threshold = "dit", 10, 0.3
    model = build(name)
    one = walk(name, steps, seed=0)
    companies = {"alone": one}
    for label, delta in (("among fast ones", 0.5), ("among slow ones", 0.02)):
        companies[label] = joined([one, *(walk(name, steps, seed=k, delta=delta) for k in (1, 2))])
    peer, here = {}, {}
    outputs: list[list[Tensor]] = []
    run = with_cache_dit(name, model, threshold=threshold)
    for label, calls in companies.items():
        seen = run(calls)
        outputs.append([output[:1] for output in seen.outputs])
        peer[label] = {"hits": _steps(seen.hits), "error": _largest(outputs[0], outputs[-1])}
    outputs.clear()
    options = {**HERE, "residual_diff_threshold": threshold, "batch_policy": "per_sample"}
    for label, calls in companies.items():
        compiled = compile_cached(copy.deepcopy(model), **options)
        outputs.append([compiled(**step)[0][:1].clone() for step in calls])
        (span,) = last_branch(compiled)["spans"]
        hits, *others = (sample["hits"] for sample in span.get("samples", [span]))
        here[label] = {"hits": hits, "others": others, "error": _largest(outputs[0], outputs[-1])}
    return Case(
        "a request's picture depends on whom it is batched with",
        "",
        f"cache-dit takes one mean over the batch: {_companies(peer)}",
        f'`batch_policy="per_sample"`: {_companies(here)}',
        {"peer": peer, "here": here},
    )


def _companies(found: dict[str, dict[str, Any]]) -> str:
    return "; ".join(
        f"{label} the request reuses steps {seen['hits']}" + (f", {_off(seen['error'])} off" if k else "")
        for k, (label, seen) in enumerate(found.items())
    )


class InPlaceBlock(BasicTransformerBlock):
    """A block that writes its result over its input, as fused kernels do."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The block's own forward, into the memory of `hidden_states`."""
        return hidden_states.copy_(super().forward(hidden_states, *args, **kwargs))


def in_place() -> Case:
    """A model whose blocks write their stream in place, against the same model whose blocks do not."""
    from diffusers.hooks._helpers import TransformerBlockRegistry

    name, steps = "dit", 10
    model = build(name)
    written = copy.deepcopy(model)
    for block in written.get_submodule("transformer_blocks").children():
        block.__class__ = InPlaceBlock
    TransformerBlockRegistry.register(InPlaceBlock, copy.copy(TransformerBlockRegistry.get(BasicTransformerBlock)))
    calls = walk(name, steps)
    plain, changed = (run_cache_dit(m, calls, **CACHE_DIT, threshold=THRESHOLD) for m in (model, written))
    (hits,), (hits_changed,) = plain.hits.values(), changed.hits.values()
    (diffs,) = changed.diffs.values()
    never = [run_first_block_cache(m, calls, threshold=MEASURE_ONLY) for m in (model, written)]
    assert never[0] is not None and never[1] is not None
    seen, seen_changed = with_dit_cache(model)(calls), with_dit_cache(written)(calls)
    figures: dict[str, Any] = {
        "peer": {"hits": hits, "in_place": hits_changed, "nan": sum(d != d for d in diffs.values())},
        "first_block_cache": {
            "hits": never[0].hits["model"],
            "in_place": never[1].hits["model"],
            "error": _largest(never[0].outputs, never[1].outputs),
        },
        "here": {
            "hits": _steps(seen.hits),
            "in_place": _steps(seen_changed.hits),
            "equal": all(torch.equal(a, b) for a, b in zip(seen.outputs, seen_changed.outputs, strict=True)),
        },
    }
    fbc = figures["first_block_cache"]
    return Case(
        "blocks that write their stream in place overwrite the probe",
        "sglang #33827",
        f"cache-dit: {figures['peer']['nan']} diffs are NaN, {len(hits_changed)} hits instead of {len(hits)}, and no "
        f"message. First Block Cache at a threshold of {MEASURE_ONLY:.0e}: {len(fbc['in_place'])} hits instead of "
        f"{len(fbc['hits'])}, which add nothing: {fbc['error']:.0%} off",
        f"{sum(seen_changed.hits)} hits, like blocks that do not ({sum(seen.hits)}); outputs "
        f"{'bit for bit the same' if figures['here']['equal'] else 'differ'}",
        figures,
    )


def side_input() -> Case:
    """A ControlNet's samples change in the middle of a request: those that only blocks which a hit skips read."""
    name, steps, change, threshold = "FluxTransformer2DModel+controlnet", 8, 4, 0.3
    model, calls = build(name), walk(name, steps)
    other = {k: [*v[:-1], -2.0 * v[-1]] for k, v in calls[0].items() if k.startswith("controlnet")}
    changed = [*calls[:change], *({**step, **other} for step in calls[change:])]
    expected = run_eager(model, changed).outputs
    fbc, fbc_changed = (run_first_block_cache(model, c, threshold=threshold) for c in (calls, changed))
    assert fbc is not None and fbc_changed is not None
    cache_dit = with_cache_dit(name, model, threshold=threshold)
    before, after = cache_dit(calls), cache_dit(changed)
    compiled = compile_cached(copy.deepcopy(model), **HERE, residual_diff_threshold=threshold)
    outputs = [compiled(**step)[0].clone() for step in changed]
    (span,) = last_branch(compiled)["spans"]
    figures: dict[str, Any] = {
        "change": change,
        "first_block_cache": {
            "hits": fbc.hits["model"],
            "changed": fbc_changed.hits["model"],
            "error": relative_error(expected[change], fbc_changed.outputs[change]),
        },
        "peer": {
            "hits": _steps(before.hits),
            "changed": _steps(after.hits),
            "same": all(torch.equal(a, b) for a, b in zip(before.outputs, after.outputs, strict=True)),
            "computed_error": relative_error(expected[0], after.outputs[0]),
        },
        "here": {
            "hits": span["hits"],
            "reason": span["misses"].get(change),
            "equal": torch.equal(expected[change], outputs[change]),
        },
    }
    fbc_figures, peer, here = figures["first_block_cache"], figures["peer"], figures["here"]
    return Case(
        f"an input that only skipped blocks read (ControlNet) changes at step {change}",
        "cache-dit #482",
        f"First Block Cache reuses steps {fbc_figures['changed']}, as without the change; step {change} is "
        f"{fbc_figures['error']:.0%} off what the model computes. cache-dit runs both lists as one block, so that only "
        f"the first sample is ever added: outputs are {'the same' if peer['same'] else 'others'} with the change and "
        f"without, and step 0, which is computed, is {peer['computed_error']:.0%} off",
        f"step {change} {_reuses(change in here['hits'])} ({here['reason']}), "
        f"{'bit for bit' if here['equal'] else 'not'} the model's own; reused are steps {here['hits']}",
        figures,
    )


def graph_breaks(steps: int = 8) -> Case:
    """How many graphs Dynamo makes of a FLUX transformer of 3 + 3 blocks, call by call, with ``eager`` behind it."""
    import cache_dit
    from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

    name = "flux"
    calls = walk(name, steps)
    model: Any = build(name)
    for stack in MODELS[name].stacks:
        setattr(model, stack, getattr(model, stack)[:3])
    wrapped, hooked = copy.deepcopy(model), copy.deepcopy(model)
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        residual_diff_threshold=THRESHOLD,
        max_warmup_steps=2,
        enable_separate_cfg=False,
    )
    cache_dit.enable_cache(wrapped, cache_config=config)
    apply_first_block_cache(hooked, FirstBlockCacheConfig(threshold=THRESHOLD))
    found = {"plain": _graphs(model, calls), "cache-dit": _graphs(wrapped, calls)}
    with hooked.cache_context("cond"):
        found["First Block Cache"] = _graphs(hooked, calls)
    options = {"compiler": "eager", "Fn_compute_blocks": 1, "residual_diff_threshold": THRESHOLD, **HERE}
    found["dit_cache"] = _graphs(model, calls, backend="dit_cache", options=options)
    peers = "; ".join(
        f"{peer}: {found[peer][0]} graphs at the first call, {found[peer][-1]} after {steps} (compiled at steps 0, "
        f"{', '.join(str(i) for i in range(1, steps) if found[peer][i] > found[peer][i - 1])})"
        for peer in ("cache-dit", "First Block Cache")
    )
    return Case(
        "caching breaks the graph, and compiles in the middle of a request",
        "",
        f"FLUX of 3 + 3 blocks, plainly {found['plain'][0]} graph. {peers}",
        f"{found['dit_cache'][0]} graph at the first call, {found['dit_cache'][-1]} after {steps}",
        {"graphs": found},
    )


def _graphs(model: nn.Module, calls: Sequence[Step], **compiling: Any) -> list[int]:
    """The graphs that Dynamo has made behind each call."""
    fresh()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, **{"backend": "eager", **compiling})
    counts = []
    for step in calls:
        compiled(**step)
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    return counts


def wrapped_psnr() -> Case:
    """The quality of unrelated images, as cache-dit's metrics and the demo give it."""
    metrics = _cache_dit_metrics()
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randint(0, 256, (256, 256, 3), generator=generator, dtype=torch.uint8) for _ in range(2)]
    black = torch.zeros(256, 256, 3, dtype=torch.uint8)
    pairs = {"noise against other noise": noise, "white against black": [255 - black, black]}
    peer = {label: float(metrics.compute_psnr(a.numpy(), b.numpy())[0]) for label, (a, b) in pairs.items()}
    here = {label: psnr(a.double() / 255, b.double() / 255) for label, (a, b) in pairs.items()}
    return Case(
        "PSNR computed on bytes, whose differences wrap around",
        "",
        "cache-dit's metrics: " + ", ".join(f"{label} {value:.1f} dB" for label, value in peer.items()),
        "in float64: " + ", ".join(f"{label} {abs(value):.1f} dB" for label, value in here.items()),
        {"peer": peer, "here": here},
    )


def _cache_dit_metrics() -> types.ModuleType:
    """cache-dit's metrics. They import OpenCV and scikit-image, which PSNR does without: stand-ins take their place."""
    importlib.import_module("cache_dit.metrics")  # what else it imports is there before the stand-ins
    names = [n for n in ("cv2", "skimage", "skimage.metrics") if n not in sys.modules]
    sys.modules.update({name: mock.MagicMock() for name in names})
    try:
        return importlib.import_module("cache_dit.metrics.metrics")
    finally:
        for name in names:
            del sys.modules[name]


# --- Small things


def joined(walks: Sequence[Sequence[Step]]) -> list[Step]:
    """Requests as one batch; what stays the same over a request stays one object."""
    kept: dict[tuple[int, ...], Tensor] = {}

    def join(values: Sequence[Any]) -> Any:
        if not isinstance(values[0], Tensor):
            return values[0]
        return kept.setdefault(tuple(map(id, values)), torch.cat(list(values)))

    return [{key: join([step[key] for step in steps]) for key in steps[0]} for steps in zip(*walks, strict=True)]


def _others(hits: Sequence[int], steps: int) -> list[int]:
    return [step for step in range(steps) if step not in hits]


def _steps(hits: Sequence[bool]) -> list[int]:
    return [step for step, hit in enumerate(hits) if hit]


def _largest(expected: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    return max(relative_error(a, b) for a, b in zip(expected, got, strict=True))


def _off(error: float) -> str:
    return f"{error:.0%}" if error > 1e-3 else f"{error:.0e}"


def _dicts(found: dict[str, Share]) -> dict[str, Any]:
    return {caller: asdict(share) for caller, share in found.items()}


def _reuses(hit: bool) -> str:
    return "reuses" if hit else "computes"


CASES: dict[str, Callable[[], Case | list[Case]]] = {
    "second_request": second_request,
    "second_request_by_mask": second_request_by_mask,
    "branches": branches,
    "batch": batch,
    "in_place": in_place,
    "side_input": side_input,
    "graph_breaks": graph_breaks,
    "wrapped_psnr": wrapped_psnr,
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", action="append")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)
    record: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} thread",
        "versions": {name: version(name) for name in ("torch", "diffusers", "cache-dit", "fx_cache")},
        "cases": [],
    }
    table = Table(show_lines=True)
    for title in ("what goes wrong", "seen in", "the peer", "fx_cache"):
        table.add_column(title, overflow="fold")
    for name, run in CASES.items():
        if not any(fnmatch.fnmatch(name, pattern) for pattern in args.only or ["*"]):
            continue
        begin = time.perf_counter()
        fresh()
        with torch.no_grad():
            found = run()
        print(f"{name}: {time.perf_counter() - begin:.1f} s", file=sys.stderr, flush=True)
        for case in found if isinstance(found, list) else [found]:
            table.add_row(case.failure, case.seen, case.peer, case.here)
            record["cases"].append({"name": name, **asdict(case)})
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
