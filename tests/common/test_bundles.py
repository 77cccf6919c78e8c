"""A release against its manifest: every random corruption is found and named, in a folder and in an archive."""

import hashlib
import io
import json
import random
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.bundles import (
    MANIFEST,
    Trust,
    Verification,
    check_bundle,
    in_words,
    load_trust,
    read_contents,
)
from common.bundles_archive import write_archive
from common.errors import OutputError, VerifyError
from common.keys import key_id
from common.privacy.events import BoundedInfluence
from common.privacy.statement import privacy_statement
from common.signing import add_signature, public_pem, sign, statement_for
from tests.client.hospital import PROTOCOL

KEYS = {name: Ed25519PrivateKey.from_private_bytes(bytes([n] * 32)) for n, name in enumerate(("lead", "anna", "berta"))}
STRANGER = Ed25519PrivateKey.from_private_bytes(bytes([9] * 32))
TRUST = Trust({name: key.public_key() for name, key in KEYS.items()})
FILES = ("README.txt", "cohort.csv", "cohort.parquet", "privacy.json", "rounds.jsonl", "sites.json")


def identity(name: str) -> str:
    return key_id(KEYS[name].public_key())


def statement_of(folder: Path, **more: Any) -> dict[str, Any]:
    signers = {"coordinator": identity("lead"), "sites": {site: identity(site) for site in ("anna", "berta")}}
    return statement_for(folder, FILES, {"study": PROTOCOL.digest, "signers": signers, **more})


def write_manifest(folder: Path, envelope: Any) -> None:
    (folder / MANIFEST).write_text(json.dumps(envelope, indent=1))


def make_bundle(folder: Path) -> dict[str, Any]:
    """A release that the coordinator and two sites have signed; returns the envelope."""
    folder.mkdir()
    numbers = random.Random(5)
    patients = {"anna": 60, "berta": 40}
    events = {site: [BoundedInfluence(1, 0.5, n / 100)] for site, n in patients.items()}
    (folder / "README.txt").write_text("what is what")
    (folder / "cohort.csv").write_text("a,b\n" + "".join(f"{numbers.random()},1\n" for _ in range(20)))
    (folder / "cohort.parquet").write_bytes(numbers.randbytes(300))
    (folder / "privacy.json").write_text(json.dumps(privacy_statement(PROTOCOL, events, patients)))
    (folder / "rounds.jsonl").write_text('{"round": 1}\n')
    (folder / "sites.json").write_text(json.dumps({"joined": patients, "not_joined": {"carla": "denied"}}))
    envelope = sign(statement_of(folder), KEYS["lead"])
    for site in ("anna", "berta"):
        envelope = add_signature(envelope, KEYS[site])
    write_manifest(folder, envelope)
    return envelope


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "release"
    make_bundle(folder)
    return folder


@pytest.fixture
def bundle(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "release"))


def check(path: Path, trust: Trust = TRUST) -> Verification:
    return check_bundle(read_contents(path), trust)


def complaint(path: Path, trust: Trust = TRUST) -> str:
    with pytest.raises(VerifyError) as caught:
        check(path, trust).require()
    return str(caught.value)


def test_an_unchanged_bundle(bundle: Path) -> None:
    found = check(bundle).require()
    assert found.files == dict.fromkeys(FILES, "as signed")
    assert found.signers.trusted == {name: identity(name) for name in KEYS}
    assert found.signers.unknown == () and found.waiting == {}
    shown = "\n".join(in_words(found))
    assert all(name in shown for name in (*FILES, "signed by lead", "signed by anna", "fits the schema"))


def flip(folder: Path, numbers: random.Random) -> str:
    path = folder / numbers.choice([*FILES, MANIFEST])
    content = bytearray(path.read_bytes())
    bit = numbers.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    return f"{path.name}: changed" if path.name != MANIFEST else "manifest|signature"


def remove(folder: Path, numbers: random.Random) -> str:
    name = numbers.choice([*FILES, MANIFEST])
    (folder / name).unlink()
    return f"{name}: missing" if name != MANIFEST else "no readable manifest"


