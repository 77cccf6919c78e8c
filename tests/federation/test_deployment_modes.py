"""The other modes between real sites: dpsgd, channel, evaluation, a denial; decided with the stewards' own commands.

Statement, review and ledger are three ways to the same ε; here they meet. One deployment serves all tests, in order.
"""

import base64
import json
import math
import os
import re
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from client.approvals import Approvals, Kind
from client.site import load_site
from client.state import load_released
from common.audit import AUDIT_LOG, read_audit
from common.files import write_atomic
from common.messages import EVALUATE, JOIN, RELEASE, TRAIN
from common.privacy.accountant import Adversary, account, account_lines
from common.privacy.evaluation_release import evaluation_event
from common.privacy.events import ChannelRelease, Event, GaussianStatistics, GaussianUpdate, SampledGaussianSteps
from common.privacy.ledger import Ledger
from common.privacy.ledger_entries import Entry
from common.privacy.ledger_keys import load_key
from common.records import values_digest
from common.schema import load_schema
from common.study import Protocol
from common.table import read_table
from tests.federation.consortium import Consortium, digest_of, running_consortium
from tests.federation.processes import cohortium, cohortium_site, wait_for

pytestmark = [pytest.mark.federation, pytest.mark.deadlines]

SITES = ["anna", "berta", "clara"]
ROUNDS, DELTA = 2, 1e-4
DPSGD_EPSILON, CHANNEL_EPSILON = 4.0, 3.0
POLICY = '[policy]\nmodes = ["constrained", "dpsgd"]\nmax_release_rows = 150'
DPSGD = {"[training]": '[training]\nmode = "dpsgd"', "delta = 1e-4": f"delta = 1e-4\nepsilon = {DPSGD_EPSILON}"}
# A new encoder fitted to the decoder's samples: every ε is finite, and it takes seconds to make, which a test can use.
CHANNEL = {
    "delta = 1e-4": "delta = 1e-4\nupdate_noise = 6.0\naccept_useless_noise = true",
    "rows = 150": f'rows = 150\nmethod = "channel"\n[channel]\nepsilon = {CHANNEL_EPSILON}\nencoder = "synthetic"',
}
EVALUATION_EPSILON, HOLDOUT, HELD_OUT = 2.0, 0.3, 12  # of 40 patients: a smaller share is under the sites' min_count
EVALUATION = DPSGD | {
    'schema = "schema.json"': 'schema = "schema.json"\ntarget = "sex"',
    "rows = 150": f'rows = 150\n[evaluation]\nmethod = "accounted"\nepsilon = {EVALUATION_EPSILON}\n'
    f'holdout = {HOLDOUT}\nsecrets = ["age"]',
}
TWO_SITES = {"min_sites = 3": "min_sites = 2"}
Costs = dict[str, tuple[float, float]]


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Consortium]:
    with running_consortium(tmp_path_factory.mktemp("modes"), SITES) as made:
        for site in SITES:
            path = made.folder / site / "site.toml"
            path.write_text(path.read_text().replace("[policy]", POLICY))
        yield made


@pytest.fixture(scope="module")
def costs() -> dict[str, Costs]:
    """What `review` printed before each study was approved, by site: ε of the study alone, and with all before it."""
    return {}


def launch(made: Consortium, name: str, changes: dict[str, str]) -> Path:
    study, out = made.study(name, ROUNDS), made.folder / f"out-{name}"
    text = study.read_text()
    changes = changes | {"join_timeout = 90.0": "join_timeout = 300.0"}  # it runs while commands start, one by one
    for before, after in changes.items():
        assert before in text
        text = text.replace(before, after)
    study.write_text(text)
    made.running.coordinator(f"launch-{name}", "launch", study, "--consortium", made.home, "--out", out)
    return out


