"""Which worker runs what: tests that share engines run in one, the others wherever there is room."""

from __future__ import annotations

import os
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

TOGETHER = "test_engine.py"
"""What its fixture makes takes minutes, and all its tests need that."""


class ByEngine(LoadScopeScheduling):
    """Scopes are tests, but for those that run together. (`xdist_group` does not hold under pytest 9.2.)"""

    def _split_scope(self, nodeid: str) -> str:
        return TOGETHER if TOGETHER in nodeid else nodeid


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByEngine:
    return ByEngine(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    every = "all" in (os.environ.get("FX_CACHE_TESTS"), os.environ.get("FX_CACHE_PIPELINES"))
    if not every and len(items) > 1:
        long = [item for item in items if item.get_closest_marker("long")]
        items[:] = [item for item in items if item not in long]
        config.hook.pytest_deselected(items=long)
