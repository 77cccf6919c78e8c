"""What the steward sees and decides."""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from client.budget import Budget
from client.bundles import (
    LARGEST_CONTENT,
    BundleStore,
    differences,
    installed_files,
    list_files,
    printable,
    read_bundle,
)
from client.review import Review, render, render_list, what_leaves
from client.start_commands import app
from common.audit import read_audit
from common.errors import CohortiumError, OutputError, SiteError
from common.evaluation.plan import count_plan
from common.messages import JOIN, Status
from common.study import Protocol
from server.bundle import build_bundle
from tests.client.hospital import MARKED, PROTOCOL, SECRET, join_request, study, train_request
from tests.client.steward import BUNDLE, Stewarded, digest_of


def pack(files: Mapping[str, str | bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name, (2024, 1, 1, 0, 0, 0)), content)
    return buffer.getvalue()


@pytest.fixture
def site(tmp_path: Path) -> Stewarded:
    return Stewarded(tmp_path / "anna", "max_epsilon_per_study = 2.0")


def asked_for(site: Stewarded, protocol: Protocol) -> Review:
    """The review of a site that was asked for one study, its bundle being approved."""
    site.judge(JOIN, join_request(protocol))
    site.decide("bundle", digest_of(BUNDLE))
    site.judge(JOIN, join_request(protocol))
    return Review(site.hospital.config)


def test_a_study_in_plain_words(site: Stewarded) -> None:
    protocol = study(training={"mode": "dpsgd", "update_norm": 0.5}, privacy={"epsilon": 3.0}, release={"rows": 77})
    review = asked_for(site, protocol)
    text = "\n".join(render(review.details(review.find(protocol.digest[:8]))))
    for expected in (
        "Study s: mode dpsgd, 3 rounds",
        "age: number, 0 to 120",
        "sex: categorical, f, m",
        "in each of 3 rounds: one update of the decoder, trained with DP-SGD and projected onto Euclidean norm 0.5",
        "the coordinator samples 77 rows",
        "What the cohort has to show before it is released:",
        "budget: no limit on epsilon is declared",
        "(40 patients)",
        "mode 'dpsgd' is not among the allowed modes",
        "more than this site allows: max_epsilon_per_study",
    ):
        assert expected in text
    assert MARKED not in text and SECRET not in text
    found = review.details(review.find(protocol.digest))["cost"]
    assert 2.5 < found["epsilon"] <= 3.0 and found["epsilon_with_all_studies"] == found["epsilon"]
    whole = Budget(protocol, 40, math.inf).approve([]).epsilon
    assert whole <= found["epsilon"] <= whole + 1e-6  # rounded up: it is read as a bound
    assert "against the coordinator, who sees most; relation: replacing the content of one patient slot" in text
    assert "basis: Poisson-sampled Gaussian mechanism" in text


def test_a_cost_that_cannot_be_said_does_not_hide_the_rest(site: Stewarded) -> None:
    review = asked_for(site, PROTOCOL)
    site.hospital.data.unlink()
    details = review.details(review.find(PROTOCOL.digest))
    assert "cannot be read" in details["cost"]["problem"] and details["columns"]
    json.dumps(details, allow_nan=False)


def test_the_channel_and_withheld_columns_are_named(tmp_path: Path) -> None:
    site = Stewarded(tmp_path / "anna", 'max_release_rows = 100\nwithheld_columns = ["SEX"]')
    protocol = study(release={"rows": 60, "method": "channel"}, channel={"epsilon": 1.5})
    review = asked_for(site, protocol)
    text = "\n".join(render(review.details(review.find(protocol.digest))))
    assert "up to 60 synthetic rows drawn from all patients" in text and "epsilon 1.5" in text
    assert "sex: categorical, f, m, withheld by this site" in text
    assert "What it would cost: epsilon infinity" in text and "for every patient: epsilon infinity" in text
    [rows] = [line for line in text.splitlines() if "its rows by themselves: epsilon" in line]
    assert 1.4 < float(rows.split("epsilon ")[1].split(";")[0]) <= 1.5
    assert "holds only given the encoder and decoder" in rows and "added to no other number" in rows


