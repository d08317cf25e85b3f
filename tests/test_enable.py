"""`fx_cache.enable`. Oracles: pipelines with each transformer compiled by hand, and uncached ones."""

from __future__ import annotations

import copy
import io
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import fx_cache
from fx_cache.integrations.pipelines import denoisers
from fx_cache.profiles import options_for, recommended
from tests.models import build, walk
from tests.pipelines import CASES, FIRST, THRESHOLD, run
from tests.running import compile_cached, hits_of, layers, shallow
from tests.selection import few

pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")

OPTIONS = {"compiler": "eager", "Fn_compute_blocks": 1, "max_warmup_steps": 1, "residual_diff_threshold": THRESHOLD}


class Controls(nn.Module):
    """What makes controls for a denoiser is told the time as well."""

    def forward(self, hidden_states: Any, timestep: Any, conditioning_scale: float = 1.0) -> Any:
        raise NotImplementedError


class Encoder(nn.Module):
    def forward(self, input_ids: Any) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize("name", few(CASES, 2))
def test_a_pipeline_by_one_line(name: str) -> None:
    case = CASES[name]
    by_hand, pipeline, plain = case.cached(THRESHOLD), case.build(), case.build()
    expected = run(by_hand, case.ask(FIRST), FIRST)
    handle = fx_cache.enable(pipeline, **OPTIONS | {"max_warmup_steps": 2})
    assert tuple(handle.modules) == case.transformers
    assert torch.equal(run(pipeline, case.ask(FIRST), FIRST), expected)
    for transformer, same in zip(case.of(pipeline), case.of(by_hand), strict=True):
        assert hits_of(transformer) == hits_of(same) != []
    spans = [s for session in handle.summary().sessions for b in session["branches"] for s in b["spans"]]
    assert sum(len(s["hits"]) for s in spans) == sum(sum(map(len, hits_of(t))) for t in case.of(pipeline))
    handle.disable()
    assert torch.equal(run(pipeline, case.ask(FIRST), FIRST), run(plain, case.ask(FIRST), FIRST))
    handle.disable()


def test_what_is_a_denoiser() -> None:
    parts = {
        "transformer": build("dit"),
        "unconditional_transformer": build("dit"),
        "controlnet": Controls(),
        "text_encoder": Encoder(),
        "scheduler": object(),
    }
    expected = ["transformer", "unconditional_transformer"]
    assert list(denoisers(SimpleNamespace(components=parts))) == expected
    assert list(denoisers(SimpleNamespace(**parts))) == expected
    for module in parts["transformer"], parts["controlnet"]:
        assert denoisers(module) == {"": module}


def test_a_module_and_a_configuration() -> None:
    config = fx_cache.CacheConfig(**OPTIONS)
    for given in (config, OPTIONS):
        model, steps = build("dit"), walk("dit", 6)
        handle = fx_cache.enable(model, given, residual_diff_threshold=2.0, fullgraph=True)
        with handle.session("request"):
            for step in steps:
                model(**step)
        assert hits_of(model) == [[1, 2, 3, 4, 5]]
        assert handle.summary("request").sessions == handle.summary().sessions
        assert handle.summary("other").sessions == ()
        handle.configure(residual_diff_threshold=0.0)
        with handle.session("second"):
            for step in steps:
                model(**step)
        assert hits_of(model) == [[1, 2, 3, 4, 5]]


def test_what_is_compiled_in_blocks_is_taken_off() -> None:
    """As engines and `compile_repeated_blocks` do it: each block's forward or call is a compiled one."""
    model, steps = build("flux"), walk("flux", 6)
    expected = compile_cached(build("flux"), **OPTIONS)
    outputs = [expected(**step)[0].clone() for step in steps]
    first, *others = [*model.transformer_blocks, *model.single_transformer_blocks]
    first.forward = compiled = torch.compile(first.forward, backend="eager")
    for block in others:
        block.compile(backend="eager")
    handle = fx_cache.enable(model, OPTIONS, fullgraph=True)
    assert [torch.equal(model(**s)[0], o) for s, o in zip(steps, outputs, strict=True)] == [True] * len(steps)
    assert hits_of(model) == hits_of(expected)
    handle.disable()
    assert first.forward is compiled
    assert all(block._compiled_call_impl is not None for block in others)
    assert layers(model, steps[0]) > 0


PROFILES = {"Tiny*": {"Fn_compute_blocks": 3}, "DiT*": {"Fn_compute_blocks": 2, "max_warmup_steps": 2}}


