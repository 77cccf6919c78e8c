import json
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.connection import check_address, load_connection
from client.init_site import Enrolled, follow_release_key, init_site, rotate_node_key
from client.policy import PolicySection
from client.site import load_site
from common.audit import read_audit
from common.enrolment import read_enrolment
from common.errors import CohortiumError, LedgerError, OutputError, SiteError, VerifyError
from common.handover import write_handover
from common.keys import NODE_KEY, create_key, key_id, load_p384, new_p384, openssh_public
from common.privacy.ledger import Ledger
from common.privacy.ledger_keys import load_key, public_hex
from common.signing import load_public_key, public_pem
from tests.tls import certificate

ADDRESS = "consortium.example.org:443"


def authority(path: Path, *, ca: bool = True, days: int = 9, age: int = 0, name: str = "ca.pem") -> Path:
    made = certificate(new_p384(), "Some CA", ca=ca, days=days, age=age)
    (path / name).write_bytes(made.public_bytes(serialization.Encoding.PEM))
    return path / name


@pytest.fixture
def made(tmp_path: Path) -> Enrolled:
    return init_site(tmp_path / "north", "north", tmp_path / "patients.csv", ADDRESS, authority(tmp_path))


def private_files(folder: Path) -> set[str]:
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and b"PRIVATE" in path.read_bytes()
    }


