"""A release made of a small run's raw results: real ledgers, decoder and cohort, without Flower in between."""

import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from rich.console import Console

from common.encoding import TableEncoding
from common.errors import ExitCode, OutputError, VerifyError
from common.generation import sample_prior
from common.privacy.events import BoundedInfluence, ChannelRelease
from common.privacy.ledger import Ledger
from common.schema import parse_schema
from common.signing import public_pem
from common.study import Protocol, Study
from common.table import Table
from server.checkpoint import build_decoder, save_checkpoint
from server.cohort import write_cohort
from server.gating import GateError
from server.progress import summary_table
from server.release import (
    SIMULATION_KEY,
    release_simulation,
    released_files,
    sign_release,
    verify_release,
    write_statement,
)
from server.run import RunFiles
from server.simulation import SimulationResult

HOSTILE = "<script>alert(1)</script>"
IMAGE = '<img src="http://evil.example/x.png" onerror=alert(2)>'
PATIENTS = {"anna": 60, "berta": 40}


def make_protocol(column: str = "age", level: str = "m") -> Protocol:
    schema = {
        "cohortium:target": "dead",
        "fields": [
            {"name": column, "type": "number", "constraints": {"minimum": 0, "maximum": 100}},
            {"name": "sex", "type": "string", "constraints": {"enum": ["f", level]}},
            {"name": "dead", "type": "boolean", "constraints": {"required": True}},
        ],
    }
    study: dict[str, Any] = {
        "study": {"name": "small", "schema": "schema.json", "seed": 3},
        "model": {"latent_dim": 2, "hidden": [8], "decoder_lipschitz": 12.0},
        "training": {"rounds": 2, "update_norm": 0.5},
        "release": {"rows": 200},
    }
    return Protocol(Study.model_validate(study), parse_schema(schema))


def make_table(protocol: Protocol, rows: int, seed: int) -> Table:
    random = np.random.default_rng(seed)
    age = random.uniform(0, 100, rows)
    sex = random.integers(0, 2, rows).astype(float)
    age[::9] = np.nan
    return Table(protocol.schema, np.column_stack([age, sex, (random.random(rows) < 0.4).astype(float)]))


def make_result(
    out: Path, protocol: Protocol, extra_sites: dict[str, str] | None = None, channel: ChannelRelease | None = None
) -> SimulationResult:
    """What `simulate` leaves behind; with `channel` every site released its rows through it."""
    files, total = RunFiles(out), sum(PATIENTS.values())
    out.mkdir()
    decoder = build_decoder(protocol, 0)
    lines = []
    for number in (1, 2):
        dropped = extra_sites or {}
        lines.append(
            {
                "round": number,
                "answered": sorted(PATIENTS),
                "dropped": dropped if number == 2 else {},
                "certificate": decoder.certificate(),
                "step_norm": 0.1,
                "seconds": 0.5,
                "server_seconds": 0.1,
            }
        )
    files.rounds.write_text("".join(json.dumps(line) + "\n" for line in lines))
    joined = {site: {"patients": n, "weight": n / total} for site, n in PATIENTS.items()}
    files.sites.write_text(json.dumps({"joined": joined, "not_joined": extra_sites or {}}))
    files.study.write_text(json.dumps(protocol.to_json()))
    save_checkpoint(files.decoder, protocol, 2, decoder)
    for site, n in PATIENTS.items():
        with Ledger(files.ledgers / f"{site}.sqlite", site) as ledger:
            for number in (1, 2):
                ledger.record(protocol.digest, BoundedInfluence(number, 0.5, n / total), "d" * 64)
            if channel is not None:
                ledger.record(protocol.digest, channel, "e" * 64)
        (files.ledgers / f"{site}.key").unlink()  # the key stays at the site
    tables = sample_prior(decoder, TableEncoding(protocol.schema), protocol.study.release.rows, 0)
    write_cohort(tables, protocol.schema, files.cohort_csv, files.cohort_parquet, protocol.markers)
    return SimulationResult(protocol, files, make_table(protocol, total, 1), {"federation": 1.0}, PATIENTS)


