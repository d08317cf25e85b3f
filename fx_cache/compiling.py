"""Compiles the pieces of a rewritten graph with the inner compiler, like pieces once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._guards import CompileContext, TracingContext
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.graph import CodeGen

from fx_cache.boxing import Boxed, TakesAList, box, taking_a_list
from fx_cache.errors import OptionError
from fx_cache.ops import cond, once
from fx_cache.patterns.graph import attribute_of, value_of

Compiler = Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]


def inner_compiler(name: str, mode: str | None, options: Mapping[str, Any]) -> Compiler:
    """The Dynamo backend `name`, with the user's mode and options as ``torch.compile`` hands them over.

    Raises:
        OptionError: no such backend, or an option or mode that it does not have.
    """
    try:
        if name == "inductor":
            return torch._TorchCompileInductorWrapper(mode, dict(options), None)
        wrapper = torch._TorchCompileWrapper(name, mode, dict(options), None)
        if options and wrapper.compiler_fn.__module__ == "torch._dynamo.backends.debugging":
            raise RuntimeError("it takes none")
        return wrapper
    except torch._dynamo.exc.InvalidBackend:
        known = ", ".join(torch._dynamo.list_backends())
        raise OptionError(f"option 'compiler': got {name!r}; expected one of {known}; install or correct it.") from None
    except RuntimeError as error:
        text = str(error).split(", known options are")[0]
        raise OptionError(
            f"options: got {sorted(options)} with mode {mode!r} for compiler {name!r} ({text}); expected options of "
            f"fx_cache.CacheConfig or of {name}; correct or remove them."
        ) from None


def uses_cuda_graphs(name: str, mode: str | None, options: Mapping[str, Any]) -> bool:
    """Whether what a compiler makes hands out tensors that its next run overwrites."""
    if name != "inductor":
        return name == "cudagraphs"
    chosen = {**torch._inductor.list_mode_options(mode or "default"), **options}
    return bool(chosen.get("triton.cudagraphs", torch._inductor.config.triton.cudagraphs))


def weights_stay(compiler: Compiler) -> Compiler:
    """The same compiler, told of each piece which inputs always lie where they lie, as Dynamo tells it of whole graphs.

    CUDA graphs copy all others into place at each run.
    """

    def compile_piece(piece: fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        piece.meta["dynamo_compile_id"] = CompileContext.current_compile_id()
        piece._param_name_to_source = {}  # type: ignore[assignment]
        for node in piece.graph.find_nodes(op="placeholder"):
            node._dynamo_source = None
            if isinstance(value_of(node), torch.nn.Parameter):
                node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
        return compiler(piece, examples)

    return compile_piece


def compile_pieces(gm: fx.GraphModule, compiler: Compiler) -> fx.GraphModule:
    """The same graph with every piece compiled; what consists of pieces itself is gone through likewise.

    Arguments are handed over in lists to the branch that computes a span, and to pieces that take one.

    Args:
        gm: a rewritten graph: calls of pieces, checks and conditionals. It is left as it is.
        compiler: ``(piece, example inputs) -> callable``. Each piece is compiled once, however often it is called.
    """
    return _compiled(gm, compiler, {})


@dataclass(frozen=True)
class _Piece:
    """A compiled piece, and what takes its arguments in a list, if it has that."""

    compiled: Callable[..., Any]
    boxed: Boxed | None

    @classmethod
    def of(cls, piece: fx.GraphModule, compiler: Compiler) -> _Piece:
        compiled = piece.forward if _is_one_operation(piece) else compiler(piece, _examples(piece))
        return cls(compiled, taking_a_list(compiled))


def _compiled(
    gm: fx.GraphModule, compiler: Compiler, done: dict[fx.GraphModule, _Piece], codegen: CodeGen | None = None
) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    if codegen is not None:
        graph.set_codegen(codegen)
    parts: dict[str, Any] = {}
    for node in graph.find_nodes(op="call_function", target=once):
        target = node.args[1].target
        parts[target] = _compiled(attribute_of(gm, target), compiler, done)
    for node in graph.find_nodes(op="call_function", target=cond):
        hit, reuse, compute, operands, slot = node.args
        parts[reuse.target] = _compiled(attribute_of(gm, reuse.target), compiler, done)
        parts[compute.target] = _compiled(attribute_of(gm, compute.target), compiler, done, TakesAList())
        node.args = (hit, reuse, compute, box(graph, node, operands), slot)
    rest = [n for n in graph.nodes if n.op in ("call_module", "get_attr") and n.target not in parts]
    for node in rest:
        part = attribute_of(gm, node.target)
        if not isinstance(part, fx.GraphModule):
            parts[node.target] = part
            continue
        if part not in done:
            done[part] = _Piece.of(part, compiler)
        piece = done[part]
        parts[node.target] = piece.compiled
        if node.op == "call_module" and piece.boxed is not None:
            parts[node.target] = piece.boxed
            node.args = (box(graph, node, node.args),)
    return fx.GraphModule(parts, graph)


def _is_one_operation(piece: fx.GraphModule) -> bool:
    """Whether there is nothing to fuse: such a piece runs as it is, and costs no compilation."""
    return sum(n.op not in ("placeholder", "output") for n in piece.graph.nodes) == 1


def _examples(piece: fx.GraphModule) -> list[Any]:
    return [_example(n) for n in piece.graph.find_nodes(op="placeholder")]


def _example(node: fx.Node) -> Any:
    """An input's fake value in the mode that Dynamo made for its backends; symbols stay the same."""
    value = value_of(node)
    context = TracingContext.try_get()
    mode = None if context is None else context.fake_mode
    if mode is None or not isinstance(value, FakeTensor) or value.fake_mode is mode:
        return value
    with torch.no_grad(), mode:
        example: Any = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    if value.item_memo is not None:
        example.item_memo = value.item_memo  # a Python number that Dynamo made an input: it stays the same symbol
    is_parameter = isinstance(value, torch.nn.Parameter)
    return torch.nn.Parameter(example, requires_grad=value.requires_grad) if is_parameter else example
