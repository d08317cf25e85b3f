"""Batches: each sample has a diff of its own, and with ``per_sample`` it is as if alone."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import fx_cache
from fx_cache.runtime.batches import Separation
from tests.models import build, conditioning, walk
from tests.running import compile_cached, last_branch, needs_inductor, relative_error

REUSING = {"residual_diff_threshold": 0.3, "max_warmup_steps": 1}


@pytest.fixture(autouse=True)
def one_request() -> Iterator[None]:
    """Named, so that a first move is believed."""
    with fx_cache.session("request", branch="only"):
        yield


STEPS = 8


def batch_of(walks: list[list[dict[str, Any]]], batched: set[str]) -> list[dict[str, Any]]:
    """Some walks as one: the inputs in `batched` joined, the same tensors at every step where they are."""
    joined: dict[tuple[int, ...], torch.Tensor] = {}
    steps = []
    for calls in zip(*walks, strict=True):
        step = dict(calls[0])
        for name in batched:
            parts = [c[name] for c in calls]
            key = tuple(map(id, parts))
            joined.setdefault(key, torch.cat(parts))
            step[name] = joined[key]
        steps.append(step)
    return steps


def batched_inputs(kind: str) -> set[str]:
    """The inputs with a row for each sample."""
    one, two = (walk(kind, 1, batch=b)[0] for b in (1, 2))
    return {k for k, v in one.items() if isinstance(v, torch.Tensor) and v.shape != two[k].shape}


def walks_of(kind: str, speeds: tuple[float, ...]) -> list[list[dict[str, Any]]]:
    """One walk for each speed: slow ones are reused often, fast ones seldom."""
    return [walk(kind, STEPS, seed=k, delta=d, conditioning=conditioning(kind, seed=k)) for k, d in enumerate(speeds)]


def alone(model: nn.Module, walks: list[list[dict[str, Any]]]) -> list[tuple[list[torch.Tensor], list[int]]]:
    """Of each walk by itself the outputs and hits."""
    model = copy.deepcopy(model)
    compiled = compile_cached(model, **REUSING)
    found = []
    for steps in walks:
        fx_cache.reset(model)
        outputs = [compiled(**step)[0].clone() for step in steps]
        found.append((outputs, last_branch(model)["spans"][0]["hits"]))
    torch._dynamo.reset()
    return found


@pytest.mark.parametrize(("kind", "dynamic"), [("dit", False), ("dit", True), ("wan", True)])
def test_a_sample_is_as_if_alone(kind: str, dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(kind)
    walks = walks_of(kind, (0.05, 0.3, 0.6, 0.1))
    expected = alone(model, walks)
    assert len({tuple(hits) for _, hits in expected}) > 2
    sizes = sizes_of_mixed_steps(monkeypatch)
    steps = batch_of(walks, batched_inputs(kind))
    compiled = compile_cached(model, **REUSING, batch_policy="per_sample")
    if dynamic:
        compiled(**batch_of([w[:1] for w in walks[:3]], batched_inputs(kind))[0])
        fx_cache.reset(model)
        sizes.clear()
    outputs = [compiled(**step)[0].clone() for step in steps]
    samples = last_branch(model)["spans"][0]["samples"]
    for k, (alone_outputs, hits) in enumerate(expected):
        assert samples[k]["hits"] == hits
        for step, output in enumerate(alone_outputs):
            assert relative_error(output[0], outputs[step][k]) < 1e-5, (k, step)
    computed = [4 - sum(s in hits for _, hits in expected) for s in range(STEPS)]
    mixed = [n for n in computed if 0 < n < 4]
    assert len(mixed) > 1
    # The first mixed step is computed twice in whole, to see that samples do not depend on each other.
    assert sizes == ([4, 4, *(max(2, n) for n in mixed[1:])] if dynamic else [4] * len(mixed))


def sizes_of_mixed_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Notes for how many samples the span is computed at each step that some samples reuse."""
    sizes: list[int] = []
    plain = Separation.compute

    def compute(self, branch, operands, misses, by_sample):  # type: ignore[no-untyped-def]
        def noted(*given: Any) -> Any:
            results = branch(*given)
            sizes.append(results[0].shape[0])
            return results

        return plain(self, noted, operands, misses, by_sample)

    monkeypatch.setattr(Separation, "compute", compute)
    return sizes