def waiting_at(made: Consortium, site: str, kind: Kind) -> str:
    """The digest that waits at a site for a decision; "" if none does."""
    state = load_site(made.folder / site / "site.toml").site.state
    approvals, key = Approvals(state, site), load_key(state / "ledger.key")
    found = [r for r in approvals.requests() if r.kind == kind]
    return next((r.digest for r in found if approvals.standing(kind, r.digest, key) == "waiting"), "")


def ask_steward(made: Consortium, site: str, kind: Kind) -> str:
    """The request as `review` lists it, once the site has been asked."""
    digest = wait_for(lambda: waiting_at(made, site, kind), 90, lambda: made.log(site) + made.log("superlink")[-3000:])
    listed = cohortium_site("review", "--site", made.folder / site / "site.toml").stdout
    assert re.search(rf"^{kind}\s+{digest[:16]}\s+waiting", listed, re.MULTILINE), listed
    return digest


def decide(made: Consortium, site: str, kind: Kind, verdict: str = "approve", reason: str = "test") -> tuple[str, str]:
    """Review and decide as the handbook says; returns the digest and what `review` showed of it."""
    digest, toml = ask_steward(made, site, kind), made.folder / site / "site.toml"
    shown = cohortium_site("review", digest[:12], "--site", toml).stdout
    said = cohortium_site(verdict, digest[:12], "--site", toml, "--by", "Dr. A. Example", "--reason", reason).stdout
    assert digest in said and "signed and logged" in said
    return digest, shown


def approve_bundle(made: Consortium) -> None:
    printed = cohortium("bundle").stdout.strip()
    with ThreadPoolExecutor(2) as hands:
        decided = list(hands.map(lambda site: decide(made, site, "bundle"), SITES))
    assert {digest for digest, _ in decided} == {printed}  # the one that coordinator and stewards read to each other
    for _, shown in decided:  # the code is what is installed here; only Flower's description of it is not
        changes = re.findall(r"^  (?:added|removed|changed) .*", shown.partition("Compared with")[2], re.MULTILINE)
        assert changes == ["  added    pyproject.toml"] and "Every file of code is the one installed here" in shown


def approve_study(made: Consortium, sites: Sequence[str] = SITES) -> Costs:
    """Every steward reads what the study would cost, and approves; returns what he read."""
    with ThreadPoolExecutor(2) as hands:
        shown = list(hands.map(lambda site: decide(made, site, "study")[1], sites))
    return {site: cost_in(text) for site, text in zip(sites, shown, strict=True)}


def cost_in(shown: str) -> tuple[float, float]:
    alone = re.search(r"What it would cost: epsilon (\S+) at delta 0\.0001 for one patient", shown)
    total = re.search(r"together with all studies of this site: epsilon (\S+)", shown)
    assert alone and total, shown
    return float(alone[1]), float(total[1])


def ledger(made: Consortium, site: str) -> list[Entry]:
    with Ledger(made.folder / site / "state" / "ledger.sqlite") as found:
        found.verify()
        return found.entries()


def events_of(made: Consortium, site: str, digest: str) -> list[Event]:
    return [entry.event for entry in ledger(made, site) if entry.study == digest]


def statement_of(out: Path, site: str) -> dict[str, dict[str, Any]]:
    """The entries of one site in the released statement, by adversary."""
    entries = json.loads((out / "privacy.json").read_text())["entries"]
    return {entry["adversary"]: entry for entry in entries if entry["site"] == site}


def check_epsilons(made: Consortium, out: Path, reviewed: Costs) -> None:
    """At every site the statement says what its ledger says, and the steward had been told no less."""
    digest = digest_of(out)
    for site in SITES:
        events = events_of(made, site, digest)
        stated = statement_of(out, site)
        assert set(stated) == set(get_args(Adversary))
        for adversary in get_args(Adversary):
            spent = account(events, DELTA, adversary=adversary)
            assert 0 < spent.epsilon <= stated[adversary]["epsilon"] < math.inf
            assert stated[adversary]["delta"] == DELTA
            lines = {(line["applies_to"], line["conditional"]): line["epsilon"] for line in stated[adversary]["lines"]}
            assert lines == {  # all rounds were answered, so that the statement claims no more than was spent either
                (line.applies_to, not line.unconditional): pytest.approx(line.epsilon, rel=1e-9)
                for line in account_lines(events, DELTA, adversary=adversary)
            }
        spent = account(events, DELTA)
        before = [entry for entry in ledger(made, site) if entry.study != digest]
        others = [[entry.event for entry in before]] if before else []
        alone, total = reviewed[site]
        assert spent.epsilon <= alone and account(events, DELTA, other_studies=others).epsilon <= total