@pytest.mark.parametrize(
    ("settings", "how"),
    [
        (
            {"method": "accounted", "epsilon": 2.5},
            "with Gaussian noise calibrated to epsilon 2.5 for all of them together",
        ),
        ({"method": "unnoised"}, "no epsilon covers them"),
    ],
)
def test_an_evaluation_is_named_with_what_covers_it(settings: dict[str, Any], how: str) -> None:
    protocol = study(study={"target": "dead"}, evaluation=settings | {"holdout": 0.25, "secrets": ["age"]})
    *_, tables, attacks = what_leaves(protocol)
    plan = count_plan(protocol)
    assert f"{len(plan.tables)} tables" in tables and f"({plan.size} numbers)" in tables and how in tables
    assert "guesses at age" in attacks and "the 25% who are held out" in attacks
    assert not any("compare" in line for line in what_leaves(study()))


def test_a_request_on_disk_that_was_changed_is_not_shown_as_the_study(site: Stewarded) -> None:
    review = asked_for(site, PROTOCOL)
    path = site.state / "approvals" / f"study-{PROTOCOL.digest}.request.json"
    document = json.loads(path.read_text())
    document["content"]["protocol"]["study"]["training"]["rounds"] = 1
    path.write_text(json.dumps(document))
    with pytest.raises(SiteError, match="does not hold the study of this digest"):
        review.details(review.find(PROTOCOL.digest))
    assert any("unreadable" in line for line in render_list(review.listed()))


def test_prefixes(site: Stewarded) -> None:
    review = asked_for(site, PROTOCOL)
    digest = PROTOCOL.digest
    assert review.find(digest[:8].upper()).digest == review.find(f"{digest[:16]}…").digest == digest
    with pytest.raises(SiteError, match="at least 8"):
        review.find(digest[:7])
    with pytest.raises(SiteError, match="not a digest"):
        review.find("../../etc/passwd")
    with pytest.raises(SiteError, match="nothing with this digest"):
        review.find("0" * 12)
    for kind in ("0", "1"):
        review.approvals.ask("study", "ab" * 8 + kind * 48, {})
    with pytest.raises(SiteError, match="2 digests begin so"):
        review.find("ab" * 8)


def test_a_decision_is_signed_and_logged_and_counts_at_once(site: Stewarded) -> None:
    review = asked_for(site, PROTOCOL)
    review.decide(review.find(PROTOCOL.digest), "approved", "Dr. Anna", "ethics vote 7")
    assert site.judge(JOIN, join_request()) is None
    line = read_audit(site.state / "audit.jsonl")[-1]
    assert (line["action"], line["study"], line["outcome"]) == ("approve", PROTOCOL.digest, "approved")
    assert (line["by"], line["reason"]) == ("Dr. Anna", "ethics vote 7")
    review.decide(review.find(PROTOCOL.digest), "denied", "Dr. Anna", "")
    assert site.judge(JOIN, join_request()) is Status.DENIED


def test_what_cannot_be_logged_is_not_approved(site: Stewarded) -> None:
    review = asked_for(site, PROTOCOL)
    (site.state / "audit.jsonl").unlink()
    (site.state / "audit.jsonl").mkdir()
    with pytest.raises(OutputError):
        review.decide(review.find(PROTOCOL.digest), "approved", "Dr. Anna", "")
    assert site.judge(JOIN, join_request()) is Status.AWAITING_APPROVAL


def test_a_bundle_is_compared_with_the_last_approved_one(site: Stewarded) -> None:
    one = pack({"client/app.py": "a = 1\nb = 2\n", "old.py": "x", ".info/CONTENT": "1"})
    two = pack({"client/app.py": "a = 1\nb = 3\n", "new.bin": b"\0\1", ".info/CONTENT": "2"})
    for bundle in (one, two):
        site.judge(JOIN, join_request(), bundle)
    review = Review(site.hospital.config)
    assert "the software installed here" in "\n".join(render(review.details(review.find(digest_of(two)))))
    review.decide(review.find(digest_of(one)), "approved", "me", "")
    details = review.details(review.find(digest_of(two)))
    found = {line["file"]: line for line in details["differences"]}
    assert {name: line["change"] for name, line in found.items()} == {
        "client/app.py": "changed",
        "old.py": "removed",
        "new.bin": "added",
    }
    assert "-b = 2" in found["client/app.py"]["diff"] and "+b = 3" in found["client/app.py"]["diff"]
    assert {file["file"]: file["bytes"] for file in details["files"]}["new.bin"] == 2
    text = "\n".join(render(details))
    assert digest_of(one) in text and "-b = 2" in text and "never run" in text
    review.decide(review.find(digest_of(two)), "denied", "me", "")
    assert BundleStore(site.state).load(digest_of(two)) is None and BundleStore(site.state).load(digest_of(one)) == one


def test_the_coordinators_bundle_of_this_version_differs_in_nothing() -> None:
    found = differences(installed_files(), read_bundle(build_bundle().content))
    assert [(line.change, line.name) for line in found] == [("added", "pyproject.toml")]


