import hashlib
import json
import math
import sqlite3
import sys
from contextlib import closing
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.cli import main
from common.errors import ExitCode
from common.privacy.accountant import account
from common.privacy.events import BoundedInfluence, ChannelRelease, Event, GaussianUpdate, SampledGaussianSteps
from common.privacy.ledger import Ledger
from common.privacy.ledger_keys import load_key, public_hex, sign_head
from common.schema import parse_schema
from common.signing import sign
from common.study import Protocol, Study

HOSTILE = "<script>alert(1)</script>"
COORDINATOR = Ed25519PrivateKey.generate()
NOISY: list[Event] = [GaussianUpdate(n, 0.5, 20.0, 0.25) for n in (1, 2, 3)]
STEPS: list[Event] = [SampledGaussianSteps(n, 10, 0.1, 4.0) for n in (1, 2, 4)]


def protocol(name: str, delta: float) -> Protocol:
    schema = parse_schema({"fields": [{"name": "sex", "type": "string", "constraints": {"enum": ["f", "m"]}}]})
    study = {"study": {"name": name, "schema": "s.json"}, "privacy": {"delta": delta}}
    return Protocol(Study.model_validate(study), schema)


class Hospital:
    """A site with a ledger of two studies, one of which it knows by name."""

    def __init__(self, folder: Path, *studies: tuple[str, list[Event]]) -> None:
        self.known = protocol("heart", 1e-6)
        self.folder, self.state = folder, folder / "state"
        (folder / "site.toml").write_text('[site]\nname = "anna"\ndata = "none.csv"\nstate = "state"\n')
        accepted = self.state / "studies" / self.known.digest[:32]
        accepted.mkdir(parents=True)
        (accepted / "protocol.json").write_text(json.dumps(self.known.to_json()))
        with Ledger(self.ledger, "anna") as ledger:
            for digest, events in studies or ((self.known.digest, NOISY), ("f" * 64, STEPS)):
                for event in events:
                    ledger.record(digest, event, "d" * 64)
            head = ledger.head()
            signature = sign_head("countersignature", COORDINATOR, "anna", head.length, head.head)
            ledger.countersigned(public_hex(COORDINATOR), head.length, head.head, signature)

    @property
    def ledger(self) -> Path:
        return self.state / "ledger.sqlite"


@pytest.fixture
def hospital(tmp_path: Path) -> Hospital:
    return Hospital(tmp_path)


