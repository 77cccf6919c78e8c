"""How the suite is divided over workers; `make test` starts two (pytest-xdist)."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

FIRST = ("deadlines", "federation")  # these markers, each on one worker, before everything else: they take longest
ROOT = Path(__file__).parents[1]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep every file on one worker, and what starts many processes on one worker a kind.

    Fixtures of a module start servers: a file on two workers would start them twice. Consortia with deadlines in real
    time never run beside each other, nor do simulations; `make test` runs the former by themselves.
    """
    from xdist.scheduler.loadscope import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group(nodeid.split("::", 1)[0])

    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest does not come last."""
    items.sort(key=lambda item: [*FIRST, _group(item.location[0])].index(_group(item.location[0])))


@cache
def _group(file: str) -> str:
    """The first of these markers that the file puts on all its tests, or else the file (relative to the root)."""
    # From the text, since the process that divides the work sees names only.
    marks = [line for line in (ROOT / file).read_text(encoding="utf-8").splitlines() if line.startswith("pytestmark")]
    return next((marker for marker in FIRST if any(f"mark.{marker}" in line for line in marks)), file)
