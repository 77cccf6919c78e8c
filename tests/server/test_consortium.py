import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from concurrent import futures
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from common.audit import read_audit
from common.certificates import fingerprint
from common.errors import CohortiumError, OutputError, UsageError
from common.handover import follow_handover
from common.keys import create_key, key_id, new_p384
from common.signing import load_public_key
from server.authority import issue, make_ca, permits
from server.consortium import (
    Given,
    init_consortium,
    load_facts,
    load_release_key,
    renew_certificate,
    rotate_release_key,
)
from tests.tls import certificate, greet, serving

NAME = "consortium.example.org"
FOREIGN = ("unable to get local issuer certificate", "certificate signature failure")
PRIVATE = ("ca.key", "server.key", "release.key")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    init_consortium(tmp_path / "con", "Trial", [NAME, "192.0.2.7"])
    return tmp_path / "con"


def write_pem(path: Path, *certificates: x509.Certificate) -> Path:
    path.write_bytes(b"".join(found.public_bytes(serialization.Encoding.PEM) for found in certificates))
    return path


def read_pem(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def own_ca(
    tmp_path: Path, names: tuple[str, ...] = (NAME,), *, days: int = 30, age: int = 0, label: str = "own"
) -> Given:
    """What a hospital's CA would hand out; `age` days ago, for `days` days."""
    then = datetime.now(UTC) - timedelta(days=age)
    ca_key, key = new_p384(), new_p384()
    ca = make_ca(ca_key, label, [*names, "localhost", "127.0.0.1", "::1"], 3650, then)
    certificate = issue(ca, ca_key, key.public_key(), names, days, then)
    create_key(tmp_path / f"{label}.key", key)
    return Given(
        write_pem(tmp_path / f"{label}.pem", certificate),
        tmp_path / f"{label}.key",
        write_pem(tmp_path / f"{label}-ca.pem", ca),
    )


# ---------------------------------------------------------------- the folder


def test_private_keys_are_the_owners_and_nothing_public_holds_one(folder: Path) -> None:
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {path.name for path in folder.iterdir()} == {
        *PRIVATE, "ca.pem", "server.pem", "release.pub", "consortium.json", "audit.jsonl",
    }  # fmt: skip
    for path in folder.iterdir():
        private = path.name in PRIVATE
        assert (stat.S_IMODE(path.stat().st_mode) == 0o600) is private
        assert (b"PRIVATE" in path.read_bytes()) is private
    assert sorted(path.name for path in folder.parent.iterdir()) == ["con"]


def test_the_public_facts_are_those_of_the_files(folder: Path) -> None:
    facts = load_facts(folder)
    assert (facts["name"], facts["addresses"]) == ("Trial", [NAME, "192.0.2.7"])
    assert facts["ca"][0]["sha256"] == fingerprint(read_pem(folder / "ca.pem"))
    assert facts["server"]["sha256"] == fingerprint(read_pem(folder / "server.pem"))
    assert facts["release_key"]["key_id"] == key_id(load_release_key(folder).public_key())
    assert key_id(load_public_key(folder / "release.pub")) == facts["release_key"]["key_id"]
    left = datetime.fromisoformat(facts["server"]["not_after"]) - datetime.now(UTC)
    assert timedelta(days=824) < left <= timedelta(days=825)


def test_the_ca_certifies_these_names_and_no_other_ca(folder: Path) -> None:
    ca, server = read_pem(folder / "ca.pem"), read_pem(folder / "server.pem")
    basic = ca.extensions.get_extension_for_class(x509.BasicConstraints)
    assert basic.critical and basic.value.ca and basic.value.path_length == 0
    usage = ca.extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical and usage.value.key_cert_sign and not usage.value.digital_signature
    assert ca.extensions.get_extension_for_class(x509.NameConstraints).critical
    assert not server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == [NAME, "localhost"]
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["192.0.2.7", "127.0.0.1", "::1"]
    purpose = server.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(purpose) == [x509.oid.ExtendedKeyUsageOID.SERVER_AUTH]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"addresses": ["https://x.org"]}, "neither a host name nor an IP address"),
        ({"addresses": ["x.org:443"]}, "neither a host name"),
        ({"addresses": [NAME], "permit": ["a b"]}, "neither a host name"),
        ({"addresses": [NAME], "name": " "}, "--name"),
        ({"addresses": [NAME], "days": 4000}, "not longer than its CA"),
    ],
)
def test_unusable_arguments_leave_nothing(tmp_path: Path, arguments: dict[str, Any], expected: str) -> None:
    given: dict[str, Any] = {"name": "Trial", **arguments}
    with pytest.raises(UsageError, match=expected):
        init_consortium(tmp_path / "con", **given)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_in_use_is_left_alone(folder: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(OutputError, match="is not empty"):
        init_consortium(folder, "Trial", [NAME])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="not a folder"):
        init_consortium(tmp_path / "file", "Trial", [NAME])
    (tmp_path / "empty").mkdir()
    init_consortium(tmp_path / "empty", "Trial", [NAME])
    assert stat.S_IMODE((tmp_path / "empty").stat().st_mode) == 0o700


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync, calls = os.fsync, []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) > 8:
            raise OSError(28, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        init_consortium(tmp_path / "con", "Trial", [NAME])
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- what clients say


def test_a_client_accepts_the_server_under_its_names_only(folder: Path, tmp_path: Path) -> None:
    init_consortium(tmp_path / "other", "Other", [NAME])
    with serving(folder / "server.pem", folder / "server.key") as port:
        for name in (NAME, "192.0.2.7", "localhost", "127.0.0.1", "::1"):
            assert greet(port, folder / "ca.pem", name) == "hello"
        assert greet(port, tmp_path / "other" / "ca.pem", NAME) in FOREIGN
        assert "Hostname mismatch" in greet(port, folder / "ca.pem", "evil.example.org")
        assert "IP address mismatch" in greet(port, folder / "ca.pem", "192.0.2.8")


def test_a_client_refuses_an_expired_certificate(folder: Path, tmp_path: Path) -> None:
    given = own_ca(tmp_path, days=3, age=10)
    with serving(given.certificate, given.key) as port:
        assert greet(port, given.ca, NAME) == "certificate has expired"


def test_the_ca_cannot_speak_for_other_names(folder: Path, tmp_path: Path) -> None:
    """Even with its stolen key: name constraints hold the client back."""
    ca, key = read_pem(folder / "ca.pem"), new_p384()
    ca_key: Any = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
    certificate = issue(ca, ca_key, key.public_key(), ["bank.example.com"], 3)
    create_key(tmp_path / "bank.key", key)
    with serving(write_pem(tmp_path / "bank.pem", certificate), tmp_path / "bank.key") as port:
        assert greet(port, folder / "ca.pem", "bank.example.com") == "permitted subtree violation"


def test_grpc_accepts_the_server_under_its_name_only(folder: Path, tmp_path: Path) -> None:
    import grpc

    init_consortium(tmp_path / "other", "Other", [NAME])
    pair = ((folder / "server.key").read_bytes(), (folder / "server.pem").read_bytes())
    server = grpc.server(futures.ThreadPoolExecutor(1))
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
    server.start()

    def reachable(ca: Path, name: str) -> bool:
        credentials = grpc.ssl_channel_credentials(ca.read_bytes())
        options = [("grpc.ssl_target_name_override", name)]
        with grpc.secure_channel(f"127.0.0.1:{port}", credentials, options) as channel:
            try:
                grpc.channel_ready_future(channel).result(timeout=1.5)
            except grpc.FutureTimeoutError:
                return False
            return True

    try:
        assert reachable(folder / "ca.pem", NAME) and reachable(folder / "ca.pem", "127.0.0.1")
        assert not reachable(folder / "ca.pem", "evil.example.org")
        assert not reachable(tmp_path / "other" / "ca.pem", NAME)
    finally:
        server.stop(None)


# ---------------------------------------------------------------- a CA of one's own


def test_a_hospitals_own_ca_is_used(tmp_path: Path) -> None:
    given = own_ca(tmp_path)
    facts = init_consortium(tmp_path / "con", "Trial", [NAME], given=given)
    assert not (tmp_path / "con" / "ca.key").exists() and "permitted" not in facts
    with serving(tmp_path / "con" / "server.pem", tmp_path / "con" / "server.key") as port:
        assert greet(port, tmp_path / "con" / "ca.pem", NAME) == "hello"
    with pytest.raises(UsageError, match="a CA of its own institution"):
        renew_certificate(tmp_path / "con")
    renewed = own_ca(tmp_path, label="next")
    (tmp_path / "con" / "ca.pem").write_bytes(renewed.ca.read_bytes())
    after = renew_certificate(tmp_path / "con", given=renewed)
    assert after["server"]["sha256"] != facts["server"]["sha256"]


def swap(given: Given, tmp_path: Path, **parts: str) -> Given:
    other = own_ca(tmp_path, label="other")
    return Given(**(vars(given) | {part: getattr(other, part) for part in parts}))


def not_a_ca(given: Given, tmp_path: Path) -> Given:
    return Given(given.certificate, given.key, given.certificate)


def open_key(given: Given, tmp_path: Path) -> Given:
    given.key.chmod(0o644)
    return given


def key_in_certificate(given: Given, tmp_path: Path) -> Given:
    given.certificate.write_bytes(given.certificate.read_bytes() + given.key.read_bytes())
    return given


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda given, tmp: swap(given, tmp, key=""), "not the key of the certificate"),
        (lambda given, tmp: swap(given, tmp, ca=""), "a site that trusts .* refuses it .*(self-signed|unable|failure)"),
        (not_a_ca, "is not the certificate of a certification authority"),
        (open_key, "permissions 0644"),
        (key_in_certificate, "holds a private key"),
        (lambda given, tmp: own_ca(tmp, ("elsewhere.org",), label="e"), "refuses it at .*Hostname mismatch"),
        (lambda given, tmp: own_ca(tmp, days=3, age=10, label="e"), "CN=consortium.example.org expired at"),
        (lambda given, tmp: own_ca(tmp, age=-3, label="e"), "is not valid before"),
        (lambda given, tmp: Given(tmp / "none.pem", given.key, given.ca), "none.pem: cannot be read"),
        (lambda given, tmp: Given(given.certificate, tmp / "none.key", given.ca), "the server's key is missing"),
    ],
)
def test_what_is_wrong_with_it_is_told_apart(
    tmp_path: Path, spoil: Callable[[Given, Path], Given], expected: str
) -> None:
    given = spoil(own_ca(tmp_path), tmp_path)
    with pytest.raises(CohortiumError, match=expected) as caught:
        init_consortium(tmp_path / "con", "Trial", [NAME], given=given)
    assert caught.value.fix and not (tmp_path / "con").exists()


