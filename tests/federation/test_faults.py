"""Faults in a consortium of real processes, one after another: networks, disks, certificates, keys and clocks.

After each no spend is lost or doubled, no aggregate is wrong, and the study ends well or a command says in one sentence
why it does not. One deployment serves all tests, in order. The table is in docs/deployment.md, "What happens when".
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from client.ledger_statement import ledger_statement
from common.audit import read_audit
from common.privacy.ledger import Ledger
from server.checkpoint import load_checkpoint
from server.consortium import init_consortium
from server.launch import Launch
from tests.federation.consortium import SITES, Consortium, running_consortium
from tests.federation.disks import Disk
from tests.federation.processes import Network, cohortium, cohortium_site, lines, wait_for
from tests.tls import certify

pytestmark = [pytest.mark.federation, pytest.mark.deadlines]

CLOCK = Path(__file__).parent / "clock"
CUT_SECONDS = 30.0


@pytest.fixture(scope="module")
def disks() -> Iterator[dict[str, Disk]]:
    made: dict[str, Disk] = {}
    yield made
    for disk in made.values():
        disk.close()


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory, disks: dict[str, Disk]) -> Iterator[Consortium]:
    def small_state(made: Consortium) -> None:
        try:
            disks["state"] = Disk(made.home / "state", 32)
        except OSError:
            return

    with running_consortium(tmp_path_factory.mktemp("faults"), prepare=small_state) as made:
        yield made


@pytest.fixture
def network(consortium: Consortium) -> Network:
    if consortium.network is None:
        pytest.skip("this machine does not allow network namespaces (`ip netns add` failed)")
    return consortium.network


def begin(consortium: Consortium, name: str, rounds: int, sites: list[str] = SITES, **settings: Any) -> Path:
    """A study that the sites have approved, and whose first round is over."""
    out = consortium.launch(name, rounds, **settings)
    consortium.approve_all(sites=sites)
    wait_for(lambda: consortium.rounds(out) >= 1, 90, lambda: consortium.log("superlink")[-4000:])
    return out


def check(consortium: Consortium, out: Path, rounds: int | None = None) -> dict[str, set[int]]:
    """What holds after every fault; returns the rounds that each site has spent. `rounds`: the study is over."""
    protocol, done = Launch.load(out, consortium.home).protocol(), lines(out / "rounds.jsonl")
    checkpoint = load_checkpoint(out / "decoder.safetensors", protocol)
    # The checkpoint comes first; what is resumed adds its line.
    behind = 0 if rounds is not None else checkpoint.round - len(done)
    assert [line["round"] for line in done] == list(range(1, checkpoint.round - behind + 1)) and behind in (0, 1)
    if done and not behind:
        assert _plain(checkpoint.report) == _plain(done[-1]), "the line of another decoder"
    assert rounds is None or checkpoint.round == rounds
    spent: dict[str, set[int]] = {}
    for site in SITES:
        found = consortium.spends(site, protocol.digest)
        answered = {line["round"] for line in done if site in line["answered"]}
        assert found == sorted(set(found)), f"{site} spent twice: {found}"
        assert answered <= set(found), f"{site} answered without a spend: {answered - set(found)}"
        assert set(found) <= set(range(1, checkpoint.round + 2)), f"{site} spent what nobody asked for: {found}"
        spent[site] = set(found)
    read_audit(consortium.home / "audit.jsonl")
    return spent


def _plain(report: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in report.items() if name != "server_seconds"}


def missing(out: Path, site: str) -> dict[int, str]:
    """The rounds without this site, each with the reason that the coordinator gives."""
    return {line["round"]: line["dropped"][site] for line in lines(out / "rounds.jsonl") if site in line["dropped"]}


def ended(consortium: Consortium, name: str, seconds: float) -> int:
    """The exit code of a process that ends by itself."""
    process = consortium.running._running[name]
    return_code = wait_for(
        lambda: None if process.poll() is None else (process.returncode,),
        seconds,
        lambda: f"{name} goes on: {consortium.log(name)[-3000:]}\n{consortium.log('superlink')[-3000:]}",
    )
    return return_code[0]


def said(consortium: Consortium, name: str) -> str:
    """The error a command ended with: one, with a way to mend it, and no traceback of ours (Flower's have a prefix)."""
    text = consortium.log(name)
    own = [line for line in text.splitlines() if line.startswith(("error: ", "Traceback"))]
    assert len(own) == 1 and own[0].startswith("error: "), text[-3000:]
    found = text[text.index(own[0]) :]
    assert "How to mend it" in found, text[-3000:]
    return found


def site_status(consortium: Consortium, site: str) -> dict[str, Any]:
    done = cohortium_site("status", "--json", "--site", consortium.folder / site / "site.toml", code=8)
    return json.loads(done.stdout)


def trouble(consortium: Consortium, site: str) -> str:
    """What `cohortium-site status` says is wrong; empty if nothing is."""
    return (site_status(consortium, site)["trouble"] or {"message": ""})["message"]


def resume(consortium: Consortium, out: Path, name: str) -> subprocess.Popen[bytes]:
    return consortium.running.coordinator(name, "resume", out, "--consortium", consortium.home)


def online(consortium: Consortium, site: str) -> None:
    wait_for(
        lambda: consortium.status()["sites"][site]["status"] == "online", 120, lambda: consortium.log(site)[-3000:]
    )


def test_a_site_without_network_is_left_out_and_returns(consortium: Consortium, network: Network) -> None:
    out = begin(consortium, "short", 10, round_timeout=8.0)
    node = consortium.running._running["dora"].pid
    network.cut("dora", off=True)
    time.sleep(CUT_SECONDS)
    network.cut("dora", off=False)
    consortium.finished(out, "launch-short", 180)
    spent, without = check(consortium, out, 10), missing(out, "dora")
    assert without and set(without.values()) == {"no reply before the deadline"}
    assert max(without) < 10, "it did not come back"
    assert {1, *range(max(without) + 1, 11)} <= spent["dora"]
    for site in ("anna", "berta", "clara"):
        assert spent[site] == set(range(1, 11)), "the study waited for nobody else"
    assert consortium.running._running["dora"].poll() is None and node == consortium.running._running["dora"].pid


def test_a_round_that_may_last_longer_than_the_network_is_away_waits(consortium: Consortium, network: Network) -> None:
    out = begin(consortium, "long", 5, round_timeout=90.0)
    network.cut("dora", off=True)
    time.sleep(CUT_SECONDS / 2)
    network.cut("dora", off=False)
    consortium.finished(out, "launch-long", 180)
    spent = check(consortium, out, 5)
    assert not missing(out, "dora") and set(map(len, spent.values())) == {5}


def test_a_site_that_was_given_another_ca_trusts_nobody(consortium: Consortium) -> None:
    folder = consortium.folder / "dora"
    init_consortium(consortium.folder / "other", "Other", ["localhost"])
    consortium.running.end("dora")
    right = (folder / "ca.pem").read_bytes()
    (folder / "ca.pem").write_bytes((consortium.folder / "other" / "ca.pem").read_bytes())
    consortium.log_file("dora").unlink()
    consortium.start_site("dora")
    assert ended(consortium, "dora", 60) == 6
    assert "has not signed" in said(consortium, "dora") and "ask the coordinator" in said(consortium, "dora")
    assert "process=supernode" not in consortium.log("dora"), "nothing was sent to a server that nobody vouches for"
    assert not site_status(consortium, "dora")["running"] and "has not signed" in trouble(consortium, "dora")
    assert consortium.status()["sites"]["dora"]["status"] == "offline"
    (folder / "ca.pem").write_bytes(right)


def test_a_site_whose_clock_is_wrong_says_so_and_returns_when_it_is_set(consortium: Consortium) -> None:
    clock = consortium.folder / "clock"
    environment = {"PYTHONPATH": str(CLOCK), "COHORTIUM_TEST_CLOCK": str(clock)}
    for seconds, words in ((600, "s ahead of the SuperLink's"), (-600, "s behind the SuperLink's")):
        clock.write_text(str(seconds))
        consortium.log_file("dora").unlink(missing_ok=True)
        consortium.start_site("dora", **environment)
        assert ended(consortium, "dora", 60) == 6
        assert words in said(consortium, "dora") and "NTP" in said(consortium, "dora")
    assert "behind the SuperLink's" in trouble(consortium, "dora")
    clock.write_text("0")
    consortium.log_file("dora").unlink()
    consortium.start_site("dora", **environment)
    online(consortium, "dora")
    out = begin(consortium, "clock", 14, round_timeout=8.0)
    clock.write_text("600")
    wait_for(lambda: "s ahead of the SuperLink's" in consortium.log("dora"), 90, lambda: consortium.log("dora")[-3000:])
    assert "ahead of the SuperLink's" in trouble(consortium, "dora")
    wait_for(lambda: missing(out, "dora"), 60, lambda: consortium.log("superlink")[-3000:])
    clock.write_text("-240")  # Flower tolerates up to 305
    consortium.finished(out, "launch-clock", 240)
    spent, without = check(consortium, out, 14), missing(out, "dora")
    assert 1 in spent["dora"] and max(without) < 14, "it came back by itself"
    assert spent["anna"] == set(range(1, 15))
    # Its ledger and its audit log have times that go back and forth; both hold, and what was spent is counted.
    state = consortium.folder / "dora" / "state"
    with Ledger(state / "ledger.sqlite") as ledger:
        findings = ledger.inspect()
    assert [e.recorded_at for e in findings.entries] != sorted(e.recorded_at for e in findings.entries)
    digest = Launch.load(out, consortium.home).protocol().digest
    (stated,) = [s for s in ledger_statement(findings, state / "studies", 1e-5)["studies"] if s["study"] == digest]
    assert stated["guarantees"]
    cohortium_site("audit", "verify", "--site", consortium.folder / "dora" / "site.toml")


def test_a_certificate_that_expires_stops_a_study_until_it_is_renewed(consortium: Consortium) -> None:
    for site in SITES:
        consortium.log_file(site).write_bytes(b"")
    out = begin(consortium, "expired", 20, round_timeout=20.0)
    certify(consortium.home, consortium.public.rsplit(":", 1)[0], datetime.now(UTC) - timedelta(minutes=1))
    os.kill(consortium.child("server.superlink"), signal.SIGKILL)  # every connection has to be made anew
    for site in SITES:
        wait_for(
            lambda site=site: "has expired" in trouble(consortium, site), 90, lambda site=site: consortium.log(site)
        )
        assert "has expired" in consortium.log(site)
    assert ended(consortium, "launch-expired", 120) == 7
    assert "expired at" in said(consortium, "launch-expired") and "renew-certificate" in said(
        consortium, "launch-expired"
    )
    check(consortium, out)
    consortium.running.end("superlink")
    addresses = ("--public", consortium.public, "--private", consortium.private)
    refused = cohortium("start-superlink", "--consortium", consortium.home, *addresses, code=7)
    assert "expired at" in refused.stderr and "renew-certificate" in refused.stderr
    cohortium("renew-certificate", consortium.home)
    consortium.log_file("superlink").unlink()
    consortium.start_superlink()
    for site in SITES:
        online(consortium, site)  # by itself
    before = consortium.rounds(out)
    resume(consortium, out, "resume-expired")
    consortium.finished(out, "resume-expired", 240)
    spent = check(consortium, out, 20)
    assert 1 <= before < 20 and set(map(len, spent.values())) == {20}


def test_a_full_disk_under_the_superlinks_database(consortium: Consortium, disks: dict[str, Disk]) -> None:
    if "state" not in disks:
        pytest.skip("this machine does not allow a small file system (`mount -t tmpfs` failed)")
    out = begin(consortium, "database", 30, round_timeout=20.0)
    disks["state"].fill()
    try:
        code = ended(consortium, "launch-database", 150)
        check(consortium, out)
        if code != 0:
            assert code == 7 and "the disk is full" in said(consortium, "launch-database")
    finally:
        disks["state"].free()
    for site in SITES:
        online(consortium, site)
    # SQLite may find room in its own files: then the study ends well on the full disk, which is as good.
    if code != 0:
        resume(consortium, out, "resume-database")
        consortium.finished(out, "resume-database", 180)
    assert set(map(len, check(consortium, out, 30).values())) == {30}


def test_a_full_disk_under_the_results(consortium: Consortium, disks: dict[str, Disk]) -> None:
    try:
        disk = disks["results"] = Disk(consortium.folder / "results", 4)
    except OSError as error:
        pytest.skip(str(error))
    out = begin(consortium, "results", 12, out=disk.folder / "out", round_timeout=20.0)
    disk.fill()  # the next checkpoint does not fit
    assert ended(consortium, "launch-results", 90) == 7
    assert "the disk is full" in said(consortium, "launch-results")
    check(consortium, out)
    disk.free()
    resume(consortium, out, "resume-results")
    wait_for(lambda: "following run" in consortium.log("resume-results"), 60, "nobody follows")
    consortium.running.end("resume-results", signal.SIGKILL)
    wait_for(lambda: (out / "cohort.parquet").exists(), 120, lambda: consortium.log("superlink")[-3000:])
    spent = check(consortium, out, 12)
    assert set(map(len, spent.values())) == {12}
    disk.fill()  # now the release does not fit
    resume(consortium, out, "release-results")
    assert ended(consortium, "release-results", 60) == 7
    assert "cannot be written" in said(consortium, "release-results") and str(out) in said(
        consortium, "release-results"
    )
    left = {path.name for path in out.iterdir()}
    assert "manifest.dsse.json" not in left and not [name for name in left if name.startswith(".")], left
    disk.free()
    resume(consortium, out, "released-results")
    consortium.finished(out, "released-results", 60)
    assert check(consortium, out, 12) == spent


def test_a_site_that_is_revoked_in_a_study_is_out_at_once(consortium: Consortium) -> None:
    consortium.log_file("dora").write_bytes(b"")
    out = begin(consortium, "revoked", 12, round_timeout=8.0)
    cohortium("revoke", "dora", "--consortium", consortium.home, "--superlink", consortium.private)
    asked = consortium.rounds(out) + 1
    assert ended(consortium, "dora", 90) == 8
    assert "does not accept this site's key" in said(consortium, "dora")
    assert "does not accept this site's key" in trouble(consortium, "dora")
    consortium.finished(out, "launch-revoked", 180)
    spent = check(consortium, out, 12)
    assert max(spent["dora"]) <= asked < 12 and set(range(asked + 1, 13)) <= set(missing(out, "dora"))
    assert spent["anna"] == set(range(1, 13))
    status = consortium.status()["sites"]["dora"]
    assert (status["enrolled"], status["registered"], status["status"]) == (False, False, "revoked")
    others = [site for site in SITES if site != "dora"]
    after = begin(consortium, "after", 2, sites=others)
    assert Launch.load(after, consortium.home).load_settings().sites == len(others)
    consortium.finished(after, "launch-after", 120)
    assert not check(consortium, after, 2)["dora"]