def add(folder: Path, numbers: random.Random) -> str:
    name = numbers.choice(
        ["x.csv", ".hidden", "manifest.json", "cohort.csv.bak", "decoder.safetensors", "ledgers", "Z"]
    )
    (folder / name).write_bytes(numbers.randbytes(numbers.randrange(3)))
    return f"{name}: not in the manifest"


def rename(folder: Path, numbers: random.Random) -> str:
    name = numbers.choice(FILES)
    (folder / name).rename(folder / f"{name}.old")
    return f"{name}: missing"


def truncate(folder: Path, numbers: random.Random) -> str:
    path = folder / numbers.choice([*FILES, MANIFEST])
    content = path.read_bytes()
    path.write_bytes(content[: numbers.randrange(len(content))])
    return f"{path.name}: changed" if path.name != MANIFEST else "no readable manifest"


def swap(folder: Path, numbers: random.Random) -> str:
    first, second = numbers.sample(FILES, 2)
    content = (folder / first).read_bytes()
    (folder / first).write_bytes((folder / second).read_bytes())
    (folder / second).write_bytes(content)
    return f"{first}: changed"


def sign_anew(folder: Path, numbers: random.Random) -> str:
    """By one who changed a file and has a key of his own."""
    (folder / "cohort.csv").write_bytes(numbers.randbytes(9))
    write_manifest(folder, sign(statement_of(folder), STRANGER))
    return "no key that you trust"


def repeat(folder: Path, numbers: random.Random) -> str:
    envelope = json.loads((folder / MANIFEST).read_text())
    envelope["signatures"].append(numbers.choice(envelope["signatures"]))
    write_manifest(folder, envelope)
    return "same key twice"


def exchange(folder: Path, numbers: random.Random) -> str:
    envelope = json.loads((folder / MANIFEST).read_text())
    first, second = numbers.sample(envelope["signatures"], 2)
    first["sig"] = second["sig"]
    write_manifest(folder, envelope)
    return "does not hold"


def rename_key(folder: Path, numbers: random.Random) -> str:
    envelope = json.loads((folder / MANIFEST).read_text())
    numbers.choice(envelope["signatures"])["keyid"] = numbers.randbytes(32).hex()
    write_manifest(folder, envelope)
    return "another key id"


CORRUPTIONS: list[Callable[[Path, random.Random], str]] = [
    flip, flip, flip, flip, remove, add, rename, truncate, swap, sign_anew, repeat, exchange, rename_key,
]  # fmt: skip


@pytest.mark.parametrize("part", range(10))
def test_every_one_of_a_thousand_random_corruptions_is_found_and_named(
    original: Path, tmp_path: Path, part: int
) -> None:
    for seed in range(100 * part, 100 * part + 100):
        numbers = random.Random(seed)
        folder = Path(shutil.copytree(original, tmp_path / str(seed)))
        corrupt = numbers.choice(CORRUPTIONS)
        expected = corrupt(folder, numbers)
        said = complaint(folder)
        assert any(word in said for word in expected.split("|")), (seed, corrupt.__name__, expected, said)


@pytest.mark.parametrize("who", ["lead", "anna", "berta"])
def test_a_signature_that_was_dropped(bundle: Path, who: str) -> None:
    envelope = json.loads((bundle / MANIFEST).read_text())
    envelope["signatures"] = [s for s in envelope["signatures"] if s["keyid"] != identity(who)]
    write_manifest(bundle, envelope)
    if who == "lead":
        assert f"the key that made the release ({identity('lead')[:16]}…) has not signed" in complaint(bundle)
        return
    # It looks like one that never came, which is no fault of the release; it is said.
    found = check(bundle).require()
    assert found.waiting == {who: identity(who)}
    assert f"not signed yet by {who}, which took part" in in_words(found)