def test_the_steward_reads_that_a_bundle_is_what_he_installed(site: Stewarded) -> None:
    built = build_bundle().content
    files = dict(read_bundle(built))
    files["client/app.py"] += b"# one line more\n"
    said = "Every file of code is the one installed here"
    for bundle, same in ((built, True), (pack(files), False)):
        site.judge(JOIN, join_request(), bundle)
        review = Review(site.hospital.config)
        text = "\n".join(render(review.details(review.find(digest_of(bundle)))))
        assert (said in text) == same and ("changed  client/app.py" in text) != same


def test_a_stranger_writes_nothing_into_the_terminal(site: Stewarded) -> None:
    bundle = pack({"a\x1b[2J.py": "x = 1 \x1b]0;owned\x07\n# \u202e reversed\n"})
    site.judge(JOIN, join_request(), bundle)
    review = Review(site.hospital.config)
    text = "\n".join(render(review.details(review.find(digest_of(bundle)))))
    assert "\x1b" not in text and "\x07" not in text and "\u202e" not in text
    assert r"\x1b]0;owned\x07" in text and r"\u202e" in text
    assert printable("ä\tß") == "ä\tß"


def test_archives_that_are_none_or_too_large() -> None:
    for content in (b"", b"PK\3\4 nothing", pack({"a": "b"})[:-30]):
        with pytest.raises(SiteError, match="not a readable zip"):
            read_bundle(content)
    with pytest.raises(SiteError, match="50 MiB"):
        read_bundle(pack({"bomb": b"\0" * (LARGEST_CONTENT + 1)}))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive, pytest.warns(UserWarning):
        archive.writestr("a", "1")
        archive.writestr("a", "2")
    with pytest.raises(SiteError, match="twice"):
        read_bundle(buffer.getvalue())
    assert [file.name for file in list_files(read_bundle(pack({"../../x": "1", "/etc/y": "2"})))] == [
        "../../x",
        "/etc/y",
    ]


def test_a_kept_bundle_that_was_changed_is_not_shown(site: Stewarded) -> None:
    bundle = pack({"a.py": ""})
    site.judge(JOIN, join_request(), bundle)
    BundleStore(site.state).path(digest_of(bundle)).write_bytes(pack({"b.py": ""}))
    review = Review(site.hospital.config)
    assert review.details(review.find(digest_of(bundle)))["files"] == []


def test_the_commands(site: Stewarded) -> None:
    run = CliRunner()
    where = ["--site", str(site.hospital.folder / "site.toml")]
    assert "Nothing waits" in run.invoke(app, ["review", *where]).output
    site.judge(JOIN, join_request())
    listed = json.loads(run.invoke(app, ["review", "--json", *where]).output)
    assert [(line["kind"], line["standing"]) for line in listed] == [("bundle", "waiting")]
    done = run.invoke(app, ["approve", digest_of(BUNDLE)[:10], "--reason", "known", "--by", "Anna", *where])
    assert done.exit_code == 0 and "signed and logged" in done.output
    site.judge(JOIN, join_request())
    shown = run.invoke(app, ["review", PROTOCOL.digest[:9], *where])
    assert shown.exit_code == 0 and "What leaves this site" in shown.output
    json.loads(run.invoke(app, ["review", PROTOCOL.digest[:9], "--json", *where]).output)
    assert json.loads(run.invoke(app, ["deny", PROTOCOL.digest[:9], "--json", "--by", "A", *where]).output) | {
        "verdict": "denied"
    }
    found = run.invoke(app, ["status", "--json", *where])
    status = json.loads(found.output)
    assert found.exit_code == 8 and status["running"] is False and status["waiting"] == [] and status["studies"] == []
    assert "the chain holds" in run.invoke(app, ["audit", "verify", *where]).output
    log = site.state / "audit.jsonl"
    log.write_text(log.read_text().replace('"by": "Anna"', '"by": "Eve"'))
    failed = run.invoke(app, ["audit", "verify", *where])
    assert isinstance(failed.exception, CohortiumError) and failed.exception.exit_code == 11


def test_status_of_a_site_that_trained(tmp_path: Path) -> None:
    site = Stewarded(tmp_path / "anna")
    site.hospital.joined()
    assert site.hospital.train(train_request()).status is Status.OK
    run = CliRunner().invoke(app, ["status", "--site", str(site.hospital.folder / "site.toml")])
    assert "round 1; epsilon infinity" in run.output and "not running" in run.output