def test_intermediate_certificates_come_with_the_servers(tmp_path: Path) -> None:
    root_key, middle_key, key = new_p384(), new_p384(), new_p384()
    root = certificate(root_key, "Root")
    middle = certificate(middle_key, "Middle", by=root_key, issuer="Root")
    leaf = issue(middle, middle_key, key.public_key(), [NAME], 30)
    create_key(tmp_path / "s.key", key)
    ca = write_pem(tmp_path / "root.pem", root)
    whole = Given(write_pem(tmp_path / "whole.pem", leaf, middle), tmp_path / "s.key", ca)
    with pytest.raises(UsageError, match="unable to get local issuer"):
        bare = Given(write_pem(tmp_path / "bare.pem", leaf), tmp_path / "s.key", ca)
        init_consortium(tmp_path / "con", "Trial", [NAME], given=bare)
    init_consortium(tmp_path / "con", "Trial", [NAME], given=whole)
    with serving(tmp_path / "con" / "server.pem", tmp_path / "con" / "server.key") as port:
        assert greet(port, tmp_path / "con" / "ca.pem", NAME) == "hello"


# ---------------------------------------------------------------- rotation


def test_a_renewed_certificate_comes_from_the_same_ca(folder: Path) -> None:
    before = {name: (folder / name).read_bytes() for name in ("server.key", "server.pem", "ca.pem")}
    facts = renew_certificate(folder, days=90)
    with serving(folder / "server.pem", folder / "server.key") as port:
        assert greet(port, folder / "ca.pem", NAME) == "hello"
    assert (folder / "ca.pem").read_bytes() == before["ca.pem"]
    for name in ("server.key", "server.pem"):
        (kept,) = folder.glob(f"{name}.old-*")
        assert kept.read_bytes() == before[name] != (folder / name).read_bytes()
        assert name == "server.pem" or stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert facts == load_facts(folder) and facts["server"]["sha256"] == fingerprint(read_pem(folder / "server.pem"))
    renew_certificate(folder)
    assert len(list(folder.glob("server.key.old-*"))) == 2, "twice in a second keeps both"


