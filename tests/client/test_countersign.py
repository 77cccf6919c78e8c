"""A site countersigns a release that its own ledger bears out, and the coordinator collects the signature."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner

from client.cli import app as site_app
from client.countersign import countersign, propose
from common.audit import read_audit
from common.bundles import MANIFEST, check_bundle, load_trust, read_contents
from common.bundles_archive import write_archive
from common.enrolment import enrolment_text, make_enrolment
from common.errors import CohortiumError, LedgerError, UsageError, VerifyError
from common.keys import key_id, new_p384
from common.messages import Status
from common.privacy.ledger import GENESIS, Ledger
from common.privacy.ledger_keys import load_key
from common.privacy.statement import privacy_statement
from common.signing import add_signature, public_pem, sign, statement_for
from server.cli import app
from server.consortium import init_consortium, load_release_key
from server.countersignatures import add_signatures
from server.enrol import enrol, revoke
from tests.client.hospital import PROTOCOL, Hospital, study, train_request

FILES = ("cohort.csv", "privacy.json", "sites.json", "study.json")
PATIENTS = {"anna": 40, "berta": 40}
OTHER = Ed25519PrivateKey.from_private_bytes(bytes(32))  # berta's ledger key


class Scene:
    """A consortium, a hospital `anna` that took part in its study for two rounds, and the release of it."""

    def __init__(self, folder: Path) -> None:
        self.home, self.out = folder / "consortium", folder / "out"
        init_consortium(self.home, "Trial", ["localhost"])
        self.release_key = load_release_key(self.home)
        self.hospital = Hospital(folder / "anna").joined()
        for number in (1, 2):
            assert self.hospital.train(train_request(number)).status is Status.OK
        self.toml = self.hospital.folder / "site.toml"
        self.ledger = self.hospital.state / "ledger.sqlite"
        shutil.copy(self.home / "release.pub", self.hospital.folder / "release.pub")
        self.key = load_key(self.hospital.state / "ledger.key")
        for site, key in (("anna", self.key), ("berta", OTHER)):
            (folder / "request.json").write_text(enrolment_text(make_enrolment(site, new_p384(), key, "0.1.0")))
            enrol(folder / "request.json", self.home)
        self.out.mkdir()
        self.write()

    def head(self, length: int) -> str:
        with Ledger(self.ledger, "anna") as ledger:
            return ledger.entries()[length - 1].hash if length else GENESIS

    def write(self, *, length: int = 2, head: str | None = None, digest: str = PROTOCOL.digest, **more: Any) -> None:
        """The release, signed by the coordinator."""
        with Ledger(self.ledger, "anna") as ledger:
            events = [entry.event for entry in ledger.entries()]
        statement = privacy_statement(PROTOCOL, dict.fromkeys(PATIENTS, events), PATIENTS)
        (self.out / "privacy.json").write_text(json.dumps(statement | {"study_digest": digest}))
        (self.out / "sites.json").write_text(json.dumps({"joined": PATIENTS}))
        (self.out / "study.json").write_text(json.dumps(PROTOCOL.to_json()))
        (self.out / "cohort.csv").write_text("age,sex,dead\n")
        named = {"length": length, "head": self.head(length) if head is None else head}
        predicate = {
            "study": digest,
            "ledgers": {"anna": named, "berta": {"length": 2, "head": "a" * 64}},
            "signers": {
                "coordinator": key_id(self.release_key.public_key()),
                "sites": {"anna": key_id(self.key.public_key()), "berta": key_id(OTHER.public_key())},
            },
            **more,
        }
        self.manifest = sign(statement_for(self.out, FILES, predicate), self.release_key)
        (self.out / MANIFEST).write_text(json.dumps(self.manifest, indent=1))

    def refuses(self, error: type[CohortiumError]) -> str:
        """Nothing is signed, and the message says why."""
        with pytest.raises(error) as caught:
            propose(self.out, self.toml)
        assert not list(self.hospital.folder.glob("countersignature*"))
        return str(caught.value)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def run(application: Any, *arguments: object, code: int = 0) -> str:
    done = CliRunner().invoke(application, [str(argument) for argument in arguments])
    found = int(done.exception.exit_code) if isinstance(done.exception, CohortiumError) else done.exit_code
    assert found == code, (done.output, done.exception)
    return done.output + (str(done.exception) if isinstance(done.exception, CohortiumError) else "")


def test_from_the_site_to_a_manifest_with_two_signatures(scene: Scene, tmp_path: Path) -> None:
    before = (scene.out / MANIFEST).read_bytes()
    shown = run(site_app, "countersign", scene.out, "--site", scene.toml)
    for expected in (
        "digest " + PROTOCOL.digest, f"{PROTOCOL.study.release.rows} synthetic rows", "ε is infinite, for one patient",
        "2 entries of site anna", "cohort.csv  as signed", "Nothing is signed yet",
    ):  # fmt: skip
        assert expected in shown
    written = scene.hospital.folder / "countersignature-anna.json"
    assert not written.exists() and (scene.out / MANIFEST).read_bytes() == before
    assert str(written) in run(site_app, "countersign", scene.out, "--site", scene.toml, "--accept")
    assert (scene.out / MANIFEST).read_bytes() == before
    line = read_audit(scene.hospital.state / "audit.jsonl")[-1]
    assert (line["action"], line["digest"], line["ledger_length"]) == ("countersign", PROTOCOL.digest, 2)
    # It is the site's own signature over the same bytes: what signing the envelope itself would add.
    signature = json.loads(written.read_text())
    assert signature["payload"] == scene.manifest["payload"]
    assert signature["signatures"] == add_signature(scene.manifest, scene.key)["signatures"][1:]

    run(app, "add-signature", scene.out, written, "--consortium", scene.home)
    assert json.loads((scene.out / MANIFEST).read_text()) == add_signature(scene.manifest, scene.key)
    assert read_audit(scene.home / "audit.jsonl")[-1]["signers"] == {"anna": key_id(scene.key.public_key())}

    trust = tmp_path / "keys"
    trust.mkdir()
    (trust / "anna.pub").write_bytes(public_pem(scene.key.public_key()))
    shutil.copy(scene.home / "release.pub", trust / "coordinator.pub")
    shown = run(app, "verify", scene.out, "--trust", trust)
    assert "signed by coordinator" in shown and "signed by anna" in shown
    assert "not signed yet by berta, which took part" in shown
    document = json.loads(run(app, "verify", scene.out, "--trust", trust, "--json"))
    assert set(document["verification"]["not_signed_yet"]) == {"berta"}
    assert set(document["verification"]["signers"]) == {"anna", "coordinator"}
    run(app, "verify", scene.out, "--key", scene.home / "release.pub")
    (scene.out / "cohort.csv").write_text("age\n")
    shown = run(app, "verify", scene.out, "--trust", trust, code=11)
    assert "cohort.csv    changed" in shown and "cohort.csv: changed after signing" in shown


def test_an_archive_is_countersigned_without_anything_beside_it(scene: Scene, tmp_path: Path) -> None:
    (tmp_path / "mail").mkdir()
    archive = tmp_path / "mail" / "release.tar.zst"
    write_archive(archive, scene.out, [*FILES, MANIFEST])
    path = countersign(propose(archive, scene.toml), scene.toml)
    assert path.parent == scene.hospital.folder and [p.name for p in archive.parent.iterdir()] == [archive.name]
    assert add_signatures(scene.out, [path], consortium=scene.home) == {"anna": key_id(scene.key.public_key())}
    with pytest.raises(VerifyError, match="signed this manifest already"):
        countersign(propose(scene.out, scene.toml), scene.toml)


@pytest.mark.parametrize("length", [0, 1, 2])
def test_a_ledger_may_have_grown_since(scene: Scene, length: int) -> None:
    scene.write(length=length)
    if length == 0:
        assert "holds no spend for the study" in scene.refuses(VerifyError)
    else:
        assert propose(scene.out, scene.toml).length == length


def test_a_head_that_the_ledger_never_had(scene: Scene) -> None:
    scene.write(head="f" * 64)
    assert "names another entry 2 than the ledger of anna holds (ffff" in scene.refuses(LedgerError)
    scene.write(length=3, head="f" * 64)
    assert "names 3 entries in the ledger of anna, which has 2" in scene.refuses(LedgerError)
    scene.write(length=1, head=scene.head(2))
    assert "another entry 1" in scene.refuses(LedgerError)
    scene.write(ledgers={})
    assert "names no ledger of anna" in scene.refuses(VerifyError)
    scene.write(ledgers={"anna": {"length": True, "head": GENESIS}})
    assert "names no ledger of anna" in scene.refuses(VerifyError)


def test_a_study_of_others(scene: Scene) -> None:
    scene.write(digest=study(training={"rounds": 9}).digest)
    assert "holds no spend for the study" in scene.refuses(VerifyError)


def test_another_key_for_this_site(scene: Scene) -> None:
    signers = {"coordinator": key_id(scene.release_key.public_key()), "sites": {"anna": "0" * 64}}
    scene.write(signers=signers)
    assert "names another ledger key for anna" in scene.refuses(VerifyError)


def test_a_manifest_that_does_not_hold(scene: Scene) -> None:
    (scene.out / "cohort.csv").write_text("another")
    assert "cohort.csv: changed after signing" in scene.refuses(VerifyError)
    scene.write()
    (scene.out / MANIFEST).write_text(json.dumps(sign(statement_for(scene.out, FILES, {}), OTHER)))
    assert "not signed by the key" in scene.refuses(VerifyError)


def test_the_key_that_the_site_pinned(scene: Scene) -> None:
    connection = '[connection]\nsuperlink = "localhost:9443"\nroot_certificates = "ca.pem"\nnode_key = "node.key"\n'
    (scene.hospital.folder / "connection.toml").write_text(connection + f'release_key = "{"0" * 64}"\n')
    assert "pins the release key 0000" in scene.refuses(VerifyError)
    pinned = key_id(scene.release_key.public_key())
    (scene.hospital.folder / "connection.toml").write_text(connection + f'release_key = "{pinned}"\n')
    propose(scene.out, scene.toml)


def test_an_edited_ledger_signs_nothing(scene: Scene) -> None:
    import sqlite3

    database = sqlite3.connect(scene.ledger)
    database.execute("UPDATE spends SET round = 5 WHERE sequence = 1")
    database.commit()
    database.close()
    assert "does not fit the chain" in scene.refuses(LedgerError)
    scene.ledger.unlink()
    assert "there is no ledger yet" in scene.refuses(LedgerError)


def test_something_else_to_sign_is_refused(scene: Scene) -> None:
    """A decision of the steward has the same form: a coordinator must not get one signed as a release."""
    envelope = sign({"_type": "urn:cohortium:decision:v1", "site": "anna", "verdict": "approved"}, scene.release_key)
    (scene.out / MANIFEST).write_text(json.dumps(envelope))
    assert "not the manifest of a release" in scene.refuses(VerifyError)


def signed_by(scene: Scene, key: Ed25519PrivateKey, envelope: dict[str, Any] | None = None) -> Path:
    path = scene.out.parent / "given.json"
    both = add_signature(envelope or scene.manifest, key)
    path.write_text(json.dumps({**both, "signatures": both["signatures"][-1:]}))
    return path


def not_added(scene: Scene, *paths: Path) -> str:
    before = (scene.out / MANIFEST).read_bytes()
    with pytest.raises(VerifyError) as caught:
        add_signatures(scene.out, paths, consortium=scene.home)
    assert (scene.out / MANIFEST).read_bytes() == before
    return str(caught.value)


def test_what_is_not_added(scene: Scene, tmp_path: Path) -> None:
    good = countersign(propose(scene.out, scene.toml), scene.toml)
    assert "of one known site" in not_added(scene, good, signed_by(scene, Ed25519PrivateKey.generate()))
    other = sign({"subject": []}, scene.release_key)
    assert "given.json: anna: it signs another manifest" in not_added(scene, signed_by(scene, scene.key, other))
    forged = json.loads(good.read_text())
    forged["signatures"][0]["keyid"] = key_id(OTHER.public_key())
    (tmp_path / "forged.json").write_text(json.dumps(forged))
    assert "forged.json: berta: the key" in not_added(scene, good, tmp_path / "forged.json")
    assert "anna: the key" in not_added(scene, good, good)  # twice
    for text in ("", "[]", "{}"):
        (tmp_path / "x.json").write_text(text)
        assert "x.json:" in not_added(scene, tmp_path / "x.json")
    assert "cannot be read" in not_added(scene, tmp_path / "none.json")
    revoke("anna", scene.home)
    assert "the key of anna" in not_added(scene, good) and "is revoked" in not_added(scene, good)
    for options in ({}, {"consortium": scene.home, "trust": scene.home}):
        with pytest.raises(UsageError):
            add_signatures(scene.out, [good], **options)
    with pytest.raises(UsageError, match="not a folder"):
        add_signatures(good, [good], consortium=scene.home)


def test_several_at_once_against_a_folder_of_keys(scene: Scene, tmp_path: Path) -> None:
    trust = tmp_path / "keys"
    trust.mkdir()
    for name, key in (("anna", scene.key), ("berta", OTHER), ("lead", scene.release_key), ("carla", None)):
        key = key or Ed25519PrivateKey.from_private_bytes(bytes([7] * 32))
        (trust / f"{name}.pub").write_bytes(public_pem(key.public_key()))
    anna = countersign(propose(scene.out, scene.toml), scene.toml)
    carla = signed_by(scene, Ed25519PrivateKey.from_private_bytes(bytes([7] * 32)))
    with pytest.raises(VerifyError, match="carla took no part in this study"):
        add_signatures(scene.out, [anna, carla], trust=trust)
    assert set(add_signatures(scene.out, [anna, signed_by(scene, OTHER)], trust=trust)) == {"anna", "berta"}
    found = check_bundle(read_contents(scene.out), load_trust(trust)).require()
    assert set(found.signers.trusted) == {"anna", "berta", "lead"} and not found.waiting
