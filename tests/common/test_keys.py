import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.errors import OutputError, SiteError
from common.keys import (
    NODE_KEY,
    KeyUse,
    create_key,
    create_private,
    key_id,
    load_ed25519,
    load_p384,
    new_p384,
    openssh_public,
    p384_holds,
    parse_openssh_public,
    private_bytes,
    replace_private,
    sign_p384,
)

SIGNING = KeyUse("the signing key", SiteError, "it is missing", "restore it")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_keys_come_back_from_their_files(tmp_path: Path) -> None:
    ed, node = Ed25519PrivateKey.generate(), new_p384()
    create_key(tmp_path / "a.key", ed)
    create_key(tmp_path / "node.key", node, openssh=True)
    assert load_ed25519(tmp_path / "a.key", SIGNING).private_bytes_raw() == ed.private_bytes_raw()
    assert load_p384(tmp_path / "node.key", NODE_KEY).private_numbers() == node.private_numbers()
    assert [mode(tmp_path / name) for name in ("a.key", "node.key")] == [0o600, 0o600]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.key", "node.key"], "no temporary file stays"


def test_flower_reads_the_node_key_and_its_public_half(tmp_path: Path) -> None:
    from flwr.cli.supernode.register import try_load_public_key
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes

    node = new_p384()
    create_key(tmp_path / "node.key", node, openssh=True)
    read = serialization.load_ssh_private_key((tmp_path / "node.key").read_bytes(), None)  # as flower-supernode does
    assert isinstance(read, ec.EllipticCurvePrivateKey)
    (tmp_path / "node.pub").write_text(openssh_public(node) + "\n")
    assert try_load_public_key(tmp_path / "node.pub") == public_key_to_bytes(read.public_key())


def test_the_file_is_private_from_its_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    link = os.link

    def watch(source: Path, target: Path) -> None:
        seen.append(mode(Path(source)))
        link(source, target)

    monkeypatch.setattr(os, "link", watch)
    mask = os.umask(0)
    try:
        create_private(tmp_path / "x.key", b"secret")
    finally:
        os.umask(mask)
    assert seen == [0o600] and mode(tmp_path / "x.key") == 0o600


def test_a_key_is_never_replaced_by_a_new_one(tmp_path: Path) -> None:
    path = tmp_path / "a.key"
    create_private(path, b"first")
    with pytest.raises(OutputError, match="there is a key already"):
        create_private(path, b"second")
    assert path.read_bytes() == b"first" and len(list(tmp_path.iterdir())) == 1
    (tmp_path / "link.key").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="there is a key already"):
        create_private(tmp_path / "link.key", b"second")
    assert not (tmp_path / "elsewhere").exists()


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left on device"):
        create_private(tmp_path / "a.key", b"secret")
    assert list(tmp_path.iterdir()) == []


def test_a_replaced_key_stays_under_another_name(tmp_path: Path) -> None:
    path, kept = tmp_path / "a.key", tmp_path / "a.key.old"
    create_private(path, b"first")
    replace_private(path, b"second", kept)
    assert (path.read_bytes(), kept.read_bytes()) == (b"second", b"first")
    assert mode(path) == mode(kept) == 0o600
    with pytest.raises(OutputError, match="the old key is unchanged"):
        replace_private(path, b"third", kept)
    assert path.read_bytes() == b"second" and len(list(tmp_path.iterdir())) == 2


def wide(path: Path) -> None:
    create_key(path, Ed25519PrivateKey.generate())
    path.chmod(0o640)


def encrypted(path: Path) -> None:
    key = Ed25519PrivateKey.generate()
    how = serialization.BestAvailableEncryption(b"word")
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, how))
    path.chmod(0o600)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda path: None, "it is missing"),
        (wide, "permissions 0640; nobody but its owner"),
        (lambda path: path.mkdir(), "is not a file"),
        (lambda path: create_private(path, b"not a key"), "not a readable PEM private key"),
        (encrypted, "without a password"),
        (lambda path: create_key(path, new_p384()), "not an Ed25519 key"),
        (lambda path: create_key(path, new_p384(), openssh=True), "not a readable PEM private key"),
    ],
)
def test_what_is_wrong_with_a_key_is_told_apart(tmp_path: Path, make: Callable[[Path], object], expected: str) -> None:
    make(tmp_path / "a.key")
    with pytest.raises(SiteError, match=expected) as caught:
        load_ed25519(tmp_path / "a.key", SIGNING)
    assert "a.key" in str(caught.value) and caught.value.fix


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP521R1()])
def test_another_curve_is_refused(tmp_path: Path, curve: ec.EllipticCurve) -> None:
    key = ec.generate_private_key(curve)
    create_key(tmp_path / "node.key", key, openssh=True)
    with pytest.raises(SiteError, match="P-384"):
        load_p384(tmp_path / "node.key", NODE_KEY)
    with pytest.raises(ValueError, match="P-384"):
        parse_openssh_public(openssh_public(key))


@pytest.mark.parametrize("line", ["", "ssh-ed25519 AAAA", "ecdsa-sha2-nistp384 AAAA", "é"])
def test_a_line_that_is_no_public_key(line: str) -> None:
    with pytest.raises(ValueError, match="not a public key"):
        parse_openssh_public(line)


def test_a_public_key_with_a_comment_is_refused() -> None:
    line = openssh_public(new_p384())
    assert openssh_public_of(line) == line
    with pytest.raises(ValueError, match="something added"):
        parse_openssh_public(line + " user@host")


def openssh_public_of(line: str) -> str:
    key = parse_openssh_public(line)
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


def test_signatures_of_the_node_key() -> None:
    key, other = new_p384(), new_p384()
    signature = sign_p384(key, b"content")
    assert p384_holds(key.public_key(), b"content", signature)
    assert not p384_holds(key.public_key(), b"other", signature)
    assert not p384_holds(other.public_key(), b"content", signature)
    assert not p384_holds(key.public_key(), b"content", "zz")


def test_private_bytes_are_what_openssl_and_openssh_write() -> None:
    assert private_bytes(new_p384()).startswith(b"-----BEGIN PRIVATE KEY-----")
    assert private_bytes(new_p384(), openssh=True).startswith(b"-----BEGIN OPENSSH PRIVATE KEY-----")


def test_an_ed25519_key_has_one_name_whichever_way_it_is_held() -> None:
    public = Ed25519PrivateKey.generate().public_key()
    der = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    raw = der[-32:]  # RFC 8410: the key ends the structure
    assert key_id(public) == key_id(raw.hex()) == hashlib.sha256(raw).hexdigest()
    assert key_id(raw.hex()) != hashlib.sha256(raw.hex().encode()).hexdigest()