def logged(made: Consortium, site: str, digest: str) -> list[tuple[str, str]]:
    """What the site's own log says about a study: actions with the rounds they name, and how each ended."""
    lines = read_audit(made.folder / site / "state" / AUDIT_LOG)
    return [
        (f"{line['action']} {line.get('round', '')}".strip(), line["outcome"])
        for line in lines
        if line["study"] == digest
    ]


def in_order(wanted: Sequence[tuple[str, str]], found: Sequence[tuple[str, str]]) -> bool:
    rest = iter(found)
    return all(line in rest for line in wanted)


def executor_of(made: Consortium, site: str) -> int:
    return int(re.findall(r"started process=executor pid=(\d+)", made.log(site))[-1])


def worker_of(made: Consortium, site: str) -> int:
    return int(re.findall(r"worker-started worker=(\d+)", made.log(site))[-1])


def processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_dpsgd_from_review_to_a_signed_cohort(consortium: Consortium, costs: dict[str, Costs]) -> None:
    out = launch(consortium, "dpsgd", DPSGD)
    approve_bundle(consortium)
    costs["dpsgd"] = approve_study(consortium)
    consortium.finished(out, "launch-dpsgd", 120)
    assert all(alone <= DPSGD_EPSILON and alone == total for alone, total in costs["dpsgd"].values())
    assert f"at δ = {DELTA:g}" in consortium.log("launch-dpsgd")


def test_what_dpsgd_spent_is_what_was_said_before_and_after(consortium: Consortium, costs: dict[str, Costs]) -> None:
    out = consortium.folder / "out-dpsgd"
    check_epsilons(consortium, out, costs["dpsgd"])
    for site in SITES:
        events = events_of(consortium, site, digest_of(out))
        assert [event.round for event in events] == list(range(1, ROUNDS + 1))
        steps = [event for event in events if isinstance(event, SampledGaussianSteps)]
        assert len(steps) == ROUNDS
        exposure = statement_of(out, site)["coordinator"]["exposure"]
        assert exposure["rounds"] == ROUNDS and exposure["steps"] == sum(event.steps for event in steps)
        assert {event.noise_multiplier for event in steps} == {exposure["noise_multiplier"]}
        assert {event.sampling_probability for event in steps} == {exposure["sampling_probability"]}


