"""What can go wrong, by kind. Messages say subject, got, expected and remedy in one self-contained sentence."""

from __future__ import annotations

import contextlib
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch._dynamo.exc import RestartAnalysis, SkipFrame


class FxCacheError(Exception):
    """Base of every error that fx_cache raises on purpose."""


class OptionError(FxCacheError, ValueError):
    """An option is unknown, has a value outside its range, or contradicts another one."""


class SessionError(FxCacheError, RuntimeError):
    """A session, or a model's cached state, was used in a way that has no meaning."""


class ExportError(FxCacheError, RuntimeError):
    """A model cannot be exported with its cache."""


class CacheWarning(UserWarning):
    """A graph runs uncached; the text says what was found, what was expected and what to do."""


@dataclass(frozen=True)
class Refusal:
    """Why a graph is not cached. Falsy, so that a search returns either its finding or a Refusal.

    Attributes:
        subject: what was looked at.
        got: what was found there.
        expected: what caching needs.
        remedy: what the user can do.
    """

    subject: str
    got: str
    expected: str
    remedy: str

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        return f"{self.subject}: got {self.got}; expected {self.expected}; {self.remedy}."


@dataclass(frozen=True)
class Failure(Refusal):
    """A refusal because of an error of ours.

    Attributes:
        trace: the error with its traceback.
    """

    trace: str = ""

    @classmethod
    def of(cls, error: StageError, written_to: Path | None) -> Failure:
        """What to say of an error; `written_to` is the folder of the dump."""
        look = "set dump_dir (or FX_CACHE_DUMP_DIR)" if written_to is None else f"look into {written_to}"
        return cls(
            error.stage,
            error.what,
            "no error",
            f"the result is the model's own; {look} for the graphs and the traceback, and report it with them",
            "".join(traceback.format_exception(error.cause)),
        )


class StageError(FxCacheError):
    """What one stage of the backend raised. It is caught in the backend, which then compiles the graph as it is."""

    def __init__(self, stage: str, cause: Exception) -> None:
        self.stage = stage
        self.cause = cause
        super().__init__(f"{stage}: {self.what}")

    @property
    def what(self) -> str:
        """Kind, text and place of what was raised."""
        text = (str(self.cause).strip().splitlines() or [""])[0]
        at = traceback.extract_tb(self.cause.__traceback__)[-1]
        return f"{type(self.cause).__name__}{': ' if text else ''}{text} ({Path(at.filename).name}:{at.lineno})"


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """Lets what is raised within say where: as a `StageError`, the innermost name first.

    By some of its errors Dynamo asks itself to capture anew: those go through, and so does what is no error of ours.
    """
    try:
        yield
    except (StageError, RestartAnalysis, SkipFrame, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise StageError(name, error) from error


@dataclass
class Guard:
    """What became of something that a call does beside the model's own.

    Attributes:
        failure: the error that it ended with, if it did.
    """

    failure: Failure | None = None


@contextlib.contextmanager
def guarded(name: str) -> Iterator[Guard]:
    """An error of ours within is a warning, and the call computes; what is meant for the caller is raised."""
    guard = Guard()
    try:
        with stage(name):
            yield guard
    except StageError as error:
        if isinstance(error.cause, FxCacheError | Warning):
            raise error.cause from None
        guard.failure = Failure.of(error, None)
    except torch.OutOfMemoryError as error:  # of what is done beside the model's own
        guard.failure = Failure.of(StageError(name, error), None)
    if guard.failure is not None:
        say_uncached(guard.failure)


def say_uncached(refusal: Refusal) -> None:
    """Warns that something runs uncached, and why."""
    warnings.warn(f"dit_cache runs this graph uncached. {refusal}", CacheWarning, stacklevel=3)
