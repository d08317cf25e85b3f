"""Streams that go on joined, divided or in another shape: the result does not depend on how the code is written."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fx_cache
from tests import test_writes
from tests.running import compile_cached, hits_of, last_branch, relative_error
from tests.test_writes import TEXT, TOKENS, WIDTH, Model, Single, by_rule, steps, with_method


class Joined(Model):
    """Double blocks, then single ones on both streams joined."""

    def __init__(self) -> None:
        super().__init__(None, 3, 4)

    def forward(self, latent: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        image, text, time = self.begin(latent, t, prompt)
        for double in self.doubles:
            image, text = double(image, text, time)
        image = self.run_singles(image, text, time)
        return self.finish(image, time)

    def run_singles(self, image: Tensor, text: Tensor, time: Tensor) -> Tensor:
        x = self.join(image, text)
        for single in self.singles:
            x = single(x, time)
        return self.part(x)

    def join(self, image: Tensor, text: Tensor) -> Tensor:
        return torch.cat([text, image], 1)

    def part(self, x: Tensor) -> Tensor:
        return x[:, TEXT:]


class Carried(Joined):
    """Both streams carried through the single blocks, which join and divide them themselves."""

    class Block(nn.Module):
        def __init__(self, single: Single) -> None:
            super().__init__()
            self.single = single

        def forward(self, image: Tensor, text: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
            x = self.single(torch.cat([text, image], 1), time)
            return x[:, TEXT:], x[:, :TEXT]

    def __init__(self) -> None:
        super().__init__()
        self.singles = nn.ModuleList(map(self.Block, self.singles))

    def run_singles(self, image: Tensor, text: Tensor, time: Tensor) -> Tensor:
        for single in self.singles:
            image, text = single(image, text, time)
        return image


class InABuffer(Joined):
    def join(self, image: Tensor, text: Tensor) -> Tensor:
        x = torch.empty(1, TEXT + TOKENS, WIDTH)
        x[:, :TEXT] = text
        x[:, TEXT:].copy_(image)
        return x


class SplitBehind(Joined):
    def part(self, x: Tensor) -> Tensor:
        return x.split([TEXT, TOKENS], 1)[1]


class ChunkBehind(Joined):
    def part(self, x: Tensor) -> Tensor:
        return x[:, -TOKENS:, ...]


class WholeBehind(Joined):
    """The text is read behind the blocks, too; it adds nothing there."""

    def part(self, x: Tensor) -> Tensor:
        return x[:, TEXT:] + 0.0 * x.mean(1, keepdim=True)


class BothBehind(Joined):
    def part(self, x: Tensor) -> Tensor:
        text, image = x.split([TEXT, TOKENS], 1)
        return image + 0.0 * text.sum()


class ByHeads(Joined):
    """The joined stream has other dimensions: tokens first."""

    def run_singles(self, image: Tensor, text: Tensor, time: Tensor) -> Tensor:
        x = torch.cat([text.transpose(0, 1), image.transpose(0, 1)], 0).contiguous()
        for single in self.singles:
            x = single(x.transpose(0, 1), time).transpose(0, 1)
        return x.transpose(0, 1)[:, TEXT:]


class Written(Joined):
    """In place from the first block to the last."""

    def __init__(self) -> None:
        super().__init__()
        for block in (*self.doubles, *self.singles):
            block.write = with_method


FORMS = [Joined, Carried, InABuffer, SplitBehind, ChunkBehind, WholeBehind, BothBehind, ByHeads, Written]


def run(model: nn.Module, calls: list[tuple[Tensor, ...]], **options: Any) -> tuple[list[Tensor], list[list[int]]]:
    compiled = compile_cached(model, residual_diff_threshold=10.0, **options)
    with fx_cache.session("reused"):
        outputs = [compiled(*call).clone() for call in calls]
    return outputs, [s["hits"] for s in last_branch(compiled)["spans"]]


@pytest.mark.parametrize("tokens", [TEXT, TOKENS], ids=["less text", "as much text"])
@pytest.mark.parametrize("form", FORMS)
def test_a_joined_stream_goes_on_by_its_parts_residuals(
    form: type[Joined], tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where both parts have one shape, and the last block hands on one of them alone."""
    for module in (test_writes, sys.modules[__name__]):
        monkeypatch.setattr(module, "TEXT", tokens)
    calls = steps(4)
    expected, hits = by_rule(Model(None, 3, 4), calls)
    outputs, found = run(form(), calls)
    assert found == [hits]
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(expected, outputs, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_nothing_changes_where_nothing_is_reused(form: type[Joined]) -> None:
    calls = steps(3)
    expected = [form()(*call) for call in calls]
    compiled = compile_cached(form(), residual_diff_threshold=0.0)
    assert all(torch.equal(compiled(*call), output) for call, output in zip(calls, expected, strict=True))


@pytest.mark.parametrize("options", [{"Fn_compute_blocks": n} for n in (3, 4, 6)] + [{"Bn_compute_blocks": 2}])
def test_the_same_decisions_however_it_is_written(options: dict[str, int]) -> None:
    """What is compared is the image, also within the blocks that have it joined to the text."""
    calls = steps(6)
    results = []
    for form in (Carried, Joined, Written):
        compiled = compile_cached(form(), residual_diff_threshold=0.1, **options)
        outputs = [compiled(*call).clone() for call in calls]
        (span,) = last_branch(compiled)["spans"]
        results.append((outputs, span["hits"], span["diffs"]))
    (expected, hits, diffs), *others = results
    assert hits
    for outputs, found, measured in others:
        assert found == hits
        assert list(measured) == list(diffs)
        assert all(abs(measured[i] - diffs[i]) < 1e-5 for i in diffs)
        assert all(relative_error(a, b) < 1e-5 for a, b in zip(expected, outputs, strict=True))


class Divided(Model):
    """The other way round: single blocks on a joined stream, then double ones on its parts."""

    def __init__(self) -> None:
        super().__init__(None, 3, 4)

    def forward(self, latent: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        image, text, time = self.begin(latent, t, prompt)
        x = torch.cat([text, image], 1)
        for single in self.singles:
            x = single(x, time)
        text, image = x[:, :TEXT], x[:, TEXT:]
        for double in self.doubles:
            image, text = double(image, text, time)
        return self.finish(image, time)


def test_a_stream_that_is_divided_goes_on_by_residuals() -> None:
    model, calls, expected, added = Divided(), steps(4), [], torch.zeros(())
    for i, (latent, t, prompt) in enumerate(calls):
        image, text, time = model.begin(latent, t, prompt)
        first = model.singles[0](torch.cat([text, image], 1), time)
        if i == 0:
            x = first
            for single in model.singles[1:]:
                x = single(x, time)
            text, image = x[:, :TEXT], x[:, TEXT:]
            for double in model.doubles:
                image, text = double(image, text, time)
            added = image - first[:, TEXT:]
        expected.append(model.finish(first[:, TEXT:] + added, time))
    outputs, hits = run(model, calls)
    assert hits == [[1, 2, 3]]
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(expected, outputs, strict=True))


class Between(Joined):
    """Between the stacks each stream goes through a norm of its own, and registers join that no block has changed."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.registers = nn.Parameter(torch.randn(1, 2, WIDTH))

    def join(self, image: Tensor, text: Tensor) -> Tensor:
        return torch.cat([self.norms[0](text), self.registers, self.norms[1](image)], 1)

    def part(self, x: Tensor) -> Tensor:
        return x[:, TEXT + 2 :]


class NormBetween(Joined):
    """Both streams go through one norm once they are joined."""

    def join(self, image: Tensor, text: Tensor) -> Tensor:
        return F.layer_norm(super().join(image, text), (WIDTH,))


@pytest.mark.parametrize("form", [Between, NormBetween])
def test_what_is_put_between_the_streams(form: type[Joined]) -> None:
    model, calls, expected, added = form(), steps(4), [], torch.zeros(())
    for i, (latent, t, prompt) in enumerate(calls):
        image, text, time = model.begin(latent, t, prompt)
        image, text = model.doubles[0](image, text, time)
        start = image
        if i == 0:
            for double in model.doubles[1:]:
                image, text = double(image, text, time)
            added = model.run_singles(image, text, time) - start
        expected.append(model.finish(start + added, time))
    outputs, hits = run(model, calls)
    assert hits == [[1, 2, 3]]
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(expected, outputs, strict=True))


def test_a_hit_computes_nothing_for_the_part_that_nobody_reads() -> None:
    """The head's text is for later blocks alone, in both forms of the model: a hit skips as much of either."""
    shares = []
    for form in (Carried, Joined, Written):
        compiled = compile_cached(form())
        shares.append(fx_cache.explain(compiled, *steps(1)[0]).shares[0])
    assert shares[0] == pytest.approx(shares[1]) == pytest.approx(shares[2])


def test_at_sizes_that_are_symbols() -> None:
    """Captured once for all lengths of the prompt and all sizes of the image."""

    class Symbolic(Joined):
        def part(self, x: Tensor) -> Tensor:
            return x[:, x.shape[1] - self.tokens :]

        def forward(self, latent: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
            self.tokens = latent.shape[1]
            return super().forward(latent, t, prompt)

    model = Symbolic()
    options = {"compiler": "eager", "Fn_compute_blocks": 1, "max_warmup_steps": 1, "residual_diff_threshold": 10.0}
    compiled = torch.compile(model, backend="dit_cache", dynamic=True, options=options)
    for tokens, text in ((TOKENS, TEXT), (8, 7)):
        calls = [(x[:, :tokens], t, F.pad(p, (0, 0, 0, text - TEXT))) for x, t, p in steps(3)]
        with fx_cache.session(f"of {tokens}"):
            outputs = [compiled(*call).clone() for call in calls]
        (span,) = last_branch(compiled)["spans"]
        assert span["hits"] == [1, 2]
        added = None
        for (latent, t, prompt), output in zip(calls, outputs, strict=True):
            image, words, time = model.begin(latent, t, prompt)
            image, words = model.doubles[0](image, words, time)
            start = image
            if added is None:
                for double in model.doubles[1:]:
                    image, words = double(image, words, time)
                model.tokens = tokens
                added = model.run_singles(image, words, time) - start
            assert relative_error(model.finish(start + added, time), output) < 1e-5


class Hyper(Model):
    """Hyper-connections: three streams, of which glue makes each block's input, and to which it adds the output."""

    def __init__(self) -> None:
        super().__init__(None)
        self.read = nn.Parameter(0.3 + 0.3 * torch.randn(6, 3))
        self.mix = nn.Parameter(torch.eye(3) + 0.05 * torch.randn(6, 3, 3))
        self.write_to = nn.Parameter(0.5 + 0.2 * torch.randn(6, 3))

    def open(self, x: Tensor) -> Any:
        return x[:, None].expand(-1, 3, -1, -1).contiguous()

    def close(self, streams: Any) -> Tensor:
        return streams.sum(1)

    def around(self, i: int, streams: Any, time: Tensor) -> Any:
        x = torch.einsum("bknd,k->bnd", streams, self.read[i])
        made = self.singles[i](x, time) - x
        return (
            torch.einsum("bknd,kj->bjnd", streams, self.mix[i]) + self.write_to[i][None, :, None, None] * made[:, None]
        )

    def forward(self, latent: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        image, _, time = self.begin(latent, t, prompt)
        streams = self.open(image)
        for i in range(6):
            streams = self.around(i, streams, time)
        return self.finish(self.close(streams), time)


class HyperList(Hyper):
    """The same, each stream a tensor of its own."""

    def open(self, x: Tensor) -> Any:
        return [x * 1.0, x * 1.0, x * 1.0]

    def close(self, streams: Any) -> Tensor:
        return streams[0] + streams[1] + streams[2]

    def around(self, i: int, streams: Any, time: Tensor) -> Any:
        x = sum(self.read[i, k] * s for k, s in enumerate(streams))
        made = self.singles[i](x, time) - x
        mixed = [sum(self.mix[i, k, j] * s for k, s in enumerate(streams)) for j in range(3)]
        return [m + self.write_to[i, j] * made for j, m in enumerate(mixed)]


class HyperWritten(Hyper):
    """The same in place."""

    def around(self, i: int, streams: Any, time: Tensor) -> Any:
        streams.copy_(super().around(i, streams, time))
        return streams


class Sum(Hyper):
    """What all blocks have made is summed up beside them, and read in the end."""

    def open(self, x: Tensor) -> Any:
        return x, 0.1 * x

    def close(self, streams: Any) -> Tensor:
        return streams[0] + streams[1]

    def around(self, i: int, streams: Any, time: Tensor) -> Any:
        x = self.singles[i](streams[0], time)
        return x, streams[1] + self.read[i, 0] * x.mean(1, keepdim=True)


@pytest.mark.filterwarnings("ignore::fx_cache.CacheWarning")
@pytest.mark.parametrize("bn", [0, 1])
def test_a_running_sum_is_no_stream(bn: int) -> None:
    """All of it is made of the stream, and would be as far as that had come: nothing is cached."""
    calls, model = steps(4), Sum()
    compiled = compile_cached(model, residual_diff_threshold=10.0, Bn_compute_blocks=bn)
    outputs = [compiled(*call) for call in calls]
    assert not hits_of(compiled)
    assert all(torch.equal(model(*call), output) for call, output in zip(calls, outputs, strict=True))


@pytest.mark.parametrize(("form", "bn"), [(Hyper, 0), (HyperList, 0), (HyperList, 1), (HyperWritten, 0)])
def test_streams_that_glue_alone_reads_go_on_by_residuals(form: type[Hyper], bn: int) -> None:
    model, calls, expected, added = form(), steps(4), [], []
    for i, (latent, t, prompt) in enumerate(calls):
        image, _, time = model.begin(latent, t, prompt)
        streams = model.around(0, model.open(image), time)
        split = isinstance(streams, list | tuple)
        start = [s.clone() for s in streams] if split else [streams.clone()]
        if i == 0:
            for k in range(1, 6 - bn):
                streams = model.around(k, streams, time)
            added = [b - a for a, b in zip(start, streams if split else [streams], strict=True)]
        now = [a + b for a, b in zip(start, added, strict=True)]
        streams = now if split else now[0]
        for k in range(6 - bn, 6):
            streams = model.around(k, streams, time)
        expected.append(model.finish(model.close(streams), time))
    outputs, hits = run(form(), calls, Bn_compute_blocks=bn)
    assert hits == [[1, 2, 3]]
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(expected, outputs, strict=True))


class Routed(Model):
    """Blocks in the middle see half of the tokens: what they make of these is put back among the others."""

    def __init__(self) -> None:
        super().__init__(None, 0, 10)

    def put(self, x: Tensor, part: Tensor) -> Tensor:
        return torch.cat([part, x[:, TOKENS // 2 :]], 1)

    def forward(self, latent: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        x, _, time = self.begin(latent, t, prompt)
        return self.finish(self.run(x, time, 0), time)

    def run(self, x: Tensor, time: Tensor, first: int) -> Tensor:
        for single in self.singles[first:2]:
            x = single(x, time)
        part = x[:, : TOKENS // 2]
        for single in self.singles[2:8]:
            part = single(part, time)
        x = self.put(x, part)
        for single in self.singles[8:]:
            x = single(x, time)
        return x


class RoutedWritten(Routed):
    def put(self, x: Tensor, part: Tensor) -> Tensor:
        x = x.clone()
        x[:, : TOKENS // 2] = part
        return x


class RoutedScattered(Routed):
    def put(self, x: Tensor, part: Tensor) -> Tensor:
        return torch.slice_scatter(x, part, 1, 0, TOKENS // 2)


class RoutedCopied(Routed):
    def put(self, x: Tensor, part: Tensor) -> Tensor:
        return x.index_copy(1, torch.arange(TOKENS // 2), part)


class RoutedInPlaces(Routed):
    def put(self, x: Tensor, part: Tensor) -> Tensor:
        return x.index_put((torch.zeros(1, dtype=torch.int64), torch.arange(TOKENS // 2)), part[0])


class RoutedScatteredByIndex(Routed):
    def put(self, x: Tensor, part: Tensor) -> Tensor:
        places = torch.arange(TOKENS // 2)[None, :, None].expand_as(part)
        return x.clone().scatter_(1, places, part)


class RoutedChosen(Routed):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("chosen", torch.arange(TOKENS)[None, :, None] < TOKENS // 2)

    def put(self, x: Tensor, part: Tensor) -> Tensor:
        return torch.where(self.chosen, torch.cat([part, part], 1), x)


class RoutedMasked(RoutedChosen):
    def put(self, x: Tensor, part: Tensor) -> Tensor:
        return x.masked_scatter(self.chosen, part)


class RoutedIndexed(Routed):
    def put(self, x: Tensor, part: Tensor) -> Tensor:
        x = x.clone()
        x[:, torch.arange(TOKENS // 2)] = part
        return x[:, torch.arange(TOKENS)]


class RoutedAdded(Routed):
    """What the blocks make of the tokens is added to them; the rule is the same."""

    def put(self, x: Tensor, part: Tensor) -> Tensor:
        return x.index_add(1, torch.arange(TOKENS // 2), part)


class RoutedSorted(RoutedChosen):
    """Tokens are put back in an order that is made where they are."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", torch.randperm(TOKENS, generator=torch.Generator().manual_seed(1)))

    def put(self, x: Tensor, part: Tensor) -> Tensor:
        back = torch.argsort(self.order)
        return torch.cat([part, x[:, TOKENS // 2 :]], 1).gather(1, back[None, :, None].expand_as(x))


FORMS = [Routed, RoutedWritten, RoutedScattered, RoutedCopied, RoutedInPlaces, RoutedScatteredByIndex]
FORMS += [RoutedChosen, RoutedMasked, RoutedIndexed, RoutedAdded, RoutedSorted]


@pytest.mark.parametrize("form", FORMS)
def test_tokens_that_go_past_a_stack_go_on_by_residuals(form: type[Routed]) -> None:
    model, calls, expected, added = form(), steps(4), [], None
    for latent, t, prompt in calls:
        x, _, time = model.begin(latent, t, prompt)
        x = model.singles[0](x, time)
        same = model.put(x, x[:, : TOKENS // 2])  # as if no block had added anything
        added = model.run(x.clone(), time, 1) - same if added is None else added
        expected.append(model.finish(same + added, time))
    outputs, hits = run(form(), calls)
    assert hits == [[1, 2, 3]]
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(expected, outputs, strict=True))
