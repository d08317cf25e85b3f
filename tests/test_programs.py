"""Graphs that compute otherwise are other programs: neither goes on with what the other one cached."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor, nn

import fx_cache
from fx_cache.patterns.programs import Program, Programs, Symbol
from tests.running import compile_cached, last_branch

WIDTH = 16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.time, self.text = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.gain: int | float = 1
        self.start, self.swapped, self.other = 0, False, False

    def forward(self, x: Tensor, time: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
        first, second = (text, pooled) if not self.other else (pooled, text)
        gate = torch.sigmoid(self.time(time))[:, None]
        added = self.layer(torch.tanh(x)) if not self.swapped else torch.tanh(self.layer(x))
        part = first[:, self.start : self.start + 4].mean(1, keepdim=True) - second.mean(1, keepdim=True)
        return x + self.gain * added * gate + self.text(part)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.time, self.out = nn.Linear(4, WIDTH), nn.Linear(2, WIDTH), nn.Linear(WIDTH, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(6))
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, pooled: Tensor) -> tuple[Tensor]:
        time = self.time(torch.stack([timestep.sin(), timestep.cos()], -1))
        x = self.embed(x).view(*x.shape[:2], WIDTH)  # sizes among the arguments
        for block in self.blocks:
            x = block(x, time, text, pooled)
        return (self.out(x),)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize(
    "changed", [{"gain": 3}, {"gain": 1.5}, {"start": 2}, {"swapped": True}, {"other": True}], ids=str
)
def test_a_model_that_computes_otherwise_from_a_step_on(changed: dict, named: bool) -> None:
    """Blocks that the probe does not see are changed in the middle of a request."""
    model = Model()
    compiled = compile_cached(model, residual_diff_threshold=10.0, max_warmup_steps=1)
    x, text, pooled = torch.randn(1, 8, 4), torch.randn(1, 8, WIDTH), torch.randn(1, 8, WIDTH)
    with fx_cache.session("request", branch="only") if named else contextlib.nullcontext():
        for i in range(8):
            if i == 5:
                for block in model.blocks[2:]:
                    for name, value in changed.items():
                        setattr(block, name, value)
            inputs = x, torch.tensor([0.9 - 0.1 * i]), text, pooled
            output = compiled(*inputs)[0]
            if i == 5:
                assert torch.equal(output, model(*inputs)[0])
            x = x - 0.1 * output
    assert last_branch(compiled)["spans"][0]["hits"]


def test_sizes_make_no_other_program() -> None:
    """A request that began in the static graph goes on in the dynamic one."""
    compiled = compile_cached(Model(), residual_diff_threshold=10.0, max_warmup_steps=1)
    given = [(torch.randn(1, n, 4), torch.randn(1, n, WIDTH), torch.randn(1, n, WIDTH)) for n in (8, 12, 16)]
    for i in range(5):
        for k, (x, text, pooled) in enumerate(given):
            with fx_cache.session(f"request-{k}", branch="only"):
                compiled(x, torch.tensor([0.9 - 0.1 * i]), text, pooled)
    spans = [b["spans"][0] for s in fx_cache.summary(compiled).to_dict()["sessions"] for b in s["branches"]]
    assert [span["hits"] for span in spans] == [[1, 2, 3, 4]] * 3


def test_what_else_runs_in_the_process_makes_no_other_program() -> None:
    """The static graph of another model, at another size, is not told apart from a dynamic one."""
    other = compile_cached(Model(), residual_diff_threshold=10.0, max_warmup_steps=1)
    other(torch.randn(1, 20, 4), torch.tensor([0.9]), torch.randn(1, 20, WIDTH), torch.randn(1, 20, WIDTH))
    torch._dynamo.reset()
    test_sizes_make_no_other_program()


def test_programs_that_fit_each_other_share_a_name() -> None:
    def program(*numbers: int | Symbol) -> Program:
        return Program("wiring", numbers)

    programs, size = Programs(), Symbol(1)
    first = programs.name_of(program(size, 1))
    assert first == programs.name_of(program(1, 1)) == programs.name_of(program(1, size))
    # It fits the first, but not the second.
    assert programs.name_of(program(2, 1)) != first
    assert programs.name_of(program(size, 2)) != first
    assert programs.name_of(Program("other wiring", (1, 1))) != first
