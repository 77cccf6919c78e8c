import hashlib
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.digest import canonical_json, sha256_of, sha256_of_file

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)


def _reordered(value: object) -> object:
    if isinstance(value, dict):
        return {key: _reordered(value[key]) for key in reversed(list(value))}
    return [_reordered(item) for item in value] if isinstance(value, list) else value


def test_canonical_json_is_pinned() -> None:
    assert canonical_json({"b": [1, 1.5, None, True], "a": "Größe"}) == (
        b'{"a":"Gr\xc3\xb6\xc3\x9fe","b":[1,1.5,null,true]}'
    )


def test_digest_is_pinned() -> None:
    expected = hashlib.sha256(b'{"a":1}').hexdigest()
    assert sha256_of({"a": 1}) == expected == "015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862"


@given(JSON)
def test_key_order_does_not_matter(value: object) -> None:
    assert sha256_of(value) == sha256_of(_reordered(value))


@pytest.mark.parametrize("value", [{"a": 1}, {"a": 2}, {"b": 1}, [1], ["1"], [1, 2], [2, 1], None, "", {}])
def test_different_documents_differ(value: object) -> None:
    others = [{"a": 1}, {"a": 2}, {"b": 1}, [1], ["1"], [1, 2], [2, 1], None, "", {}]
    assert [sha256_of(other) for other in others].count(sha256_of(value)) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "\ud800"])
def test_what_json_cannot_carry_is_refused(value: object) -> None:
    with pytest.raises(ValueError):
        sha256_of({"a": value})


@pytest.mark.parametrize("size", [0, 1, 3_000_000])
def test_file_digest_is_that_of_its_bytes(tmp_path: Path, size: int) -> None:
    content = bytes(range(251)) * (size // 251 + 1)
    path = tmp_path / "file"
    path.write_bytes(content[:size])
    assert sha256_of_file(path) == hashlib.sha256(content[:size]).hexdigest()
