"""Graphs that compute otherwise are other programs: neither goes on with what the other one cached."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fx_cache
from fx_cache.patterns.programs import Program
from tests.running import compile_cached, hits_of, last_branch

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


class Numbered(Model):
    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, pooled: Tensor, k: int = 1) -> tuple[Tensor]:  # type: ignore[override]
        return super().forward(x * k, timestep, text, pooled)


@pytest.mark.parametrize("branch", [None, "only"])
@pytest.mark.parametrize("how", ["blocks", "blocks, all anew", "prompt", "number"])
def test_a_request_that_was_given_up_in_another_program(how: str, branch: str | None) -> None:
    """Its name is given to another request of its seed, which comes to that program, or that prompt, too."""
    model = Numbered()
    compiled = compile_cached(model, residual_diff_threshold=10.0, max_warmup_steps=1)
    text, pooled, other, first = (torch.randn(1, n, w) for n, w in ((80, WIDTH), (80, WIDTH), (80, WIDTH), (8, 4)))
    for request in range(3):
        x = first.clone()
        for i in range(6 if request == 0 else 8):
            late = i >= 5
            for block in model.blocks[2:]:
                block.gain = 3 if late and "blocks" in how else 1
            given = other if late and how == "prompt" else text, pooled
            given = tuple(v.clone() for v in given) if "anew" in how else given
            with fx_cache.session("request", branch=branch):
                time = torch.tensor([0.9 - (0.1 + 0.003 * request) * i])
                inputs = x, time, *given, 2 if late and how == "number" else 1
                output = compiled(*inputs)[0]
            # A prompt that changes under a name is another step of the request, which the probe shows.
            if i == 0 or (i == 5 and not (branch and how in ("prompt", "number"))):
                assert torch.equal(output, model(*inputs)[0]), (request, i)
            x = x - 0.1 * output
    assert hits_of(compiled)


@pytest.mark.parametrize("every", [1, 4])
def test_another_program_at_some_steps(every: int) -> None:
    """The others go on with what theirs has computed (skip-layer guidance)."""
    model = Model()
    compiled = compile_cached(model, residual_diff_threshold=10.0, max_warmup_steps=2)
    x, text, pooled = torch.randn(1, 8, 4), torch.randn(1, 80, WIDTH), torch.randn(1, 80, WIDTH)
    for i in range(16):
        for block in model.blocks[2:]:
            block.gain = 3 if i // every % 2 else 1
        x = x - 0.05 * compiled(x, torch.tensor([0.95 - 0.05 * i]), text, pooled)[0]
    assert hits_of(compiled) == [[2, 3, 4, 5, 6, 7]] * 2


def test_numbers_that_data_give() -> None:
    """Which tensor a number was read from is a part of the program, and so is whose size it is."""

    def items(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return x * a + b + x * a.item() + x.tanh() * b.item()

    def items_swapped(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return x * a + b + x * b.item() + x.tanh() * a.item()

    def sizes(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        i, j = a.nonzero(), b.nonzero()
        return x + i.sum() + j.sum() + x.new_ones(i.shape[0]).sum() + 2 * x.new_ones(j.shape[0]).sum()

    def sizes_swapped(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        i, j = a.nonzero(), b.nonzero()
        return x + i.sum() + j.sum() + x.new_ones(j.shape[0]).sum() + 2 * x.new_ones(i.shape[0]).sum()

    names = []
    with torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
        for compute in (items, items_swapped, sizes, sizes_swapped, items):
            torch._dynamo.reset()
            captured: list[fx.GraphModule] = []

            def look(gm: fx.GraphModule, _: list, captured: list = captured) -> Callable:
                captured.append(gm)
                return gm.forward

            inputs = torch.randn(3), torch.tensor(1.5), torch.tensor(2.5)
            torch.compile(compute, backend=look, fullgraph=True)(*inputs)
            names.append(Program.of(captured[0].graph).at(inputs))
    assert len(set(names)) == 4 and names[0] == names[-1]


@torch.library.custom_op("fx_cache_test_one::mix", mutates_args=())
def mix_one(x: Tensor) -> Tensor:
    return x.tanh()


@torch.library.custom_op("fx_cache_test_other::mix", mutates_args=())
def mix_other(x: Tensor) -> Tensor:
    return x.relu() * 3


for op in (mix_one, mix_other):
    op.register_fake(torch.empty_like)


def test_operators_of_one_name_in_two_libraries() -> None:
    names = set()
    for mix in (torch.ops.fx_cache_test_one.mix, torch.ops.fx_cache_test_other.mix):
        graph = fx.Graph()
        graph.output(graph.call_function(mix, (graph.placeholder("x"),)))
        names.add(Program.of(graph).at([torch.randn(2)]))
    assert len(names) == 2


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("changed", [(4, 2), (3, 5)])
def test_a_number_that_only_skipped_blocks_read(changed: tuple[int, int], named: bool) -> None:
    """It is a symbol from its second value on; a step with another one computes."""

    class Scaled(Model):
        def forward(self, x: Tensor, timestep: Tensor, text: Tensor, k: int) -> tuple[Tensor]:
            time = self.time(torch.stack([timestep.sin(), timestep.cos()], -1))
            x = self.embed(x)
            for i, block in enumerate(self.blocks):
                x = block(x, time, text, text)
                x = x + k * self.embed(text[..., :4]) if 1 < i < 5 else x
            return (self.out(x),)

    model = Scaled()
    compiled = compile_cached(model, residual_diff_threshold=10.0, max_warmup_steps=1)
    text = torch.randn(1, 8, WIDTH)
    for request in range(2):
        x = torch.randn(1, 8, 4)
        for i in range(8):
            inputs = x, torch.tensor([0.9 - 0.1 * i]), text, 7 if i < 4 else changed[i == 7]
            with fx_cache.session(f"{request}", branch="only") if named else contextlib.nullcontext():
                output = compiled(*inputs)[0]
            if i in (0, 4, 7):
                assert torch.equal(output, model(*inputs)[0])
            x = x - 0.1 * output
    assert hits_of(compiled)


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


class Sized(nn.Module):
    """Computes with sizes, and with numbers that are none."""

    def __init__(self, divisor: int = 2, added: int = 0) -> None:
        super().__init__()
        self.divisor, self.added = divisor, added

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        n = x.shape[1] // self.divisor
        return torch.cat([x[:, :n], y], 1).reshape(x.shape[0], -1) * (y.shape[1] + self.added)


def at(model: nn.Module, sizes: tuple[int, int], dynamic: Sequence[int] = ()) -> str:
    """The name of what runs at these sizes, in a static graph or one in which the sizes of some inputs are dynamic."""
    names: list[str] = []

    def look(gm: fx.GraphModule, example_inputs: list) -> Callable:
        del example_inputs
        program = Program.of(gm.graph)

        def run(*args: Any) -> Any:
            names.append(program.at(args))
            return gm(*args)

        return run

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=look, fullgraph=True, dynamic=None if dynamic else False)
    for first, second in [(20, 30), sizes] if dynamic else [sizes]:
        inputs = torch.randn(2, first, 3), torch.randn(2, second, 3)
        for i in dynamic:
            torch._dynamo.mark_dynamic(inputs[i], 1)
        compiled(*inputs)
    return names[-1]


def test_the_name_of_a_program_is_that_of_its_static_graph() -> None:
    for sizes in [(8, 12), (12, 8), (16, 6)]:
        assert at(Sized(), sizes, (0, 1)) == at(Sized(), sizes)
    assert at(Sized(), (8, 30), (0,)) == at(Sized(), (8, 30))
    assert at(Sized(), (20, 8), (1,)) == at(Sized(), (20, 8))
    assert at(Sized(), (8, 12)) != at(Sized(), (12, 8))


@pytest.mark.parametrize("other", [Sized(divisor=4), Sized(added=1)], ids=["divisor", "summand"])
def test_other_computations_with_sizes_are_other_programs(other: Sized) -> None:
    names = {at(model, (8, 12), dynamic) for model in (Sized(), other) for dynamic in ((), (0, 1))}
    assert len(names) == 2
