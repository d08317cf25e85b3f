"""Bad input gets one clear error or one warning, and the model still gives its own image."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from torch import nn

import fx_cache
from fx_cache.config import split_options
from tests.models import build, walk
from tests.models.tiny import LAYERS
from tests.running import compile_cached


class Block(nn.Module):
    def __init__(self, width: int, out: int | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, out or width)
        self.residual = out is None or out == width

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        y = self.down(torch.nn.functional.gelu(self.up(self.norm(x) * t)))
        return x + y if self.residual else y


class Stack(nn.Module):
    """A tiny transformer-like model: tokens [B, N, 8], timestep [B]."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor]:
        t = torch.sin(t)[:, None, None] + 1.0
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, t)
        return (x * t,)


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(1, 5, 8), torch.tensor([3.0])


def assert_uncached(model: nn.Module, *args, match: str, **options) -> None:
    """One warning that says why, the model's own output, and the reason in `explain`."""
    compiled = compile_cached(model, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        output = compiled(*args)[0]
    texts = [str(w.message) for w in caught if issubclass(w.category, fx_cache.CacheWarning)]
    assert len(texts) == 1
    for part in ("dit_cache runs this graph uncached", ": got ", "; expected ", match):
        assert part in texts[0]
    assert torch.equal(output, model(*args)[0])
    assert match in fx_cache.explain(compiled, *args).reason


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"Fn_compute_block": 1}, "'Fn_compute_blocks'"),
        ({"fn_compute_blocks": 1}, "'Fn_compute_blocks'"),
        ({"Fn_compute_blocks": 0}, "an integer >= 1"),
        ({"Fn_compute_blocks": 1.5}, "an integer >= 1"),
        ({"Bn_compute_blocks": -1}, "an integer >= 0"),
        ({"warmup_interval": 0}, "an integer >= 1"),
        ({"max_cached_steps": -2}, "an integer >= -1"),
        ({"num_inference_steps": 0}, "an integer >= 1"),
        ({"residual_diff_threshold": "0.1"}, "a number"),
        ({"residual_diff_threshold": float("nan")}, "a number"),
        ({"scope": "block"}, "'model' or 'stack'"),
        ({"regional": 0}, "True or False"),
        ({"compiler": ""}, "the name of a torch.compile backend"),
        ({"compiler": "dit_cache"}, "another torch.compile backend"),
        ({"dump_dir": 3}, "a path or None"),
    ],
)
def test_options_are_checked_where_they_are_made(options: dict, match: str) -> None:
    with pytest.raises(fx_cache.OptionError, match=match) as caught:
        split_options(options)
    assert "got" in str(caught.value) and "expected" in str(caught.value)


def test_defaults_are_those_of_cache_dit() -> None:
    from cache_dit import DBCacheConfig

    ours, theirs = fx_cache.CacheConfig(), DBCacheConfig()
    own = ("scope", "compiler", "dump_dir", "max_sessions", "max_bytes", "batch_policy")
    own += ("hoist_invariants", "regional", "process_groups")
    shared = [n for n in fx_cache.CacheConfig.__dataclass_fields__ if n not in own]
    assert {n: getattr(ours, n) for n in shared} == {n: getattr(theirs, n) for n in shared}


def test_unknown_options_belong_to_the_inner_compiler() -> None:
    config, rest = split_options({"Fn_compute_blocks": 2, "max_autotune": True})
    assert (config.Fn_compute_blocks, rest) == (2, {"max_autotune": True})


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"compiler": "no_such_backend"}, "no_such_backend"),
        ({"compiler": "inductor", "no_such_option": 1}, "no_such"),
        ({"compiler": "eager", "no_such_option": 1}, "no_such"),
        ({"compiler": "aot_eager", "no_such_option": 1}, "no_such"),
    ],
)
def test_what_no_compiler_knows_is_an_error(options: dict, match: str) -> None:
    compiled = compile_cached(Stack([Block(8) for _ in range(3)]), **options)
    with pytest.raises(Exception, match=match) as caught:
        compiled(*inputs())
    assert "OptionError" in repr(caught.value) or "OptionError" in str(caught.value)


def test_configure_refuses_what_is_fixed_and_what_is_unknown() -> None:
    model = Stack([Block(8) for _ in range(3)])
    with pytest.raises(fx_cache.SessionError, match="after its first call"):
        fx_cache.configure(model, residual_diff_threshold=0.1)
    compile_cached(model)(*inputs())
    with pytest.raises(fx_cache.OptionError, match="compile the model again"):
        fx_cache.configure(model, Fn_compute_blocks=2)
    with pytest.raises(fx_cache.OptionError, match="'residual_diff_threshold'"):
        fx_cache.configure(model, residual_diff_thresholds=0.1)
    with pytest.raises(fx_cache.OptionError, match="a number"):
        fx_cache.configure(model, residual_diff_threshold=None)


