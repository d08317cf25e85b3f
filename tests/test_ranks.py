"""Several ranks decide together. Oracles: one rank, and each other; by ``torchrun`` with gloo, 2 and 4 processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fx_cache
from fx_cache.patterns.groups import groups_of
from fx_cache.runtime.policy import Verdict
from fx_cache.runtime.ranks import ANOTHER, agree
from tests.ranks import PUSHED
from tests.selection import few

WORKER = Path(__file__).with_name("ranks.py")
SECONDS = 240
"""After which ranks are said to wait for each other for ever."""


_alone: dict[str, dict[str, Any]] = {}
"""What one rank found, by case; for the tests of one process."""


def launch(case: str, ranks: int, folder: Path, worker: Path = WORKER) -> list[dict[str, Any]]:
    """What each rank found."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [*command, str(worker), case, str(folder)], capture_output=True, text=True, check=False, timeout=SECONDS
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{ranks}-{rank}.pt") for rank in range(ranks)]


def together(case: str, found: list[dict[str, Any]]) -> list[torch.Tensor]:
    """The outputs of all ranks as one rank has them."""
    steps = zip(*(f["outputs"] for f in found), strict=True)
    return [torch.cat(parts, dim=1) if case.startswith("tokens") else parts[0] for parts in steps]


def assert_agreed(found: list[dict[str, Any]]) -> list[int]:
    """The hits, the same on every rank."""
    assert all(f["hits"] == found[0]["hits"] for f in found)
    return found[0]["hits"]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "ranks"), few([("heads", 2), ("tokens", 4)], 1))
def test_as_on_one_rank(case: str, ranks: int, tmp_path: Path) -> None:
    """Tensor parallel: each rank has the whole probe. Sequence parallel: each has its tokens' part of it."""
    if case not in _alone:
        _alone[case] = launch(case, 1, tmp_path)[0]
    alone, found = _alone[case], launch(case, ranks, tmp_path)
    assert assert_agreed(found) == alone["hits"]
    assert PUSHED in alone["hits"]
    assert len(alone["hits"]) < len(alone["outputs"]) - 1
    for step, diff in alone["diffs"].items():
        assert all(f["diffs"][step] == pytest.approx(diff, rel=1e-3) for f in found)
    for expected, got in zip(alone["outputs"], together(case, found), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", few(["tokens broken pushed", "tokens pushed", "heads pushed"], 1))
def test_one_rank_over_the_threshold(case: str, tmp_path: Path) -> None:
    """The others are not, and would reuse by themselves; also where the blocks lie in several graphs."""
    if "broken" in case and torch.__version__ < "2.12":
        pytest.skip("torch before 2.12 captures nothing of a forward that hooks break within a loop")
    found = launch(case, 2, tmp_path)
    assert PUSHED not in assert_agreed(found)
    assert all(f["misses"][PUSHED] == "diff >= threshold" for f in found)


@pytest.mark.slow
@pytest.mark.parametrize("case", few(["tokens lost", "heads lost"], 0))
def test_one_rank_that_has_nothing_cached(case: str, tmp_path: Path) -> None:
    """It cannot reuse, so none may: else it would wait in the blocks' collectives for ever."""
    found = launch(case, 2, tmp_path)
    assert ANOTHER in found[0]["misses"].values()
    assert together(case, found)[-1].isfinite().all()


@pytest.mark.slow
@pytest.mark.long
def test_500_steps(tmp_path: Path) -> None:
    assert len(assert_agreed(launch("tokens long", 2, tmp_path))) > 100


@pytest.mark.slow
@pytest.mark.long
def test_ranks_with_requests_of_their_own_do_not_wait(tmp_path: Path) -> None:
    """Each is the only one in its group, and runs as many steps as it has."""
    found = launch("heads different", 2, tmp_path)
    assert all(f["hits"] for f in found)


@pytest.mark.slow
@pytest.mark.parametrize("case", few(["context", "tensor"], 1))
def test_diffusers_parallelism(case: str, tmp_path: Path) -> None:
    """Ulysses: each rank has its tokens' part of the probe. Tensor parallel plans: DTensors, whose collectives are
    in no graph."""
    found = launch(case, 2, tmp_path, WORKER.with_name("diffusers_ranks.py"))
    alone = found[0]["alone"]
    assert PUSHED in alone["hits"]
    for rank in found:
        divided, pushed = rank["divided"], rank["pushed"]
        assert divided["hits"] == alone["hits"]
        assert divided["diffs"] == pytest.approx(alone["diffs"], rel=1e-3)
        for expected, got in zip(alone["outputs"], divided["outputs"], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        # One rank's probe is over the threshold; the others' are not.
        assert pushed["misses"][PUSHED] == "diff >= threshold"
        assert [step for step in pushed["hits"] if step <= PUSHED] == [2, 3]


def test_groups_are_read_from_collectives() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x = graph.call_function(torch.ops._c10d_functional.all_reduce, (x, "sum", "first"))
    x = graph.call_function(torch.ops._c10d_functional.wait_tensor, (x,))
    x = graph.call_function(torch.ops._c10d_functional.all_gather_into_tensor.default, (x, 2, "second"))
    x = graph.call_function(torch.ops._c10d_functional.all_reduce.default, (x, "sum"), {"group_name": "first"})
    graph.call_function(torch.add, (x, x))
    assert groups_of(graph.nodes) == ("first", "second")


def test_a_group_that_is_gone() -> None:
    with pytest.raises(fx_cache.SessionError, match=r"process group 'gone': got .*; expected the group whose ranks"):
        agree([Verdict(None)], 1, torch.ones(2, 1), ("gone",), torch.device("cpu"))
