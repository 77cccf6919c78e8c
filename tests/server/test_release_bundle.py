"""A release of a run as it is handed out and verified on the command line."""

import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner

from common.bundles import MANIFEST
from common.bundles_archive import write_archive
from common.errors import CohortiumError, OutputError, UsageError, VerifyError
from common.signing import add_signature, public_pem, statement_for
from server.cli import app
from server.release import SIMULATION_KEY, examine_release, release_simulation, verify_release, write_manifest
from server.release_bundle import bundle_release
from tests.server.test_release import make_protocol, make_result


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundled") / "out"
    release_simulation(make_result(out, make_protocol()), None)
    return out


def command(*arguments: object, code: int = 0) -> tuple[str, str]:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    error = done.exception if isinstance(done.exception, CohortiumError) else None
    assert (int(error.exit_code) if error else done.exit_code) == code, (done.output, done.exception)
    return done.output, str(error)


def test_folder_and_archive_hold_exactly_what_was_signed(run_folder: Path, tmp_path: Path) -> None:
    key = tmp_path / "key.pub"
    key.write_bytes((run_folder / SIMULATION_KEY).read_bytes())
    names = bundle_release(run_folder, tmp_path / "release.tar.zst")
    assert bundle_release(run_folder, tmp_path / "again.tar.zst") == names
    assert (tmp_path / "again.tar.zst").read_bytes() == (tmp_path / "release.tar.zst").read_bytes()
    assert bundle_release(run_folder, tmp_path / "folder") == names
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == names
    assert {"README.txt", MANIFEST, "cohort.csv"} <= set(names)
    assert not {"decoder.safetensors", "ledgers", SIMULATION_KEY} & set(names)
    for bundle in (tmp_path / "release.tar.zst", tmp_path / "folder"):
        statement = verify_release(bundle, key)
        assert sorted([MANIFEST, *(subject["name"] for subject in statement["subject"])]) == names
    with pytest.raises(VerifyError, match="an archive holds no key"):
        verify_release(tmp_path / "release.tar.zst", None)
    (tmp_path / "folder" / "decoder.safetensors").write_bytes(b"")
    with pytest.raises(VerifyError, match=r"decoder\.safetensors: not in the manifest"):
        verify_release(tmp_path / "folder", key)
    write_archive(tmp_path / "more.tar.zst", tmp_path / "folder", [*names, "decoder.safetensors"])
    with pytest.raises(VerifyError, match=r"decoder\.safetensors: not in the manifest"):
        verify_release(tmp_path / "more.tar.zst", key)


def test_nothing_is_written_over_and_nothing_changed_goes_out(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "taken.tar.zst").write_bytes(b"mine")
    with pytest.raises(OutputError, match="exists"):
        bundle_release(run_folder, tmp_path / "taken.tar.zst")
    assert (tmp_path / "taken.tar.zst").read_bytes() == b"mine"
    with pytest.raises(OutputError, match="not empty"):
        bundle_release(run_folder, tmp_path)
    with pytest.raises(UsageError, match="not a folder"):
        bundle_release(tmp_path / "taken.tar.zst", tmp_path / "x")
    content = (run_folder / "sites.json").read_bytes()
    try:
        (run_folder / "sites.json").write_bytes(content + b" ")
        with pytest.raises(VerifyError, match=r"sites\.json: changed"):
            bundle_release(run_folder, tmp_path / "x.tar.zst")
    finally:
        (run_folder / "sites.json").write_bytes(content)
    assert not (tmp_path / "x.tar.zst").exists()


def test_the_command_line(run_folder: Path, tmp_path: Path) -> None:
    shown, _ = command("verify", run_folder)
    told = {tuple(line.split(maxsplit=1)) for line in shown.splitlines()}
    assert {("cohort.csv", "as signed"), ("decoder.safetensors", "not released")} <= told
    assert "not signed yet" not in shown and "not who made them" in shown
    command("bundle-release", run_folder, "--out", tmp_path / "r.tar.zst")
    document = json.loads(command("verify", tmp_path / "r.tar.zst", "--key", run_folder / SIMULATION_KEY, "--json")[0])
    assert document["predicate"]["simulation"] is True and document["verification"]["problems"] == []
    assert set(document["verification"]["files"].values()) == {"as signed"}
    (tmp_path / "other.pub").write_bytes(public_pem(Ed25519PrivateKey.generate().public_key()))
    assert "not signed by the key" in command("verify", run_folder, "--key", tmp_path / "other.pub", code=11)[1]
    revoked = ("--revoked", run_folder / SIMULATION_KEY)
    assert "its key is revoked" in command("verify", run_folder, *revoked, code=11)[1]


def test_the_readme_says_what_every_file_is(run_folder: Path) -> None:
    text = (run_folder / "README.txt").read_text()
    for subject in verify_release(run_folder, None)["subject"]:
        (line,) = [line for line in text.splitlines() if line.startswith(f"  {subject['name']} ")]
        assert len(line.split()) > 3
    assert "cohortium verify . --key release.pub" in text and "no statement about privacy" in text


def test_signing_the_same_again_keeps_countersignatures(tmp_path: Path) -> None:
    key, site = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    (tmp_path / "a.txt").write_text("a")
    statement: dict[str, Any] = statement_for(tmp_path, ["a.txt"], {"study": "s"})
    path = tmp_path / MANIFEST
    write_manifest(path, statement, key)
    both = add_signature(json.loads(path.read_text()), site)
    path.write_text(json.dumps(both))
    write_manifest(path, statement, key)
    assert json.loads(path.read_text()) == both
    write_manifest(path, {**statement, "predicate": {"study": "t"}}, key)
    assert len(json.loads(path.read_text())["signatures"]) == 1
    write_manifest(path, statement, site)
    assert len(json.loads(path.read_text())["signatures"]) == 1
    path.write_text("damaged")
    write_manifest(path, statement, key)
    (tmp_path / "k.pub").write_bytes(public_pem(key.public_key()))
    assert examine_release(tmp_path, tmp_path / "k.pub").files == {"a.txt": "as signed", "k.pub": "not in the manifest"}
