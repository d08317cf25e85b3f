"""Options by class name: what is known of a model stands in data, and the code knows no model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from importlib.resources import files
from typing import Any

from fx_cache.config import CacheConfig
from fx_cache.errors import OptionError

Profiles = Mapping[str, Mapping[str, Any]]
"""Options by pattern (`fnmatch`) of class names."""

RECOMMENDED = "recommended"
"""The profiles that come with the package (`profiles.json`, each with where it is from)."""


def recommended() -> Profiles:
    """The profiles that come with the package."""
    entries = json.loads(files("fx_cache").joinpath("profiles.json").read_text())
    return {pattern: entry["options"] for pattern, entry in entries.items()}


def options_for(names: Iterable[str], profiles: Profiles | str | None) -> dict[str, Any]:
    """The options for something with these class names: those of every pattern that fits one, later ones first.

    Args:
        names: of a transformer's class, its bases, and the pipeline that it is in.
        profiles: options by pattern; ``"recommended"``; None: none.

    Raises:
        OptionError: profiles that are no such mapping, or options that are unknown or out of range.
    """
    if profiles is None:
        return {}
    if profiles == RECOMMENDED:
        profiles = recommended()
    if not isinstance(profiles, Mapping) or not all(isinstance(options, Mapping) for options in profiles.values()):
        raise OptionError(
            f"profile: got {profiles!r}; expected 'recommended' or a mapping from patterns of class names to options, "
            "such as {'MyTransformer*': {'Fn_compute_blocks': 2}}; correct or remove it."
        )
    found: dict[str, Any] = {}
    known = list(names)
    for pattern, options in profiles.items():
        CacheConfig.checked(options)
        if any(fnmatchcase(name, pattern) for name in known):
            found |= options
    return found
