"""Reading a captured graph: values, scalars, writes, dependencies. Nothing here changes a graph."""

from __future__ import annotations

import contextlib
import functools
import inspect
import operator
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import fx
from torch._dynamo.utils import numpy_method_wrapper, numpy_operator_wrapper, numpy_to_tensor_wrapper
from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_mutation
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import free_symbols
from torch.utils._pytree import tree_leaves

_INPLACE_OPERATORS = {
    getattr(operator, n) for n in dir(operator) if n.startswith("i") and f"__{n}__" in dir(operator)
} - {
    operator.index,
    operator.invert,
    operator.inv,
}
_INPLACE_OPERATORS |= {operator.setitem, operator.delitem}


_NUMPY_WRAPPERS = (numpy_to_tensor_wrapper, numpy_method_wrapper, numpy_operator_wrapper)


def value_of(node: fx.Node) -> Any:
    """The fake value that the capture recorded for a node, or None."""
    return node.meta.get("example_value", node.meta.get("val"))


def attribute_of(gm: fx.GraphModule, target: str) -> Any:
    """What a node of `target` stands for: a sub-module, a parameter, a constant."""
    return operator.attrgetter(target)(gm)


def values_for(gm: fx.GraphModule, inputs: Sequence[Any]) -> dict[fx.Node, Any]:
    """The fake value of every node of a graph, computed anew from fake values of its inputs."""
    mode = next((v.fake_mode for v in inputs if isinstance(v, FakeTensor)), contextlib.nullcontext())
    interpreter = fx.Interpreter(gm, garbage_collect_values=False)
    with torch.no_grad(), mode:
        interpreter.run(*inputs)
    return interpreter.env


def is_tensor(node: fx.Node) -> bool:
    """Whether the node's value is one tensor."""
    return isinstance(value_of(node), torch.Tensor)


def symbols_of(value: Any) -> set[Any]:
    """The symbols in a tensor's shape and strides, or in a number."""
    return set(free_symbols(value)) if isinstance(value, torch.Tensor | torch.SymInt) else set()


def is_tensor_sequence(node: fx.Node) -> bool:
    """Whether the node's value is a tuple or list with tensors in it."""
    value = value_of(node)
    return isinstance(value, tuple | list) and any(isinstance(v, torch.Tensor) for v in value)


def is_scalar(node: fx.Node) -> bool:
    """A number, SymInt, size or other host value that is computed from others, and is cheap to compute again."""
    if node.op not in ("call_function", "call_method"):
        return False
    value = value_of(node)
    return value is not None and not isinstance(value, torch.Tensor) and not is_tensor_sequence(node)


def is_weight(node: fx.Node) -> bool:
    """A graph input that belongs to the module, a parameter, a buffer or another tensor it holds; or a view of one."""
    if node.op == "get_attr":
        return True
    while (viewed := _viewed(node)) is not None:
        node = viewed
    if node.op != "placeholder":
        return False
    if isinstance(value_of(node), torch.nn.Parameter):
        return True
    arg = node.meta.get("grapharg")
    source = getattr(arg, "source", None) or getattr(node, "_dynamo_source", None)
    if source is None:
        return False
    guard_source = source.guard_source
    guard_source = guard_source() if callable(guard_source) else guard_source
    return guard_source is not None and (
        guard_source.is_unspecialized_nn_module() or guard_source.is_specialized_nn_module()
    )


def is_part_of_weight(node: fx.Node) -> bool:
    """A view that shows a part of a weight, or that such a view is taken of: a layer's own, where all are one tensor.

    What gives back all of it, like ``weight.float()`` of a weight that is one, is an operation like others.
    """
    if node.op not in ("call_function", "call_method") or not is_weight(node):
        return False
    whole = node
    while (viewed := _viewed(whole)) is not None:
        whole = viewed
    if not is_tensor(node) or view_key(node) != view_key(whole):
        return True
    return any(is_part_of_weight(user) for user in node.users)


def _viewed(node: fx.Node) -> fx.Node | None:
    """What a node looks at in another way, or takes parts of; None if it does anything else."""
    if node.op not in ("call_function", "call_method") or len(node.all_input_nodes) != 1 or written_inputs(node):
        return None
    (source,) = node.all_input_nodes
    storages, sources = (_storages(n) for n in (node, source))
    return source if storages and storages <= sources else None


def positions(graph: fx.Graph) -> dict[fx.Node, int]:
    """Each node's place in the graph."""
    return {node: i for i, node in enumerate(graph.nodes)}


Reads = Callable[[fx.Node], Iterable[fx.Node]]


def _inputs(node: fx.Node) -> Iterable[fx.Node]:
    return node.all_input_nodes


def descendants(graph: fx.Graph, roots: Iterable[fx.Node], reads: Reads = _inputs) -> set[fx.Node]:
    """Every node that depends on one of `roots` by `reads`, and the roots."""
    reached = set(roots)
    for node in graph.nodes:
        if any(a in reached for a in reads(node)):
            reached.add(node)
    return reached


