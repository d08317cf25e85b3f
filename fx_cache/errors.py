"""What can go wrong, by kind. Messages say subject, got, expected and remedy in one self-contained sentence."""

from __future__ import annotations

from dataclasses import dataclass


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
