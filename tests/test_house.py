"""The core knows no model: no name of a class, a block list or an argument of one stands in it."""

from __future__ import annotations

import ast
import json
import re
import tomllib
from collections.abc import Collection, Iterable, Iterator
from importlib.metadata import requires
from pathlib import Path

import diffusers.models.transformers as transformers
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from torch import nn

import fx_cache
from fx_cache.debug.specimen import SAMPLES
from tests.models import MODELS, build

ROOT = Path(fx_cache.__file__).parent
CORE = sorted(p for folder in ("patterns", "passes", "runtime") for p in (ROOT / folder).glob("*.py"))
CORE += [ROOT / "backend.py", ROOT / "compiling.py", ROOT / "config.py", ROOT / "ops.py", ROOT / "control.py"]

# Words that are in a class's name and mean something by themselves.
COMMON = {"", "dit", "prior", "dual", "z"}


def classes() -> list[str]:
    """Every module that diffusers exports as a transformer."""
    found = [n for n in dir(transformers) if isinstance(getattr(transformers, n), type)]
    return [n for n in found if issubclass(getattr(transformers, n), nn.Module) and not n.startswith("_")]


def stem(name: str) -> str:
    """``FluxTransformer2DModel`` -> ``flux``: what the model is called."""
    return re.split(r"(?:Video|Image|Audio)?(?:Transformer|DiT|DepthDecoder|Decoder)", name)[0].lower()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_zoo_and_the_samples_are_all_there_is() -> None:
    assert len(classes()) == 76
    assert {type(build(name)).__name__ for name in MODELS if "+" not in name} == set(classes())
    assert set(json.loads(SAMPLES.read_text())) == set(classes())


@pytest.mark.parametrize("file", CORE, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_no_model_name_in_the_core(file: Path) -> None:
    words = {w.lower() for w in re.findall(r"[A-Za-z][A-Za-z0-9]*", file.read_text())}
    stems = {stem(name) for name in classes()} - COMMON
    assert len(stems) > 50
    assert not words & stems
    assert not words & {name.lower() for name in classes()}


@pytest.mark.parametrize("file", CORE, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_no_block_list_in_the_core(file: Path) -> None:
    text = file.read_text()
    lists = {path for model in MODELS.values() for path in model.stacks} - {"blocks", "layers"}
    assert not [path for path in lists if path in text]


FORBIDDEN = {
    "patterns": ("passes", "runtime", "backend", "debug", "cli", "demo", "compiling", "control"),
    "passes": ("runtime", "backend", "debug", "cli", "demo", "compiling", "control"),
    "runtime": ("passes", "backend", "debug", "cli", "demo", "compiling", "control"),
}


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_imports_go_one_way(folder: str) -> None:
    for file in (ROOT / folder).glob("*.py"):
        imported = re.findall(r"from fx_cache\.(\w+)", file.read_text())
        assert not set(imported) & set(FORBIDDEN[folder]), file


def add_needed(lines: Iterable[str], extras: Collection[str], found: dict[str, set[str]]) -> None:
    """Adds to `found` what requirements name, with the extras that it is needed with; all the way down."""
    for line in lines:
        requirement = Requirement(line)
        marker = requirement.marker
        if marker is not None and not any(marker.evaluate({"extra": extra}) for extra in extras or [""]):
            continue
        name = canonicalize_name(requirement.name)
        if name not in found or not requirement.extras <= found[name]:
            found.setdefault(name, set()).update(requirement.extras)
            add_needed(requires(name) or (), found[name], found)


def test_everything_that_is_installed_is_pinned() -> None:
    """What ``make`` installs, with what builds it; of a torch for CUDA that names its own libraries, not those."""
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["project"]
    found: dict[str, set[str]] = {}
    for lines in (project["dependencies"], *(project["optional-dependencies"][e] for e in ("demo", "dev"))):
        add_needed(lines, (), found)
    text = (ROOT.parent / "constraints.txt").read_text()
    pinned = {canonicalize_name(line.partition("==")[0]) for line in text.splitlines() if "==" in line}
    beside = {name for name in found if name.startswith(("nvidia-", "cuda-toolkit", "triton"))}
    assert len(found) > 60
    assert not (found.keys() | {"pip", "setuptools", "wheel"}) - pinned - beside


READS = {"item", "tolist", "cpu", "numpy", "nonzero", "unique", "equal", "allclose", "is_nonzero", "__bool__"}
"""Methods and functions by which the host reads tensors, as far as their names show it; where these lie on a device, it
waits. What else does, the stand-in for a card sees (tests/gpu)."""

WHERE_THE_HOST_READS = {
    "device.py: Readback.take": "the one place: behind an event",
    "clock.py: read_schedule": "schedule inputs on the host",
    "sessions.py: _since": "latents on the host",
    "identity.py: _key": "small tensors on the host",
    "weights.py: _values": "numbers that the model holds, on the host",
    "weights.py: _sample": "weights that have no memory of their own",
    "legs.py: _is_moved": "a forward that is watched, once",
    "legs.py: _joined_to": "the same",
    "legs.py: _equal": "the same",
    "batches.py: Separation.compute": "once for a span: whether samples are computed by themselves",
    "moves.py: Call._straight": "while it is not known what is denoised, and what tells the time",
    "moves.py: Call._extent": "the same",
    "moves.py: Call._helped": "the same",
    "moves.py: Call._left_of": "the same",
    "moves.py: extent_of": "the same",
    "moves.py: _extent": "the same, on the host",
    "moves.py: has_few_values": "the same",
}


def test_where_the_host_reads_tensors() -> None:
    """Each place on the path of a step, and why; what is not here goes through `Readback`."""
    found = set()
    for file in (*sorted((ROOT / "runtime").glob("*.py")), ROOT / "ops.py", ROOT / "boxing.py", ROOT / "regions.py"):
        for names, node in _with_their_names(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in READS:
                found.add(f"{file.name}: {'.'.join(names)}")
    assert found == set(WHERE_THE_HOST_READS)


def _with_their_names(node: ast.AST, names: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], ast.AST]]:
    """All that stands below a node, with the names of the classes and functions around it."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        names = (*names, node.name)
    yield names, node
    for child in ast.iter_child_nodes(node):
        yield from _with_their_names(child, names)
