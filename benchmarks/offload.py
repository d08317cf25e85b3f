"""Every class of the zoo with group offloading by leaf and by block: is it exact, what is reused, what is said.

Usage: python benchmarks/offload.py [--json FILE] [--markdown FILE] [--only PATTERN ...] [--kind KIND ...]

A request of six steps that reuses nothing is compared with the model's own, bit for bit. Then one of two passes in a
named session whose passes have no names, each of its passes by itself, and the same one with names for its passes: what
a pass reuses is what it computed, so that it gives the same bit for bit. And what it gives moves with the latents at
every step.

Options:
    --json FILE      where the rows go; those that it has already are not measured again
    --markdown FILE  where the table goes
    --only PATTERN   classes by shell pattern; may be given several times
    --kind KIND      leaf, leaf-N with a recompile limit of N, or block-N with N blocks a group; may be given several
                     times; default leaf, leaf-64, block-1 and block-2
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import json
import logging
import platform
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import fx_cache
from tests.models import MODELS, build, conditioning, walk
from tests.oracles import tensors

KINDS = ("leaf", "leaf-64", "block-1", "block-2")
STEPS = 6
PASSES = 2
OPTIONS = {"compiler": "eager", "Fn_compute_blocks": 1, "max_warmup_steps": 2}
CPU = torch.device("cpu")
HEAD = """# Group offloading

