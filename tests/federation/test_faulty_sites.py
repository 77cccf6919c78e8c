"""Sites that fail, lie or die, as real processes: no spend lost or doubled, no wrong aggregate, every loss by name.

One consortium serves all tests, in order. Dora is hostile (`hostile.py`) in the first one, and honest after it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from client.state import load_state
from common.study import Protocol
from server.checkpoint import load_checkpoint
from tests.federation.consortium import SITES, Consortium, digest_of, running_consortium
from tests.federation.hostile import FOLDER, HUGE, SITECUSTOMIZE
from tests.federation.processes import children_of, lines, wait_for

pytestmark = [pytest.mark.federation, pytest.mark.deadlines]
LIMIT = 64 << 20  # the default of --reply-mib

ROOT = Path(__file__).parents[2]
HONEST = SITES[:3]
TIMEOUT = 15.0  # seconds of a round in which a site does not answer
ROUNDS, PATIENCE = 60, 30.0  # of a study that outlasts what happens in it; an answer that was lost is asked for again
ABSENT = "no reply before the deadline"
GONE = f"{ABSENT}|is not connected"
# What dora does in each round, and what the coordinator says of it; "" for a round that counts.
LIES = {
    1: ("", ""),
    2: ("garbage", "internal-error"),
    3: ("nan", "has entries that are not finite"),
    4: ("too long", "the update's norm exceeds C = "),
    5: ("another round", "answers round 6"),
    6: ("another study", "answers another study"),
    7: ("another site", "answers under another site's name"),
    8: ("replay", "answers round 1"),
    9: ("forged", ""),
    10: ("no message", "the reply cannot be read"),
    11: ("late", ABSENT),
    12: ("", ""),
    13: ("many parts", f"the reply has more parts than a reply of this protocol|{GONE}"),
    14: ("huge", GONE),
    15: ("hang", GONE),
}


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Consortium]:
    folder = tmp_path_factory.mktemp("faulty")
    hostile = folder / "hostile"
    hostile.mkdir()
    (hostile / "sitecustomize.py").write_text(SITECUSTOMIZE)
    (hostile / "plan.json").write_text(json.dumps({str(number): lie for number, (lie, _) in LIES.items()}))
    environment = {"PYTHONPATH": f"{hostile}:{ROOT}", FOLDER: str(hostile)}
    with running_consortium(folder, environments={"dora": environment}) as made:
        yield made


def test_a_site_that_lies_in_every_round_harms_only_itself(consortium: Consortium) -> None:
    superlink, hostile = consortium.child("server.superlink"), consortium.folder / "hostile"
    before = peak_memory(superlink)
    out = consortium.launch("lies", len(LIES), TIMEOUT)
    consortium.approve_all()
    nodes = wait_for(lambda: (out / "nodes.json").exists() and json.loads((out / "nodes.json").read_text()), 60, "gone")
    (hostile / "victim.new").write_text(nodes["anna"]["node"])
    (hostile / "victim.new").rename(hostile / "victim")
    consortium.finished(out, "launch-lies", 200)

    told = {line["round"]: line["lie"] for line in lines(hostile / "seen.jsonl")}
    # A site that is busy with 200 MB may not have come to the last ones.
    assert told.items() <= {number: lie for number, (lie, _) in LIES.items()}.items() and set(range(1, 14)) <= set(told)
    rounds = lines(out / "rounds.jsonl")
    for report, (number, (lie, reason)) in zip(rounds, LIES.items(), strict=True):
        assert report["round"] == number
        assert report["answered"] == (HONEST if reason else SITES), f"{lie}: {report}"
        assert set(report["dropped"]) == ({"dora"} if reason else set()), f"{lie}: {report}"
        assert re.search(reason, report["dropped"].get("dora", "")), f"{lie}: {report}"
        assert report["seconds"] < 2 * TIMEOUT, f"{lie}: the others waited too long: {report}"
        weight = sum(weights(out)[site] for site in report["answered"])
        assert report["step_norm"] <= protocol(out).study.training.update_norm * weight * 1.0001
    require_spends(consortium, out)

    # 400 MB were offered in two rounds: neither the SuperLink's memory nor its database has taken them. What came until
    # the limit of 64 MiB, after which a site is cut off, has left the database; Flower holds a few copies of it.
    # About five copies were seen (342 to 400 MB); without the limit they would be of 200 MB each, a GB and more.
    assert peak_memory(superlink) - before < 7 * LIMIT
    database = consortium.home / "state" / "superlink.db"
    assert database.stat().st_size < HUGE / 2
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as reader:
        assert largest_object(reader) < 1 << 20


def test_processes_of_a_site_that_are_killed_in_a_round(consortium: Consortium) -> None:
    consortium.running.end("dora")
    hostile = consortium.folder / "hostile"
    (hostile / "plan.json").write_text("{}")  # from now on she only keeps what the coordinator sends
    consortium.start_site("dora", PYTHONPATH=f"{hostile}:{ROOT}", **{FOLDER: str(hostile)})
    out = consortium.launch("kills", ROUNDS, PATIENCE)
    consortium.approve_all()
    wait_for(lambda: consortium.rounds(out) >= 1, 120, lambda: consortium.log("superlink")[-4000:])

    # The worker: its executor answers at once, by name and in one code.
    number = in_a_round(consortium, out, "anna")
    os.kill(child(consortium, "anna", "client.worker"), signal.SIGKILL)
    report = wait_for_round(consortium, out, number)
    assert report["dropped"]["anna"] == "internal-error", report
    counted_again(consortium, out, "anna", number)

    # The SuperNode, while the worker trains: the round is asked for once more, and answered without a second spend.
    number = in_a_round(consortium, out, "berta")
    os.kill(child(consortium, "berta", "client.supernode"), signal.SIGKILL)
    os.kill(child(consortium, "berta", "client.worker"), signal.SIGCONT)
    report = wait_for_round(consortium, out, number)
    assert "berta" in report["answered"] or report["dropped"]["berta"] in (ABSENT, "is not connected"), report
    counted_again(consortium, out, "berta", number)

    # The executor: nobody can answer, and the SuperLink hears at once that the node is gone.
    number = in_a_round(consortium, out, "clara")
    os.kill(child(consortium, "clara", "client.executor"), signal.SIGKILL)
    report = wait_for_round(consortium, out, number)
    assert "clara" in report["answered"] or report["dropped"]["clara"] in (ABSENT, "is not connected"), report
    counted_again(consortium, out, "clara", number)
    consortium.finished(out, "launch-kills", 240)
    require_spends(consortium, out)
    require_aggregate(consortium, out, hostile / f"decoder-{ROUNDS}.safetensors")


def test_a_full_disk_at_a_site(consortium: Consortium) -> None:
    state = consortium.folder / "clara" / "state"
    consortium.running.end("clara")
    kept = state.with_name("kept")
    state.rename(kept)
    state.mkdir(0o700)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m,mode=0700", "tmpfs", str(state)], capture_output=True)
    try:
        shutil.copytree(kept, state, dirs_exist_ok=True)
        if done.returncode:
            pytest.skip("this machine does not allow `mount -t tmpfs`, which makes a small disk")
        consortium.start_site("clara")
        out = consortium.launch("full", ROUNDS, PATIENCE)
        consortium.approve_all()
        wait_for(lambda: consortium.rounds(out) >= 2, 120, lambda: consortium.log("superlink")[-4000:])
        filler = state / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        report = wait_for(lambda: next((r for r in lines(out / "rounds.jsonl") if r["dropped"]), None), 60, "not full")
        assert report["dropped"].keys() == {"clara"} and report["answered"] == ["anna", "berta", "dora"]
        assert report["dropped"]["clara"] in ("storage-failed", "ledger-failed"), report
        spent = consortium.spends("clara", protocol(out).digest)
        assert report["round"] not in spent, "a round that was not answered is in the ledger"
        filler.unlink()
        counted_again(consortium, out, "clara", report["round"])
        consortium.finished(out, "launch-full", 240)
        require_spends(consortium, out)
        reasons = {r["dropped"]["clara"] for r in lines(out / "rounds.jsonl") if "clara" in r["dropped"]}
        assert reasons <= {"storage-failed", "ledger-failed"}, reasons
    finally:
        if "clara" in consortium.running._running:
            consortium.running.end("clara")
        subprocess.run(["umount", "-l", str(state)], capture_output=True, check=False)


def child(consortium: Consortium, site: str, module: str) -> int:
    """The process of a site that runs this module; the worker is a child of the executor."""
    found = workers(consortium, site) if module == "client.worker" else of_site(consortium, site)
    return found[module]


def of_site(consortium: Consortium, site: str) -> dict[str, int]:
    return children_of(consortium.running._running[site].pid)


def workers(consortium: Consortium, site: str) -> dict[str, int]:
    executor = of_site(consortium, site).get("client.executor")
    return children_of(executor) if executor else {}


def busy(consortium: Consortium, site: str) -> bool:
    """Whether the executor has a message in hand."""
    events = re.findall(
        r" executor: (received|answered|task-lost|task-failed|unanswered|started)", consortium.log(site)
    )
    return bool(events) and events[-1] == "received"


def in_a_round(consortium: Consortium, out: Path, site: str) -> int:
    """The number of a round whose message the site has in hand, with its worker stopped."""

    def stuck() -> bool:
        before = consortium.log(site).count(" executor: ")
        time.sleep(1.0)
        return busy(consortium, site) and consortium.log(site).count(" executor: ") == before

    children = wait_for(lambda: "client.worker" in (c := workers(consortium, site)) and c, 60, "no worker")
    os.kill(children["client.worker"], signal.SIGSTOP)
    wait_for(stuck, 60, lambda: consortium.log(site)[-2000:])
    return consortium.rounds(out) + 1


def wait_for_round(consortium: Consortium, out: Path, number: int) -> dict[str, Any]:
    wait_for(lambda: consortium.rounds(out) >= number, 90, lambda: consortium.log("superlink")[-4000:])
    return lines(out / "rounds.jsonl")[number - 1]


def counted_again(consortium: Consortium, out: Path, site: str, number: int) -> None:
    """In a later round the site takes part again."""

    def again() -> bool:
        return any(r["round"] > number and site in r["answered"] for r in lines(out / "rounds.jsonl"))

    wait_for(again, 120, lambda: consortium.log(site)[-3000:] + str(lines(out / "rounds.jsonl")[number - 1 :]))


def largest_object(reader: sqlite3.Connection) -> int:
    """Bytes of the largest object that the SuperLink holds."""
    tables = [name for (name,) in reader.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    (objects,) = [
        name for name in tables if "object_id" in columns(reader, name) and "content" in columns(reader, name)
    ]
    return reader.execute(f"SELECT COALESCE(MAX(LENGTH(content)), 0) FROM {objects}").fetchone()[0]


def columns(reader: sqlite3.Connection, table: str) -> set[str]:
    return {row[1] for row in reader.execute(f"PRAGMA table_info({table})")}


def peak_memory(pid: int) -> int:
    """Bytes of memory that a process has held at most."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))


