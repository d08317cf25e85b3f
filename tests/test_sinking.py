"""What is computed in front of a span for the span alone is skipped with it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fx_cache.patterns import invariants
from tests.models import NAMES, build, walk
from tests.oracles import run_eager
from tests.running import compile_cached, last_branch, layers, run_cached
from tests.selection import few


def test_a_hit_skips_what_only_later_blocks_read() -> None:
    """Of the text in the head's double block: the layer behind its attention, and the two of its MLP."""
    model, steps = build("flux"), walk("flux", 3)
    compiled = compile_cached(model, hoist_invariants=False, residual_diff_threshold=1.0)
    for step in steps[:2]:
        compiled(**step)
    count = layers(compiled, steps[2])
    assert last_branch(model)["spans"][0]["hits"] == [2]
    first = build("flux")
    del first.transformer_blocks[1:], first.single_transformer_blocks[:]
    assert count == layers(first, steps[1]) - 3


@pytest.mark.parametrize("hoist", [False, True])
def test_blocks_that_are_split_stay_one_kind(hoist: bool, tmp_path, monkeypatch) -> None:
    """Double blocks are split as the head's is; a norm that only the first could be spared makes no kind of its own."""
    monkeypatch.setattr(invariants, "MIN_APART", 0.2)
    options = {"residual_diff_threshold": 0.0, "hoist_invariants": hoist, "dump_dir": str(tmp_path)}
    run = run_cached(build("flux"), walk("flux", 2), **options)
    expected = run_eager(build("flux"), walk("flux", 2)).outputs
    assert all(torch.equal(a, b) for a, b in zip(expected, run.outputs, strict=True))
    pieces = {p.stem for p in (tmp_path / "graph_0" / "pieces").iterdir()}
    double = {p for p in pieces if p.startswith("transformer_blocks_") and "invariants" not in p}
    assert double == {"transformer_blocks_block", "transformer_blocks_rest"}


class Written(nn.Module):
    """A block that makes the text of the image, and then writes to the image in place."""

    def __init__(self) -> None:
        super().__init__()
        self.to_text, self.mlp = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        made = text + self.to_text(image).mean(1, keepdim=True)
        image += self.mlp(image) + text.mean(1, keepdim=True)
        return image, made


class WritingModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out = nn.Linear(4, 16), nn.Linear(16, 4)
        self.blocks = nn.ModuleList(Written() for _ in range(4))

    def forward(self, latent: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        image = self.embed(latent) + torch.sin(timestep)[:, None, None]
        for block in self.blocks:
            image, text = block(image, text)
        return self.out(image)


@pytest.mark.parametrize("fn", [1, 2])
def test_what_is_written_to_later_is_read_before(fn: int) -> None:
    """The text's layer reads the image as it was before the block wrote to it, wherever it runs."""
    torch.manual_seed(1)
    start, text = torch.randn(1, 8, 4), torch.randn(1, 8, 16)
    steps = [{"latent": start + 0.1 * i, "timestep": torch.tensor([1.0 - 0.1 * i]), "text": text} for i in range(3)]
    model = WritingModel().eval()
    expected = [model(**step).clone() for step in steps]
    compiled = compile_cached(model, residual_diff_threshold=0.0, Fn_compute_blocks=fn)
    assert all(torch.equal(compiled(**step), output) for step, output in zip(steps, expected, strict=True))


@pytest.mark.parametrize("name", few(NAMES, 2))
def test_behind_a_head_of_two_blocks_the_model_is_itself(name: str) -> None:
    model, steps = build(name), walk(name, 3)
    run = run_cached(model, steps, residual_diff_threshold=0.0, Fn_compute_blocks=2)
    expected = run_eager(model, steps).outputs
    assert all(torch.equal(a, b) for a, b in zip(expected, run.outputs, strict=True))