def test_a_site_that_dies_after_the_spend_of_its_rows_sends_the_same_rows(
    consortium: Consortium, costs: dict[str, Costs]
) -> None:
    before = len(consortium.log("anna"))
    out = launch(consortium, "channel", CHANNEL)
    costs["channel"] = approve_study(consortium)
    trained = r"answered kind=train\.round \S+ round=2 status=ok.*\n(?:.*\n)*?.*executor: received"
    wait_for(lambda: re.search(trained, consortium.log("anna")[before:]), 60, lambda: consortium.log("anna")[-3000:])
    worker, executor = worker_of(consortium, "anna"), executor_of(consortium, "anna")
    begun = processor_seconds(worker)
    wait_for(lambda: processor_seconds(worker) > begun + 0.4, 60, lambda: consortium.log("anna")[-3000:])
    os.kill(executor, signal.SIGSTOP)  # the worker has the request; its answer will stay where it is
    digest = Protocol.from_json(json.loads((out / "study.json").read_text())).digest
    released = consortium.folder / "anna" / "state" / "studies" / digest[:32] / "released.safetensors"
    wait_for(released.exists, 90, lambda: consortium.log("anna")[-3000:])
    wait_for(lambda: isinstance(ledger(consortium, "anna")[-1].event, ChannelRelease), 30, "nothing was spent")
    entry, content = ledger(consortium, "anna")[-1], released.read_bytes()
    os.kill(executor, signal.SIGKILL)
    process = consortium.running._running["launch-channel"]
    wait_for(lambda: process.poll() is not None, 90, lambda: consortium.log("superlink")[-4000:])
    assert process.returncode == 8, consortium.log("launch-channel")
    assert "2 sites sent valid rows, at least 3 are needed (anna: " in consortium.log("launch-channel")
    assert not (out / "cohort.csv").exists() and not (out / "manifest.dsse.json").exists()
    consortium.running.coordinator("resume-channel", "resume", out, "--consortium", consortium.home)
    consortium.finished(out, "resume-channel", 120)
    assert ledger(consortium, "anna")[-1] == entry and released.read_bytes() == content
    assert consortium.spends("anna", digest) == [1, 2, 3]
    found = load_released(released, digest)
    assert found is not None and values_digest(found.rows) == entry.payload_digest
    cohort, _ = read_table(out / "cohort.csv", load_schema(consortium.folder / "schema.json"), out_of_bounds="refuse")
    distance = np.abs(found.rows[:, None, :] - cohort.values[None, :, :]).max(axis=2)
    assert (distance.min(axis=1) < 1e-9).all()  # each of its rows is in the cohort


def test_what_the_channel_spent_is_what_was_said_before_and_after(
    consortium: Consortium, costs: dict[str, Costs]
) -> None:
    out = consortium.folder / "out-channel"
    check_epsilons(consortium, out, costs["channel"])
    report = (out / "report.html").read_text()
    assert "with Gaussian noise of 6 times that norm" in report and "no noise" not in report
    shares = json.loads((out / "release.json").read_text())
    assert shares["dropped"] == {} and sum(shares["rows"].values()) == 150
    for site in SITES:
        *rounds, release = events_of(consortium, site, digest_of(out))
        assert [type(event) for event in rounds] == [GaussianUpdate] * ROUNDS
        assert isinstance(release, ChannelRelease) and release.networks_accounted
        assert (release.rows, release.patients) == (shares["rows"][site], 40)
        exposure = statement_of(out, site)["public"]["exposure"]
        assert exposure["released_rows"] == release.rows and exposure["rounds"] == ROUNDS
        assert f"{release.latent_noise:.4g}" in exposure["released_in_words"]
        assert f"{site}: {exposure['released_in_words'][:40]}" in report
        alone, total = costs["channel"][site]
        assert CHANNEL_EPSILON < alone < total < math.inf and costs["dpsgd"][site][0] < total


