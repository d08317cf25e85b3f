"""A stand-in for an accelerator: `device`, of which the host knows nothing that it does not wait for.

Its tensors are plain ones that lie on no host, so whatever asks for the values of one goes through the device, and is
counted: as a wait, if the host could not go on without the answer on a GPU either. A copy to pinned memory arrives when
an event behind it is waited for, and no earlier. What is launched is counted too. It computes with the kernels of the
host, so it says nothing about speed.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.utils import cpp_extension

SOURCE = Path(__file__).with_name("device.cpp")


@cache
def device() -> torch.device:
    """The device; built at the first call in this environment, which takes g++ and half a minute."""
    _load()
    return torch.device("standin:0")


@contextlib.contextmanager
def watched() -> Iterator[tuple[list[str], list[str]]]:
    """What the host waits for in a block, and what it lets the device do."""
    _load().taken()
    seen: tuple[list[str], list[str]] = [], []
    try:
        yield seen
    finally:
        for known, found in zip(seen, _load().taken(), strict=True):
            known += found


@contextlib.contextmanager
def capturing() -> Iterator[None]:
    """A block in which it is an error to wait for the device, as while a CUDA graph is captured."""
    _load().capture(True)
    try:
        yield
    finally:
        _load().capture(False)


@cache
def _load() -> Any:
    library = _built()
    spec = importlib.util.spec_from_file_location("fx_cache_standin", library)
    assert spec is not None
    assert spec.loader is not None
    native = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(native)
    torch.utils.rename_privateuse1_backend("standin")
    module = ModuleType("torch.standin")
    module.__dict__.update(
        is_available=lambda: True,
        is_initialized=lambda: True,
        _lazy_init=lambda: None,  # without it torch 2.11 takes the device for one that nobody has used yet
        device_count=lambda: 1,
        current_device=lambda: 0,
        set_device=lambda device: None,
        device=lambda index: contextlib.nullcontext(),
        synchronize=lambda device=None: None,
        memory_allocated=lambda device=None: native.memory_allocated(),
        is_current_stream_capturing=native.is_capturing,
        manual_seed_all=lambda seed: None,
        _is_in_bad_fork=lambda: False,
        get_amp_supported_dtype=lambda: [torch.bfloat16, torch.float16],
    )
    torch._register_device_module("standin", module)
    return native


def _built() -> Path:
    command = ["g++", "-shared", "-fPIC", "-O1", "-std=c++20", "-w", "-DTORCH_EXTENSION_NAME=fx_cache_standin"]
    command += [f"-I{p}" for p in (*cpp_extension.include_paths(), sysconfig.get_path("include"))]
    command += [str(SOURCE)]
    for folder in cpp_extension.library_paths():
        command += [f"-L{folder}", f"-Wl,-rpath,{folder}"]
    command += ["-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"]
    text = f"{torch.__version__} {command}".encode() + SOURCE.read_bytes()
    folder = Path(tempfile.gettempdir()) / f"fx_cache_standin_{hashlib.sha256(text).hexdigest()[:16]}"
    library = folder / "fx_cache_standin.so"
    if not library.exists():
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as own:
            made = Path(own) / library.name
            ran = subprocess.run([*command, "-o", str(made)], check=False, capture_output=True, text=True)
            if ran.returncode:
                raise RuntimeError(
                    f"the stand-in for a card does not compile with g++ (10 or later): {ran.stderr[-2000:]}"
                )
            made.replace(library)
    return library
