"""explain, summary, dumps and the command line: what a person reads."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

import fx_cache
from fx_cache.cli import app
from tests.models import MODELS, NAMES, build, walk
from tests.models.tiny import LAYERS
from tests.oracles import run_eager
from tests.running import compile_cached
from tests.selection import few

PATTERNS = {
    "flux": ["Pattern_0/Pattern_1", "Pattern_0/Pattern_1"],
    "dit": ["Pattern_3"],
    "wan": ["Pattern_2"],
    "sd3": ["Pattern_0/Pattern_1"],
    "pixart": ["Pattern_2"],
    "cogvideox": ["Pattern_0/Pattern_1"],
    "qwenimage": ["Pattern_0/Pattern_1"],
    "ltx": ["Pattern_2"],
    "auraflow": ["Pattern_0/Pattern_1", "Pattern_3"],
    "sana": ["Pattern_2"],
}


@pytest.mark.parametrize("name", few(NAMES, 2))
def test_explain_names_stacks_patterns_and_streams(name: str) -> None:
    model, step = build(name), walk(name, 1)[0]
    compiled = compile_cached(model)
    found = fx_cache.explain(compiled, **step)
    assert found.reason is None and found.graphs == 1
    stacks = {s: len(getattr(model, s)) for s in MODELS[name].stacks}
    assert {s.name: s.blocks for s in found.stacks} == stacks
    assert [s.pattern.split(":")[0] for s in found.stacks] == PATTERNS[name]
    first = found.stacks[0]
    assert first.head == (0, 1) and first.span == (1, first.blocks)
    assert [s.role for s in first.streams].count("main") == 1
    assert json.loads(json.dumps(found.to_dict()))["stacks"][0]["name"] == first.name
    for part in (first.name, "head blocks[0:1]", "cached"):
        assert part in str(found)


@pytest.mark.long
def test_looking_often_leaves_compiling_alone() -> None:
    """Dynamo compiles a function eight times at most; what `explain` captures does not count."""
    model, step = build("dit"), walk("dit", 1)[0]
    for _ in range(9):
        assert fx_cache.explain(model, **step).graphs == 1
    assert torch.equal(compile_cached(model)(**step)[0], run_eager(model, [step]).outputs[0])
    assert fx_cache.summary(model).to_dict()["sessions"]


@pytest.mark.parametrize("name", few(NAMES, 2))
def test_the_roles_of_inputs_are_read_off_the_graph(name: str) -> None:
    model, step = build(name), walk(name, 1)[0]
    inputs = fx_cache.explain(compile_cached(model), **step).inputs
    latent = [n.removesuffix("_input") for n in inputs["latents"]]
    schedule = [n.removesuffix("_input") for n in inputs["schedule"]]
    assert latent == ["hidden_states"] or latent == ["latent"]
    assert "timestep" in schedule
    assert not any("encoder" in n or "text" in n for n in (*latent, *schedule))


def test_summary_counts_and_prints() -> None:
    model = build("dit")
    compiled = compile_cached(model, residual_diff_threshold=0.6)
    for step in walk("dit", 6):
        compiled(**step)
    found = fx_cache.summary(model)
    span = found.to_dict()["sessions"][0]["branches"][0]["spans"][0]
    assert span["steps"] == 6 == len(span["hits"]) + len(span["misses"])
    # The probe and the residual of one stream of [1, 16, 32] floats.
    assert span["bytes"] == 2 * 16 * 32 * 4
    assert json.loads(json.dumps(found.to_dict()))
    text = str(found)
    for part in ("request-1", "branch-0", "diff P50", "P95", "max", str(len(span["hits"]))):
        assert part in text
    assert fx_cache.summary().to_dict()["sessions"]


def test_dumps(tmp_path, monkeypatch) -> None:
    model, step = build("flux"), walk("flux", 1)[0]
    compile_cached(model, dump_dir=str(tmp_path))(**step)
    folder = tmp_path / "graph_0"
    names = sorted(p.name for p in folder.glob("[0-9]*.py"))
    assert [n[3:-3] for n in names][:2] == ["captured", "name_inputs"] and names[-1].endswith("outline_glue.py")
    for path in folder.rglob("*.py"):
        compile(path.read_text(), str(path), "exec")
    assert "residual" in (folder / "explain.txt").read_text()
    report = json.loads((folder / "report.json").read_text())
    assert [p["pass"] for p in report["passes"]][-1] == "outline_glue"
    assert {"compute_0.py", "reuse_0.py", "measure_0.py", "transformer_blocks_block.py"} <= {
        p.name for p in (folder / "pieces").iterdir()
    }
    monkeypatch.setenv("FX_CACHE_DUMP_DIR", str(tmp_path))
    other = build("flux", seed=1)
    compile_cached(other, Fn_compute_blocks=2)(**step)
    assert (tmp_path / "graph_1" / "skeleton.txt").exists()


SKELETON = """\
def forward(hidden_states_input, ..., timestep, ..., class_labels, ..., \
slot_0_gate, slot_0):
    head = self.head(hidden_states_input, ...)
    hidden_states = head[0]
    transformer_blocks_0 = self.transformer_blocks_block(timestep, ..., class_labels, ..., hidden_states, ...)
    hidden_states_12 = transformer_blocks_0[0]
    residual_of_head = self.residual_of_head(hidden_states_12, hidden_states)
    probe_0 = residual_of_head[0]
    measure_0 = self.measure_0
    hit_0 = check(slot_0_gate, measure_0, probe_0, slot_0)
    reuse_0 = self.reuse_0
    compute_0 = self.compute_0
    cond_0 = cond(hit_0, reuse_0, compute_0, (timestep, ..., class_labels, ..., hidden_states_12, ..., \
probe_0), slot_0)
    hidden_states_60 = cond_0[0]
    new_slot_0_probe = cond_0[1]
    new_slot_0_hidden_states_60 = cond_0[2]
    tail = self.tail(timestep, ..., class_labels, ..., hidden_states_60, ...)
    output = tail[0]
    return ((output,), ((new_slot_0_probe, new_slot_0_hidden_states_60),))

