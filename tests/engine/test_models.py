"""The engine's transformers under its own context. Oracles: the transformer itself, and a request seen before."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from vllm.distributed import parallel_state
from vllm_omni.diffusion.forward_context import get_forward_context

import fx_cache
from fx_cache.integrations.vllm_omni import DitCacheBackend
from fx_cache.runtime.policy import Verdict
from fx_cache.runtime.ranks import agree
from tests.engine.models import MODELS, Inputs, engine
from tests.engine.running import OPTIONS, hits, same, tensors


def captured(module: nn.Module, steps: list[Inputs]) -> list[list[Tensor]]:
    """The outputs under Dynamo alone: some of the engine's operations are others while they are captured."""
    torch._dynamo.reset()
    compiled, outputs = torch.compile(module, backend="eager"), []
    for inputs in steps:
        get_forward_context()._sp_shard_depth = 0
        outputs.append(tensors(compiled(**inputs)))
    get_forward_context()._sp_shard_depth = 0
    torch._dynamo.reset()
    return outputs


@pytest.mark.parametrize("name", MODELS)
def test_a_transformer(name: str) -> None:
    model = MODELS[name]
    with engine(model.settings) as config, torch.no_grad():
        module = model.make(config)
        plain = captured(module, model.request(0))
        assert all(t.isfinite().all() for step in plain for t in step)
        backend = DitCacheBackend(OPTIONS | {"residual_diff_threshold": 0.0})
        backend.enable(SimpleNamespace(**{model.held: module}, _dit_modules=[model.held]))
        handle = backend.handle
        assert handle is not None

        def run(request: str, seed: int) -> list[list[Tensor]]:
            with fx_cache.session(request):
                return [tensors(module(**inputs)) for inputs in model.request(seed)]

        assert same(plain, run("never", 0))
        assert not any(hits(handle, "never"))
        handle.configure(residual_diff_threshold=2.0)
        first, _, again = run("first", 0), run("second", 1), run("again", 0)
        # Two to begin with; after three reused in a row one must be computed.
        assert [hits(handle, request) for request in ("first", "second", "again")] == [[*model.hits]] * 3
        assert same(first, again)
        assert not same(plain, first)


def test_groups_go_by_the_names_of_the_engine() -> None:
    """Its collectives name them otherwise than torch does."""
    model = MODELS["Wan 2.2"]
    with engine(model.settings) as config, torch.no_grad():
        DitCacheBackend(OPTIONS).enable(SimpleNamespace(transformer=model.make(config)))
        names = [name for name, reference in parallel_state._groups.items() if reference() is not None]
        assert "world:0" in names
        verdicts, diffs = agree([Verdict(None)], 1, torch.tensor([[1.0], [4.0]]), ["world:0"], torch.device("cpu"))
        assert (verdicts, diffs) == ([Verdict(None)], [0.25])
