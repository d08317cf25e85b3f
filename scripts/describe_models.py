"""Writes ``docs/models.md`` from what ``benchmarks/zoo.py`` measured: ``python scripts/describe_models.py FILE``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TARGET = Path(__file__).parents[1] / "docs" / "models.md"

HEAD = """\
# Models

Every module that diffusers {diffusers} exports as a transformer, as a small configuration with random weights, and
variants of it where they change the graph. Measured on {date} ({machine}; torch {torch}, cache-dit {cache_dit})
by `python benchmarks/zoo.py --json FILE`; `python scripts/describe_models.py FILE` makes this page of it.

**Of {classes} classes: {cached} cached, {exact} exact, {refused} refused.** With variants there are {rows} rows:

- **exact** {exact_rows} of {rows}: with a policy that never reuses, every output is bit for bit the model's own
  (`compiler="eager"`).
- **cached** {cached_rows} of {rows}. A step reused on the very inputs that were computed differs by {reused:.0e} at most.
- **found without a name**: in a walk of {steps} steps with no session given, {unnamed} of {cached_rows} reuse from step to step.
- **both detectors**: on {agree} of {seen} graphs with a stack, module paths and structure alone show the same blocks;
  on {stripped} the rewrite of the graph without any metadata stores the same.
- **cache-dit**: {ran} rows ran in it ({configs}); {same} of them reuse at the same steps with outputs within 1e-5.
  {refuses} are not registered there; {fails} fail in it or compute another output than the model even without caching.
- **First Block Cache**: {fbc_ran} rows ran in it; {fbc_same} are the same.
- **Inductor**: on {inductor} models the largest relative error of a computed step is {inductor_error:.0e}.

A blank peer column: not registered or not supported there.

| class | graphs | cached | share | unnamed | detectors | cache-dit | First Block Cache |
|---|---|---|---|---|---|---|---|
"""

NOTES = """\

*share*: the part of the FLOPs that a hit saves, in these small configurations. *relay*: each block lies in graphs of its
own (a graph break in the blocks, or a loop that Dynamo leaves to Python); one decision is made for all.

## Where the peers differ, and why

- **ControlNet variants.** cache-dit's wrappers lose what is added between the blocks, so they compute another output
  than the model even without a hit. First Block Cache adds the samples of skipped blocks once more on a hit; its probe
  is the first block alone, ours the first block and what is added behind it.
- **BriaFibo.** cache-dit takes the blocks of its second list as two streams, by a rewritten forward; in the graph they
  carry one sequence of text and image. Its probe is the image part, ours the whole.
- **Other rows that compute another output in cache-dit, or fail in it** (AnyFlow FAR, Bria, ConsisID, Cosmos3, FLUX.2 with
  cached keys, LTX2): measured with a threshold at which nothing is reused, so no caching rule has a part in it.
- **WanVACE.** In cache-dit's patched forward each block takes its hint off the end of a list. On a hit the skipped blocks
  take none, and the blocks behind them get those. First Block Cache compares the first block alone, ours with its hint.
- **HunyuanImage with glyph text.** Its blocks lie in graphs of their own, and then each list has a span of its own; First
  Block Cache has one for both.
- **Latte, plain 2D transformers.** Where a block of ours is a pair of theirs, or an unnamed request computes (below), First
  Block Cache reuses at other steps.
- **Not found without a name.** Classes with no timestep among their inputs (plain 2D transformers inside a UNet,
  decoders) compute until a request is named with `fx_cache.session`, and its branch where latents do not follow from
  step to step: nothing else says when a step ends. So do those whose blocks carry several inputs of the latent's kind
  in one stream (Framepack, WanAnimate): which of them is denoised the graph does not show, and every step is taken
  for a request of its own. A pass that writes keys and values into a cache object is
  never taken for a step of a request.
"""


def _same(texts: Sequence[str]) -> bool:
    return bool(texts) and all(t == "same" for t in texts)


def _absent(row: dict[str, Any]) -> bool:
    texts = list(row["cache_dit"].values())
    return not texts or any("not registered" in t or "officially supported" in t for t in texts)


def _fails(row: dict[str, Any]) -> bool:
    return not _absent(row) and any(t.startswith("cache-dit:") for t in row["cache_dit"].values())


def _peer(row: dict[str, Any]) -> str:
    if _absent(row):
        return ""
    texts = row["cache_dit"]
    if _same(list(texts.values())):
        return "same"
    different = {k: v for k, v in texts.items() if v != "same"}
    return "; ".join(f"{k}: {_short(v)}" for k, v in different.items())


def _short(text: str) -> str:
    return text.replace("|", "/").removeprefix("cache-dit: ")[:110]


def _line(row: dict[str, Any]) -> str:
    relay = any(pattern.startswith("relay") for _, _, pattern in row["stacks"])
    cached = ", ".join(f"{name}×{blocks}" for name, blocks, _ in row["stacks"]) or f"no: {_short(row['reason'] or '')}"
    detectors = {None: "", True: "agree", False: "differ"}[row["detectors_agree"]]
    if row["same_without_metadata"] is False:
        detectors += ", other result without metadata"
    first = "" if row["first_block_cache"] == "not supported" else _short(row["first_block_cache"])
    cells = [
        row["name"] + ("" if row["exact"] else " **not exact**"),
        str(row["graphs"]),
        cached + (" (relay)" if relay else ""),
        "" if row["share"] is None else f"{row['share']:.0%}",
        {None: "", True: "yes", False: "no"}[row["hits_unnamed"]],
        detectors,
        _peer(row),
        first,
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    record = json.loads(Path(sys.argv[1]).read_text())
    rows = record["rows"]
    classes = [r for r in rows if "+" not in r["name"]]
    cached = [r for r in rows if r["spans"]]
    seen = [r for r in cached if r["detectors_agree"] is not None]
    ran = [r for r in cached if not _absent(r) and not _fails(r)]
    fbc = [
        r for r in cached if r["first_block_cache"] != "not supported" and "First Block" not in r["first_block_cache"]
    ]
    inductor = [r["inductor_error"] for r in rows if r["inductor_error"] is not None]
    text = HEAD.format(
        date=record["date"],
        machine=record["machine"],
        torch=record["versions"]["torch"],
        diffusers=record["versions"]["diffusers"],
        cache_dit=record["versions"]["cache-dit"],
        classes=len(classes),
        cached=sum(bool(r["spans"]) for r in classes),
        exact=sum(r["exact"] for r in classes),
        refused=sum(not r["spans"] for r in classes),
        rows=len(rows),
        exact_rows=sum(r["exact"] for r in rows),
        cached_rows=len(cached),
        reused=max(r["reused_error"] for r in cached),
        steps=8,
        unnamed=sum(bool(r["hits_unnamed"]) for r in cached),
        seen=len(seen),
        agree=sum(r["detectors_agree"] for r in seen),
        stripped=sum(bool(r["same_without_metadata"]) for r in seen),
        ran=len(ran),
        configs=", ".join(next(iter(ran))["cache_dit"]),
        same=sum(_same(list(r["cache_dit"].values())) for r in ran),
        refuses=sum(_absent(r) for r in cached),
        fails=sum(_fails(r) for r in cached),
        fbc_ran=len(fbc),
        fbc_same=sum(r["first_block_cache"] == "same" for r in fbc),
        inductor=len(inductor),
        inductor_error=max(inductor),
    )
    lines = [_line(r) for r in sorted(rows, key=lambda r: r["name"])]
    TARGET.write_text(text + "\n".join(lines) + "\n" + NOTES)
    print(text.splitlines()[6])


if __name__ == "__main__":
    main()