def ancestors(node: fx.Node, stop: Collection[fx.Node] = (), reads: Reads = _inputs) -> set[fx.Node]:
    """Every node that `node` depends on by `reads`, and itself; nodes in `stop` are included but not followed."""
    seen: set[fx.Node] = set()
    todo = [node]
    while todo:
        n = todo.pop()
        if n in seen:
            continue
        seen.add(n)
        if n not in stop:
            todo.extend(reads(n))
    return seen


def written_inputs(node: fx.Node) -> list[fx.Node]:
    """The inputs that a node writes to in place."""
    if node.op not in ("call_function", "call_method") or not node.all_input_nodes:
        return []
    first = _nodes(node.args[:1])
    out = _nodes(node.kwargs.get("out"))
    if node.op == "call_method":
        name = str(node.target)
        return (first if (name.endswith("_") and not name.endswith("__")) or name == "__setitem__" else []) + out
    schema = _schema(node.target)
    if schema is not None:
        given = dict(zip((a.name for a in schema.arguments), node.args, strict=False)) | node.kwargs
        written = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        return [n for name in written for n in _nodes(given.get(name))]
    if node.target is triton_kernel_wrapper_mutation:
        return _nodes(node.kwargs["kwargs"])  # which of them a kernel writes to is not asked
    if getattr(node.target, "__module__", None) == "_operator":  # `and_` ends as in-place functions do, and is none
        return first if node.target in _INPLACE_OPERATORS else []
    name = getattr(node.target, "__name__", "")
    if (name.endswith("_") and not name.endswith("__")) or _asks_inplace(node):
        return first + out
    return out


def _nodes(value: Any) -> list[fx.Node]:
    return [a for a in tree_leaves(value) if isinstance(a, fx.Node)]


def _schema(target: Any) -> Any:
    """The schema of a dispatcher's operator; None for any other function."""
    target = getattr(target, "_opoverload", target)  # of one that was made by ``torch.library.custom_op``
    if isinstance(target, torch._ops.OpOverloadPacket):
        target = getattr(target, target.overloads()[0])
    return target._schema if isinstance(target, torch._ops.OpOverload) else None


def written_storages(nodes: Iterable[fx.Node]) -> set[int]:
    """The storages that some nodes write to in place."""
    return {key for n in nodes for a in written_inputs(n) if (key := storage_key(a)) is not None}


def touches(node: fx.Node, storages: Collection[int]) -> bool:
    """Whether what a node makes or reads lies in one of some storages: behind a write it would compute otherwise."""
    return any(storage_key(n) in storages for n in (node, *node.all_input_nodes))


_RANDOM = {
    "rand",
    "randn",
    "randint",
    "randperm",
    "rand_like",
    "randn_like",
    "randint_like",
    "bernoulli",
    "multinomial",
}
_RANDOM |= {"normal", "poisson", "normal_", "uniform_", "bernoulli_", "exponential_", "random_"}
_DROPOUTS = {"dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout"}


def operation(node: fx.Node) -> str:
    """What an operation is called, as a function, a method or in an exported graph (``aten.linear.default``); or ""."""
    if node.op not in ("call_function", "call_method"):
        return ""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.split(".")[0]


def draws_random(node: fx.Node) -> bool:
    """Whether an operation draws random numbers."""
    name = operation(node)
    if name == "scaled_dot_product_attention":
        return _may_hold(node.kwargs.get("dropout_p", node.args[4] if len(node.args) > 4 else 0.0))
    if name not in _DROPOUTS:
        return name in _RANDOM
    given = dict(zip(("input", "p", "training"), node.args, strict=False)) | node.kwargs
    return _may_hold(given.get("p", 0.5)) and _may_hold(given.get("training", given.get("train", True)))


def _may_hold(argument: Any) -> bool:
    """Whether an argument may be other than zero; reading a symbolic one guards it."""
    value = value_of(argument) if isinstance(argument, fx.Node) else argument
    if value is None:
        return True
    try:
        return bool(value)
    except RuntimeError:  # data-dependent
        return True


def _asks_inplace(node: fx.Node) -> bool:
    if "inplace" in node.kwargs:
        return bool(node.kwargs["inplace"])
    if getattr(node.target, "__module__", None) != "torch.nn.functional":
        return False
    place = _inplace_position(node.target)
    return place is not None and place < len(node.args) and bool(node.args[place])


@functools.cache
def _inplace_position(function: Any) -> int | None:
    """Where a function takes the argument `inplace`."""
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return None
    return names.index("inplace") if "inplace" in names else None


def storage_key(node: fx.Node) -> int | None:
    """Identifies the storage of a node's value: views and in-place results share it."""
    value = value_of(node)
    return _storage(value) if isinstance(value, torch.Tensor) else None


