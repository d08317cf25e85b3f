"""Captures a forward as one graph, and says how the graph's inputs and outputs make up those of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map

from fx_cache.backend import Rewritten, refuse_gradients, rewrite
from fx_cache.capturing import captured
from fx_cache.config import CacheConfig
from fx_cache.errors import ExportError


@dataclass(frozen=True)
class Leaf:
    """A leaf of the model's inputs, by number."""

    number: int


@dataclass(frozen=True)
class Result:
    """An output of the graph, by number."""

    number: int


@dataclass(frozen=True)
class Weight:
    """A parameter or buffer of the model, by name."""

    name: str


@dataclass(frozen=True)
class Constant:
    """A tensor that the model holds under no name, or a number of its output."""

    value: Any


@dataclass(frozen=True)
class Capture:
    """A model's forward as one rewritten graph.

    Attributes:
        rewritten: the graph after the pipeline.
        inputs: where each input of the captured graph comes from.
        outputs: where each leaf of the model's output comes from.
        structure: of the model's output.
    """

    rewritten: Rewritten
    inputs: tuple[Leaf | Weight | Constant, ...]
    outputs: tuple[Leaf | Result | Constant, ...]
    structure: TreeSpec


def capture(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], config: CacheConfig) -> Capture:
    """Captures and rewrites the forward of a model; runs it once.

    Raises:
        ExportError: the forward cannot be cached, or its output is not made of tensors.
        torch._dynamo.exc.Unsupported: it cannot be captured as one graph.
    """
    found: list[Rewritten] = []
    seen: list[tuple[Sequence[Any], Sequence[Any]]] = []

    def look(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        del example_inputs
        refusal = refuse_gradients(gm)
        if refusal is None:
            found.append(rewrite(gm, config))
            refusal = found[-1].plan.refusal
        if refusal is not None:
            raise ExportError(str(refusal))

        def run(*given: Any) -> Any:
            results = gm.forward(*given)
            seen.append((given, results))
            return results

        return run

    # Copies: what a user gives twice are two inputs all the same.
    args, kwargs = tree_map(lambda v: v.clone() if isinstance(v, torch.Tensor) else v, (tuple(args), dict(kwargs)))
    leaves = tree_flatten((args, kwargs))[0]
    try:
        output = captured(model, look, fullgraph=True, dynamic=False)(*args, **kwargs)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        if isinstance(error.inner_exception, ExportError):
            raise error.inner_exception from None
        raise
    results, structure = tree_flatten(output)
    (given, computed), *_ = seen
    names = {id(t): Weight(name) for name, t in _held_tensors(model)}
    by_leaf = {id(leaf): Leaf(i) for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)}
    inputs = tuple(names.get(id(v)) or by_leaf.get(id(v)) or Constant(v) for v in given)
    by_result = {id(r): Result(i) for i, r in enumerate(computed) if isinstance(r, torch.Tensor)}
    outputs = tuple(by_result.get(id(r)) or by_leaf.get(id(r)) or _number(r) for r in results)
    return Capture(found[0], inputs, outputs, structure)


def _held_tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _number(value: Any) -> Constant:
    if value is None or isinstance(value, bool | int | float | str):
        return Constant(value)
    raise ExportError(
        f"the model's output: got a {type(value).__name__}; expected tensors in tuples, lists, dicts or classes that "
        f"torch.utils._pytree knows; let the model return a tuple (diffusers: return_dict=False)."
    )
