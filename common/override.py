"""The second signature under an override: who else than the coordinator answers for a cohort whose gates failed.

An approval is an in-toto statement in a DSSE envelope, made without a network. Its subjects are the very files of the
candidate; its predicate names the study, the failed gates with their numbers, the reason, the person and his key. So it
fits no other candidate, no other reason and no other numbers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import Field

from common.config import Section
from common.errors import UsageError, VerifyError
from common.gates import GATES, NOT_RELEASED, GateRecord, GatesDocument, OverrideRecord, Value, read_gates
from common.gates_section import KeyId
from common.keys import KeyUse, key_id
from common.privacy.ledger_keys import KEY_HEX
from common.signing import STATEMENT_TYPE, load_json, read_envelope, sign, statement_for

PREDICATE_TYPE = "urn:cohortium:gate-override:v1"
FORMER = "former-manifest.json"
# Written when the candidate is released: they say that it was overridden, or describe the files that were approved. The
# gates' numbers are in the predicate.
REWRITTEN = frozenset({GATES, "report.html", "README.txt", "schema.json", "croissant.json", "ro-crate-metadata.json"})
NOT_SUBJECTS = frozenset({NOT_RELEASED, FORMER})
SHORTEST_REASON, FEWEST_WORDS, LONGEST_REASON = 20, 4, 2000
SECOND_KEY = KeyUse(
    "the key of the second signature",
    UsageError,
    "there is no such key",
    "make one with `openssl genpkey -algorithm ed25519 -out second.pem` and `chmod 600 second.pem`",
)
AGAIN = "have the candidate that is in quarantine now approved again: `cohortium approve-override`"


class FailedGate(Section):
    """A failed gate as the second person saw it."""

    name: str
    found: Value
    limit: Value


class ApprovalContent(Section):
    """The predicate of an approval."""

    study: str = Field(pattern=r"^[0-9a-f]{64}$", description="digest of the study")
    gates: tuple[FailedGate, ...] = Field(min_length=1)
    reason: str
    by: str = Field(min_length=1, max_length=200)
    at: str
    key: str = Field(pattern=f"^{KEY_HEX}$", description="hex of the raw Ed25519 key")
    kind: Literal["override"]


class Approval(Section):
    """An approval whose signature holds."""

    content: ApprovalContent
    key_id: KeyId
    files: dict[str, str] = Field(description="SHA-256 of every file of the candidate")


def check_reason(text: str) -> str:
    """The reason with single blanks; `UsageError` unless it is one that a reader could judge."""
    reason = " ".join(text.split())
    words = set(re.findall(r"\w{2,}", reason.lower()))
    if not reason.isprintable() or len(reason) > LONGEST_REASON:
        raise UsageError(f"the reason: expected at most {LONGEST_REASON} printable characters", fix="say it shorter")
    if len(reason) < SHORTEST_REASON or len(words) < FEWEST_WORDS:
        raise UsageError(
            f"the reason {reason!r} says too little: expected at least {SHORTEST_REASON} characters and {FEWEST_WORDS}"
            " different words",
            fix="say why this cohort may be released although the gate failed; it is printed with every release",
        )
    return reason


def load_candidate(folder: Path) -> GatesDocument:
    """The gates of a candidate in quarantine; `VerifyError` if there is none, or nothing that can be overridden."""
    if not (folder / NOT_RELEASED).is_file():
        raise VerifyError(f"{folder}: no candidate in quarantine", fix="name the folder `quarantine` of a run")
    try:
        document = read_gates(load_json((folder / GATES).read_bytes()))
    except (OSError, ValueError) as error:
        why = str(error) if isinstance(error, ValueError) else "it cannot be read"
        raise VerifyError(f"{folder / GATES}: {why}", fix="run `cohortium release` again") from None
    never = [gate.name for gate in document.failed if not gate.overridable]
    if never:
        raise VerifyError(
            f"{folder}: {', '.join(never)} failed, which nobody can override",
            fix="mend what failed; statements of the release would be false",
        )
    if document.passed:
        raise VerifyError(f"{folder}: every gate passed, there is nothing to override", fix="`cohortium release` it")
    return document


def approve(
    folder: Path, key: Ed25519PrivateKey, *, by: str, reason: str, now: datetime | None = None
) -> dict[str, Any]:
    """The approval of the candidate in `folder` with this reason: a DSSE envelope.

    `UsageError` for a reason or name that says too little, `VerifyError` if there is nothing to approve.
    """
    document, reason, by = load_candidate(folder), check_reason(reason), " ".join(by.split())
    if not 1 <= len(by) <= 200 or not by.isprintable():
        raise UsageError("--by: expected 1 to 200 printable characters", fix="name the person who signs")
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name not in NOT_SUBJECTS)
    raw = key.public_key().public_bytes_raw()
    content = ApprovalContent(
        kind="override",
        study=document.study_digest,
        gates=tuple(FailedGate(name=g.name, found=g.found, limit=g.limit) for g in document.failed),
        reason=reason,
        by=by,
        at=(now or datetime.now(UTC)).isoformat(timespec="seconds").replace("+00:00", "Z"),
        key=raw.hex(),
    )
    statement = statement_for(folder, names, content.model_dump(mode="json"))
    return sign({**statement, "predicateType": PREDICATE_TYPE}, key)


def read_approval(envelope: Any, source: str) -> Approval:
    """What an approval says, if its own key signed it; `VerifyError` otherwise."""
    not_one = VerifyError(f"{source}: not the approval of an override", fix="name what `approve-override` wrote")
    try:
        opened = read_envelope(envelope)
        statement = opened.statement()
        if (statement["_type"], statement["predicateType"]) != (STATEMENT_TYPE, PREDICATE_TYPE):
            raise KeyError
        content = ApprovalContent.model_validate(statement["predicate"])
        files = {str(subject["name"]): str(subject["digest"]["sha256"]) for subject in statement["subject"]}
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(content.key))
    except (KeyError, TypeError, AttributeError, ValueError, VerifyError):
        raise not_one from None
    if not opened.signed_by(key):
        raise VerifyError(f"{source}: its signature does not hold: it was changed after signing", fix=AGAIN)
    return Approval(content=content, key_id=key_id(key), files=files)


def load_approval(path: Path) -> dict[str, Any]:
    """The envelope in a file; `VerifyError` if it is not an approval whose signature holds."""
    try:
        envelope = load_json(path.read_bytes())
    except OSError as error:
        raise VerifyError(f"{path}: cannot be read ({error.strerror})", fix="name the file of the approval") from None
    except ValueError:
        raise VerifyError(f"{path}: not JSON", fix="name what `cohortium approve-override` wrote") from None
    read_approval(envelope, str(path))
    return envelope


def override_of(
    envelope: Mapping[str, Any],
    document: GatesDocument,
    files: Mapping[str, str],
    *,
    release_key: str,
    allowed: Sequence[str] = (),
) -> OverrideRecord:
    """The override that an approval allows for these failed gates and files (SHA-256 by name).

    `release_key` is the key id of the coordinator, `allowed` are those that the study declares. `VerifyError` naming
    what does not fit.
    """
    approval = read_approval(envelope, "the second signature")
    problems = approval_problems(approval, document.study_digest, document.failed, files, release_key, allowed)
    if problems:
        listing = "\n".join(f"  - {problem}" for problem in problems)
        raise VerifyError(f"the second signature does not allow this override\n{listing}", fix=AGAIN)
    content = approval.content
    return OverrideRecord(
        reason=content.reason,
        by=content.by,
        key_id=approval.key_id,
        at=content.at,
        gates=tuple(gate.name for gate in document.failed),
        second_signature=json.loads(json.dumps(envelope)),
    )


def approval_problems(
    approval: Approval,
    study: str,
    failed: Sequence[GateRecord],
    files: Mapping[str, str],
    release_key: str | None,
    allowed: Sequence[str],
) -> list[str]:
    """Why an approval does not cover these failed gates and files; none if it does."""
    content, found = approval.content, []
    if content.study != study:
        found.append(f"it is for another study ({content.study[:16]}…)")
    if approval.key_id == release_key:
        found.append("it is signed with the release key: it has to be another person's")
    if allowed and approval.key_id not in allowed:
        found.append(f"its key {approval.key_id[:16]}… is not among gates.override_keys of the study")
    seen = {gate.name: (gate.found, gate.limit) for gate in content.gates}
    for gate in failed:
        if not gate.overridable:
            found.append(f"{gate.name} failed, which nobody can override")
        elif seen.get(gate.name) != (gate.found, gate.limit):
            found.append(f"it does not name {gate.in_words()}")
    mine = {name: digest for name, digest in files.items() if name not in REWRITTEN}
    theirs = {name: digest for name, digest in approval.files.items() if name not in REWRITTEN}
    found += [f"{name} is not the file that was approved" for name in sorted(mine) if mine[name] != theirs.get(name)]
    found += [f"{name} was approved and is not there" for name in sorted(set(theirs) - set(mine))]
    return found
