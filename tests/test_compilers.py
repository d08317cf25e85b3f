"""Inner compilers: any Dynamo backend compiles the pieces, like blocks once, both branches at the first call."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch._dynamo import register_backend
from torch._dynamo.utils import counters
from torch._functorch._aot_autograd.autograd_cache import check_cacheable

import fx_cache
from tests.models import build, walk
from tests.running import compile_cached, last_branch, needs_inductor, relative_error, run_cached, shallow
from tests.selection import few

seen: list[torch.fx.GraphModule] = []


@register_backend
def counting(gm, example_inputs):
    seen.append(gm)
    return gm.forward


@pytest.mark.parametrize("depth", [6, 12])
def test_like_blocks_are_compiled_once_whatever_the_depth(depth: int) -> None:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    small = build("wan").config
    model = WanTransformer3DModel.from_config({**small, "num_layers": depth}).eval()
    seen.clear()
    compiled = compile_cached(model, compiler="counting", residual_diff_threshold=1.0)
    steps = walk("wan", 6)
    compiled(**steps[0])
    pieces = len(seen)
    # Prologue, block, measure, epilogue; computed once, the prompt's projection, and a block's keys and values of it.
    assert pieces == 6
    for step in steps[1:]:
        compiled(**step)
    assert len(seen) == pieces
    assert last_branch(model)["spans"][0]["hits"]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", few(["dit", "flux", "wan", "pixart"], 1))
def test_a_second_process_finds_every_piece_on_disk(name: str, dynamic: bool) -> None:
    seen.clear()
    options = {"compiler": "counting", "Fn_compute_blocks": 1}
    compiled = torch.compile(shallow(name), backend="dit_cache", fullgraph=True, dynamic=dynamic, options=options)
    compiled(**walk(name, 1)[0])
    assert len(seen) >= 4
    for piece in seen:
        check_cacheable(piece)  # raises what AOTAutograd's cache would pass the piece over for


@needs_inductor
@pytest.mark.slow
@pytest.mark.parametrize("name", few(["dit", "flux", "sd3", "cogvideox"], 1))
def test_inductor(name: str) -> None:
    model, steps = build(name), walk(name, 6)
    compiled = compile_cached(model, compiler="inductor", residual_diff_threshold=0.0, scope="stack")
    for step in steps:
        assert relative_error(model(**step)[0], compiled(**step)[0]) < 1e-5
    eager = compile_cached(build(name), compiler="eager", residual_diff_threshold=1.0, scope="stack")
    fx_cache.configure(model, residual_diff_threshold=1.0)
    fx_cache.reset(model)
    with torch._dynamo.config.patch(error_on_recompile=True), fx_cache.session("same", "only"):
        outputs = [compiled(**step)[0].clone() for step in steps]
    hits = last_branch(model)["spans"][0]["hits"]
    assert hits
    with fx_cache.session("same", "only"):
        references = [eager(**step)[0].clone() for step in steps]
    assert relative_error(references[-1], outputs[-1]) < 1e-4


def test_aot_eager_and_options_for_the_inner_compiler() -> None:
    model, steps = build("sana"), walk("sana", 4)
    counters.clear()
    compiled = compile_cached(model, compiler="aot_eager", residual_diff_threshold=0.0)
    for step in steps:
        assert relative_error(model(**step)[0], compiled(**step)[0]) < 1e-6
    assert not counters["graph_break"]


@register_backend
def noting(gm, example_inputs, *, mode=None, options=None):
    noted.append((mode, options))
    return gm.forward


noted: list[tuple] = []


def test_mode_and_foreign_options_reach_the_inner_compiler() -> None:
    model, step = build("dit"), walk("dit", 1)[0]
    compile_cached(model, compiler="noting", mode="fast", precision=16)(**step)
    assert set(map(str, noted)) == {"('fast', {'precision': 16})"}
    noted.clear()


def test_the_backend_is_found_by_name_without_an_import() -> None:
    code = (
        "import torch, sys\n"
        "assert 'fx_cache' not in sys.modules\n"
        "assert 'dit_cache' in torch._dynamo.list_backends()\n"
        "print(torch._dynamo.lookup_backend('dit_cache').__module__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "fx_cache.backend"


@pytest.mark.parametrize("name", few(["dit", "flux", "pixart", "cogvideox"], 1))
def test_whole_head_span_and_tail_as_one_piece_each(name: str) -> None:
    """``regional=False``: the same results and decisions, and as many pieces whatever the depth."""
    steps = [*walk(name, 6), *walk(name, 6, seed=1)]
    policy = {"residual_diff_threshold": 1.0, "max_continuous_cached_steps": 2, "scope": "stack"}
    with_blocks = run_cached(build(name), steps, **policy)
    seen.clear()
    whole = run_cached(build(name), steps, regional=False, compiler="counting", **policy)
    assert whole.hits == with_blocks.hits
    assert whole.hits[0]
    assert all(torch.equal(a, b) for a, b in zip(with_blocks.outputs, whole.outputs, strict=True))
    spans = len(last_branch(whole.compiled)["spans"])
    # Of each span: what is in front of it, its measure, both branches. Then the tail, and what is computed once.
    assert len(seen) <= 4 * spans + 2, [piece.code for piece in seen]


def test_public_surface() -> None:
    expected = {
        "CacheConfig",
        "enable",
        "explain",
        "summary",
        "reset",
        "session",
        "end",
        "offload",
        "configure",
        "export",
    }
    errors = {"FxCacheError", "OptionError", "SessionError", "ExportError", "CacheWarning"}
    assert set(fx_cache.__all__) == expected | errors
    assert all(getattr(fx_cache, name).__doc__ for name in fx_cache.__all__)