def reuse_0(timestep, ..., class_labels, ..., hidden_states_12, ..., \
probe_0, slot_0_probe, slot_0_hidden_states_60):
    restore = self.restore(hidden_states_12, slot_0_hidden_states_60)
    add = restore[0]
    return (add, slot_0_probe, slot_0_hidden_states_60)
"""


def test_the_rewritten_graph_of_a_dit(tmp_path) -> None:
    model, step = build("dit"), walk("dit", 1)[0]
    compile_cached(model, hoist_invariants=False, dump_dir=str(tmp_path))(**step)
    text = (tmp_path / "graph_0" / "skeleton.txt").read_text()
    assert "\n".join(text.splitlines()[: len(SKELETON.splitlines())]) == SKELETON.rstrip()


@pytest.mark.slow
def test_the_demo_writes_what_it_promises(tmp_path) -> None:
    result = CliRunner().invoke(
        app, ["demo", "--out", str(tmp_path), "--steps", "12", "--repeats", "1", "--compiler", "eager"]
    )
    assert result.exit_code == 0, result.output
    expected = {"grid.png", "diffs.png", "graph_before.py", "graph_after.py", "explain.txt", "summary.json", "graphs"}
    assert expected <= {p.name for p in tmp_path.iterdir()}
    told = json.loads((tmp_path / "summary.json").read_text())["result"]
    assert told["hits"]["cond"] and told["hits"]["uncond"]
    assert told["psnr_db"] > 15.0
    assert "speed-up" in result.output


def test_a_model_compiled_in_place() -> None:
    model, step = build("dit"), walk("dit", 1)[0]
    model.compile(backend="dit_cache", fullgraph=True, options={"compiler": "eager", "Fn_compute_blocks": 2})
    model(**step)
    assert [s.span for s in fx_cache.explain(model, **step).stacks] == [(2, LAYERS)]
    assert len(fx_cache.summary(model).to_dict()["sessions"]) == 1


def test_version() -> None:
    result = CliRunner().invoke(app, ["version"])
    assert result.output.strip() == "0.1.0"