def test_a_site_that_dies_after_the_spend_of_its_counts_sends_the_same_counts(
    consortium: Consortium, costs: dict[str, Costs]
) -> None:
    before = len(consortium.log("anna"))
    out = launch(consortium, "evaluated", EVALUATION)
    with ThreadPoolExecutor(2) as hands:
        shown = list(hands.map(lambda site: decide(consortium, site, "study")[1], SITES))
    costs["evaluated"] = {site: cost_in(text) for site, text in zip(SITES, shown, strict=True)}
    for text in shown:
        assert f"with Gaussian noise calibrated to epsilon {EVALUATION_EPSILON:g}" in text
        assert "guesses at age" in text and "the 30% who are held out of training and release" in text
    # Counting takes a moment only: the worker is stopped before it is asked, and goes on when nobody can hear it.
    trained = rf"answered kind=train\.round \S+ round={ROUNDS} status=ok"
    asked = trained + r".*\n(?:.*\n)*?.*executor: received"
    wait_for(lambda: re.search(trained, consortium.log("anna")[before:]), 60, lambda: consortium.log("anna")[-3000:])
    worker, executor = worker_of(consortium, "anna"), executor_of(consortium, "anna")
    os.kill(worker, signal.SIGSTOP)
    wait_for(lambda: re.search(asked, consortium.log("anna")[before:]), 60, lambda: consortium.log("anna")[-3000:])
    time.sleep(1.0)  # until the request is in the worker's pipe
    os.kill(executor, signal.SIGSTOP)
    os.kill(worker, signal.SIGCONT)
    digest = Protocol.from_json(json.loads((out / "study.json").read_text())).digest
    counted = consortium.folder / "anna" / "state" / "studies" / digest[:32] / "evaluated.safetensors"
    wait_for(counted.exists, 90, lambda: consortium.log("anna")[-3000:])
    wait_for(lambda: isinstance(ledger(consortium, "anna")[-1].event, GaussianStatistics), 30, "nothing was spent")
    entry, content = ledger(consortium, "anna")[-1], counted.read_bytes()
    os.kill(executor, signal.SIGKILL)
    process = consortium.running._running["launch-evaluated"]
    wait_for(lambda: process.poll() is not None, 90, lambda: consortium.log("superlink")[-4000:])
    assert process.returncode == 8, consortium.log("launch-evaluated")
    assert "2 sites answered, at least 3 are needed (anna: " in consortium.log("launch-evaluated")
    assert not (out / "evaluation.json").exists() and not (out / "manifest.dsse.json").exists()
    consortium.running.coordinator("resume-evaluated", "resume", out, "--consortium", consortium.home)
    consortium.finished(out, "resume-evaluated", 120)
    assert ledger(consortium, "anna")[-1] == entry and counted.read_bytes() == content
    for site in SITES:
        assert consortium.spends(site, digest) == [1, 2, ROUNDS + 2]


def test_what_the_sites_counted_is_spent_logged_and_signed(consortium: Consortium, costs: dict[str, Costs]) -> None:
    out = consortium.folder / "out-evaluated"
    check_epsilons(consortium, out, costs["evaluated"])
    digest, protocol = digest_of(out), Protocol.from_json(json.loads((out / "study.json").read_text()))
    found = json.loads((out / "evaluation.json").read_text())
    assert found["dropped"] == {} and set(found["results"]) == {*SITES, "all sites"}
    assert found["patients"]["anna"] == {"everyone": 40, "fit": 40 - HELD_OUT, "holdout": HELD_OUT}
    assert "fitted to the site's patients" in found["not_measured"]["trtr"]
    attacks = found["results"]["all sites"]["attacks"]
    assert set(attacks["inference"]) == {"age"}
    assert (attacks["copies"]["exact"]["patients"], attacks["copies"]["exact"]["control"]) == (84, 36)
    assert "held out: 12" in found["results"]["anna"]["attacks"]["membership"]["density"]["reason"]
    payload = json.loads(base64.b64decode(json.loads((out / "manifest.dsse.json").read_text())["payload"]))
    assert "evaluation.json" in {subject["name"] for subject in payload["subject"]}
    for site in SITES:
        event = events_of(consortium, site, digest)[-1]
        assert event == evaluation_event(protocol.study)
        state = consortium.folder / site / "state"
        sent = load_released(state / "studies" / digest[:32] / "evaluated.safetensors", digest)
        assert sent is not None and values_digest(sent.rows) == ledger(consortium, site)[-1].payload_digest
        lines = [line for line in read_audit(state / AUDIT_LOG) if line["action"] == "evaluated"]
        assert len(lines) == 2  # every site was asked again after the stop, and sent the same
        for line in lines:
            assert np.array(line["values"]).tobytes() == sent.rows.tobytes()
            assert line["digest"] == values_digest(sent.rows)
        wanted = [
            *((f"answer {TRAIN} {number}", "ok") for number in range(1, ROUNDS + 1)),
            (f"answer {EVALUATE}", "ok"),
        ]
        assert in_order(wanted, logged(consortium, site, digest)), logged(consortium, site, digest)
        alone, _ = costs["evaluated"][site]
        assert max(DPSGD_EPSILON, EVALUATION_EPSILON) < alone < DPSGD_EPSILON + EVALUATION_EPSILON