def diffs_of(model: nn.Module, steps: list[dict[str, Any]]) -> Callable[[int, int], torch.Tensor]:
    """The diff of each sample between two steps, in float64, by the plain model's own first block."""
    probes = []

    def note(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> None:
        probes.append((output - kwargs.get("hidden_states", *args[:1])).double())

    hook = model.transformer_blocks[0].register_forward_hook(note, with_kwargs=True)
    for step in steps:
        model(**step)
    hook.remove()

    def diff(last: int, now: int) -> torch.Tensor:
        old, new = probes[last].flatten(1), probes[now].flatten(1)
        return (old - new).abs().mean(1) / old.abs().mean(1)

    return diff


@pytest.mark.parametrize(("policy", "joined"), [("all", torch.max), ("any", torch.min)])
def test_one_decision_for_all(policy: str, joined: Callable[[torch.Tensor], torch.Tensor]) -> None:
    model = build("dit")
    steps = batch_of(walks_of("dit", (0.05, 0.2)), batched_inputs("dit"))
    diff = diffs_of(model, steps)
    threshold = 0.3
    expected: dict[int, float] = {}
    hits, last = [], 0
    for step in range(1, STEPS):
        expected[step] = float(joined(diff(last, step)))
        if expected[step] < threshold:
            hits.append(step)
        else:
            last = step
    assert hits and len(hits) < STEPS - 1
    compiled = compile_cached(model, residual_diff_threshold=threshold, max_warmup_steps=1, batch_policy=policy)
    for step in steps:
        compiled(**step)
    span = last_branch(model)["spans"][0]
    assert span["hits"] == hits
    assert span["diffs"] == pytest.approx(expected, rel=1e-5)
    assert "samples" not in span


def test_all_is_the_default() -> None:
    assert fx_cache.CacheConfig().batch_policy == "all"
    with pytest.raises(
        fx_cache.OptionError, match=r"'batch_policy': got 'each'; expected 'all' or 'any' or 'per_sample'"
    ):
        fx_cache.CacheConfig(batch_policy="each")  # type: ignore[arg-type]


class Blocks(nn.Module):
    """Blocks in which each sample sees all others, if they are `mixing`."""

    def __init__(self, mixing: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mixing = mixing
        self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(5)])

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        h = x + torch.sin(t).reshape(-1, 1, 1)
        for block in self.blocks:
            h = h + block(h + 0.1 * h.mean(dim=0, keepdim=True) if self.mixing else h)
        return (h,)


