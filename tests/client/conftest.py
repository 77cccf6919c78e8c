from pathlib import Path

import pytest

from tests.client.hospital import Hospital


@pytest.fixture
def hospital(tmp_path: Path) -> Hospital:
    """A site that has not heard of any study yet."""
    return Hospital(tmp_path / "anna")
