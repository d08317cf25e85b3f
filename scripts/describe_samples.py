"""Writes ``fx_cache/debug/samples.json``: a small configuration and inputs of every transformer class of diffusers.

They are those of the tests' zoo: ``python scripts/describe_samples.py``.
"""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

from fx_cache.debug.specimen import SAMPLES, describe
from tests.models import MODELS, build, walk

INSTEAD = {"DreamLiteTransformer2DModel": {"qk_norm": None, "num_kv_heads": None}}
"""Arguments without which a class runs as its constructor leaves it; the zoo exchanges attention processors."""


def arguments_of(name: str) -> dict[str, Any]:
    """What the zoo gives the constructor of a model."""
    kind = type(build(name))
    found: dict[str, Any] = {}
    original = kind.__init__

    def record(self: Any, *args: Any, **kwargs: Any) -> None:
        found.update(inspect.signature(original).bind(self, *args, **kwargs).arguments)
        original(self, *args, **kwargs)

    with mock.patch.object(kind, "__init__", record):
        build(name)
    del found["self"]
    return {**{k: v for k, v in found.items() if k != "kwargs"}, **found.get("kwargs", {})}


def sample_of(name: str) -> dict[str, Any]:
    model = build(name)
    known = {**dict(getattr(model, "config", {})), **arguments_of(name), **INSTEAD.get(name, {})}
    config = {k: v for k, v in known.items() if not k.startswith("_")}
    return {"config": config, "inputs": {argument: describe(v) for argument, v in walk(name, 1)[0].items()}}


def main() -> None:
    samples = {}
    for name in MODELS:
        if "+" not in name:
            sample = sample_of(name)
            samples[type(build(name)).__name__] = json.loads(json.dumps(sample, default=list))
    SAMPLES.write_text(json.dumps(samples, sort_keys=True) + "\n")
    print(f"{len(samples)} classes, {SAMPLES.stat().st_size} bytes")


if __name__ == "__main__":
    main()