diffusers moves parts of a model while others run (`enable_group_offload`), by hooks that break its graph. So the blocks
lie in graphs of their own, and a span lies over several ([sessions](sessions.md#a-forward-in-several-graphs)). Made by
`python benchmarks/offload.py --markdown docs/offload.md` with small models of every class, two passes in a session:

- *4 of 6*: steps of a pass that reused the blocks (two are warm-up); all others are the model's own, bit for bit;
- *computes*: every step is the model's own; a warning or, step by step, `fx_cache.summary` says why;
- *not offered*: diffusers does not offload the class so.

By leaf, Dynamo's recompile limit is soon reached in the hooks; what it leaves to Python from then on has no graphs to
reuse. *leaf-64* is with `torch._dynamo.config.recompile_limit = 64`, *block-2* with two blocks a group.
"""


@dataclass
class Row:
    """What was seen of one class or variant.

    Attributes:
        supported: whether diffusers offloads the class at all.
        exact: whether steps that reuse nothing give the model's own output.
        apart: whether each pass gives what it gives by itself, or with a name.
        moves: whether no step that reuses gives what an earlier one gave.
        reused: steps of a pass, of `STEPS`, that reused something.
        error: what was raised.
        said: the first warning.
        seconds: how long it took.
        graphs: how many Dynamo captured.
    """

    name: str
    kind: str
    supported: bool = True
    exact: bool = False
    apart: bool = False
    moves: bool = False
    reused: int = 0
    error: str = ""
    said: str = ""
    seconds: float = 0.0
    graphs: int = 0


def offload(model: nn.Module, kind: str) -> None:
    """Puts diffusers' hooks on a model; on one processor they move nothing, and break its graph all the same."""
    name, _, number = kind.partition("-")
    settings = {"num_blocks_per_group": int(number)} if name == "block" else {}
    model.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type=f"{name}_level", **settings)


def measure(name: str, kind: str) -> Row:
    """One class with one kind of offloading."""
    with torch._dynamo.config.patch(recompile_limit=int(kind[5:]) if kind.startswith("leaf-") else 8):
        return _measured(name, kind)


def _measured(name: str, kind: str) -> Row:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    row, model = Row(name, kind), build(name)
    try:
        offload(model, kind)
    except (AttributeError, ValueError) as error:  # no hooks at all, or none of this kind
        row.supported, row.error = False, _line(error)
        return row
    prompts = [conditioning(name, seed) for seed in range(PASSES)]
    steps, before = walk(name, STEPS), walk(name, STEPS, seed=PASSES)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            expected = [_outputs(model, step) for step in before]
            plain = [[_outputs(model, {**step, **prompt}) for step in steps] for prompt in prompts]
            handle = fx_cache.enable(model, OPTIONS, residual_diff_threshold=0.0)
            with fx_cache.session("before"):
                exact = [_equal(_outputs(model, step), own) for step, own in zip(before, expected, strict=True)]
            handle.configure(residual_diff_threshold=2.0)
            _request(model, "first", steps, prompts)  # by which is learned what is denoised
            together = _request(model, "together", steps, prompts)
            alone = [_request(model, f"alone-{i}", steps, [prompt])[0] for i, prompt in enumerate(prompts)]
            named = _request(model, "named", steps, prompts, named=True)
            row.exact = all(exact) and all(_equal(plain[p][0], together[p][0]) for p in range(PASSES))
            row.apart = all(
                any(_equal(ours, own) for own in owns)
                for of_pass in zip(together, alone, plain, named, strict=True)
                for ours, *owns in zip(*of_pass, strict=True)
            )
            row.moves = all(_moves(ours, own) for ours, own in zip(alone, plain, strict=True))
            row.reused = min(_reused(model, f"alone-{i}") for i in range(PASSES))
        except Exception as error:  # it is what is looked for
            row.error = f"{type(error).__name__}: {_line(error)}"
    row.said = next((_line(w.message) for w in caught if issubclass(w.category, fx_cache.CacheWarning)), "")
    row.graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return row


def _request(
    model: nn.Module, name: str, steps: Sequence[dict], prompts: Sequence[dict], named: bool = False
) -> list[list[list[Tensor]]]:
    """What each pass of a request gives at each step; the passes have names, or not."""
    outputs: list[list[list[Tensor]]] = [[] for _ in prompts]
    for step in steps:
        for k, (own, prompt) in enumerate(zip(outputs, prompts, strict=True)):
            with fx_cache.session(name, branch=f"pass-{k}" if named else None):
                own.append(_outputs(model, {**step, **prompt}))
    return outputs


def _outputs(model: nn.Module, step: dict[str, Any]) -> list[Tensor]:
    return [t.clone() for t in tensors(model(**step))]


def _equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _moves(ours: Sequence[Sequence[Tensor]], own: Sequence[Sequence[Tensor]]) -> bool:
    """Whether every step is the model's own, or some way from the last that was, as the model's own is."""
    computed = 0
    for i, (a, b) in enumerate(zip(ours, own, strict=True)):
        if _equal(a, b):
            computed = i
        elif (a[0] - ours[computed][0]).norm() < 0.1 * (b[0] - own[computed][0]).norm():
            return False
    return True


def _reused(model: nn.Module, name: str) -> int:
    """Steps of a session's last branch at which any span was reused."""
    sessions = [s for s in fx_cache.summary(model).to_dict()["sessions"] if s["name"] == name]
    branches = sessions[-1]["branches"] if sessions else []
    return len({step for span in branches[-1]["spans"] for step in span["hits"]}) if branches else 0


def _line(text: object) -> str:
    return (str(text).splitlines() or [""])[0][:240]


def _table(rows: Sequence[Row]) -> str:
    """A table of all classes and kinds in markdown."""
    kinds = [kind for kind in KINDS if any(r.kind == kind for r in rows)]
    lines = ["| class | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    for name in dict.fromkeys(r.name for r in rows):
        cells = {r.kind: _cell(r) for r in rows if r.name == name}
        lines.append(f"| {name} | " + " | ".join(cells.get(kind, "") for kind in kinds) + " |")
    return "\n".join(lines) + "\n"


def _cell(row: Row) -> str:
    if not row.supported:
        return "not offered"
    if row.error:
        return "raises"
    if not row.exact or not row.apart or not row.moves:
        return "WRONG"
    return f"{row.reused} of {STEPS}" if row.reused else "computes"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--only", action="append")
    parser.add_argument("--kind", action="append")
    args = parser.parse_args()
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)
    record: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, 1 thread",
        "torch": torch.__version__,
        "rows": [],
    }
    rows = [Row(**r) for r in json.loads(args.json.read_text())["rows"]] if args.json and args.json.exists() else []
    done = {(r.name, r.kind) for r in rows}
    with torch.no_grad():
        for name in MODELS:
            if not any(fnmatch.fnmatch(name, pattern) for pattern in args.only or ["*"]):
                continue
            for kind in args.kind or KINDS:
                if (name, kind) in done:
                    continue
                begin = time.perf_counter()
                row = measure(name, kind)
                row.seconds = round(time.perf_counter() - begin, 1)
                rows.append(row)
                print(f"{name}, {kind}: {_cell(row)} {row.error} {row.said} [{row.seconds} s]", flush=True)
                if args.json:
                    args.json.write_text(json.dumps({**record, "rows": [asdict(r) for r in rows]}, indent=1) + "\n")
    if args.markdown:
        args.markdown.write_text(f"{HEAD}\n{_table(rows)}")


if __name__ == "__main__":
    main()
