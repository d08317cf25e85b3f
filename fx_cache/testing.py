"""What caching must never change, as functions: a conformance kit that an engine runs on a model of its own.

Each raises an AssertionError that says which output of which request differs. Bit for bit equality needs a compiler
that computes the same in every graph of a model: compile with ``options={"compiler": "eager"}``.

    model = torch.compile(transformer, backend="dit_cache", options={"compiler": "eager", ...})
    requests = [Request(calls_of("a cat"), "request-0"), Request(calls_of("a dog"), "request-1")]
    hits = assert_as_if_alone(model, requests, interleaved(requests), on_copies(lambda: compiled_copy(transformer)))
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fx_cache.backend import no_garbage_collection
from fx_cache.control import end
from fx_cache.runtime.gate import SpanGate
from fx_cache.runtime.named import session
from fx_cache.runtime.summary import summary

Model = Callable[..., Any]
Outputs = list[Tensor]


@dataclass
class Request:
    """A generation request.

    Attributes:
        calls: of the model, in order: the name of the pass ("cond"), and the keyword arguments. What a pipeline keeps
            over the steps of a request (prompt embeddings) must be the same objects in all of them.
        name: its session; None: to be found from the data.
        breaks: whether its last call is interrupted in its middle.
        told: whether a named request says which pass a call is.
    """

    calls: Sequence[tuple[str, Mapping[str, Any]]]
    name: str | None = None
    breaks: bool = False
    told: bool = True

    @property
    def completed(self) -> int:
        """How many of its calls give something."""
        return len(self.calls) - self.breaks

    def call(self, model: Model, number: int) -> Outputs:
        """The tensors that one of its calls gives; none of the call that is interrupted."""
        branch, given = self.calls[number]
        with session(self.name, branch if self.told else None) if self.name is not None else contextlib.nullcontext():
            if number < self.completed:
                return [t.clone() for t in tensors(model(**given))]
            with contextlib.suppress(_Interrupted), mock.patch.object(SpanGate, "__call__", _interrupt):
                model(**given)
            return []


@dataclass
class Hits:
    """A number of spans that were reused."""

    count: int = 0


Alone = Callable[[Request], list[Outputs]]
"""Runs a request where nothing has run before, and gives the outputs of its calls."""


def tensors(output: Any) -> list[Tensor]:
    """The tensors of a model's output, in order."""
    leaves = tree_leaves(output.to_tuple() if hasattr(output, "to_tuple") else output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def run(model: Model, request: Request) -> list[Outputs]:
    """The outputs of all calls of a request, one after another."""
    return [request.call(model, i) for i in range(len(request.calls))]


def on_copies(make: Callable[[], Model]) -> Alone:
    """Runs each request on a model of its own; `make` gives a compiled copy with the same weights."""
    return lambda request: run(make(), request)


def interleaved(requests: Sequence[Request], rng: random.Random | None = None) -> list[int]:
    """The numbers of the requests whose turn it is, call by call: in turns, or at random. Each keeps its own order."""
    turns = [(i / len(r.calls), k) for k, r in enumerate(requests) for i in range(len(r.calls))]
    if rng is not None:
        rng.shuffle(turns)
    return [k for _, k in (turns if rng is not None else sorted(turns))]


def assert_as_if_alone(
    model: Model, requests: Sequence[Request], order: Sequence[int], alone: Alone, plain: Model | None = None
) -> int:
    """Runs requests call by call in a given order: each gives bit for bit what it gives alone.

    Args:
        model: the compiled model.
        requests: what is run.
        order: for each call, the number of the request whose turn it is.
        alone: runs a request where nothing has run before.
        plain: the model without a cache, for requests that share a prompt and are not named: a step in doubt computes,
            and gives what this gives; a pass that was interrupted may begin anew on the way. None: there is no doubt.

    Returns:
        Number of spans that were reused; a run without any shows nothing.
    """
    outputs: list[list[Outputs]] = [[] for _ in requests]
    with counted_hits() as hits:
        for k in order:
            outputs[k].append(requests[k].call(model, len(outputs[k])))
    for k, request in enumerate(requests):
        expected = alone(request)
        for i in range(len(outputs[k])):
            same = len(expected[i]) == len(outputs[k][i]) and all(map(torch.equal, expected[i], outputs[k][i]))
            if not same and plain is not None and i < request.completed:
                same = all(map(torch.equal, tensors(plain(**request.calls[i][1])), outputs[k][i]))
                same = same or _begun_on_the_way(request, i, alone, outputs[k][i])
            assert same, f"call {i} of request {k} ({request.name}): got another output than alone"
    return hits.count


def _begun_on_the_way(request: Request, number: int, alone: Alone, got: Outputs) -> bool:
    """Whether an output is that of its pass, begun at some call before."""
    own = [call for call in request.calls[: number + 1] if call[0] == request.calls[number][0]]
    rests = (Request(own[i:], request.name, told=request.told) for i in range(1, len(own)))
    return any(all(map(torch.equal, alone(rest)[-1], got)) for rest in rests)


def assert_exact_without_reuse(model: Model, plain: Model, request: Request) -> None:
    """With a policy that never reuses, a compiled model gives bit for bit what the plain one gives."""
    for i, (branch, given) in enumerate(request.calls):
        with _never_reusing(branch):
            cached = tensors(model(**given))
        assert all(map(torch.equal, tensors(plain(**given)), cached)), f"call {i}: got another output than the model's"
    end(_EXACT)


def assert_addresses_are_no_identity(model: Model, make: Callable[[], Request], times: int) -> int:
    """Requests whose tensors are freed and made anew, at addresses used before, never go on with one another.

    Args:
        model: the compiled model; it should reuse whatever it may (``residual_diff_threshold`` of 1, no warm-up).
        make: makes a request with prompt and noise of its own and two calls or more; it is not to keep them.
        times: how often.

    Returns:
        How many requests had a tensor, larger than what is compared by value, at an address used before.
    """
    seen: set[int] = set()
    recycled = 0
    for number in range(times):
        request = make()
        addresses = {t.data_ptr() for _, given in request.calls for t in tree_leaves(dict(given)) if _is_large(t)}
        recycled += bool(addresses & seen)
        seen |= addresses
        branch, given = request.calls[0]
        first = request.call(model, 0)
        with _never_reusing(branch):
            expected = tensors(model(**given))
        assert all(map(torch.equal, expected, first)), f"request {number}: its first step reused what another one left"
        request.call(model, 1)
        del request, given, first, expected
    end(_EXACT)
    return recycled


def assert_bytes_accounted(
    model: Model, requests: Sequence[Request], tolerance: float = 0.01, device: str = "cpu"
) -> int:
    """What `fx_cache.summary` says is held is what the allocator says; all of it is freed as sessions end.

    Args:
        model: the compiled model; it must have run with inputs of these shapes, and hold nothing.
        requests: named requests that live at the same time; every call of each is run.
        tolerance: of the bytes held.
        device: where the model runs.

    Returns:
        Bytes held by all requests together.
    """
    _collect()
    start = allocated(device)
    with no_garbage_collection():  # it would free what others have left behind
        for request in requests:
            for i in range(len(request.calls)):
                request.call(model, i)
        grown, said = allocated(device) - start, _held(model)
    assert abs(grown - said) <= tolerance * said, f"got {grown} bytes from the allocator; summary says {said}"
    for request in requests:
        assert request.name is not None, "requests that are to end need names"
        end(request.name)
    _collect()
    left = allocated(device) - start
    assert _held(model) == 0 and abs(left) <= tolerance * said, f"{left} of {said} bytes are left behind the end"
    return said


def _collect() -> None:
    """Frees what is garbage, and what becomes garbage by that."""
    while gc.collect():
        pass


def allocated(device: str = "cpu") -> int:
    """Bytes handed out by the allocator of a device and not given back; on the host that of the C library (glibc)."""
    if torch.device(device).type != "cpu":
        return torch.get_device_module(device).memory_allocated()
    library = ctypes.CDLL(None)
    library.mallinfo2.restype = _Mallinfo
    info = library.mallinfo2()
    return int(info.uordblks + info.hblkhd)


@contextlib.contextmanager
def counted_hits() -> Iterator[Hits]:
    """Counts the spans that are reused meanwhile."""
    hits = Hits()
    record = SpanGate.record

    def counting(gate: SpanGate) -> None:
        record(gate)
        hits.count += bool(gate.verdict.reuse)

    with mock.patch.object(SpanGate, "record", counting):
        yield hits


_EXACT = "fx_cache.testing"


def _never_reusing(branch: str) -> contextlib.AbstractContextManager[None]:
    return session(_EXACT, branch, config={"residual_diff_threshold": 0.0})


class _Interrupted(BaseException):
    """What breaks a call off; as KeyboardInterrupt, no Exception."""


def _interrupt(*_: Any) -> bool:
    raise _Interrupted


def _is_large(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() > 64


def _held(model: Any) -> int:
    sessions = summary(model).to_dict()["sessions"]
    branches = [b for s in sessions for b in s["branches"]]
    return sum(b["kept_bytes"] + sum(span["bytes"] for span in b["spans"]) for b in branches)


class _Mallinfo(ctypes.Structure):
    """``struct mallinfo2`` of glibc: of ten numbers, the fifth and the eighth are used."""

    _fields_ = [
        (name, ctypes.c_size_t) for name in ("_0", "_1", "_2", "_3", "hblkhd", "_5", "_6", "uordblks", "_8", "_9")
    ]
