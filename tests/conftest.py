"""How the tests are shared among processes (pytest-xdist, `make test`).

A file is a unit, as its tests share what they build. All files that start Ray are one unit, begun
first: two Rays at once would wait for each other's cores.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


@cache
def _starts_ray(file: str) -> bool:
    return "mark.ray" in (ROOT / file).read_text()


def _file_of(nodeid: str) -> str:
    return nodeid.partition("::")[0]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not _starts_ray(_file_of(item.nodeid)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class RayApart(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = _file_of(nodeid)
            return "ray" if _starts_ray(file) else file

    config.option.loadscopereorder = False  # the largest unit is the one that is begun first
    return RayApart(config, log)