@pytest.mark.parametrize(("name", "branch"), [("", None), (None, None), (3, None), ("r", ""), ("r", 0)])
def test_a_session_needs_a_name(name, branch) -> None:
    with pytest.raises(fx_cache.SessionError, match="non-empty string"), fx_cache.session(name, branch):
        pass


def test_what_a_session_says_is_checked() -> None:
    for step in (-1, 1.5, True, "3"):
        with pytest.raises(fx_cache.SessionError, match="an integer >= 0"), fx_cache.session("r", step=step):
            pass
    with pytest.raises(fx_cache.OptionError, match="compile the model again"):
        fx_cache.session("r", config={"Fn_compute_blocks": 2}).__enter__()
    with pytest.raises(fx_cache.OptionError, match="'residual_diff_threshold'"):
        fx_cache.session("r", config={"residual_diff_thresholds": 0.2}).__enter__()
    with pytest.raises(fx_cache.OptionError, match="an integer >= 1"):
        fx_cache.session("r", num_inference_steps=0).__enter__()
    with pytest.raises(fx_cache.SessionError, match="non-empty string"):
        fx_cache.end("")


@pytest.mark.parametrize(("fn", "bn"), [(4, 0), (1, 3), (3, 1), (9, 9)])
def test_too_many_blocks_in_head_and_tail(fn: int, bn: int) -> None:
    model = Stack([Block(8) for _ in range(4)])
    assert_uncached(model, *inputs(), match="for 4 blocks", Fn_compute_blocks=fn, Bn_compute_blocks=bn)


def test_no_stack() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block(8)

        def forward(self, x, t):
            return (self.block(x, t[:, None, None]),)

    assert_uncached(Flat(), *inputs(), match="no stack of repeated blocks")


def test_a_single_block_as_regional_compile_gives() -> None:
    block = Block(8)

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([block])

        def forward(self, x, t):
            return (self.blocks[0](x, t[:, None, None]),)

    assert_uncached(One(), *inputs(), match="regional compile")


def test_a_carried_shape_that_changes() -> None:
    model = Stack([Block(8, 12), Block(12, 6), Block(6, 9), Block(9, 8)])
    assert_uncached(model, *inputs(), match="a stream that keeps its shape")


def test_gradients_enabled() -> None:
    model = Stack([Block(8) for _ in range(3)])
    compiled = compile_cached(model, residual_diff_threshold=1.0)
    x, t = inputs()
    with torch.enable_grad():
        with pytest.warns(fx_cache.CacheWarning, match="gradients enabled"):
            output = compiled(x, t)[0]
        output.sum().backward()
        gradient = model.embed.weight.grad.clone()
        model.zero_grad()
        model(x, t)[0].sum().backward()
    assert torch.equal(gradient, model.embed.weight.grad)
    assert fx_cache.summary(model).to_dict() == {"sessions": []}


def test_gradients_enabled_but_needed_by_nobody() -> None:
    model = Stack([Block(8) for _ in range(3)]).requires_grad_(False)
    compiled = compile_cached(model, residual_diff_threshold=0.0)
    x, t = inputs()
    with torch.enable_grad():
        assert torch.equal(compiled(x, t)[0], model(x, t)[0])
    assert len(fx_cache.summary(model).to_dict()["sessions"]) == 1


class Loop(Stack):
    """A break inside a loop: Dynamo leaves the whole loop to Python."""

    def forward(self, x, t):
        t = torch.sin(t)[:, None, None] + 1.0
        for block in self.blocks:
            x = block(x, t)
            torch._dynamo.graph_break()
            x = torch.cat([x, x[:, :1]], dim=1)
        return (x,)


class Unrolled(Stack):
    """A break between two calls: what is behind it is a graph of its own."""

    def forward(self, x, t):
        t = torch.sin(t)[:, None, None] + 1.0
        x = self.blocks[0](x, t)
        torch._dynamo.graph_break()
        return (self.blocks[1](x, t),)


