"""Processes that die while they write, and several that write at once."""

import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from common.errors import LedgerError
from common.privacy.ledger import Ledger
from tests.common.privacy.ledgers import STUDY, filled, spend


def child(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def start(*processes: subprocess.Popen[str]) -> None:
    """Let all of them write at once, when each has opened the ledger."""
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()


WRITER = """
import sys
from pathlib import Path
from common.privacy.events import BoundedInfluence
from common.privacy.ledger import Ledger
path, first, last, study, payload = sys.argv[1:]
with Ledger(Path(path), "north") as ledger:
    print("ready", flush=True)
    sys.stdin.readline()  # the start signal
    for number in range(int(first), int(last)):
        ledger.record(study, BoundedInfluence(number, 0.5, 0.25), payload)
        print(number, flush=True)
"""


@pytest.mark.parametrize("acknowledged", [1, 7, 30])
def test_every_acknowledged_spend_survives_kill_minus_nine(tmp_path: Path, acknowledged: int) -> None:
    path = tmp_path / "l.sqlite"
    process = child(WRITER, path, 1, 1_000_000, STUDY, "payload")
    start(process)
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(acknowledged)]
    process.send_signal(signal.SIGKILL)
    lines += process.stdout.readlines()
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    complete = [int(line) for line in lines if line.endswith("\n")]
    assert complete == list(range(1, len(complete) + 1)) and len(complete) >= acknowledged
    with Ledger(path, "north") as ledger:
        length, _ = ledger.verify()
        assert len(complete) <= length <= len(complete) + 1, "at most one spend was on disk and not yet acknowledged"
        assert [entry.round for entry in ledger.entries()] == list(range(1, length + 1))
        spend(ledger, length + 1)
        assert ledger.verify()[0] == length + 1


CREATOR = """
import sys
from pathlib import Path
from common.privacy.events import BoundedInfluence
from common.privacy.ledger import Ledger
print("ready", flush=True)
sys.stdin.readline()
for number in range(1_000_000):
    with Ledger(Path(sys.argv[1]) / str(number) / "ledger.sqlite", "north") as ledger:
        ledger.record("s", BoundedInfluence(1, 0.5, 0.25), "payload")
    print(number, flush=True)
"""


@pytest.mark.parametrize("delay", [0.0, 0.003, 0.011])
def test_a_ledger_killed_while_it_is_made_is_made_by_the_next_start(tmp_path: Path, delay: float) -> None:
    process = child(CREATOR, tmp_path)
    start(process)
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(3)]
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    lines += process.stdout.readlines()
    process.wait()
    process.stdout.close()
    complete = sum(line.endswith("\n") for line in lines)
    folders = sorted(tmp_path.iterdir(), key=lambda folder: int(folder.name))
    assert complete <= len(folders) <= complete + 1
    for number, folder in enumerate(folders):
        with Ledger(folder / "ledger.sqlite", "north") as ledger:
            length, _ = ledger.verify()
            assert length == 1 or (length == 0 and number == complete), "an acknowledged spend was lost"
            spend(ledger, 2)
            assert ledger.verify()[0] == length + 1


def test_a_ledger_that_another_process_holds_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = filled(tmp_path / "l.sqlite", 1)
    connect: Callable[..., sqlite3.Connection] = sqlite3.connect

    def impatient(path: Path, **options: Any) -> sqlite3.Connection:
        return connect(path, **(options | {"timeout": 0.05}))

    monkeypatch.setattr(sqlite3, "connect", impatient)
    with closing(connect(path, isolation_level=None)) as other, Ledger(path, "north") as ledger:
        other.execute("BEGIN IMMEDIATE")
        assert ledger.verify()[0] == 1  # reading is possible meanwhile
        with pytest.raises(LedgerError, match="another process holds the ledger"):
            spend(ledger, 2)
        other.execute("ROLLBACK")
        spend(ledger, 2)
        assert ledger.verify()[0] == 2


def test_two_processes_write_one_chain(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    filled(path, 1)
    processes = [child(WRITER, path, 2, 32, study, "payload") for study in ("b" * 64, "c" * 64)]
    start(*processes)
    for process in processes:
        process.communicate()
        assert process.returncode == 0
    with Ledger(path, "north") as ledger:
        assert ledger.verify()[0] == 61
        for study in ("b" * 64, "c" * 64):
            assert [entry.round for entry in ledger.entries(study)] == list(range(2, 32))


def test_of_two_processes_with_different_answers_one_wins_each_round(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    loop = WRITER.replace(
        "        ledger.record(study, BoundedInfluence(number, 0.5, 0.25), payload)\n        print(number, flush=True)",
        "        try:\n"
        "            ledger.record(study, BoundedInfluence(number, 0.5, 0.25), payload)\n"
        "            print(number, flush=True)\n"
        "        except LedgerError:\n"
        "            pass",
    ).replace("import sys\n", "import sys\nfrom common.errors import LedgerError\n", 1)
    processes = {payload: child(loop, path, 1, 31, STUDY, payload) for payload in ("one", "two")}
    start(*processes.values())
    won = {payload: {int(n) for n in process.communicate()[0].split()} for payload, process in processes.items()}
    assert all(process.returncode == 0 for process in processes.values())
    assert not won["one"] & won["two"] and won["one"] | won["two"] == set(range(1, 31))
    with Ledger(path, "north") as ledger:
        assert {entry.round: entry.payload_digest for entry in ledger.entries()} == {
            number: payload for payload, numbers in won.items() for number in numbers
        }
        assert ledger.verify()[0] == 30
