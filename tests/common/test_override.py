"""An approval fits one candidate, one reason and one set of numbers, and nothing else."""

import base64
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from common.digest import sha256_of_file
from common.errors import VerifyError
from common.gates import NOT_RELEASED, GatesDocument, read_gates
from common.keys import key_id
from common.override import NOT_SUBJECTS, approve, override_of, read_approval

REASON = "The board accepts this cohort for a pilot"
KEY = Ed25519PrivateKey.generate()
FILES = {"cohort.csv": b"age\n1\n", "study.json": b"{}", "report.html": b"<p>", NOT_RELEASED: b"not a release"}
GATES = [
    {"name": name, "passed": name != "copies", "found": 0.2, "limit": 0.1, "fix": "", "evidence": "metrics.json"}
    for name in ("certificate", "ledgers", "schema", "copies")
]
DOCUMENT = {
    "schema_version": 1, "study_digest": "1" * 64, "cohort_sha256": None, "passed": False, "gates": GATES,
    "override": None,
}  # fmt: skip


def lay_out(folder: Path) -> GatesDocument:
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    (folder / "gates.json").write_text(json.dumps(DOCUMENT))
    return read_gates(DOCUMENT)


def digests(folder: Path) -> dict[str, str]:
    return {p.name: sha256_of_file(p) for p in folder.iterdir() if p.name not in NOT_SUBJECTS}


@pytest.fixture
def candidate(tmp_path: Path) -> Path:
    lay_out(tmp_path)
    return tmp_path


def test_an_approval_allows_what_it_names(candidate: Path) -> None:
    document = lay_out(candidate)
    envelope = approve(candidate, KEY, by=" Dr.  B ", reason=f"  {REASON}\n")
    found = override_of(envelope, document, digests(candidate), release_key="0" * 64)
    assert (found.reason, found.by, found.gates) == (REASON, "Dr. B", ("copies",))
    assert found.key_id == key_id(KEY.public_key()) and found.at.endswith("Z")
    # What is written anew once it is overridden may differ: it is covered by the numbers.
    override_of(envelope, document, digests(candidate) | {"report.html": "0" * 64}, release_key="0" * 64)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"study_digest": "2" * 64}, "for another study"),
        ({"gates": [gate | {"found": 0.3} for gate in GATES]}, "does not name copies: found 0.3"),
        ({"gates": [gate | {"limit": 0.01} for gate in GATES]}, "limit 0.01"),
        ({"gates": [gate | {"passed": False} for gate in GATES]}, "certificate failed, which nobody can override"),
        ({"gates": [*GATES, GATES[3] | {"name": "inference"}]}, "does not name inference"),
    ],
)
def test_other_numbers_need_another_approval(candidate: Path, change: dict[str, Any], words: str) -> None:
    envelope = approve(candidate, KEY, by="B", reason=REASON)
    with pytest.raises(VerifyError, match=words):
        override_of(envelope, read_gates(DOCUMENT | change), digests(candidate), release_key="0" * 64)


def test_files_and_keys(candidate: Path) -> None:
    envelope, document = approve(candidate, KEY, by="B", reason=REASON), read_gates(DOCUMENT)
    held = digests(candidate)
    mine = key_id(KEY.public_key())
    cases: list[tuple[dict[str, str], dict[str, Any], str]] = [
        (held | {"cohort.csv": "0" * 64}, {}, r"cohort\.csv is not the file"),
        (held | {"audit.json": "0" * 64}, {}, r"audit\.json is not the file"),
        ({"study.json": held["study.json"]}, {}, r"cohort\.csv was approved and is not there"),
        (held, {"release_key": mine}, "another person's"),
        (held, {"allowed": ["0" * 64]}, "override_keys"),
    ]
    for files, options, words in cases:
        with pytest.raises(VerifyError, match=words):
            override_of(envelope, document, files, **{"release_key": "0" * 64, **options})
    override_of(envelope, document, held, release_key="0" * 64, allowed=[mine])


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_changed_approval_is_none(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        lay_out(Path(folder))
        envelope = approve(Path(folder), KEY, by="B", reason=REASON)
    where = data.draw(st.sampled_from(["payload", "signature"]))
    text = envelope["payload"] if where == "payload" else envelope["signatures"][0]["sig"]
    raw = bytearray(base64.b64decode(text))
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    changed = base64.b64encode(bytes(raw)).decode()
    if where == "payload":
        envelope["payload"] = changed
    else:
        envelope["signatures"][0]["sig"] = changed
    with pytest.raises(VerifyError):
        read_approval(envelope, "it")
