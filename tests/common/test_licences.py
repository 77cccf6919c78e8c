"""What a study says of its release: licences by their SPDX name or address, and one-line texts."""

from typing import Any

import pytest

from common.config import validate
from common.errors import StudyError
from common.study import ReleaseSection, Study


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("CC-BY-4.0", "CC-BY-4.0"),
        ("cc-by-nc-4.0", "CC-BY-NC-4.0"),
        ("https://example.org/data-use", "https://example.org/data-use"),
        (None, None),
    ],
)
def test_a_licence_is_named_or_found(written: str | None, read: str | None) -> None:
    assert ReleaseSection(license=written).license == read


@pytest.mark.parametrize(
    "release",
    [
        {"license": "CC-BY"},
        {"license": "CC-BY-4.0 OR MIT"},
        {"license": "LicenseRef-ours"},
        {"license": "ours"},
        {"license": "ftp://example.org/x"},
        {"license": "https://example.org/a b"},
        {"license": ""},
        {"url": "example.org"},
        {"url": "javascript:alert(1)"},
        {"creators": ["A", " "]},
        {"citation": "two\nlines"},
        {"creators": "one string"},
    ],
)
def test_anything_else_is_refused_by_key(release: dict[str, Any]) -> None:
    document = {"study": {"name": "s", "schema": "schema.json"}, "release": release}
    with pytest.raises(StudyError, match=rf"\[release\] {next(iter(release))}"):
        validate(Study, document, "study.toml", StudyError)


def test_nothing_is_claimed_by_default() -> None:
    release = ReleaseSection()
    assert (release.license, release.creators, release.citation, release.url) == (None, (), None, None)