def weights(out: Path) -> dict[str, float]:
    joined = json.loads((out / "sites.json").read_text())["joined"]
    return {site: about["weight"] for site, about in joined.items()}


def protocol(out: Path) -> Protocol:
    return Protocol.from_json(json.loads((out / "study.json").read_text()))


def require_spends(consortium: Consortium, out: Path) -> None:
    """Every round that counted is in the ledger of each site, none is there twice, and none that was not asked for."""
    rounds = lines(out / "rounds.jsonl")
    for site in SITES:
        spent = consortium.spends(site, digest_of(out))
        assert spent == sorted(set(spent)), f"{site} spent twice: {spent}"
        answered = {report["round"] for report in rounds if site in report["answered"]}
        assert answered <= set(spent) <= {report["round"] for report in rounds}, f"{site}: {spent}, counted {answered}"


def require_aggregate(consortium: Consortium, out: Path, sent: Path) -> None:
    """The released decoder is what was sent in the last round, moved by what the sites keep as their last answer."""
    study, digest, last = protocol(out), digest_of(out), lines(out / "rounds.jsonl")[-1]
    total = {name: value.numpy().astype(np.float64) for name, value in load_file(sent).items()}
    for site in last["answered"]:
        path = consortium.folder / site / "state" / "studies" / digest[:32] / "state.safetensors"
        state = load_state(path, digest)
        assert state.round == last["round"]
        for name, value in state.reply.items():
            total[name] += weights(out)[site] * value.numpy().astype(np.float64)
    released = load_checkpoint(out / "decoder.safetensors", study).decoder
    expected = load_checkpoint(out / "decoder.safetensors", study).decoder
    expected.load_arrays({name: torch.from_numpy(value.astype(np.float32)) for name, value in total.items()})
    with torch.no_grad():
        expected.network.project(exact=True)
    for name, value in released.arrays().items():
        np.testing.assert_allclose(value.numpy(), expected.arrays()[name].numpy(), rtol=0, atol=1e-6)
