"""What callers say about requests: `session` names the request, branch and step that the calls inside it belong to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from fx_cache.config import CacheConfig
from fx_cache.errors import SessionError


@dataclass(frozen=True)
class NamedSession:
    """What `session` says about the calls inside it.

    Attributes:
        name: the request.
        branch: its pass, or None.
        step: number of the step within the request, or None.
        changes: run-time options for it, as items.
    """

    name: str
    branch: str | None
    step: int | None = None
    changes: tuple[tuple[str, Any], ...] = ()

    @property
    def key(self) -> tuple[str, str | None]:
        """By what its branches are known: neither step nor options make another request."""
        return self.name, self.branch

    def config(self, base: CacheConfig) -> CacheConfig:
        """The configuration of a model, with the run-time values of this session."""
        return _changed(base, self.changes) if self.changes else base


@lru_cache(maxsize=256)
def _changed(base: CacheConfig, changes: tuple[tuple[str, Any], ...]) -> CacheConfig:
    return base.changed(dict(changes))


_named: ContextVar[NamedSession | None] = ContextVar("fx_cache_session", default=None)


def named_session() -> NamedSession | None:
    """What is said about a call made here."""
    return _named.get()


def named_pass() -> tuple[str, str] | None:
    """Request and branch of a call made here, if both are said."""
    named = named_session()
    return None if named is None or named.branch is None else (named.name, named.branch)


def check_name(what: str, value: Any) -> None:
    """Refuses what is no name of a session or branch."""
    if not isinstance(value, str) or not value:
        raise SessionError(f"session {what}: got {value!r}; expected a non-empty string; pass the request's id.")


@contextlib.contextmanager
def session(
    name: str,
    branch: str | None = None,
    *,
    step: int | None = None,
    num_inference_steps: int | None = None,
    config: Mapping[str, Any] | None = None,
) -> Iterator[None]:
    """Says to which request, and to which of its branches, the calls inside belong. Per thread and task; nestable.

    Args:
        name: the request; its cached tensors are never used for another name.
        branch: one of its passes (``"cond"``, ``"uncond"``); None: told apart by the conditioning inputs.
        step: number of the step, from 0. Then the timestep is not looked at: a greater number than at the call before
            goes on with the request, a smaller one starts it afresh, the same one computes. None: by the timestep.
        num_inference_steps: steps of this request, if `step` is not given: the one after the last starts it afresh.
        config: run-time options (:class:`fx_cache.CacheConfig`) for the calls inside. Nothing is recompiled.

    Without `step`, a timestep that goes back starts the request afresh, once it is known which input that is; so does
    another shape, dtype or device.

    Raises:
        SessionError: a name that is no non-empty string, or a step that is no integer >= 0.
        OptionError: an option that is unknown, out of range, or fixed at compile time.
    """
    check_name("name", name)
    if branch is not None:
        check_name("branch", branch)
    if step is not None and (not isinstance(step, int) or isinstance(step, bool) or step < 0):
        raise SessionError(
            f"session step: got {step!r}; expected an integer >= 0; pass the number of the denoising step, or nothing."
        )
    changes = dict(config or {})
    if num_inference_steps is not None:
        changes["num_inference_steps"] = num_inference_steps
    if changes:
        checked = CacheConfig().changed(changes)
        changes = {n: getattr(checked, n) for n in sorted(changes)}
    with within(NamedSession(name, branch, step, tuple(changes.items()))):
        yield


@contextlib.contextmanager
def within(named: NamedSession | None) -> Iterator[None]:
    """What was said about other calls holds here."""
    token = _named.set(named)
    try:
        yield
    finally:
        _named.reset(token)
