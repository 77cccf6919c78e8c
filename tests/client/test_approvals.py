import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.approvals import WAITING_TIME, Approvals
from common.errors import SiteError

KEY, OTHER = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
ONE, TWO = "a" * 64, "b" * 64
NOW = datetime(2026, 3, 2, 9, 0, tzinfo=UTC)


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def approvals(tmp_path: Path, clock: Clock) -> Approvals:
    return Approvals(tmp_path, "anna", clock)


def test_what_nobody_decided_waits_and_expires(approvals: Approvals, clock: Clock) -> None:
    assert approvals.standing("study", ONE, KEY) == "waiting"
    request = approvals.ask("study", ONE, {"name": "s"})
    assert request.first_seen == "2026-03-02T09:00:00Z" and request.content == {"name": "s"}
    clock.now += WAITING_TIME - timedelta(seconds=1)
    assert approvals.standing("study", ONE, KEY) == "waiting"
    assert approvals.ask("study", ONE, {"name": "changed"}) == request, "asking again does not make it younger"
    clock.now += timedelta(seconds=1)
    assert approvals.standing("study", ONE, KEY) == "expired"
    assert approvals.ask("study", ONE, {}).first_seen == "2026-03-16T09:00:00Z"
    assert approvals.standing("study", ONE, KEY) == "waiting"


def test_decisions_stand_until_replaced_and_do_not_expire(approvals: Approvals, clock: Clock) -> None:
    approvals.ask("study", ONE, {})
    approvals.ask("bundle", ONE, {})
    decision = approvals.decide("study", ONE, "approved", by="steward", reason="ethics vote 12", key=KEY)
    assert approvals.decision("study", ONE, KEY) == decision
    assert approvals.standing("bundle", ONE, KEY) == "waiting", "a study's approval is none of a bundle"
    assert approvals.standing("study", TWO, KEY) == "waiting"
    clock.now += 2 * WAITING_TIME
    assert approvals.standing("study", ONE, KEY) == "approved"
    approvals.decide("study", ONE, "denied", by="steward", reason="", key=KEY)
    assert approvals.standing("study", ONE, KEY) == "denied"


def test_only_what_was_asked_can_be_decided(approvals: Approvals) -> None:
    with pytest.raises(SiteError, match="has been asked for here"):
        approvals.decide("study", ONE, "approved", by="steward", reason="", key=KEY)


def test_requests_are_listed_oldest_first_and_strangers_are_passed_over(approvals: Approvals, clock: Clock) -> None:
    approvals.ask("study", TWO, {})
    clock.now += timedelta(hours=1)
    approvals.ask("bundle", ONE, {})
    (approvals.folder / "study-zz.request.json").write_text("{}")
    (approvals.folder / f"study-{ONE}.request.json").write_text("no JSON")
    assert [(request.kind, request.digest) for request in approvals.requests()] == [("study", TWO), ("bundle", ONE)]


def forged(approvals: Approvals, tmp_path: Path, how: str) -> None:
    """A decision file that must not count."""
    path = approvals.folder / f"study-{ONE}.decision.json"
    if how == "another key":
        approvals.decide("study", ONE, "approved", by="x", reason="", key=OTHER)
    elif how == "another site":
        elsewhere = Approvals(tmp_path / "berta", "berta")
        elsewhere.ask("study", ONE, {})
        elsewhere.decide("study", ONE, "approved", by="x", reason="", key=KEY)
        path.write_bytes((elsewhere.folder / path.name).read_bytes())
    elif how == "another digest":
        approvals.ask("study", TWO, {})
        approvals.decide("study", TWO, "approved", by="x", reason="", key=KEY)
        path.write_bytes((approvals.folder / f"study-{TWO}.decision.json").read_bytes())
    elif how == "another kind":
        approvals.ask("bundle", ONE, {})
        approvals.decide("bundle", ONE, "approved", by="x", reason="", key=KEY)
        path.write_bytes((approvals.folder / f"bundle-{ONE}.decision.json").read_bytes())
    elif how == "edited":
        approvals.decide("study", ONE, "denied", by="x", reason="", key=KEY)
        envelope = json.loads(path.read_text())
        envelope["payload"] = envelope["payload"][:-4] + "AAAA"
        path.write_text(json.dumps(envelope))
    else:
        path.write_text(how)


@pytest.mark.parametrize(
    "how",
    ["another key", "another site", "another digest", "another kind", "edited", "", "[]", '{"verdict": "approved"}'],
)
def test_a_decision_this_site_did_not_sign_is_none(approvals: Approvals, tmp_path: Path, how: str) -> None:
    approvals.ask("study", ONE, {})
    forged(approvals, tmp_path, how)
    with pytest.raises(SiteError, match="not signed by this site's key"):
        approvals.standing("study", ONE, KEY)


@pytest.mark.parametrize("digest", ["", "../" + "a" * 61, "A" * 64, "a" * 63])
def test_a_digest_never_leads_elsewhere(approvals: Approvals, digest: str) -> None:
    with pytest.raises(ValueError, match="SHA-256"):
        approvals.ask("study", digest, {})