# Noise multiplier 1 at 50 patients drawn from.
CHANNEL = ChannelRelease(3, 100, 50, 4.0, 4.0, 0.0, 12.0, False)


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("release") / "out"
    protocol = make_protocol(column=f"age {IMAGE}", level=f"m{HOSTILE}")
    result = make_result(out, protocol, {HOSTILE: f"data-unusable {IMAGE}"})
    return out, release_simulation(result, make_table(protocol, 80, 2))


class Page(HTMLParser):
    """Tags and attributes of a page as a browser would see them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += " ".join(data.split()) + " "


def test_everything_that_is_released_verifies(release: tuple[Path, dict[str, Any]]) -> None:
    out, summary = release
    statement = verify_release(out, None)
    names = {subject["name"] for subject in statement["subject"]}
    assert names == {"README.txt", *(path.name for path in released_files(RunFiles(out)))}
    assert names == {
        "README.txt", "cohort.csv", "cohort.parquet", "croissant.json", "gates.json", "metrics.json", "privacy.json",
        "report.html", "ro-crate-metadata.json", "rounds.jsonl", "schema.json", "sites.json", "study.json",
    }  # fmt: skip
    assert statement["predicate"]["simulation"] is True and statement["predicate"]["study"] == summary["study_digest"]
    marked = {
        "cohortium_study": "small",
        "cohortium_release": summary["study_digest"][:16],
        "cohortium_synthetic": True,
    }
    assert statement["predicate"]["markers"] == marked
    for site in PATIENTS:
        with Ledger(out / "ledgers" / f"{site}.sqlite", site) as ledger:
            length, head = ledger.verify()
        assert statement["predicate"]["ledgers"][site] == {"length": length, "head": head}


@pytest.mark.parametrize(
    "name",
    ["README.txt", "cohort.csv", "cohort.parquet", "croissant.json", "gates.json", "metrics.json", "privacy.json",
     "report.html", "ro-crate-metadata.json", "rounds.jsonl", "schema.json", "sites.json", "study.json"],
)  # fmt: skip
@pytest.mark.parametrize("where", [0.0, 0.5, 1.0])
def test_one_flipped_bit_is_found_and_named(release: tuple[Path, dict[str, Any]], name: str, where: float) -> None:
    path = release[0] / name
    content = path.read_bytes()
    position = round(where * (len(content) - 1))
    try:
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        with pytest.raises(VerifyError) as caught:
            verify_release(release[0], None)
    finally:
        path.write_bytes(content)
    assert "1 file(s)" in str(caught.value) and f"{name}: changed after signing" in str(caught.value)
    assert caught.value.exit_code is ExitCode.VERIFY
    verify_release(release[0], None)


def test_a_missing_file_and_a_longer_one_are_both_named(release: tuple[Path, dict[str, Any]]) -> None:
    csv, rounds = release[0] / "cohort.csv", release[0] / "rounds.jsonl"
    content, lines = csv.read_bytes(), rounds.read_bytes()
    try:
        csv.unlink()
        rounds.write_bytes(lines + b"\n")
        with pytest.raises(VerifyError, match="2 file") as caught:
            verify_release(release[0], None)
    finally:
        csv.write_bytes(content)
        rounds.write_bytes(lines)
    assert "cohort.csv: missing" in str(caught.value) and "rounds.jsonl: changed" in str(caught.value)


def test_a_manifest_changed_after_signing_is_refused(release: tuple[Path, dict[str, Any]]) -> None:
    path = release[0] / "manifest.dsse.json"
    content = path.read_text()
    envelope = json.loads(content)
    statement = json.loads(base64.b64decode(envelope["payload"]))
    statement["subject"][0]["digest"]["sha256"] = "0" * 64
    forged = envelope | {"payload": base64.b64encode(json.dumps(statement).encode()).decode()}
    try:
        for text, expected in (
            (json.dumps(forged), "does not hold"),
            (json.dumps(envelope | {"signatures": []}), "not signed by the key"),
            (json.dumps({"payload": 3}), "not a DSSE envelope"),
            ("{", "no readable manifest"),
        ):
            path.write_text(text)
            with pytest.raises(VerifyError, match=expected):
                verify_release(release[0], None)
        path.unlink()
        with pytest.raises(VerifyError, match="no readable manifest"):
            verify_release(release[0], None)
    finally:
        path.write_text(content)


def test_another_key_does_not_fit(release: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "other.pub").write_bytes(public_pem(Ed25519PrivateKey.generate().public_key()))
    with pytest.raises(VerifyError, match="not signed by the key"):
        verify_release(release[0], tmp_path / "other.pub")
    assert verify_release(release[0], release[0] / SIMULATION_KEY)["subject"]


def test_no_private_key_is_left(release: tuple[Path, dict[str, Any]]) -> None:
    for path in release[0].rglob("*"):
        assert path.is_dir() or b"PRIVATE KEY" not in path.read_bytes()


def test_the_report_escapes_what_people_wrote(release: tuple[Path, dict[str, Any]]) -> None:
    text = (release[0] / "report.html").read_text()
    assert HOSTILE not in text and IMAGE not in text and "<script" not in text.lower()
    page = Page(text)
    assert not page.tags & {"script", "img", "iframe", "object", "embed", "link", "base", "form"}
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert HOSTILE in page.text and IMAGE in page.text  # shown as text, not lost


def test_the_report_needs_no_network(release: tuple[Path, dict[str, Any]]) -> None:
    text = (release[0] / "report.html").read_text()
    loading = {"src", "href", "xlink:href", "data", "poster", "action", "srcset", "background"}
    references = [value for _, name, value in Page(text).attributes if name in loading]
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in references)
    assert all(target.startswith("#") for target in re.findall(r"url\(\s*[\"']?([^)\"']+)", text))
    assert "@import" not in text and "@font-face" not in text


def test_the_report_says_that_epsilon_is_infinite(release: tuple[Path, dict[str, Any]]) -> None:
    text = Page((release[0] / "report.html").read_text()).text
    assert "ε is infinite, for one patient, against every adversary" in text
    assert all(adversary in text for adversary in ("public", "member", "coordinator"))
    assert "Un-noised evaluation aggregates" in text and "n = 100 patients" in text


def test_the_summary_says_what_happened(release: tuple[Path, dict[str, Any]]) -> None:
    out, summary = release
    assert (summary["rounds"], summary["rows"], summary["epsilon"]) == (2, 200, "infinity")
    assert summary["not_joined"] == {HOSTILE: f"data-unusable {IMAGE}"}
    assert summary["certificate"] <= summary["certificate_bound"] == 12.0
    assert set(summary["files"]) == {path.name for path in out.iterdir()}
    assert all(purpose for purpose in summary["files"].values())
    assert summary["exposure"]["anna"]["largest_move_of_decoder_per_round"] == pytest.approx(2 * 0.6 * 0.5)
    json.dumps(summary, allow_nan=False)


def test_a_run_without_held_out_patients_says_why_there_is_no_utility(tmp_path: Path) -> None:
    protocol = make_protocol()
    summary = release_simulation(make_result(tmp_path / "out", protocol), None)
    assert summary["utility"] is None
    assert "not measured: no test table was given" in Page((tmp_path / "out" / "report.html").read_text()).text
    verify_release(tmp_path / "out", None)


def test_an_edited_ledger_stops_the_release(tmp_path: Path) -> None:
    import sqlite3

    result = make_result(tmp_path / "out", make_protocol())
    database = sqlite3.connect(result.files.ledgers / "anna.sqlite")
    database.execute("DELETE FROM spends WHERE sequence = 1")
    database.commit()
    database.close()
    with pytest.raises(GateError, match=r"(?s)ledgers: .*does not fit the chain.*ledgers cannot be overridden"):
        release_simulation(result, None)
    assert not result.files.manifest.exists() and not result.files.report.exists()


@pytest.mark.parametrize(("column", "level"), [("$\\frac$", "m"), ("age", "$\\frac$"), ("cost $x_{$", "m")])
def test_dollar_signs_are_no_mathematics(tmp_path: Path, column: str, level: str) -> None:
    release_simulation(make_result(tmp_path / "out", make_protocol(column, level)), None)
    assert column in Page((tmp_path / "out" / "report.html").read_text()).text


def screen(summary: dict[str, Any]) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(summary_table(summary))
    return captured.get()


def test_a_channel_release_is_told_in_report_screen_and_bundle(tmp_path: Path) -> None:
    result = make_result(tmp_path / "out", make_protocol(), channel=CHANNEL)
    (tmp_path / "out" / "release.json").write_text(
        json.dumps({"method": "channel", "rows": {"anna": 100, "berta": 100}})
    )
    summary = release_simulation(result, None)
    text = Page(result.files.report.read_text()).text
    assert "and 200 rows through the stochastic channel" in text and "anna: 100" in text and "berta: 100" in text
    assert "conditional on the encoder and decoder" in text and "σ_z/Δ = 1" in text
    assert "This line holds only given the encoder and decoder" in text
    signed = {subject["name"] for subject in verify_release(result.files.out, None)["subject"]}
    assert "release.json" in signed and "cohort" in summary["files"]["release.json"]
    assert [(line["applies_to"], line["conditional"]) for line in summary["lines"]] == [
        ("every patient", False),
        ("every patient", True),
    ]
    shown = screen(summary)
    assert "200 through the stochastic channel (anna 100, berta 100)" in shown
    assert "infinity: every patient" in shown and "every patient, conditional on the encoder and decoder" in shown
    json.dumps(summary, allow_nan=False)


def test_roles_give_two_lines_in_report_and_screen(tmp_path: Path) -> None:
    result = make_result(tmp_path / "out", make_protocol(), channel=replace(CHANNEL, role="release"))
    shown = screen(release_simulation(result, None))
    text = Page(result.files.report.read_text()).text
    assert "ε is infinite for fit patients (the updates carry no noise)" in text and "release patients" in text
    assert "infinity: fit patients" in shown and "release patients" in shown


def test_without_a_channel_release_nothing_is_said_of_one(release: tuple[Path, dict[str, Any]]) -> None:
    text = (release[0] / "report.html").read_text()
    shown = screen(release[1])
    assert "through the" not in text and "channel" not in text and "applies to" not in text
    assert "channel" not in shown and "largest ε" not in shown


def test_a_statement_that_does_not_fit_its_schema_is_not_released(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.release.privacy_statement", lambda *_, **__: {"schema_version": 3})
    result = make_result(tmp_path / "out", make_protocol())
    with pytest.raises(OutputError, match=r"does not fit its schema: study: Field required"):
        release_simulation(result, None)
    assert not result.files.privacy.exists() and not result.files.manifest.exists()
    with pytest.raises(OutputError):
        write_statement(tmp_path / "privacy.json", {})


@pytest.mark.parametrize("change", ["negative", "NaN", "text"])
def test_a_signed_statement_that_does_not_fit_is_refused(tmp_path: Path, change: str) -> None:
    result = make_result(tmp_path / "out", make_protocol())
    release_simulation(result, None)
    document = json.loads(result.files.privacy.read_text())
    document["entries"][0]["lines"][0]["epsilon"] = -1.0 if change == "negative" else float("nan")
    result.files.privacy.write_text("no JSON" if change == "text" else json.dumps(document))
    sign_release(result.files, result.protocol, {})
    with pytest.raises(VerifyError, match="it is not JSON" if change == "text" else r"entries\.0\.lines\.0\.epsilon"):
        verify_release(result.files.out, None)


def test_a_bundle_without_a_statement_still_verifies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = make_result(tmp_path / "out", make_protocol())
    release_simulation(result, None)
    without = [path for path in released_files(result.files) if path != result.files.privacy]
    monkeypatch.setattr("server.release.released_files", lambda _: without)
    sign_release(result.files, result.protocol, {})
    result.files.privacy.write_text("{}")
    with pytest.raises(VerifyError, match=r"privacy\.json: not in the manifest"):
        verify_release(result.files.out, None)
    result.files.privacy.unlink()
    verify_release(result.files.out, None)