def test_a_signature_by_an_unknown_key(bundle: Path) -> None:
    envelope = json.loads((bundle / MANIFEST).read_text())
    write_manifest(bundle, add_signature(envelope, STRANGER))
    found = check(bundle).require()
    assert found.signers.unknown == (key_id(STRANGER.public_key()),)
    assert any("not among yours" in line for line in in_words(found))
    # A site whose key the reader lacks: the manifest says whose it ought to be, and nothing is taken for proven.
    found = check(bundle, Trust({"lead": KEYS["lead"].public_key()})).require()
    assert set(found.waiting) == {"anna", "berta"} and len(found.signers.unknown) == 3
    assert any("says that it is anna's" in line for line in in_words(found))


def test_a_name_of_a_site_on_another_key(bundle: Path) -> None:
    envelope = add_signature(json.loads((bundle / MANIFEST).read_text()), STRANGER)
    write_manifest(bundle, envelope)
    trust = Trust({"lead": KEYS["lead"].public_key(), "anna": STRANGER.public_key()})
    assert "anna: signed with another key than the manifest names" in complaint(bundle, trust)


def test_revoked_keys_are_refused_by_name(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    (folder / "revoked").mkdir(parents=True)
    for name, key in KEYS.items():
        (folder / f"{name}.pub").write_bytes(public_pem(key.public_key()))
    check(bundle, load_trust(folder)).require()
    revoked = tmp_path / "berta-2025.pub"
    revoked.write_bytes((folder / "berta.pub").read_bytes())
    assert "berta-2025 (" in complaint(bundle, load_trust(folder, revoked))
    assert "its key is revoked" in complaint(bundle, load_trust(folder, revoked))
    (folder / "anna.pub").rename(folder / "revoked" / "anna.pub")
    assert f"anna ({identity('anna')[:16]}…) has signed, and its key is revoked" in complaint(
        bundle, load_trust(folder)
    )
    (folder / "again.pub").write_bytes((folder / "lead.pub").read_bytes())
    with pytest.raises(VerifyError, match=r"again\.pub and lead\.pub are the same key"):
        load_trust(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(VerifyError, match="holds no public key"):
        load_trust(tmp_path / "empty")
    with pytest.raises(VerifyError, match="not a folder"):
        load_trust(tmp_path / "nothing")


def test_what_a_run_leaves_is_allowed_only_beside_its_decoder(bundle: Path) -> None:
    (bundle / "decoder.safetensors").write_bytes(b"weights")
    statement = statement_of(bundle, decoder_sha256=hashlib.sha256(b"weights").hexdigest())
    write_manifest(bundle, sign(statement, KEYS["lead"]))
    (bundle / "ledgers").mkdir()
    found = check(bundle).require()
    assert (found.files["ledgers"], found.files["decoder.safetensors"]) == ("not released", "not released")
    (bundle / "notes.txt").write_text("")
    assert "notes.txt: not in the manifest" in complaint(bundle)
    (bundle / "notes.txt").unlink()
    (bundle / "decoder.safetensors").unlink()
    assert "ledgers: not in the manifest" in complaint(bundle)


def test_a_link_is_no_file(bundle: Path) -> None:
    (bundle / "cohort.csv").rename(bundle.parent / "elsewhere")
    (bundle / "cohort.csv").symlink_to(bundle.parent / "elsewhere")
    assert "cohort.csv: missing" in complaint(bundle)


@pytest.mark.parametrize("name", ["../cohort.csv", "/etc/passwd", "a/b", "", "..", MANIFEST])
def test_a_statement_that_names_other_places(bundle: Path, name: str) -> None:
    statement = statement_of(bundle)
    statement["subject"][0]["name"] = name
    write_manifest(bundle, sign(statement, KEYS["lead"]))
    assert "not the manifest of a release" in complaint(bundle)


@pytest.mark.parametrize("change", [{"_type": "x"}, {"predicateType": "urn:x"}, {"subject": []}, {"predicate": 3}])
def test_something_else_that_was_signed(bundle: Path, change: dict[str, Any]) -> None:
    write_manifest(bundle, sign({**statement_of(bundle), **change}, KEYS["lead"]))
    assert "not the manifest of a release" in complaint(bundle)


# ---------------------------------------------------------------- the same as one file


@pytest.fixture
def archive(bundle: Path) -> Path:
    path = bundle.parent / "release.tar.zst"
    write_archive(path, bundle, [*FILES, MANIFEST])
    return path


def test_an_archive_says_the_same_and_is_always_the_same(bundle: Path, archive: Path) -> None:
    inside, beside = check(archive), check(bundle)
    assert (inside.files, inside.signers, inside.problems) == (beside.files, beside.signers, ())
    again = bundle.parent / "again.tar.zst"
    (bundle / "cohort.csv").touch()
    write_archive(again, bundle, [MANIFEST, *reversed(FILES)])
    assert again.read_bytes() == archive.read_bytes()
    # Any tar reads it; an independent look at what it holds.
    with tarfile.open(
        fileobj=io.BytesIO(zstandard.ZstdDecompressor().stream_reader(archive.read_bytes()).read())
    ) as tar:
        members = tar.getmembers()
        assert [m.name for m in members] == sorted([*FILES, MANIFEST])
        assert {(m.mtime, m.uid, m.gid, m.mode, m.type) for m in members} == {(0, 0, 0, 0o644, tarfile.REGTYPE)}
        for member in members:
            file = tar.extractfile(member)
            assert file is not None and file.read() == (bundle / member.name).read_bytes()


def test_random_corruptions_of_an_archive_are_found(archive: Path) -> None:
    content = archive.read_bytes()
    for seed in range(200):
        numbers = random.Random(seed)
        changed = bytearray(content)
        # The first six bytes are zstandard's magic number and what the frame asks of a reader: a larger window is none.
        bit = numbers.randrange(8 * 6, 8 * len(content))
        changed[bit // 8] ^= 1 << bit % 8
        archive.write_bytes(changed)
        assert archive.name in complaint(archive), seed
        archive.write_bytes(content[: numbers.randrange(len(content))])
        assert "not a whole" in complaint(archive)
        archive.write_bytes(content + numbers.randbytes(1 + seed % 3))
        assert "something follows" in complaint(archive)


def packed(path: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> Path:
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    path.write_bytes(zstandard.ZstdCompressor().compress(plain.getvalue()))
    return path


def entry(name: str, **changes: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for key, value in changes.items():
        setattr(info, key, value)
    return info


@pytest.mark.parametrize(
    "members",
    [
        [entry("../x")], [entry("/x")], [entry("a/b")], [entry("..")], [entry("x", type=tarfile.SYMTYPE, linkname="/")],
        [entry("x", type=tarfile.LNKTYPE, linkname="y")], [entry("x", type=tarfile.DIRTYPE)], [entry("x", mode=0o4755)],
        [entry("x", type=tarfile.CHRTYPE)], [entry("x", mtime=1)], [entry("x", uid=5)], [entry("y"), entry("x")],
        [entry("x"), entry("x")], [entry("x" * 300)], [entry(f"{n:03}") for n in range(65)],
    ],
)  # fmt: skip
def test_archives_that_hold_anything_but_plain_files(tmp_path: Path, members: list[tarfile.TarInfo]) -> None:
    path = packed(tmp_path / "x.tar.zst", [(info, b"") for info in members])
    assert "something else than plain files" in complaint(path)
    assert [item.name for item in tmp_path.iterdir()] == ["x.tar.zst"]


def test_a_size_beyond_all_measure_is_not_read(tmp_path: Path) -> None:
    info = entry("x", size=1 << 60)
    header = info.tobuf(tarfile.GNU_FORMAT)
    path = tmp_path / "x.tar.zst"
    path.write_bytes(zstandard.ZstdCompressor().compress(header + bytes(1 << 20)))
    assert "something else than plain files" in complaint(path)


def test_what_is_no_archive(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"PK")
    assert "not a whole .tar.zst" in complaint(tmp_path / "x")
    assert "cannot be read" in complaint(tmp_path / "missing")
    assert "no readable manifest" in complaint(packed(tmp_path / "y", [(entry("x"), b"1")]))


def test_an_archive_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / ("x" * 120)).write_bytes(b"")
    with pytest.raises(OutputError, match="too long"):
        write_archive(tmp_path / "out.tar.zst", tmp_path, ["x" * 120])
    assert not (tmp_path / "out.tar.zst").exists()
