"""Exported programs. Oracles: the same model compiled, in a named session; the runtime's policy; the model itself."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

import fx_cache
from tests.models import walk
from tests.oracles import run_eager
from tests.running import REUSING, compile_cached, last_branch, needs_inductor, shallow
from tests.selection import few

ROOT = Path(__file__).parents[1]
CONTROLLED = "FluxTransformer2DModel+controlnet"

POLICIES = [
    {**REUSING, "Fn_compute_blocks": 1},
    {**REUSING, "Fn_compute_blocks": 1, "Bn_compute_blocks": 1, "scope": "stack", "max_continuous_cached_steps": 2},
    {
        "Fn_compute_blocks": 2,
        "steps_computation_mask": [1, 0, 1, 0, 0, 1, 0, 0],
        "steps_computation_policy": "static",
        "residual_diff_threshold": 0.6,
    },
]


def run(program: torch.export.ExportedProgram, steps: list[dict]) -> tuple[list[torch.Tensor], dict]:
    call, state = program.module(), program.example_inputs[0][0]
    outputs = []
    for step in steps:
        (output, *_), state = call(state, **step)
        outputs.append(output)
    return outputs, state


@pytest.mark.parametrize("options", POLICIES, ids=["threshold", "stacks", "mask"])
@pytest.mark.parametrize("name", few(["dit", "flux"], 1))
def test_a_program_does_what_the_compiled_model_does(name: str, options: dict) -> None:
    """Bit for bit, with the same hits and the same diffs."""
    model, steps = shallow(name), walk(name, 12)
    compiled = compile_cached(model, **options)
    with fx_cache.session("request", branch="only"):  # whoever has a program's state, has its request
        expected = [compiled(**step)[0].clone() for step in steps]
    spans = last_branch(model)["spans"]
    outputs, state = run(fx_cache.export(model, (), steps[0], **options), steps)
    assert all(map(torch.equal, outputs, expected))
    assert all(0 < len(span["hits"]) < len(steps) for span in spans)
    assert [int(state[f"hits_{k}"]) for k in range(len(spans))] == [len(span["hits"]) for span in spans]
    for k, span in enumerate(spans):
        assert float(state[f"accumulated_{k}"]) == pytest.approx(sum(d for d in span["diffs"].values() if d > 0))
    assert int(state["step"]) == len(steps)


def test_without_reuse_it_is_the_model() -> None:
    model, steps = shallow("wan"), walk("wan", 3)
    outputs, _ = run(fx_cache.export(model, (), steps[0], residual_diff_threshold=0.0, Fn_compute_blocks=1), steps)
    assert all(map(torch.equal, outputs, run_eager(model, steps).outputs))


def test_requests_in_turns_and_a_program_from_a_file(tmp_path: Path) -> None:
    """Whoever has the state has the request: two in turns are as two in a row; weights keep their names."""
    model = shallow("dit")
    requests = [walk("dit", 6, seed=seed) for seed in (0, 1)]
    program = fx_cache.export(model, (), requests[0][0], **POLICIES[0])
    assert set(program.state_dict) == set(model.state_dict())
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2")
    call, state = loaded.module(), loaded.example_inputs[0][0]
    assert not any(tensor.any() for tensor in state.values())
    states, outputs = [state, state], [[], []]
    for turn in zip(*requests, strict=True):
        for k, step in enumerate(turn):
            (output, *_), states[k] = call(states[k], **step)
            outputs[k].append(output)
    for k, request in enumerate(requests):
        expected, last = run(program, request)
        assert all(map(torch.equal, outputs[k], expected))
        assert int(last["hits_0"]) > 0


def test_a_step_with_other_controls_computes() -> None:
    """What feeds the span alone is compared by value."""
    model, steps = shallow(CONTROLLED), walk(CONTROLLED, 4)
    double = [c.clone() for c in steps[2]["controlnet_block_samples"]]
    changed = {**steps[2], "controlnet_block_samples": [double[0], *(-2.0 * c for c in double[1:])]}
    program = fx_cache.export(model, (), steps[0], residual_diff_threshold=1.0, max_warmup_steps=1, Fn_compute_blocks=1)
    assert int(run(program, steps)[1]["hits_0"]) == 3
    outputs, state = run(program, [steps[0], steps[1], changed, changed])
    assert int(state["hits_0"]) == 2
    assert torch.equal(outputs[2], run_eager(model, [changed]).outputs[0])


def test_numbers_lie_on_the_host() -> None:
    """Whatever tensors are made on by default."""
    model, steps = shallow("dit"), walk("dit", 4)
    torch.set_default_device("meta")
    try:
        program = fx_cache.export(model, (), steps[0], **POLICIES[0])
    finally:
        torch.set_default_device(None)
    assert int(run(program, steps)[1]["step"]) == 4


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # torch's own, where it packages
@pytest.mark.long
@needs_inductor
def test_a_compiled_package_from_python_and_from_cpp(tmp_path: Path) -> None:
    """Over 20 steps of hits and misses the package gives what the program gives; in C++ what it gives in Python."""
    model, steps = shallow("dit"), walk("dit", 20)
    options = {"Fn_compute_blocks": 1, "max_warmup_steps": 2, "residual_diff_threshold": 0.4}
    program = fx_cache.export(model, (), steps[0], **options)
    empty = program.example_inputs[0][0]
    expected, last = run(program, steps)
    assert 0 < int(last["hits_0"]) < len(steps) - 2

    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    call, state = torch._inductor.aoti_load_package(package), empty
    printed = []
    for step, output in zip(steps, expected, strict=True):
        (got, *_), state = call(state, **step)
        torch.testing.assert_close(got, output, rtol=1e-4, atol=1e-4)
        printed.append((float(got.detach().double().abs().sum()), int(state["hits_0"])))
    assert int(state["hits_0"]) == int(last["hits_0"])

    inputs = [[v for v in step.values() if isinstance(v, torch.Tensor)] for step in steps]
    torch.save(([*empty.values()], inputs, [*empty].index("hits_0")), tmp_path / "steps.pt")
    built = build_cpp(tmp_path)
    lines = subprocess.run(
        [built, package, tmp_path / "steps.pt"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert [(pytest.approx(float(a), rel=1e-8), int(b)) for a, b in map(str.split, lines)] == printed


def build_cpp(folder: Path) -> Path:
    """As docs/export.md does it."""
    (libraries,) = cpp_extension.library_paths()[:1]
    command = ["g++", "-std=c++20", ROOT / "examples/cpp/denoise.cpp", "-o", folder / "denoise"]
    command += [f"-I{path}" for path in cpp_extension.include_paths()]
    command += [f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run(command, check=True)
    return folder / "denoise"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_inference_steps": 20}, "option 'num_inference_steps': got 20 for export; expected nothing"),
        ({"compiler": "eager"}, "option 'compiler': got 'eager' for export"),
        ({"batch_policy": "per_sample"}, "option 'batch_policy': got 'per_sample' for export; expected 'all' or 'any'"),
        ({"Fn_computed_blocks": 1}, "got an unknown name; expected 'Fn_compute_blocks'"),
        ({"config": fx_cache.CacheConfig(), "Fn_compute_blocks": 1}, "export: got a config and options beside it"),
    ],
)
def test_options_without_a_meaning(options: dict, match: str) -> None:
    with pytest.raises(fx_cache.OptionError, match=match):
        fx_cache.export(torch.nn.Identity(), (torch.ones(1),), **options)


def test_what_cannot_be_exported() -> None:
    with pytest.raises(fx_cache.ExportError, match="expected"):
        fx_cache.export(torch.nn.Linear(4, 4), (torch.ones(1, 4),))

    class Holder:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor

    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = shallow("dit")

        def forward(self, **given):
            return Holder(self.model(**given)[0])

    with pytest.raises(fx_cache.ExportError, match="the model's output: got a Holder; expected tensors in tuples"):
        fx_cache.export(Wrapped(), (), walk("dit", 1)[0], Fn_compute_blocks=1)
