import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

import common.privacy.ledger
from common.errors import LedgerError, StudyError
from common.privacy.events import BoundedInfluence, UnboundedInfluence
from common.privacy.ledger import GENESIS, Ledger
from common.privacy.ledger_entries import Entry
from tests.common.privacy.ledgers import STUDY, filled, spend


@contextmanager
def unprivileged() -> Iterator[Path]:
    """A folder nobody but root may write to, and no root for as long as it lasts."""
    root = os.geteuid() == 0
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        filled(folder / "old.sqlite")
        (folder / "old.sqlite").chmod(0o444)
        folder.chmod(0o555)
        if root:
            os.seteuid(65534)
        try:
            yield folder
        finally:
            if root:
                os.seteuid(0)
            folder.chmod(0o700)


def test_spends_are_kept_in_order_and_survive_reopening(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "ledger.sqlite"
    with Ledger(path, "north") as ledger:
        assert ledger.verify() == (0, GENESIS) and ledger.entries() == []
        written = [spend(ledger, 1), spend(ledger, 2), spend(ledger, 1, "b" * 64)]
        written.append(ledger.record("b" * 64, UnboundedInfluence(2, 1.0), "other"))
    with Ledger(path, "north") as ledger:
        assert ledger.entries() == written
        assert [entry.sequence for entry in written] == [1, 2, 3, 4]
        assert ledger.entries("b" * 64) == written[2:] and ledger.entries("c") == []
        assert ledger.verify() == (4, written[-1].hash)


def test_the_chain_is_sha256_over_content_and_predecessor(tmp_path: Path) -> None:
    with Ledger(filled(tmp_path / "l.sqlite", 2), "north") as ledger:
        one, two = ledger.entries()
    assert one.previous == GENESIS and two.previous == one.hash
    event = {"type": "BoundedInfluence", "round": 2, "update_norm": 0.5, "weight": 0.25}
    content = ["north", 2, STUDY, event, "payload 2", two.recorded_at, "", one.hash]
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert two.hash == hashlib.sha256(text.encode()).hexdigest()


def test_a_resend_is_not_a_new_spend(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    with Ledger(path, "north") as ledger:
        first = spend(ledger, 1)
        assert spend(ledger, 1) == first
    with Ledger(path, "north") as ledger:
        assert spend(ledger, 1) == first and ledger.entries() == [first]


@pytest.mark.parametrize(
    ("event", "payload"),
    [
        (BoundedInfluence(1, 0.5, 0.25), "other bytes"),
        (BoundedInfluence(1, 0.6, 0.25), "payload 1"),
        (BoundedInfluence(1, 0.5, 0.3), "payload 1"),
        (UnboundedInfluence(1, 0.25), "payload 1"),
    ],
)
def test_a_round_is_answered_once(tmp_path: Path, event: BoundedInfluence, payload: str) -> None:
    with Ledger(tmp_path / "l.sqlite", "north") as ledger:
        first = spend(ledger, 1)
        with pytest.raises(LedgerError, match="round 1 of this study has been spent"):
            ledger.record(STUDY, event, payload)
        assert ledger.entries() == [first], "and nothing was written"
        spend(ledger, 2)
        assert ledger.verify()[0] == 2


def test_a_spend_that_is_not_approved_is_not_written(tmp_path: Path) -> None:
    shown: list[int] = []

    def refuse(entries: Sequence[Entry]) -> None:
        shown.append(len(entries))
        raise StudyError("too much")

    with Ledger(filled(tmp_path / "l.sqlite"), "north") as ledger:
        before = ledger.verify()
        with pytest.raises(StudyError, match="too much"):
            ledger.record(STUDY, BoundedInfluence(6, 0.5, 0.25), "payload 6", refuse)
        assert ledger.verify() == before and shown == [5]
        ledger.record(STUDY, BoundedInfluence(5, 0.5, 0.25), "payload 5", refuse)  # a resend spends nothing
        ledger.record(STUDY, BoundedInfluence(6, 0.5, 0.25), "payload 6", lambda entries: shown.append(-len(entries)))
        assert shown == [5, -5] and ledger.verify()[0] == 6


@pytest.mark.parametrize("name", ["new.sqlite", "old.sqlite", "sub/new.sqlite"])
def test_a_read_only_folder_is_a_ledger_error(name: str) -> None:
    with unprivileged() as folder, pytest.raises(LedgerError) as caught, Ledger(folder / name, "north") as ledger:
        spend(ledger, 9)
    assert Path(name).stem in str(caught.value) and "permissions" in str(caught.value)


def test_a_file_in_place_of_the_folder_is_a_ledger_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerError), Ledger(tmp_path / "file" / "l.sqlite", "north"):
        pass


def test_every_commit_waits_for_the_disk(tmp_path: Path) -> None:
    # No test can cut the power; what SQLite promises for it hangs on this setting (3 is EXTRA).
    with Ledger(tmp_path / "l.sqlite", "north") as ledger:
        assert ledger._database.execute("PRAGMA synchronous").fetchone() == (3,)
        assert ledger._database.execute("PRAGMA journal_mode").fetchone() == ("delete",)


# ---------------------------------------------------------------- the clock


def test_a_clock_that_goes_backwards_is_noted_and_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "l.sqlite"
    times = [f"2026-03-{day:02d}T00:00:00+00:00" for day in (10, 11, 5, 5, 6)]
    with Ledger(path, "north") as ledger:
        for number, now in enumerate(times, start=1):
            monkeypatch.setattr(common.privacy.ledger, "_now", lambda now=now: now)
            spend(ledger, number)
        found = ledger.inspect()
        assert ledger.verify()[0] == 5
    assert [entry.recorded_at for entry in found.entries] == times, "what the clock said, not what it should have said"
    notes = [entry.note for entry in found.entries]
    assert notes == ["", "", f"the clock went backwards: the entry before is dated {times[1]}", "", ""]
    assert len(found.clock) == 1 and "entry 3" in found.clock[0] and "went backwards" in found.clock[0]


def test_no_finding_in_an_orderly_ledger(tmp_path: Path) -> None:
    with Ledger(filled(tmp_path / "l.sqlite")) as ledger:
        found = ledger.inspect()
    assert found.clock == () and found.witnesses == () and found.key_compared
    assert (found.head.length, found.head.head) == (5, found.entries[-1].hash)