def _storage(value: torch.Tensor) -> int | None:
    try:
        return int(value.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return None


def view_key(node: fx.Node) -> tuple[Any, ...]:
    """Identifies a view of a storage: nodes with the same key are the same tensor, whatever is written to it."""
    value = value_of(node)
    layout = tuple(map(str, value.shape)), tuple(map(str, value.stride())), str(value.storage_offset())
    return storage_key(node), value.dtype, *layout


def viewed(node: fx.Node) -> fx.Node | None:
    """The input whose storage a node's value shows, as a view of it or as what was written to; None: it has its own."""
    shown = _storages(node)
    return next((a for a in node.all_input_nodes if not shown.isdisjoint(_storages(a))), None)


def _storages(node: fx.Node) -> set[int]:
    """The storages of a tensor, or of the elements of a tuple."""
    tensors = [v for v in tree_leaves(value_of(node)) if isinstance(v, torch.Tensor)]
    return {key for v in tensors if (key := _storage(v)) is not None}


def external_inputs(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """What a run of nodes reads from outside, in the order of first use; scalars are replaced by what they need."""
    inside = set(nodes)
    found: dict[fx.Node, None] = {}
    seen: set[fx.Node] = set()

    def visit(node: fx.Node) -> None:
        if node in seen:
            return
        seen.add(node)
        if is_scalar(node):
            for a in node.all_input_nodes:
                if a not in inside:
                    visit(a)
        else:
            found[node] = None

    for node in nodes:
        for a in node.all_input_nodes:
            if a not in inside:
                visit(a)
    return list(found)


def structure(nodes: Sequence[fx.Node], inputs: Sequence[fx.Node]) -> tuple[Any, ...]:
    """A hashable description of a run of nodes that is equal for runs that compute the same function.

    References inside the run become indices, those to outside become the index in `inputs`. Shapes, strides, dtypes
    and devices of the inputs are part of it, since they decide what a compiler makes of the run.
    """
    index = {n: i for i, n in enumerate(nodes)}
    outer = {n: i for i, n in enumerate(inputs)}

    def ref(a: Any) -> Any:
        if isinstance(a, fx.Node):
            if a in index:
                return ("%", index[a])
            if a in outer:
                return ("@", outer[a])
            if is_scalar(a):
                return ("scalar", callee(a), ref(a.args), ref(tuple(sorted(a.kwargs.items()))))
            return ("attr", callee(a))
        if isinstance(a, tuple | list):
            return (type(a).__name__, *map(ref, a))
        if isinstance(a, dict):
            return ("dict", *((k, ref(v)) for k, v in a.items()))
        if isinstance(a, slice):
            return ("slice", ref(a.start), ref(a.stop), ref(a.step))
        return (type(a).__name__, repr(a))

    body = tuple((n.op, callee(n), ref(_computed_from(n)), ref(tuple(sorted(n.kwargs.items())))) for n in nodes)
    return body, tuple(describe(value_of(n)) for n in inputs)


def _computed_from(node: fx.Node) -> tuple[Any, ...]:
    """A node's arguments, but for the words of an assertion: they name the symbols, which are new in each block."""
    return tuple(a for a in node.args if not isinstance(a, str)) if "assert" in operation(node) else node.args


def callee(node: fx.Node) -> Any:
    """What a node calls or reads, equal for two nodes that call the same."""
    if node.op == "get_attr":
        module: Any = node.graph.owning_module
        for part in str(node.target).split("."):
            module = getattr(module, part, None)
        return _body(module) if isinstance(module, fx.GraphModule) else id(module)
    if isinstance(node.target, _NUMPY_WRAPPERS):  # made anew for every call
        return type(node.target), *vars(node.target).values()
    return node.target


def _body(module: fx.GraphModule) -> tuple[Any, ...]:
    """What a sub-graph computes, whatever its inputs are called."""
    inputs = list(module.graph.find_nodes(op="placeholder"))
    return structure([n for n in module.graph.nodes if n.op != "placeholder"], inputs)


def source_of(node: fx.Node) -> str:
    """Where an input comes from in the captured code, or its name in the graph."""
    source = getattr(node.meta.get("grapharg"), "source", None)
    if source is None:
        return node.name
    return source.name if isinstance(source.name, str) else str(source.name())


def hinted_shape(value: torch.Tensor) -> tuple[int, ...]:
    """A shape in numbers: for a symbol that of the present inputs, 1 for one that depends on data."""
    return tuple(map(hint, value.shape))


def hint(size: Any) -> int:
    """A number for a size: the one of the present inputs; 1 for one that depends on data."""
    if isinstance(size, int):
        return size
    found = getattr(getattr(size, "node", None), "hint", None)
    return 1 if found is None else int(found)


def describe(value: Any) -> tuple[Any, ...]:
    """Everything about an input value that compiled code may depend on."""
    if isinstance(value, torch.Tensor):
        stride = tuple(map(str, value.stride())) if value.layout is torch.strided else ()
        return (
            tuple(map(str, value.shape)),
            stride,
            value.dtype,
            value.device,
            isinstance(value, torch.nn.Parameter),
            type(value),
        )
    return (type(value).__name__, str(value))


def same_shape(a: fx.Node, b: fx.Node) -> bool:
    """Whether two tensors agree in shape, dtype and device."""
    va, vb = value_of(a), value_of(b)
    return tuple(map(str, va.shape)) == tuple(map(str, vb.shape)) and va.dtype == vb.dtype and va.device == vb.device
