"""Where the peers go wrong, as ``benchmarks/peer_failures.py`` shows it: in the pinned versions they still do, and the
same calls come out right here."""

from __future__ import annotations

import pytest

from benchmarks import peer_failures


def assert_as_alone(shares: dict) -> None:
    """Bit for bit what each gets alone, at the same hits, of which there are some."""
    for share in shares.values():
        assert share["equal"]
        assert share["hits"] == share["alone"] != []


def test_the_second_request_is_as_if_alone() -> None:
    figures = peer_failures.second_request().figures
    assert_as_alone(figures["here"])
    assert_as_alone(figures["renewed"])
    warmups = [[step for step in range(4) if step not in share["hits"]] for share in figures["peer"].values()]
    assert warmups == [[0, 1], [0, 1, 2], [0, 2, 3]]
    assert [share["equal"] for share in figures["peer"].values()] == [True, False, False]


def test_the_first_step_of_the_second_request_computes() -> None:
    figures = peer_failures.second_request_by_mask().figures
    peer, here = figures["peer"], figures["here"]
    assert peer["first_step_reused"] and peer["error"] > 0.1
    assert not here["first_step_reused"] and here["error"] == 0.0
    assert_as_alone(here["requests"])


def test_branches_in_any_order_and_number() -> None:
    turns, *others = (case.figures for case in peer_failures.branches())
    assert len(others) == 3
    assert_as_alone(turns["peer"])
    assert_as_alone(turns["here"])
    for figures in others:
        assert_as_alone(figures["here"])
        assert figures["from_other_branches"] > 0
        assert not all(share["equal"] for share in figures["peer"].values())


def test_company_in_a_batch_does_not_matter() -> None:
    figures = peer_failures.batch().figures
    alone, *companies = figures["here"].values()
    for seen in companies:
        assert seen["hits"] == alone["hits"]
        assert any(other != alone["hits"] for other in seen["others"])
        assert seen["error"] < 1e-5
    alone, *companies = figures["peer"].values()
    for seen in companies:
        assert seen["hits"] != alone["hits"]
        assert seen["error"] > 0.1


def test_blocks_that_write_in_place() -> None:
    figures = peer_failures.in_place().figures
    here, peer, first_block_cache = figures["here"], figures["peer"], figures["first_block_cache"]
    assert here["equal"] and here["in_place"] == here["hits"] == list(range(2, 10))
    assert peer == {"hits": list(range(2, 10)), "in_place": [], "nan": 8}
    assert first_block_cache["hits"] == [] and first_block_cache["in_place"] == list(range(1, 10))
    assert first_block_cache["error"] > 0.1


def test_an_input_that_only_skipped_blocks_read() -> None:
    figures = peer_failures.side_input().figures
    here, peer, first_block_cache = figures["here"], figures["peer"], figures["first_block_cache"]
    assert here["equal"] and figures["change"] not in here["hits"] != []
    assert here["reason"] == "an input that feeds only the span changed"
    assert figures["change"] in first_block_cache["changed"] == first_block_cache["hits"]
    assert first_block_cache["error"] > 0.1
    assert peer["same"] and peer["computed_error"] > 0.1


@pytest.mark.slow
def test_one_graph() -> None:
    graphs = peer_failures.graph_breaks(steps=3).figures["graphs"]
    assert graphs["plain"] == graphs["dit_cache"] == [1, 1, 1]
    for peer in ("cache-dit", "First Block Cache"):
        assert 1 < graphs[peer][0] < graphs[peer][-1]


def test_psnr_of_unrelated_images() -> None:
    figures = peer_failures.wrapped_psnr().figures
    noise, opposite = figures["here"].values()
    # Two values drawn alike in [0, 1] are 1/6 apart in the mean square.
    assert noise == pytest.approx(7.78, abs=0.1) and opposite == 0.0
    noise, opposite = figures["peer"].values()
    assert noise == pytest.approx(27.9, abs=0.1) and opposite == pytest.approx(48.13, abs=0.01)
