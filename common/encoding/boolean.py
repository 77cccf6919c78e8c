"""Boolean columns: two levels, false and true, and a third for missing where allowed."""

from __future__ import annotations

from common.encoding.categorical import CategoricalEncoding


class BooleanEncoding(CategoricalEncoding):
    """A categorical column whose declared levels are false (0) and true (1)."""