@pytest.mark.filterwarnings("ignore")  # of torch's export
@pytest.mark.parametrize("name", few(["dit", "flux", "wan"], 1))
def test_an_exported_module(name: str) -> None:
    """Its operations are ATen's, and no module shows its blocks; roles and hits are the model's own."""
    model, steps = shallow(name), walk(name, 5)
    exported = torch.export.export(model, (), dict(steps[0])).module()
    expected = [exported(**step)[0].clone() for step in steps]
    found, known = (fx_cache.explain(m, **steps[0]).inputs for m in (exported, model))
    assert {role: len(names) for role, names in found.items()} == {role: len(names) for role, names in known.items()}
    own, handle = fx_cache.enable(model, OPTIONS), fx_cache.enable(exported, OPTIONS)
    for module in (model, exported):
        with fx_cache.session("never", "only", config={"residual_diff_threshold": 0.0}):
            outputs = [module(**step)[0].clone() for step in steps]
        if module is exported:
            assert all(map(torch.equal, expected, outputs))
        with fx_cache.session("reusing", "only", config={"residual_diff_threshold": 2.0}):
            for step in steps:
                module(**step)
    (branch,), (theirs,) = (h.summary("reusing").sessions[0]["branches"] for h in (handle, own))
    assert [span["hits"] for span in branch["spans"]] == [span["hits"] for span in theirs["spans"]]
    assert all(span["hits"] for span in branch["spans"])


def test_profiles_are_options_by_class_name() -> None:
    model = build("dit")
    handle = fx_cache.enable(model, compiler="eager", max_warmup_steps=1, profile=PROFILES)
    assert handle.options[""] == {"compiler": "eager", "Fn_compute_blocks": 2, "max_warmup_steps": 1}
    handle.disable()
    with_base = fx_cache.enable(model, compiler="eager", profile={"*Mixin": {"Fn_compute_blocks": 3}})
    assert with_base.options[""]["Fn_compute_blocks"] == 3


def test_a_configuration_says_what_it_does_not_have_by_default() -> None:
    config = fx_cache.CacheConfig(max_warmup_steps=1)
    handle = fx_cache.enable(build("dit"), config, compiler="eager", profile=PROFILES)
    assert handle.options[""] == {"compiler": "eager", "Fn_compute_blocks": 2, "max_warmup_steps": 1}


def test_profiles_by_the_class_of_the_pipeline() -> None:
    pipeline = type("TinyPipeline", (), {})()
    pipeline.transformer = build("dit")
    assert fx_cache.enable(pipeline, profile={"Tiny*": {"scope": "stack"}}).options["transformer"] == {"scope": "stack"}


def test_recommended_profiles_hold_what_is_known() -> None:
    for pattern, options in recommended().items():
        assert options_for([pattern.replace("*", "X")], "recommended") == options
    assert options_for(["Flux2KleinPipeline"], "recommended") == {"Fn_compute_blocks": 2}


@pytest.mark.parametrize(
    ("target", "kwargs", "match"),
    [
        (SimpleNamespace(text_encoder=Encoder()), {}, r"text_encoder \(Encoder\); expected a pipeline with a denoiser"),
        (object(), {}, "got object with no module"),
        (None, {"Fn_compute_block": 1}, "'Fn_compute_blocks'"),
        (None, {"Fn_compute_blocks": 0}, "integer >= 1"),
        (None, {"profile": "recommend"}, "profile: got 'recommend'"),
        (None, {"profile": {"*": {"Fn_block": 2}}}, "unknown name"),
    ],
)
def test_bad_input(target: Any, kwargs: dict, match: str) -> None:
    model = build("dit")
    with pytest.raises(fx_cache.OptionError, match=match):
        fx_cache.enable(model if target is None else target, **kwargs)
    assert model._compiled_call_impl is None


def test_once_is_enough() -> None:
    model = build("dit")
    handle = fx_cache.enable(model, OPTIONS)
    with pytest.raises(fx_cache.OptionError, match="call disable"):
        fx_cache.enable(model, OPTIONS)
    handle.disable()
    fx_cache.enable(model, OPTIONS)


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_a_denoiser_that_has_run_is_copied_and_saved() -> None:
    """Enabled or not, for a pipeline that says which pass a call is. Oracle: the model's own forward."""
    model, steps = shallow("flux"), walk("flux", 3)

    def outputs(of: nn.Module) -> list[torch.Tensor]:
        found = []
        for step in steps:
            with of.cache_context("cond"):
                found.append(of(**step)[0].clone())
        return found

    expected, own = outputs(model), set(vars(model))
    handle = fx_cache.enable(model, OPTIONS, residual_diff_threshold=2.0)
    outputs(model)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), saved(model)]
    handle.disable()
    assert set(vars(model)) == own and not model._diffusers_hook.hooks and not model._diffusers_hook._fn_refs
    for copied in (*copies, saved(model)):
        assert all(torch.equal(a, b) for a, b in zip(expected, outputs(copied), strict=True))
    fx_cache.enable(copies[0], OPTIONS, residual_diff_threshold=2.0)
    outputs(copies[0])
    assert hits_of(copies[0])
    assert [b["name"] for s in fx_cache.summary(copies[0]).to_dict()["sessions"] for b in s["branches"]] == ["branch-0"]
