"""How the suite is divided over workers; `make test` starts two (pytest-xdist, `--dist loadgroup`)."""

import pytest

FIRST = ("deadlines", "federation")  # these markers, each on one worker, before everything else


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


def _kind(item: pytest.Item) -> str | None:
    return next((marker for marker in FIRST if item.get_closest_marker(marker) is not None), None)
