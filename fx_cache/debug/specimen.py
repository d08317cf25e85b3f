"""Builds a model and inputs for it from descriptions, for `fx-cache explain`.

``samples.json`` describes a small configuration and inputs of every transformer class of diffusers; it is written by
``scripts/describe_samples.py``. Inputs are described as JSON: a tensor as
``{"shape": [1, 16, 32], "dtype": "float32"}`` (standard normal) or ``{"values": [[1, 0]], "dtype": "int64"}``; lists,
dictionaries with names as keys, and plain values stand for themselves; ``{"tuple": [...]}``, ``{"items": [[key, value],
...]}`` and ``{"class": path, "holds": attributes}`` for tuples, other dictionaries and plain objects.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any, TypeVar

import torch

from fx_cache.errors import FxCacheError

SAMPLES = Path(__file__).with_name("samples.json")

MAX_TRIES = 256
"""Combinations of widths that are tried on a model without data."""

_Kind = TypeVar("_Kind")

MAX_PARAMETERS = 200_000_000
"""Models with more parameters are looked at without data, on the meta device."""


class SpecimenError(FxCacheError, ValueError):
    """A class, configuration or inputs that no model can be made of."""


@dataclass(frozen=True)
class Specimen:
    """A model and the keyword arguments of one call of it."""

    model: torch.nn.Module
    inputs: dict[str, Any]


def make_specimen(name: str, config: Mapping[str, Any] | None, inputs: Mapping[str, Any] | None) -> Specimen:
    """Builds a model and inputs.

    Args:
        name: a class that diffusers exports, or the path of one (``package.module.Class``).
        config: arguments of its constructor; None: those of the sample.
        inputs: the arguments of a call, described; None: those of the sample, with its widths changed as in `config`.

    Raises:
        SpecimenError: no such class, no sample, or a class that cannot be made with these arguments.
    """
    kind = _find_class(name, torch.nn.Module)
    sample = json.loads(SAMPLES.read_text()).get(kind.__name__, {})
    if inputs is None and not sample:
        known = [p for p in inspect.signature(kind.forward).parameters if p != "self"]
        raise SpecimenError(
            f"class {name}: got no inputs, and there is no sample of it; expected a description of its arguments "
            f"({', '.join(known)}); give it with --inputs FILE."
        )
    arguments = {k: v for k, v in (config or sample.get("config", {})).items() if not k.startswith("_")}
    try:
        with torch.device("meta"):
            empty = kind(**arguments)
        large = sum(p.numel() for p in empty.parameters()) > MAX_PARAMETERS
        model = empty if large else kind(**arguments)
    except Exception as error:
        text = (str(error).splitlines() or [""])[0]
        raise SpecimenError(
            f"class {name}: got {type(error).__name__} ({text}) from its constructor; expected arguments that it "
            "takes; correct the file given with --config."
        ) from error
    described = inputs if inputs is not None else _fitting(kind, sample, arguments)
    generator = torch.Generator().manual_seed(0)
    device = torch.device("meta") if large else torch.device("cpu")
    return Specimen(model.eval(), {k: _make(v, generator, device) for k, v in described.items()})


def _find_class(name: str, base: type[_Kind]) -> type[_Kind]:
    module, _, attribute = name.replace(":", ".").rpartition(".")
    try:
        found = getattr(importlib.import_module(module or "diffusers.models.transformers"), attribute, None)
    except ImportError as error:
        raise SpecimenError(
            f"class {name}: got {error}; expected a module that can be imported; install it or correct the name."
        ) from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise SpecimenError(
            f"class {name}: got {'nothing' if found is None else type(found).__name__} of that name in "
            f"{module or 'diffusers'}; expected a {base.__name__}; give a class of diffusers or package.module.Class."
        )
    return found


def _fitting(kind: type[torch.nn.Module], sample: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The sample's inputs, with the widths that the model takes under other arguments.

    A size that is the value of a changed argument may follow it. Where several arguments have that value, what runs
    (without data) is taken.
    """
    before = {k: v for k, v in sample["config"].items() if isinstance(v, int) and not isinstance(v, bool)}
    follows: dict[int, list[int]] = {}
    for name, old in before.items():
        new = arguments.get(name, old)
        if isinstance(new, int) and new not in follows.setdefault(old, []):
            follows[old].append(new)
    inputs = sample["inputs"]
    sizes = [size for value in inputs.values() for size in _sizes(value)]
    choices = [[*(n for n in follows.get(size, []) if n != size), size] for size in sizes]
    if all(len(c) == 1 for c in choices):
        return dict(inputs)
    with torch.device("meta"):
        model = kind(**arguments).eval()
    for chosen in islice(product(*choices), MAX_TRIES):
        new_sizes = iter(chosen)
        found = {name: _resized(value, new_sizes) for name, value in inputs.items()}
        try:
            with torch.no_grad():
                model(**{k: _make(v, torch.Generator(), torch.device("meta")) for k, v in found.items()})
        except Exception:
            continue
        return found
    return dict(inputs)


def _sizes(value: Any) -> list[int]:
    """The sizes of described tensors, but for the first of each: a batch."""
    if isinstance(value, dict) and "shape" in value:
        return list(value["shape"][1:])
    held = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [size for v in held for size in _sizes(v)]


def _resized(value: Any, sizes: Iterator[int]) -> Any:
    """The same with other sizes, in the order of `_sizes`."""
    if isinstance(value, dict) and "shape" in value:
        first, others = value["shape"][:1], value["shape"][1:]
        return {**value, "shape": [*first, *(next(sizes) for _ in others)]}
    if isinstance(value, dict):
        return {k: _resized(v, sizes) for k, v in value.items()}
    return [_resized(v, sizes) for v in value] if isinstance(value, list) else value


def _make(value: Any, generator: torch.Generator, device: torch.device) -> Any:
    if isinstance(value, list):
        return [_make(v, generator, device) for v in value]
    if not isinstance(value, dict):
        return value
    if "class" in value:
        kind = _find_class(value["class"], object)
        made = kind.__new__(kind)
        made.__dict__.update(_make(value["holds"], generator, device))
        return made
    if "items" in value:
        return {k: _make(v, generator, device) for k, v in value["items"]}
    if "tuple" in value:
        return tuple(_make(v, generator, device) for v in value["tuple"])
    if "dtype" not in value:
        return {k: _make(v, generator, device) for k, v in value.items()}
    dtype = getattr(torch, value["dtype"])
    if "values" in value:
        return torch.tensor(value["values"], dtype=dtype, device=device)
    return torch.randn(value["shape"], generator=generator).to(device, dtype)


def describe(value: Any) -> Any:
    """The description of an input: what `make_specimen` takes."""
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        if (value.is_floating_point() or value.is_complex()) and value.numel() > 1:
            return {"shape": list(value.shape), "dtype": dtype}
        return {"values": value.tolist(), "dtype": dtype}
    if isinstance(value, tuple):
        return {"tuple": [describe(v) for v in value]}
    if isinstance(value, list):
        return [describe(v) for v in value]
    if isinstance(value, dict):
        if all(isinstance(k, str) for k in value):
            return {k: describe(v) for k, v in value.items()}
        return {"items": [[k, describe(v)] for k, v in value.items()]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    kind = type(value)
    return {"class": f"{kind.__module__}.{kind.__qualname__}", "holds": describe(dict(vars(value)))}
