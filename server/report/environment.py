"""Where every page of the coordinator gets its templates."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined


def environment() -> Environment:
    """Templates in which everything is escaped, as people write names, and in which a missing name is an error."""
    return Environment(
        loader=PackageLoader("server", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