class Command:
    """`cohortium-site ledger …` in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *arguments: object, code: int = ExitCode.OK) -> tuple[str, str]:
        self.monkeypatch.setattr(sys, "argv", ["cohortium-site", "ledger", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        captured = self.capsys.readouterr()
        assert caught.value.code == code, captured.err
        return captured.out, captured.err


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(monkeypatch, capsys)


def test_the_statement_says_what_was_spent(hospital: Hospital, command: Command) -> None:
    out, err = command("show", "--site", hospital.folder / "site.toml", "--json")
    document = json.loads(out)
    assert err == "" and (document["site"], document["length"], document["warnings"]) == ("anna", 6, [])
    known, unknown = document["studies"]
    assert (known["name"], known["delta"], known["delta_from"]) == ("heart", 1e-6, "the study")
    assert known["events"] == [
        {
            "type": "GaussianUpdate",
            "count": 3,
            "rounds": "rounds 1 to 3",
            "constants": {"update_norm": 0.5, "noise_multiplier": 20.0, "weight": 0.25},
        }
    ]
    assert unknown["delta"] == 1e-5 and "not at hand" in unknown["delta_from"]
    assert unknown["events"][0]["rounds"] == "rounds 1 to 4, not all"
    for study, events in ((known, NOISY), (unknown, STEPS)):
        found = {line["adversary"]: line for line in study["guarantees"]}
        assert set(found) == {"public", "member", "coordinator"}
        for line in found.values():
            assert line["epsilon"] == pytest.approx(account(events, study["delta"]).epsilon, rel=1e-12)
            assert line["unit"] == "one patient" and "replacing the content" in line["relation"] and line["basis"]
    whole = account(NOISY, 1e-6, other_studies=[STEPS]).epsilon
    assert [line["epsilon"] for line in document["total"]] == pytest.approx([whole] * 3, rel=1e-12)
    assert whole > max(line["epsilon"] for study in document["studies"] for line in study["guarantees"])
    assert document["witnesses"][0]["length"] == 6


def test_the_text_holds_the_same_numbers(hospital: Hospital, command: Command) -> None:
    out, _ = command("show", "--ledger", hospital.ledger)
    document = json.loads(command("show", "--ledger", hospital.ledger, "--json")[0])
    for study in document["studies"]:
        for line in study["guarantees"]:
            assert f"against {line['adversary']}: epsilon {line['epsilon']:.4g}, delta {line['delta']:g}" in out
    for word in (
        "heart",
        "3 x GaussianUpdate",
        "noise_multiplier = 20.0",
        "Total of the site over 2 studies",
        "basis:",
    ):
        assert word in out
    assert "relation: replacing the content" in out and "up to entry 6" in out


def test_keys_are_named_as_releases_and_enrolments_name_them(hospital: Hospital, command: Command) -> None:
    keys = {"coordinator": COORDINATOR, "site": load_key(hospital.state / "ledger.key")}
    raw = {name: key.public_key().public_bytes_raw() for name, key in keys.items()}
    ids = {name: hashlib.sha256(value).hexdigest() for name, value in raw.items()}
    export = hospital.folder / "ledger.html"
    command("export", "--ledger", hospital.ledger, "--out", export)
    shown = command("show", "--ledger", hospital.ledger)[0]
    for text in (shown, command("verify", "--ledger", hospital.ledger)[0], export.read_text()):
        assert ids["coordinator"] in text and ids["site"] in text
        assert raw["coordinator"].hex() not in text and raw["site"].hex() not in text
    envelope = sign({"a": 1}, COORDINATOR)
    assert envelope["signatures"][0]["keyid"] == ids["coordinator"], "what a release says"
    for name in ("show", "verify"):
        document = json.loads(command(name, "--ledger", hospital.ledger, "--json")[0])
        (witness,) = document["witnesses"]
        assert (witness["key"], witness["key_id"]) == (raw["coordinator"].hex(), ids["coordinator"])
        assert (document["key"], document["key_id"]) == (raw["site"].hex(), ids["site"])


def test_an_infinite_epsilon_is_said_in_words(tmp_path: Path, command: Command) -> None:
    hospital = Hospital(tmp_path, ("a" * 64, NOISY), ("b" * 64, [BoundedInfluence(1, 0.5, 0.25)]))
    document = json.loads(command("show", "--ledger", hospital.ledger, "--json")[0])
    assert [line["epsilon"] for line in document["total"]] == ["infinity"] * 3
    assert math.isfinite(document["studies"][0]["guarantees"][0]["epsilon"])
    out, _ = command("show", "--ledger", hospital.ledger)
    assert "against coordinator: epsilon infinity" in out and "T2" in out


def test_a_conditional_line_is_marked_as_one(tmp_path: Path, command: Command) -> None:
    release = ChannelRelease(1, 50, 200, 2.0, 3.0, 0.1, 8.0, all_coordinates_noised=True)
    hospital = Hospital(tmp_path, ("a" * 64, [release]))
    out, _ = command("show", "--ledger", hospital.ledger)
    assert "conditional on the encoder and decoder, added to nothing" in out and "epsilon infinity" in out


def test_delta_of_a_study_that_is_not_at_hand(hospital: Hospital, command: Command) -> None:
    out, _ = command("show", "--ledger", hospital.ledger, "--json", "--delta", "1e-7")
    document = json.loads(out)
    assert [study["delta"] for study in document["studies"]] == [1e-6, 1e-7]
    assert {line["delta"] for line in document["total"]} == {1e-7}
    (hospital.state / "studies" / hospital.known.digest[:32] / "protocol.json").write_text(
        json.dumps(protocol("another", 1e-3).to_json())
    )
    document = json.loads(command("show", "--ledger", hospital.ledger, "--json")[0])
    assert [study["delta"] for study in document["studies"]] == [1e-5, 1e-5], "a swapped protocol is not believed"


def test_verify_says_what_it_checked(hospital: Hospital, command: Command) -> None:
    out, err = command("verify", "--site", hospital.folder / "site.toml")
    for word in ("the file", "the chain: 6 entries", "what the site signed last", "the site's own key"):
        assert word in out
    assert "has countersigned the first 6 entries" in out and "Verdict: the ledger of site anna holds." in out
    document = json.loads(command("verify", "--ledger", hospital.ledger, "--json")[0])
    assert document["holds"] is True and document["length"] == 6 and document["key_compared"] is True
    assert err == "" and document["warnings"] == [] and document["witnesses"][0]["length"] == 6


def test_verify_of_a_copy_without_key_says_so(hospital: Hospital, command: Command, tmp_path: Path) -> None:
    copy = tmp_path / "copy.sqlite"
    copy.write_bytes(hospital.ledger.read_bytes())
    out, _ = command("verify", "--ledger", copy)
    assert "only the public key in the ledger was at hand" in out
    assert not (tmp_path / "copy.key").exists()


def edit(path: Path, statement: str) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute(statement)


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("DELETE FROM spends WHERE sequence = 6", "truncated: 6 entries were signed and 5 are there"),
        ("UPDATE spends SET payload_digest = 'x' WHERE sequence = 2", "entry 2 does not fit the chain"),
        ("UPDATE header SET value = 'berta' WHERE key = 'site'", "belongs to site 'berta', not to 'anna'"),
        ("UPDATE header SET value = '3' WHERE key = 'format'", "ledger format 3"),
        (f"UPDATE header SET value = '{'0' * 64}' WHERE key = 'key'", "signed by another key"),
        ("UPDATE witnesses SET length = 7", "countersignature does not hold"),
    ],
)
def test_a_ledger_that_does_not_hold(hospital: Hospital, command: Command, statement: str, expected: str) -> None:
    edit(hospital.ledger, statement)
    site = hospital.folder / "site.toml"
    for arguments in (("verify",), ("show",), ("show", "--json"), ("export", "--out", hospital.folder / "x.html")):
        out, err = command(*arguments, "--site", site, code=ExitCode.LEDGER)
        assert out == "" and expected in err and "Traceback" not in err
    out, err = command("verify", "--site", site, "--json", code=ExitCode.LEDGER)
    document = json.loads(out)
    assert document["holds"] is False and expected in document["problem"] and expected in err
    assert not (hospital.folder / "x.html").exists()


def test_no_command_makes_a_ledger(tmp_path: Path, command: Command) -> None:
    (tmp_path / "site.toml").write_text('[site]\nname = "anna"\ndata = "none.csv"\nstate = "state"\n')
    for arguments in (("--ledger", tmp_path / "none.sqlite"), ("--site", tmp_path / "site.toml")):
        _, err = command("verify", *arguments, code=ExitCode.LEDGER)
        assert "there is no ledger" in err
    assert [path.name for path in tmp_path.iterdir()] == ["site.toml"]


@pytest.mark.parametrize("arguments", [(), ("--ledger", "a", "--site", "b"), ("--ledger", "a", "--delta", "1.5")])
def test_wrong_usage(command: Command, arguments: tuple[str, ...]) -> None:
    out, err = command("show", *arguments, code=ExitCode.USAGE)
    assert out == "" and err.startswith("error: ")


def test_an_empty_ledger_says_that_nothing_was_spent(tmp_path: Path, command: Command) -> None:
    Hospital(tmp_path, ("a" * 64, []))
    out, _ = command("show", "--site", tmp_path / "site.toml")
    assert "0 entries" in out and "nothing has been spent" in out
    command("export", "--site", tmp_path / "site.toml", "--out", tmp_path / "x.html")
    assert "Nothing has been spent" in (tmp_path / "x.html").read_text()


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += " ".join(data.split()) + " "


def test_the_page_is_self_contained_escaped_and_complete(tmp_path: Path, command: Command) -> None:
    hospital = Hospital(tmp_path, ("a" * 64, NOISY), (HOSTILE, STEPS))
    out, _ = command("export", "--ledger", hospital.ledger, "--out", tmp_path / "ledger.html")
    assert "6 entries" in out
    text = (tmp_path / "ledger.html").read_text()
    page = Page(text)
    assert HOSTILE not in text and HOSTILE in page.text
    assert not page.tags & {"script", "img", "iframe", "object", "embed", "link", "base", "form", "a"}
    assert not [name for name, _ in page.attributes if name in ("src", "href", "action") or name.startswith("on")]
    assert "url(" not in text and "@import" not in text and "@media print" in text
    with Ledger(hospital.ledger) as ledger:
        for entry in ledger.entries():
            assert entry.hash in page.text and entry.recorded_at in page.text
    whole = account([], 1e-5, other_studies=[NOISY, STEPS])
    assert f"{whole.epsilon:.4g}" in page.text and "coordinator" in page.text and "the chain: 6 entries" in page.text


def test_the_json_export_holds_every_entry(hospital: Hospital, command: Command) -> None:
    path = hospital.folder / "ledger.json"
    command("export", "--site", hospital.folder / "site.toml", "--format", "json", "--out", path)
    document: dict[str, Any] = json.loads(path.read_text())
    shown = json.loads(command("show", "--ledger", hospital.ledger, "--json")[0])
    assert {name: document[name] for name in shown} == shown
    with Ledger(hospital.ledger) as ledger:
        assert [entry["hash"] for entry in document["entries"]] == [entry.hash for entry in ledger.entries()]
    assert document["entries"][0]["event"]["type"] == "GaussianUpdate"
    _, err = command("export", "--ledger", hospital.ledger, "--out", hospital.ledger / "x", code=ExitCode.OUTPUT)
    assert "cannot be written" in err


def test_a_clock_that_went_backwards_is_a_warning(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    days = iter((11, 10, 10, 10))
    monkeypatch.setattr("common.privacy.ledger._now", lambda: f"2026-03-{next(days):02d}T00:00:00+00:00")
    hospital = Hospital(tmp_path, ("a" * 64, NOISY))
    out, _ = command("verify", "--ledger", hospital.ledger)
    assert "Warning: entry 2 is dated 2026-03-10" in out and "Verdict: the ledger of site anna holds." in out
    assert "Warning: entry 2" in command("show", "--ledger", hospital.ledger)[0]
