"""The memory of a site: what it accounted before, used only where there is no doubt about it."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import common.privacy.memory
from common.errors import StudyError
from common.privacy.accountant import account
from common.privacy.dpsgd import calibrate_dpsgd
from common.privacy.events import SampledGaussianSteps
from common.privacy.memory import remembered, remembering

KEY = Ed25519PrivateKey.generate()
CALLS: list[tuple[float, ...]] = []


@remembered
def slow(first: float, second: float = 1.0) -> float:
    CALLS.append((first, second))
    if first < 0:
        raise StudyError("too small")
    return first / second if second else math.inf


@remembered
def named(first: float) -> tuple[float, str]:
    CALLS.append((first,))
    return first, "name"


@pytest.fixture(autouse=True)
def fresh() -> None:
    forget()


def forget() -> None:
    """What a fresh process knows."""
    CALLS.clear()
    for function in (slow, named, calibrate_dpsgd):
        function.cache_clear()


def test_without_a_memory_a_value_is_computed_once_in_a_process() -> None:
    assert [slow(6.0, 2.0), slow(6.0, 2.0)] == [3.0, 3.0] and CALLS == [(6.0, 2.0)]


def test_a_fresh_process_finds_what_an_earlier_one_computed(tmp_path: Path) -> None:
    path = tmp_path / "accounting.json"
    with remembering(path, "north", KEY):
        values = (slow(1.0, 3.0), slow(1.0, 0.0), named(0.1), slow(1.0, second=3.0))
    forget()
    with remembering(path, "north", KEY):
        assert (slow(1.0, 3.0), slow(1.0, 0.0), named(0.1), slow(1.0, second=3.0)) == values
        assert CALLS == [] and slow(2.0) == 2.0 and CALLS == [(2.0, 1.0)]
    forget()
    with remembering(path, "north", KEY):
        assert slow(2.0) == 2.0 and slow(1.0, 3.0) == 1 / 3 and CALLS == []
    assert slow(2.0) == 2.0 and CALLS == [(2.0, 1.0)], "closed"


def test_an_error_is_not_remembered(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(StudyError), remembering(tmp_path / "accounting.json", "north", KEY):
            slow(-1.0)
    assert len(CALLS) == 2 and not (tmp_path / "accounting.json").exists()


def tampered(text: str) -> str:
    return text.replace("0.5", "9.5")


def unsigned(text: str) -> str:
    return "0" * 128 + "\n" + text.partition("\n")[2]


def signed_by_another(text: str) -> str:
    content = text.partition("\n")[2].replace("0.5", "9.5")
    signature = Ed25519PrivateKey.generate().sign(common.privacy.memory._PURPOSE + content.encode())
    return f"{signature.hex()}\n{content}"


@pytest.mark.parametrize("change", [tampered, unsigned, signed_by_another, lambda _: "", lambda text: text[:-5]])
def test_a_memory_in_doubt_is_as_good_as_none(tmp_path: Path, change: Callable[[str], str]) -> None:
    path = tmp_path / "accounting.json"
    with remembering(path, "north", KEY):
        assert slow(1.0, 2.0) == 0.5
    path.write_text(change(path.read_text()))
    forget()
    with remembering(path, "north", KEY):
        assert slow(1.0, 2.0) == 0.5 and len(CALLS) == 1
    forget()
    with remembering(path, "north", KEY):
        assert slow(1.0, 2.0) == 0.5 and CALLS == [], "mended"


@pytest.mark.parametrize("content", ["{}", "[]", "3", '{"site": "north", "software": "x", "values": {}}'])
def test_what_is_signed_and_no_memory_of_ours_is_as_good_as_none(tmp_path: Path, content: str) -> None:
    path = tmp_path / "accounting.json"
    signature = KEY.sign(common.privacy.memory._PURPOSE + content.encode()).hex()
    path.write_text(f"{signature}\n{content}")
    with remembering(path, "north", KEY):
        assert slow(1.0, 2.0) == 0.5 and len(CALLS) == 1


def test_another_site_and_another_software_compute_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "accounting.json"
    with remembering(path, "north", KEY):
        slow(1.0, 2.0)
    forget()
    with remembering(path, "south", KEY):
        assert slow(1.0, 2.0) == 0.5 and len(CALLS) == 1
    forget()
    monkeypatch.setattr(common.privacy.memory, "_software", lambda: "newer")
    with remembering(path, "south", KEY):
        assert slow(1.0, 2.0) == 0.5 and len(CALLS) == 1


def test_a_memory_that_cannot_be_written_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with remembering(tmp_path / "file" / "accounting.json", "north", KEY):
        assert slow(1.0, 2.0) == 0.5


def test_the_memory_does_not_grow_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common.privacy.memory, "_MOST_VALUES", 3)
    path = tmp_path / "accounting.json"
    with remembering(path, "north", KEY):
        for number in range(1, 6):
            slow(float(number))
    values = json.loads(path.read_text().partition("\n")[2])["values"]
    assert list(values.values()) == [3.0, 4.0, 5.0]


def test_calibration_and_accounting_are_remembered_to_the_last_bit(tmp_path: Path) -> None:
    path = tmp_path / "accounting.json"

    def both() -> tuple[float, float]:
        multiplier = calibrate_dpsgd(20, 0.2, 3.0, 1e-5)
        return multiplier, account([SampledGaussianSteps(1, 20, 0.2, multiplier)], 1e-5).epsilon

    plain = both()
    with remembering(path, "north", KEY):
        assert both() == plain
    forget()
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey\n"
        "from common.privacy.accountant import account\nfrom common.privacy.dpsgd import calibrate_dpsgd\n"
        "from common.privacy.events import SampledGaussianSteps\nfrom common.privacy.memory import remembering\n"
        "key = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(sys.argv[2]))\n"
        "with remembering(Path(sys.argv[1]), 'north', key):\n"
        "    multiplier = calibrate_dpsgd(20, 0.2, 3.0, 1e-5)\n"
        "    epsilon = account([SampledGaussianSteps(1, 20, 0.2, multiplier)], 1e-5).epsilon\n"
        "print(repr(multiplier), repr(epsilon), 'dp_accounting' in sys.modules)\n"
    )
    command = [sys.executable, "-c", code, str(path), KEY.private_bytes_raw().hex()]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    # A fresh process needs neither the computation nor the library.
    assert done.stdout.split() == [repr(plain[0]), repr(plain[1]), "False"]


def test_a_site_without_noise_does_not_wait_for_the_accountants_libraries() -> None:
    code = (
        "import sys\nimport common.privacy.channel_release, common.privacy.dpsgd, common.privacy.ledger\n"
        "from common.privacy.accountant import account\nfrom common.privacy.events import BoundedInfluence\n"
        "account([BoundedInfluence(1, 1.0, 0.5)], 1e-5)\nprint([m for m in sys.modules if m in"
        " ('dp_accounting', 'scipy')])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