def test_addresses_of_a_renewed_certificate(tmp_path: Path) -> None:
    init_consortium(tmp_path / "con", "Trial", [NAME], permit=["hospital.org"])
    facts = renew_certificate(tmp_path / "con", ["new.hospital.org"])
    assert facts["addresses"] == ["new.hospital.org"]
    with serving(tmp_path / "con" / "server.pem", tmp_path / "con" / "server.key") as port:
        assert greet(port, tmp_path / "con" / "ca.pem", "new.hospital.org") == "hello"
        assert "mismatch" in greet(port, tmp_path / "con" / "ca.pem", NAME)
    before = (tmp_path / "con" / "server.pem").read_bytes()
    with pytest.raises(UsageError, match="this CA certifies only"):
        renew_certificate(tmp_path / "con", ["evil.org"])
    assert (tmp_path / "con" / "server.pem").read_bytes() == before


def test_permitted_names() -> None:
    assert permits(["a.org"], "a.org") and permits(["a.org"], "x.y.a.org") and permits(["*.a.org"], "x.a.org")
    assert (
        not permits(["a.org"], "ba.org") and not permits(["x.a.org"], "a.org") and not permits(["192.0.2.1"], "a.org")
    )
    assert permits(["a.org"], "192.0.2.1"), "addresses cannot be constrained: gRPC would refuse the whole chain"


