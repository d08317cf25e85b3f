"""What is done to a transformer beside compiling it: LoRA, offloading, int8. Oracle: the same, uncached."""

from __future__ import annotations

import copy
from collections.abc import Callable

import accelerate
import pytest
import torch
from torch import nn

import fx_cache
from tests.models import build, conditioning, walk
from tests.pipelines import CASES, FIRST, THRESHOLD
from tests.pipelines import run as generate
from tests.running import hits_of, shallow
from tests.selection import few

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries that are tried here

OPTIONS = {"compiler": "eager", "Fn_compute_blocks": 1, "max_warmup_steps": 1}
CPU = torch.device("cpu")


def by_block(model: nn.Module) -> None:
    model.enable_group_offload(
        onload_device=CPU, offload_device=CPU, offload_type="block_level", num_blocks_per_group=1
    )


def by_leaf(model: nn.Module) -> None:
    model.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type="leaf_level")


def on_one_device(model: nn.Module) -> None:
    """As a pipeline with a device map has it."""
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)


def on_several(model: nn.Module) -> None:
    """As far as one processor shows it."""
    accelerate.dispatch_model(model, {name: "cpu" for name, _ in model.named_children()}, force_hooks=True)


def int8(model: nn.Module) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())


def lora(model: nn.Module) -> None:
    from peft import LoraConfig

    torch.manual_seed(1)
    targets = ["to_q", "to_k", "to_v"]
    model.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=targets))


def run(model: nn.Module, steps: list[dict]) -> list[torch.Tensor]:
    return [model(**step)[0].clone() for step in steps]


@pytest.mark.slow
@pytest.mark.parametrize("change", [by_block, int8, *few([lora, by_leaf], 0)])
def test_exact_and_reused(change: Callable[[nn.Module], None]) -> None:
    model, steps = build("flux"), walk("flux", 6)
    change(model)
    plain = run(model, steps)
    handle = fx_cache.enable(model, OPTIONS, residual_diff_threshold=0.0)
    assert [torch.equal(a, b) for a, b in zip(plain, run(model, steps), strict=True)] == [True] * 6
    handle.disable()
    torch._dynamo.reset()
    fx_cache.enable(model, OPTIONS, residual_diff_threshold=2.0)
    with fx_cache.session("request", branch="only"):  # else guidance, which is embedded too, has to show that it rests
        reused = run(model, steps)
    # Over several graphs the first step shows what is cached where, and the next ones that it is so.
    assert hits_of(model)[-1] == [*range(3 if change in (by_block, by_leaf) else 1, 6)]
    assert torch.equal(reused[0], plain[0])
    assert not torch.equal(reused[-1], plain[-1])


def in_passes(model: nn.Module, prompts: list[dict], steps: list[dict], before: list[dict]) -> list[list[torch.Tensor]]:
    """The outputs of a request with a pass for each prompt, which all see the same latents, behind another request."""
    fx_cache.enable(model, {**OPTIONS, "max_warmup_steps": 2}, residual_diff_threshold=2.0)
    with fx_cache.session("before"):
        run(model, before)
    outputs: list[list[torch.Tensor]] = [[] for _ in prompts]
    with fx_cache.session("request"):
        for step in steps:
            for own, prompt in zip(outputs, prompts, strict=True):
                own.append(model(**{**step, **prompt})[0].clone())
    return outputs


@pytest.mark.parametrize("change", [by_block, pytest.param(by_leaf, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", ["MochiTransformer3DModel", pytest.param("wan", marks=pytest.mark.long)])
def test_two_passes_of_a_session_are_told_apart(name: str, change: Callable[[nn.Module], None]) -> None:
    """Whatever inputs the graphs show. Oracle: each pass alone in a fresh copy, bit for bit, or the model's own."""
    prompts, steps, before = [conditioning(name, seed) for seed in (0, 1)], walk(name, 6), walk(name, 6, seed=7)

    def alone(prompts: list[dict]) -> list[list[torch.Tensor]]:
        torch._dynamo.reset()
        model = shallow(name)
        change(model)
        return in_passes(model, prompts, steps, before)

    together = alone(prompts)
    plain = [run(shallow(name), [{**step, **prompt} for step in steps]) for prompt in prompts]
    pairs = [(a, b) for own, out in zip(plain, together, strict=True) for a, b in zip(own, out, strict=True)]
    for prompt, own, outputs in zip(prompts, plain, together, strict=True):
        (expected,) = alone([prompt])
        for ours, hit, out in zip(own, expected, outputs, strict=True):
            assert torch.equal(out, ours) or torch.equal(out, hit)
    if change is by_block:
        assert sum(not torch.equal(a, b) for a, b in pairs) >= 6


@pytest.mark.slow
def test_another_lora_is_another_request() -> None:
    """A hot swap writes other numbers into the adapter: nothing of the old one is reused, nor compiled anew."""
    model, steps = build("flux"), walk("flux", 6)
    lora(model)
    swapped = copy.deepcopy(model)
    weights = [p for name, p in swapped.named_parameters() if "lora" in name]
    for weight in weights:
        weight.mul_(-1.5)
    expected = fx_cache.enable(swapped, OPTIONS, residual_diff_threshold=2.0)
    with expected.session("swapped"):
        alone = run(swapped, steps)
    handle = fx_cache.enable(model, OPTIONS, residual_diff_threshold=2.0)
    with handle.session("before"):
        run(model, steps)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    own = [p for name, p in model.named_parameters() if "lora" in name]
    for mine, other in zip(own, weights, strict=True):
        mine.copy_(other)
    with handle.session("before"):
        outputs = run(model, steps)
    assert [torch.equal(a, b) for a, b in zip(alone, outputs, strict=True)] == [True] * 6
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_a_lora_that_is_loaded_later() -> None:
    model, steps = build("flux"), walk("flux", 4)
    handle = fx_cache.enable(model, OPTIONS, residual_diff_threshold=0.0)
    run(model, steps)
    lora(model)
    got = run(model, steps)
    handle.disable()
    assert [torch.equal(a, b) for a, b in zip(run(model, steps), got, strict=True)] == [True] * 4


@pytest.mark.slow
def test_model_offload_of_a_pipeline() -> None:
    """The hook on the transformer moves it before every call, and breaks its graph there."""
    case = CASES["qwenimage"]
    plain, pipeline = case.build(), case.build()
    for p in (plain, pipeline):
        p.enable_model_cpu_offload(device="cpu")
    expected = generate(plain, case.ask(FIRST), FIRST)
    handle = fx_cache.enable(pipeline, OPTIONS, residual_diff_threshold=0.0)
    assert torch.equal(generate(pipeline, case.ask(FIRST), FIRST), expected)
    handle.configure(residual_diff_threshold=THRESHOLD)
    generate(pipeline, case.ask(FIRST), FIRST)
    assert len(hits_of(pipeline.transformer)) == case.reused


@pytest.mark.parametrize("move", [on_one_device, on_several, accelerate.cpu_offload])
def test_parts_that_accelerate_moves_are_refused(move: Callable[[nn.Module], object]) -> None:
    model, step = build("dit"), walk("dit", 1)[0]
    plain = model(**step)[0]
    move(model)
    with pytest.raises(fx_cache.OptionError, match="which accelerate moves by itself"):
        fx_cache.enable(model, OPTIONS)
    assert torch.equal(model(**step)[0], plain)
