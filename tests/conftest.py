"""How the suite is divided over workers; `make test` starts two (pytest-xdist, `--dist loadgroup`)."""

import os

import pytest

FIRST = ("deadlines", "federation")  # these markers, each on one worker, before everything else
LEAST_URGENT = 19


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in a hook of its own
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep every file on one worker, and what starts many processes on one worker a kind.

    Fixtures of a module start servers: a file on two workers would start them twice. Consortia with deadlines in real
    time never run beside each other, nor do simulations. They take longest, so that they do not come last.
    """
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        item.add_marker(pytest.mark.xdist_group(_kind(item) or item.location[0]))
    items.sort(key=lambda item: FIRST.index(kind) if (kind := _kind(item)) else len(FIRST))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Whatever has no deadline yields the processor to what has: it computes while those wait for each other.

    The worker with the deadlines begins with them, and comes here when they are over.
    """
    if "PYTEST_XDIST_WORKER" in os.environ and _kind(item) != "deadlines":
        os.nice(LEAST_URGENT - os.nice(0))


def _kind(item: pytest.Item) -> str | None:
    return next((marker for marker in FIRST if item.get_closest_marker(marker) is not None), None)
