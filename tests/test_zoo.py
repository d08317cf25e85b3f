"""Every transformer class of diffusers: exact when it computes, right when it reuses, found by both detectors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import fx

import fx_cache
from benchmarks.zoo import NOT_FULLGRAPH, OWN_BEGINNING, ZOO, compile_zoo, cuts, detectors_agree
from tests.models import build, walk
from tests.oracles import tensors
from tests.running import last_branch, relative_error
from tests.selection import every

# What diffusers and Dynamo warn of is not looked at here.
pytestmark = pytest.mark.filterwarnings("ignore")


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[fx.GraphModule]:
    """The graphs that reach the backend, as they are captured."""
    found: list[fx.GraphModule] = []
    rewrite = fx_cache.backend.rewrite

    def record(gm: fx.GraphModule, *args: Any) -> Any:
        found.append(fx.GraphModule(gm, copy.deepcopy(gm.graph)))
        return rewrite(gm, *args)

    monkeypatch.setattr(fx_cache.backend, "rewrite", record)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", every(5, ZOO))
def test_exact_and_right(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = recorded(monkeypatch)
    model, steps = build(name), walk(name, 3)
    expected = [tensors(model(**step)) for step in steps]
    compiled = compile_zoo(name)
    outputs = [[t.clone() for t in tensors(compiled(**step))] for step in steps]
    for reference, output in zip(expected, outputs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(reference, output, strict=True))
    # Reused on the very inputs that were computed, the output is the same.
    fx_cache.configure(compiled, residual_diff_threshold=2.0)
    with fx_cache.session("again", branch="only"):
        for _ in range(2):
            output = tensors(compiled(**steps[0]))
    assert all(span["hits"] == [1] for span in last_branch(compiled)["spans"])
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(expected[0], output, strict=True) if a.any())
    # On others it moves as they do: what is given back is no old picture.
    with fx_cache.session("on", branch="only"):
        first, second = ([t.clone() for t in tensors(compiled(**step))] for step in steps[:2])
    moved, own = ((b[0] - a[0]).norm() for a, b in ((first, second), expected[:2]))
    assert moved > 0.1 * own
    if name not in NOT_FULLGRAPH:
        # The structure alone shows the same blocks, and without any metadata the same is compared and stored.
        (graph,) = graphs
        assert detectors_agree(graph)
        assert name in OWN_BEGINNING or cuts(graph, strip=True) == cuts(graph, strip=False)
