"""On a card: exact where nothing is reused, and as the peers where something is, in every dtype and mode."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fx_cache.testing import tensors
from tests import test_parity, test_relay
from tests.gpu.card import REAL, Sent, device, needs_card
from tests.models import NAMES, build, styles, walk
from tests.oracles import MEASURE_ONLY, run_first_block_cache, thresholds_with_both
from tests.running import REUSING, compile_cached, hits_of, relative_error, run_cached, shallow
from tests.selection import few

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

HARD = ("writes_condition", "inplace_two", "side_network", "encoder_decoder", "autocast_block", "token_time_in_pieces")
"""Models of tests.models.styles whose graphs are hard to read."""

pytestmark = pytest.mark.slow


def on_device(model: nn.Module, dtype: str = "float32") -> nn.Module:
    return model.to(device(), DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES if REAL else few(NAMES, 1))
def test_bit_for_bit(name: str, dtype: str) -> None:
    """With the `eager` inner compiler, on a schedule that lies on the device."""
    model, send = on_device(build(name), dtype), Sent(DTYPES[dtype])
    compiled = compile_cached(model, residual_diff_threshold=0.0)
    for step in map(send, walk(name, 4)):
        assert torch.equal(compiled(**step)[0], model(**step)[0])


@pytest.mark.parametrize("name", HARD if REAL else few(HARD, 2))
@torch._dynamo.config.patch(recompile_limit=64)
def test_hard_ones(name: str) -> None:
    model, inputs = styles.build(name)
    model, send = on_device(model), Sent()
    options = {"compiler": "eager", "Fn_compute_blocks": 1, "residual_diff_threshold": 0.0}
    compiled = torch.compile(model, backend="dit_cache", options=options)
    for i in range(4):
        args, kwargs = send(inputs(1.0 - i / 4))
        # Some write to what they are given.
        again = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
        assert all(map(torch.equal, tensors(model(*again, **kwargs)), tensors(compiled(*args, **kwargs))))


@torch._dynamo.config.patch(recompile_limit=64)
def test_a_mixture_of_experts_in_many_graphs() -> None:
    model, send = on_device(test_relay.Model()), Sent()
    steps = [send(step) for step in test_relay.walk(0)]
    compiled = torch.compile(model, backend="dit_cache", options={**test_relay.OPTIONS, "residual_diff_threshold": 0.0})
    for step in [*steps, *steps]:
        assert torch.equal(compiled(**step)[0], model(**step)[0])


@needs_card
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune-no-cudagraphs"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_inductor(name: str, dtype: str, mode: str) -> None:
    """As near to the model in float32 as what Inductor makes of the plain model, whatever is reused is reused too."""
    exact, send = on_device(build(name)), Sent()
    model, given = on_device(build(name), dtype), Sent(DTYPES[dtype])
    plain = torch.compile(model, mode=mode, fullgraph=True)
    never = compile_cached(model, compiler="inductor", mode=mode, residual_diff_threshold=0.0)
    for step in walk(name, 4):
        expected = exact(**send(step))[0]
        torch.compiler.cudagraph_mark_step_begin()
        error = relative_error(expected, plain(**given(step))[0])
        torch.compiler.cudagraph_mark_step_begin()
        assert relative_error(expected, never(**given(step))[0]) <= 2 * error + 1e-5


@needs_card
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune-no-cudagraphs"])
@pytest.mark.parametrize("name", ["dit", "flux", "wan", "pixart"])
def test_what_is_reused_does_not_depend_on_the_mode(name: str, mode: str) -> None:
    send = Sent()
    steps = [send(step) for step in walk(name, 8)]
    outputs, hits = [], []
    for chosen in ("default", mode):
        torch._dynamo.reset()
        compiled = compile_cached(on_device(shallow(name)), compiler="inductor", mode=chosen, **REUSING)
        outputs.append([compiled(**step)[0].clone() for step in steps])
        hits.append(hits_of(compiled))
    assert hits[0] == hits[1] != []
    assert all(relative_error(a, b) < 1e-4 for a, b in zip(*outputs, strict=True))


@pytest.mark.parametrize("name", NAMES if REAL else few(NAMES, 1))
def test_cache_dit(name: str) -> None:
    send, compiled = Sent(), {}
    model, steps = on_device(build(name)), [send(step) for step in walk(name, test_parity.STEPS)]
    for settings in test_parity.CONFIGS.values() if REAL else [test_parity.CONFIGS["F2B1"]]:
        assert test_parity.check_against(model, steps, "stack", settings, compiled, separate_lists=True)


@pytest.mark.parametrize("name", NAMES if REAL else few(NAMES, 1))
def test_first_block_cache(name: str) -> None:
    send = Sent()
    model, steps = on_device(build(name)), [send(step) for step in walk(name, test_parity.STEPS)]
    measured = run_first_block_cache(model, steps, threshold=MEASURE_ONLY)
    if measured is None:
        pytest.skip(f"diffusers' FirstBlockCache does not support {name}")
    threshold = thresholds_with_both(measured.diffs)
    expected = run_first_block_cache(model, steps, threshold=threshold)
    assert expected is not None
    run = run_cached(model, steps, residual_diff_threshold=threshold, max_warmup_steps=0)
    assert run.hits == list(expected.hits.values())
    for reference, output in zip(expected.outputs, run.outputs, strict=True):
        assert relative_error(reference, output) < 1e-5