def test_the_folder_is_complete_and_its_keys_are_the_owners(made: Enrolled, tmp_path: Path) -> None:
    folder = made.folder
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == {
        "site.toml", "connection.toml", "ca.pem", "keys/node.key", "keys/node.key.pub", "state/ledger.key",
        "state/audit.jsonl", "enrolment-north.json",
    }  # fmt: skip
    assert private_files(folder) == {"keys/node.key", "state/ledger.key"}
    for path in (folder, folder / "keys", folder / "state"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    for name in private_files(folder):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600
    assert {path.name for path in tmp_path.iterdir()} == {"ca.pem", "north"}


def test_both_files_are_read_back(made: Enrolled, tmp_path: Path) -> None:
    config = load_site(made.folder / "site.toml")
    assert (config.site.name, config.site.data) == ("north", tmp_path / "patients.csv")
    assert config.site.state == made.folder.resolve() / "state" and config.policy == PolicySection()
    connection = load_connection(made.folder / "connection.toml")
    assert (connection.superlink, connection.release_key) == (ADDRESS, None)
    assert connection.root_certificates.read_bytes() == (tmp_path / "ca.pem").read_bytes()
    assert load_p384(connection.node_key, NODE_KEY)


def test_every_policy_key_is_shown_at_its_default(made: Enrolled, tmp_path: Path) -> None:
    text = (made.folder / "site.toml").read_text()
    head, policy = text.split("[policy]\n")
    known = [
        line
        for line in policy.splitlines()
        if any(line.startswith(f"# {name} =") for name in PolicySection.model_fields)
    ]
    assert len(known) == len(PolicySection.model_fields)
    uncommented = "\n".join(line.removeprefix("# ") for line in known if not line.endswith("="))
    (made.folder / "all.toml").write_text(f"{head}[policy]\n{uncommented}\n")
    assert load_site(made.folder / "all.toml").policy == PolicySection()


def test_the_request_holds_the_public_halves(made: Enrolled) -> None:
    content = read_enrolment(made.request)
    node = load_p384(made.folder / "keys" / "node.key", NODE_KEY)
    assert content.node_key == openssh_public(node) == (made.folder / "keys" / "node.key.pub").read_text().strip()
    ledger_key = load_key(made.folder / "state" / "ledger.key")
    assert (content.site, content.ledger_key) == ("north", public_hex(ledger_key))
    assert content.fingerprint == made.fingerprint


def test_the_ledger_takes_up_this_key(made: Enrolled) -> None:
    with Ledger(made.folder / "state" / "ledger.sqlite", "north") as ledger:
        assert ledger.head().key == read_enrolment(made.request).ledger_key


@pytest.mark.parametrize(
    ("change", "code", "expected"),
    [
        ({"site": "../north"}, 2, "--site"),
        ({"site": ""}, 2, "--site"),
        ({"data": "patients.xlsx"}, 2, r"expected a \.csv or \.parquet"),
        ({"superlink": "consortium.example.org"}, 2, "expected HOST:PORT"),
        ({"superlink": "https://x.org:443"}, 2, "expected HOST:PORT"),
        ({"superlink": "x.org:70000"}, 2, "expected HOST:PORT"),
        ({"ca": "server.pem"}, 6, "not the certificate of a certification authority"),
        ({"ca": "expired.pem"}, 6, "expired at"),
        ({"ca": "future.pem"}, 6, "not valid before"),
        ({"ca": "patients.csv"}, 6, "not a PEM certificate"),
        ({"ca": "none.pem"}, 6, "cannot be read"),
        ({"ca": "a.key"}, 6, "holds a private key"),
        ({"release_key": "ca.pem"}, 11, "not a readable PEM public key"),
    ],
)
def test_unusable_input_leaves_nothing(tmp_path: Path, change: dict[str, str], code: int, expected: str) -> None:
    (tmp_path / "patients.csv").write_text("age\n40\n")
    create_key(tmp_path / "a.key", new_p384())
    authority(tmp_path)
    authority(tmp_path, ca=False, name="server.pem")
    authority(tmp_path, age=10, name="expired.pem")
    authority(tmp_path, age=-3, name="future.pem")
    before = {path.name for path in tmp_path.iterdir()}
    given = {"site": "north", "data": "patients.csv", "superlink": ADDRESS, "ca": "ca.pem"} | change
    release = tmp_path / given["release_key"] if "release_key" in given else None
    with pytest.raises(CohortiumError, match=expected) as caught:
        init_site(
            tmp_path / "north",
            given["site"],
            tmp_path / given["data"],
            given["superlink"],
            tmp_path / given["ca"],
            release,
        )
    assert caught.value.exit_code == code and caught.value.fix
    assert {path.name for path in tmp_path.iterdir()} == before


def test_a_folder_that_is_in_use_is_left_alone(made: Enrolled, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in made.folder.rglob("*") if path.is_file()}
    with pytest.raises(OutputError, match="is not empty"):
        init_site(made.folder, "north", tmp_path / "patients.csv", ADDRESS, tmp_path / "ca.pem")
    assert {path: path.read_bytes() for path in made.folder.rglob("*") if path.is_file()} == before


def test_a_rotated_node_key_keeps_the_ledger_key(made: Enrolled) -> None:
    before, old = read_enrolment(made.request), (made.folder / "keys" / "node.key").read_bytes()
    rotated = rotate_node_key(made.folder)
    content = read_enrolment(rotated.request)
    assert content.node_key != before.node_key and content.ledger_key == before.ledger_key
    assert content.created >= before.created
    assert content.node_key == openssh_public(load_p384(made.folder / "keys" / "node.key", NODE_KEY))
    assert rotated.kept is not None and rotated.kept.read_bytes() == old
    assert stat.S_IMODE(rotated.kept.stat().st_mode) == 0o600
    assert rotate_node_key(made.folder).kept != rotated.kept, "twice in a second keeps both"


def test_a_lost_node_key_can_be_replaced_and_a_lost_ledger_key_cannot(made: Enrolled) -> None:
    (made.folder / "keys" / "node.key").unlink()
    assert rotate_node_key(made.folder).kept is None
    assert read_enrolment(made.request)
    (made.folder / "state" / "ledger.key").unlink()
    before = (made.folder / "keys" / "node.key").read_bytes()
    with pytest.raises(LedgerError, match="a new one would not continue the ledger"):
        rotate_node_key(made.folder)
    assert (made.folder / "keys" / "node.key").read_bytes() == before


def test_an_open_node_key_is_not_rotated_silently(made: Enrolled) -> None:
    (made.folder / "keys" / "node.key").chmod(0o644)
    with pytest.raises(SiteError, match="permissions 0644"):
        rotate_node_key(made.folder)


def test_a_site_follows_the_release_key_it_pinned_and_no_other(tmp_path: Path) -> None:
    first, second, third = (Ed25519PrivateKey.generate() for _ in range(3))
    (tmp_path / "release.pub").write_bytes(public_pem(first.public_key()))
    folder = tmp_path / "north"
    init_site(folder, "north", tmp_path / "p.csv", ADDRESS, authority(tmp_path), tmp_path / "release.pub")
    assert load_connection(folder / "connection.toml").release_key == key_id(first.public_key())
    write_handover(tmp_path / "1.json", "Trial", first, second)
    write_handover(tmp_path / "2.json", "Trial", second, third)
    before = {path: path.read_bytes() for path in folder.glob("*") if path.is_file()}
    with pytest.raises(VerifyError, match="not signed by the key"):
        follow_release_key(folder, tmp_path / "2.json")
    assert {path: path.read_bytes() for path in folder.glob("*") if path.is_file()} == before
    for name, key in (("1.json", second), ("2.json", third)):
        assert follow_release_key(folder, tmp_path / name) == key_id(key.public_key())
        assert load_connection(folder / "connection.toml").release_key == key_id(key.public_key())
        assert key_id(load_public_key(folder / "release.pub")) == key_id(key.public_key())
    (folder / "release.pub").write_bytes(public_pem(first.public_key()))
    with pytest.raises(SiteError, match=r"connection\.toml pins"):
        follow_release_key(folder, tmp_path / "1.json")


def test_without_a_pinned_release_key_nothing_is_followed(made: Enrolled, tmp_path: Path) -> None:
    with pytest.raises(SiteError, match="no release key is pinned"):
        follow_release_key(made.folder, tmp_path / "1.json")


def test_the_keys_of_a_site_have_a_history(tmp_path: Path) -> None:
    first, second = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    (tmp_path / "release.pub").write_bytes(public_pem(first.public_key()))
    write_handover(tmp_path / "1.json", "Trial", first, second)
    write_handover(tmp_path / "2.json", "Trial", Ed25519PrivateKey.generate(), second)
    folder, old, new = tmp_path / "north", key_id(first.public_key()), key_id(second.public_key())
    made = init_site(folder, "north", tmp_path / "p.csv", ADDRESS, authority(tmp_path), tmp_path / "release.pub")
    rotated = rotate_node_key(folder)
    with pytest.raises(VerifyError):
        follow_release_key(folder, tmp_path / "2.json")
    follow_release_key(folder, tmp_path / "1.json")
    lines = read_audit(folder / "state" / "audit.jsonl")
    assert {line["actor"] for line in lines} == {"north"}
    assert [(line["action"], line["fingerprint"]) for line in lines] == [
        ("init", made.fingerprint),
        ("rotate-node-key", rotated.fingerprint),
        ("follow-release-key refused", ""),
        ("follow-release-key", new),
    ]
    assert lines[0]["release_key"] == lines[2]["former"] == lines[3]["former"] == old
    assert [line["outcome"] == "ok" for line in lines] == [True, True, False, True]
    assert "not signed by the key" in lines[2]["outcome"]


def test_keys_do_not_change_unless_it_can_be_logged(made: Enrolled) -> None:
    (made.folder / "state" / "audit.jsonl").unlink()
    (made.folder / "state" / "audit.jsonl").mkdir()
    before = {path: path.read_bytes() for path in made.folder.rglob("*") if path.is_file()}
    with pytest.raises(OutputError, match="audit"):
        rotate_node_key(made.folder)
    assert {path: path.read_bytes() for path in made.folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("address", ["a.org:1", "192.0.2.1:65535", "[2001:db8::1]:443", "localhost:9092"])
def test_addresses(address: str) -> None:
    assert check_address(address) == address


@pytest.mark.parametrize(
    "address", ["", ":1", "a.org:", "a.org:0", "a b:1", "2001:db8::1:443", "u@a.org:1", "a.org:1/x", "[x]:1"]
)
def test_no_addresses(address: str) -> None:
    with pytest.raises(ValueError, match=r"HOST:PORT|neither a host name"):
        check_address(address)


def test_commands(tmp_path: Path) -> None:
    command = str(Path(sys.executable).with_name("cohortium-site"))

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run([command, *map(str, arguments)], capture_output=True, text=True, check=False)

    options = ("--site", "north", "--data", tmp_path / "p.csv", "--superlink", ADDRESS, "--ca", authority(tmp_path))
    made = run("init", tmp_path / "north", *options)
    assert made.returncode == 0 and made.stderr == "" and "does not exist yet" in made.stdout
    request = tmp_path / "north" / "enrolment-north.json"
    assert read_enrolment(request).fingerprint in made.stdout
    rotated = run("rotate-node-key", tmp_path / "north", "--json")
    assert rotated.returncode == 0 and json.loads(rotated.stdout)["fingerprint"] == read_enrolment(request).fingerprint
    again = run("init", tmp_path / "north", *options)
    assert again.returncode == 7
    for done in (made, rotated, again):
        for key in (tmp_path / "north").rglob("*.key*"):
            assert key.suffix == ".pub" or key.read_text().splitlines()[1] not in done.stdout + done.stderr