def calls(resting: int, changing: int, count: int = 6) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs of `Blocks`: samples that rest, and behind them some that are others at each step."""
    rest, batch = torch.randn(resting, 6, 8), resting + changing
    latents = [torch.cat([rest, torch.randn(changing, 6, 8)]) for _ in range(count)]
    return [(x, torch.full((batch,), 1.0 - 0.001 * i)) for i, x in enumerate(latents)]


@pytest.mark.parametrize("mixing", [False, True])
def test_samples_that_depend_on_each_other_are_computed_together(mixing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Blocks(mixing).eval()
    compiled = compile_cached(model, **REUSING, batch_policy="per_sample")
    sizes = sizes_of_mixed_steps(monkeypatch)
    compiled(*calls(3, 0)[0])
    fx_cache.reset(model)
    for call in calls(2, 2):
        compiled(*call)
    samples = last_branch(model)["spans"][0]["samples"]
    # At the first mixed step it is seen whether they do: the span is computed twice.
    assert [s["hits"] for s in samples] == [[1, 2, 3, 4, 5]] * 2 + [[]] * 2
    assert sizes == [4, 4, *([4] if mixing else [2]) * 4]


def test_what_is_not_finite_in_one_sample_computes_that_one() -> None:
    model = build("dit")
    walks = walks_of("dit", (0.02, 0.02, 0.02))
    steps = batch_of(walks, batched_inputs("dit"))
    steps[3]["hidden_states"] = steps[3]["hidden_states"].clone()
    steps[3]["hidden_states"][1] = float("nan")
    reasons = {}
    for policy in ("all", "any", "per_sample"):
        torch._dynamo.reset()
        options = {**REUSING, "residual_diff_threshold": 0.6}
        compiled = compile_cached(copy.deepcopy(model), **options, batch_policy=policy)
        outputs = [compiled(**step)[0] for step in steps]
        span = last_branch(compiled)["spans"][0]
        reasons[policy] = [s["misses"].get(3) for s in span.get("samples", [span])]
        finite = [bool(o.isfinite().all()) for o in outputs[3]]
        assert finite == ([True, False, True])
    assert reasons == {
        "all": ["probe not finite"],
        "any": [None],
        "per_sample": [None, "probe not finite", None],
    }


class Flat(Blocks):
    """The same with the tokens of all samples in one dimension."""

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        h = (x + torch.sin(t).reshape(-1, 1, 1)).flatten(0, 1)
        for block in self.blocks:
            h = h + block(h)
        return (h.unflatten(0, x.shape[:2]),)


def test_samples_that_cannot_be_told_apart_are_decided_together() -> None:
    """Each has a diff still, so that none reuses because others have changed little."""
    for policy in ("all", "per_sample"):
        torch._dynamo.reset()
        model = Flat(mixing=False).eval()
        compiled = compile_cached(model, **REUSING, batch_policy=policy)
        given = calls(3, 1)
        with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for x, t in given:
                assert torch.equal(compiled(x, t)[0], model(x, t)[0])
        told = [str(w.message) for w in caught]
        assert len(told) == (policy == "per_sample")
        assert all("got 'per_sample' for a span whose values do not have one row for each sample" in w for w in told)
        assert set(last_branch(model)["spans"][0]["misses"].values()) == {"warm-up", "diff >= threshold"}


def test_tokens_without_a_batch_are_one_sample() -> None:
    """Where stream and output are [tokens, channels], one token that changes much does not decide for all."""

    class Tokens(Blocks):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            h = x + torch.sin(t)
            for block in self.blocks:
                h = h + block(h)
            return (h,)

    model = Tokens(mixing=False).eval()
    compiled = compile_cached(model, **REUSING)
    x = torch.randn(32, 8)
    for i in range(4):
        compiled(torch.cat([x[1:], torch.randn(1, 8)]), torch.tensor([1.0 - 0.001 * i]))
    assert last_branch(model)["spans"][0]["hits"] == [1, 2, 3]


def test_an_empty_batch_computes() -> None:
    model = Blocks(mixing=False).eval()
    compiled = compile_cached(model, **REUSING)
    for i in range(3):
        (output,) = compiled(torch.randn(0, 6, 8), torch.full((0,), 1.0 - 0.1 * i))
        assert output.shape == (0, 6, 8)
    assert not last_branch(model)["spans"][0]["hits"]


def test_a_session_may_change_the_policy_on_the_way() -> None:
    """From there on each sample goes on by itself, from where all were together."""
    model = Blocks(mixing=False).eval()
    compiled = compile_cached(model, **REUSING)
    for i, call in enumerate(calls(1, 1, 8)):
        policy = "all" if i < 4 else "per_sample"
        with fx_cache.session("request", config={"batch_policy": policy, "max_cached_steps": 2}):
            compiled(*call)
    slow, fast = last_branch(model)["spans"][0]["samples"]
    assert slow["hits"] == [4, 5] and not fast["hits"]
    computed = {0: "warm-up", **dict.fromkeys(range(1, 8), "diff >= threshold")}
    assert fast["misses"] == computed
    assert slow["misses"] == {k: v for k, v in computed.items() if k < 4} | dict.fromkeys((6, 7), "max_cached_steps")


@pytest.mark.slow
@needs_inductor
@pytest.mark.long
def test_compiled_by_inductor() -> None:
    """The sub-batch goes into what was compiled for any number of samples."""
    model = Blocks(mixing=False).eval()
    batches = [*calls(3, 0, 1), *calls(2, 3)]
    outputs = {}
    for compiler in ("eager", "inductor"):
        torch._dynamo.reset()
        compiled = compile_cached(copy.deepcopy(model), **REUSING, batch_policy="per_sample", compiler=compiler)
        outputs[compiler] = [compiled(*batch)[0].clone() for batch in batches]
        samples = last_branch(compiled)["spans"][0]["samples"]
        assert [s["hits"] for s in samples] == [[1, 2, 3, 4, 5]] * 2 + [[]] * 3
    torch.testing.assert_close(outputs["inductor"], outputs["eager"])