def test_every_message_of_a_site_stands_in_its_log(consortium: Consortium) -> None:
    for name, channel in (("dpsgd", False), ("channel", True)):
        digest = digest_of(consortium.folder / f"out-{name}")
        wanted = [
            ("asked study", "waiting"),
            ("approve", "approved"),
            (f"answer {JOIN}", "ok"),
            *((f"answer {TRAIN} {number}", "ok") for number in range(1, ROUNDS + 1)),
            *([(f"answer {RELEASE}", "ok")] if channel else []),
        ]
        for site in SITES:
            found = logged(consortium, site, digest)
            assert in_order(wanted, found), (site, name, found)
            assert (f"answer {JOIN}", "awaiting-approval") in found
            assert sum(action.startswith(f"answer {TRAIN}") for action, _ in found) == ROUNDS
            # What it made for sending, it sent: as many as its ledger holds.
            made = [action for action, _ in found if action.startswith(("trained", "released"))]
            assert len(made) == len(events_of(consortium, site, digest)) == ROUNDS + channel


def test_a_site_that_denies_is_named_and_the_others_go_on(consortium: Consortium) -> None:
    lengths = {site: len(ledger(consortium, site)) for site in SITES}
    out = launch(consortium, "without", TWO_SITES)
    digest = ask_steward(consortium, "clara", "study")
    let_expire(consortium, "clara", digest)
    # The coordinator asks again, and the request waits anew.
    again, _ = decide(consortium, "clara", "study", "deny", "not covered by vote 2026-17")
    assert again == digest
    approve_study(consortium, SITES[:2])
    consortium.finished(out, "launch-without", 120)
    assert "without clara: denied" in consortium.log("launch-without")
    assert consortium.status()["study"]["missing"] == {"clara": "denied"}
    sites = json.loads((out / "sites.json").read_text())
    assert set(sites["joined"]) == {"anna", "berta"} and sites["not_joined"] == {"clara": "denied"}
    assert "clara" in (out / "report.html").read_text() and "denied" in (out / "report.html").read_text()
    assert "clara" not in json.dumps(json.loads((out / "privacy.json").read_text())["entries"])
    for site, rounds in (("anna", ROUNDS), ("berta", ROUNDS), ("clara", 0)):
        assert len(ledger(consortium, site)) == lengths[site] + rounds
    found = logged(consortium, "clara", digest)
    wanted = [
        ("asked study", "waiting"),
        ("asked study", "expired, waiting anew"),
        ("deny", "denied"),
        (f"answer {JOIN}", "denied"),
    ]
    assert in_order(wanted, found), found
    denial = next(e for e in read_audit(consortium.folder / "clara" / "state" / AUDIT_LOG) if e["action"] == "deny")
    assert (denial["by"], denial["reason"]) == ("Dr. A. Example", "not covered by vote 2026-17")


def let_expire(made: Consortium, site: str, digest: str) -> None:
    """Move a request's dates fifteen days back, as if nobody had looked."""
    state = load_site(made.folder / site / "site.toml").site.state
    path = state / "approvals" / f"study-{digest}.request.json"
    request = json.loads(path.read_text())
    for name in ("first_seen", "expires"):
        request[name] = (datetime.fromisoformat(request[name]) - timedelta(days=15)).astimezone(UTC).isoformat()
    write_atomic(path, json.dumps(request, indent=1))


def test_every_log_and_ledger_holds(consortium: Consortium) -> None:
    with ThreadPoolExecutor(2) as hands:
        list(hands.map(lambda site: verify_site(consortium, site), SITES))
    cohortium("audit-log", "verify", "--consortium", consortium.home)


def verify_site(made: Consortium, site: str) -> None:
    toml = made.folder / site / "site.toml"
    assert "the chain holds" in cohortium_site("audit", "verify", "--site", toml).stdout
    cohortium_site("ledger", "verify", "--site", toml)