def test_the_keys_of_the_folder_have_a_history(folder: Path) -> None:
    made = load_facts(folder)
    renewed = renew_certificate(folder, days=90)
    rotated = rotate_release_key(folder)
    lines = read_audit(folder / "audit.jsonl")
    assert [(line["actor"], line["action"], line["outcome"], line["fingerprint"]) for line in lines] == [
        ("coordinator", "init-consortium", "ok", made["ca"][0]["sha256"]),
        ("coordinator", "renew-certificate", "ok", renewed["server"]["sha256"]),
        ("coordinator", "rotate-release-key", "ok", rotated["release_key"]["key_id"]),
    ]
    assert lines[0]["release_key"] == lines[2]["former"] == made["release_key"]["key_id"]
    assert b"PRIVATE" not in (folder / "audit.jsonl").read_bytes()


@pytest.mark.parametrize("change", [renew_certificate, rotate_release_key])
def test_keys_do_not_change_unless_it_can_be_logged(folder: Path, change: Callable[[Path], object]) -> None:
    (folder / "audit.jsonl").unlink()
    (folder / "audit.jsonl").mkdir()
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises(OutputError, match="audit"):
        change(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_a_missing_or_open_ca_key_stops_renewal(folder: Path) -> None:
    (folder / "ca.key").chmod(0o640)
    with pytest.raises(OutputError, match="permissions 0640"):
        renew_certificate(folder)
    (folder / "ca.key").unlink()
    with pytest.raises(OutputError, match="CA's key is missing"):
        renew_certificate(folder)
    create_key(folder / "ca.key", new_p384())
    with pytest.raises(OutputError, match=r"not the key of ca\.pem"):
        renew_certificate(folder)
    assert not list(folder.glob("*.old-*"))


def test_sites_can_follow_a_rotated_release_key(folder: Path) -> None:
    pinned, before = load_public_key(folder / "release.pub"), (folder / "release.key").read_bytes()
    facts = rotate_release_key(folder)
    followed = follow_handover(folder / facts["handover"], pinned)
    assert key_id(followed) == facts["release_key"]["key_id"] == key_id(load_release_key(folder).public_key())
    assert key_id(load_public_key(folder / "release.pub")) == key_id(followed) != key_id(pinned)
    (former,) = facts["former_release_keys"]
    assert key_id(load_public_key(folder / former["file"])) == former["key_id"] == key_id(pinned)
    assert all(before not in path.read_bytes() for path in folder.iterdir()), "the old private key is gone"
    again = rotate_release_key(folder)
    assert len(again["former_release_keys"]) == 2
    assert key_id(follow_handover(folder / again["handover"], followed)) == again["release_key"]["key_id"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [(None, "cannot be read"), ("{", "edited or damaged"), ('{"format": 2, "name": "x", "addresses": []}', "format 2")],
)
def test_a_folder_without_usable_facts(folder: Path, text: str | None, expected: str) -> None:
    (folder / "consortium.json").unlink()
    if text is not None:
        (folder / "consortium.json").write_text(text)
    for command in (renew_certificate, rotate_release_key):
        with pytest.raises(OutputError, match=expected):
            command(folder)


# ---------------------------------------------------------------- the command line


def cohortium(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("cohortium")), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_commands(tmp_path: Path) -> None:
    folder = tmp_path / "con"
    made = cohortium("init-consortium", folder, "--name", "Trial", "--address", NAME, "--address", "192.0.2.7")
    assert made.returncode == 0 and made.stderr == ""
    assert load_facts(folder)["ca"][0]["sha256"] in made.stdout
    renewed = cohortium("renew-certificate", folder, "--days", 30, "--json")
    assert renewed.returncode == 0 and json.loads(renewed.stdout) == load_facts(folder)
    rotated = cohortium("rotate-release-key", folder)
    assert rotated.returncode == 0 and load_facts(folder)["release_key"]["key_id"] in rotated.stdout
    again = cohortium("init-consortium", folder, "--name", "Trial", "--address", NAME)
    assert again.returncode == 7 and "is not empty" in again.stderr
    half = cohortium("init-consortium", tmp_path / "x", "--name", "T", "--address", NAME, "--ca", folder / "ca.pem")
    assert half.returncode == 2 and "belong together" in half.stderr
    for done in (made, renewed, rotated, again, half):
        assert "PRIVATE" not in done.stdout + done.stderr