@pytest.mark.parametrize(
    ("kind", "told"),
    [(Loop, "TORCH_LOGS=graph_breaks"), (Unrolled, r"graph break: .* at test_bad_input.py:\d+ in forward")],
)
def test_a_graph_break_is_named_where_nothing_can_be_cached(kind: type[Stack], told: str) -> None:
    model = kind([Block(8) for _ in range(3)])
    compiled = torch.compile(model, backend="dit_cache", options={"compiler": "eager", "Fn_compute_blocks": 1})
    args = inputs()
    # The first forward compiles, and may run otherwise; that no stack lies over the graphs is known behind the second.
    for _ in range(2):
        assert torch.equal(compiled(*args)[0], model(*args)[0])
    with pytest.warns(fx_cache.CacheWarning, match=told) as caught:
        assert torch.equal(compiled(*args)[0], model(*args)[0])
    assert len(caught) == 1 and "graph breaks between its blocks" in str(caught[0].message)
    assert re.search(told, fx_cache.explain(compiled, *args).reason)


class Dropping(Block):
    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(super().forward(x, t), 0.5, self.training)


def test_blocks_that_draw_random_numbers_are_refused() -> None:
    model = Stack([Dropping(8) for _ in range(4)]).train()
    compiled = compile_cached(model, residual_diff_threshold=2.0, max_warmup_steps=0)
    args = inputs()
    with pytest.warns(fx_cache.CacheWarning, match="draws random numbers in the blocks.*model.eval"):
        torch.manual_seed(1)
        output = compiled(*args)[0]
    torch.manual_seed(1)
    assert torch.equal(output, model(*args)[0])
    assert not fx_cache.summary(model).to_dict()["sessions"]
    # The same model without dropout is cached.
    assert fx_cache.explain(model.eval(), *args).stacks[0].blocks == 4


def test_blocks_that_write_to_an_input_are_refused() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(8) for _ in range(4)])

        def forward(self, x, t, log):
            t = torch.sin(t)[:, None, None] + 1.0
            for block in self.blocks:
                x = block(x, t)
                log.add_(x.mean())
            return (x,)

    model = Writes()
    compiled = compile_cached(model, residual_diff_threshold=1.0)
    logs = [torch.zeros(()), torch.zeros(())]
    x, t = inputs()
    with pytest.warns(fx_cache.CacheWarning, match="a write in place"):
        compiled(x, t, logs[0])
    model(x, t, logs[1])
    assert torch.equal(*logs)


def test_blocks_that_change_their_stream_in_place() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(8, 8)
            self.blocks = nn.ModuleList([Block(8) for _ in range(5)])

        def forward(self, x, t):
            t = torch.sin(t)[:, None, None] + 1.0
            first = x = self.embed(x)
            for block in self.blocks:
                x += 0.1 * block(x, t)
            return (x * t + first,)

    torch.manual_seed(0)
    model = InPlace()
    steps = [(torch.randn(1, 5, 8), torch.tensor([9.0 - i])) for i in range(6)]
    compiled = compile_cached(model, residual_diff_threshold=0.0)
    for x, t in steps:
        assert torch.equal(compiled(x, t)[0], model(x, t)[0])
    fx_cache.configure(model, residual_diff_threshold=1.0)
    fx_cache.reset(model)
    expected = []
    residual = None
    for i, (x, t) in enumerate(steps):
        scaled, x0 = torch.sin(t)[:, None, None] + 1.0, model.embed(x)
        x1 = x0 + 0.1 * model.blocks[0](x0, scaled)
        out = x1
        for block in model.blocks[1:]:
            out = out + 0.1 * block(out, scaled)
        residual, out = (out - x1, out) if i == 0 else (residual, x1 + residual)
        expected.append(out * scaled + out)
    for (x, t), reference in zip(steps, expected, strict=True):
        with fx_cache.session("request", "only"):
            assert torch.allclose(compiled(x, t)[0], reference, atol=1e-6)
    span = fx_cache.summary(model).to_dict()["sessions"][-1]["branches"][0]["spans"][0]
    assert span["hits"] == [1, 2, 3, 4, 5]


def test_explain_reads_the_options_of_a_compiled_model() -> None:
    model, step = build("flux"), walk("flux", 1)[0]
    compiled = compile_cached(model, scope="stack", Fn_compute_blocks=2, Bn_compute_blocks=1)
    stacks = fx_cache.explain(compiled, **step).stacks
    assert [(s.name, s.blocks, s.head, s.span, s.tail) for s in stacks] == [
        ("transformer_blocks", LAYERS, (0, 2), (2, LAYERS - 1), (LAYERS - 1, LAYERS)),
        ("single_transformer_blocks", LAYERS, (0, 2), (2, LAYERS - 1), (LAYERS - 1, LAYERS)),
    ]
    bare = fx_cache.explain(build("dit"), **walk("dit", 1)[0])
    assert "Fn_compute_blocks=8" in bare.reason and len(bare.stacks) == 1
