"""A release as others receive it, a folder or an archive, against its signed manifest: what is as signed, and by whom.

Everything works without a network and without reading more than once. Nothing is unpacked or written.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from common.bundles_archive import read_archive
from common.errors import VerifyError
from common.gates import GATES, NOT_RELEASED, QUARANTINE, GatesDocument
from common.gates_check import check_gates_document
from common.keys import key_id
from common.privacy.statement_schema import problem_of
from common.signing import (
    PREDICATE_TYPE,
    STATEMENT_TYPE,
    Envelope,
    Signers,
    digests_of,
    load_json,
    load_public_key,
    read_envelope,
    signers_of,
)

MANIFEST, PRIVACY, SITES, STUDY, DECODER = (
    "manifest.dsse.json",
    "privacy.json",
    "sites.json",
    "study.json",
    "decoder.safetensors",
)
KEYS = ("simulation-key.pub", "release.pub")
KEPT = (MANIFEST, PRIVACY, SITES, STUDY, "release.json", GATES)
# What a run leaves beside its release. In a folder that holds no decoder of that run, none of it has any business.
BESIDE = (
    DECODER, "ledger-heads.json", "launch.json", "nodes.json", "waiting.json", "failure.json", "runtime.log",
    "inputs.json", "ledgers", "site-logs",
)  # fmt: skip
LARGEST_KEPT = 1 << 26
AS_SIGNED, CHANGED, MISSING, EXTRA, LEFT = "as signed", "changed", "missing", "not in the manifest", "not released"


@dataclass(frozen=True)
class Contents:
    """The files of a bundle: digests of all, and the content of those that a check reads. `None`: not a file."""

    source: str
    archive: bool
    digests: Mapping[str, dict[str, str] | None]
    kept: Mapping[str, bytes]

    def document(self, name: str) -> Any:
        """The JSON in one of the small files; None if it is not there or not JSON."""
        with suppress(KeyError, ValueError):
            return load_json(self.kept[name])
        return None


@dataclass(frozen=True)
class Trust:
    """Public keys by name, and those that are revoked."""

    keys: Mapping[str, Ed25519PublicKey]
    revoked: Mapping[str, Ed25519PublicKey] = field(default_factory=dict)


@dataclass(frozen=True)
class Verification:
    """What checking a bundle has found. It is good if `problems` is empty.

    `waiting` are the sites that took part and have not signed, with their key ids where the manifest names them;
    `gates` is what gates.json says, None for a release without one; `second` is the name of the trusted key behind the
    second signature of an override, if it is one of a trusted key.
    """

    source: str
    statement: Mapping[str, Any]
    files: Mapping[str, str]
    signers: Signers
    waiting: Mapping[str, str]
    problems: tuple[str, ...]
    gates: GatesDocument | None = None
    second: str | None = None

    def require(self) -> Verification:
        """Itself, or `VerifyError` naming every problem."""
        if not self.problems:
            return self
        wrong = sum(state in (CHANGED, MISSING, EXTRA) for state in self.files.values())
        about = f"{wrong} file(s) are not what was signed" if wrong else "not a release to rely on"
        listing = "\n".join(f"  - {problem}" for problem in self.problems)
        raise VerifyError(f"{self.source}: {about}\n{listing}", fix="do not use it; ask for the release again")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "files": dict(self.files),
            "signers": dict(self.signers.trusted),
            "unknown_signers": list(self.signers.unknown),
            "not_signed_yet": dict(self.waiting),
            "gates": None if self.gates is None else self.gates.to_json(),
            "second_signer": self.second,
            "problems": list(self.problems),
        }


def read_contents(path: Path) -> Contents:
    """Read a folder or a .tar.zst; `VerifyError` if it is neither or cannot be read."""
    if not path.is_dir():
        digests, kept = read_archive(path, KEPT, LARGEST_KEPT)
        return Contents(str(path), True, digests, kept)
    found: dict[str, dict[str, str] | None] = {}
    kept: dict[str, bytes] = {}
    try:
        for item in sorted(path.iterdir()):
            if item.is_symlink() or not item.is_file() or item.name in BESIDE:
                found[item.name] = None
                continue
            with item.open("rb") as file:
                found[item.name] = digests_of(file)
                if item.name in KEPT and file.tell() <= LARGEST_KEPT:
                    file.seek(0)
                    kept[item.name] = file.read()
        decoder = path / DECODER
        if decoder.is_file() and not decoder.is_symlink():
            with decoder.open("rb") as file:
                found[DECODER] = digests_of(file)
    except OSError as error:
        raise VerifyError(f"{path}: cannot be read ({error.strerror})", fix="correct its permissions") from None
    return Contents(str(path), False, found, kept)


def envelope_of(contents: Contents) -> tuple[Any, Envelope]:
    """The manifest's envelope, as JSON and decoded; `VerifyError` if there is none.

    Whose signatures it carries, and whether they hold, is not checked.
    """
    document = contents.document(MANIFEST)
    if document is None and {NOT_RELEASED, QUARANTINE} & set(contents.digests):
        failed = _failed_gates(contents)
        raise VerifyError(
            f"{contents.source}: not a release: {failed} failed, and the candidate is in quarantine",
            fix=f"read {NOT_RELEASED} there; `cohortium release` evaluates the gates again",
        )
    if document is None:
        raise VerifyError(f"{contents.source}/{MANIFEST}: no readable manifest", fix="name the directory of a release")
    return document, read_envelope(document)


def load_trust(folder: Path, revoked: Path | None = None) -> Trust:
    """The keys NAME.pub of a folder; revoked ones lie in its folder `revoked`, or in a file or folder of their own."""
    if not folder.is_dir():
        raise VerifyError(f"{folder}: not a folder", fix="name a folder with public keys NAME.pub")
    keys = _keys_in(folder)
    if not keys:
        raise VerifyError(f"{folder}: holds no public key NAME.pub", fix="put the keys there that you trust")
    names: dict[str, str] = {}
    for name, key in keys.items():
        if key_id(key) in names:
            raise VerifyError(f"{folder}: {names[key_id(key)]}.pub and {name}.pub are the same key", fix="remove one")
        names[key_id(key)] = name
    return Trust(keys, revoked_keys(revoked) | (_keys_in(folder / "revoked") if (folder / "revoked").is_dir() else {}))


def revoked_keys(path: Path | None) -> dict[str, Ed25519PublicKey]:
    """The public key in a file, or those in a folder, by name."""
    if path is None:
        return {}
    return _keys_in(path) if path.is_dir() else {path.stem: load_public_key(path)}


def check_bundle(contents: Contents, trust: Trust, must_sign: Iterable[str] = ()) -> Verification:
    """Check manifest, signatures and every file. `must_sign` are names of trusted keys without which nothing holds.

    `VerifyError` at once where nothing can be said: no manifest, a signature that does not hold, no trusted signer.
    """
    _, opened = envelope_of(contents)
    signers = signers_of(opened, trust.keys)
    for name in must_sign:
        if name not in signers.trusted:
            raise VerifyError(
                f"the manifest is not signed by the key {key_id(trust.keys[name])[:16]}…",
                fix="use the coordinator's public key",
            )
    if not signers.trusted:
        raise VerifyError(f"{contents.source}: no key that you trust has signed it", fix="name the coordinator's key")
    statement = opened.statement()
    subjects = subjects_of(statement)
    problems = [
        f"{name} ({key_id(key)[:16]}…) has signed, and its key is revoked"
        for name, key in sorted(trust.revoked.items())
        if key_id(key) in opened.signatures or opened.signed_by(key)
    ]
    predicate = statement["predicate"]
    expected = predicate.get("signers", {})
    coordinator = expected.get("coordinator")
    if coordinator is not None and coordinator not in opened.signatures:
        problems.append(f"{MANIFEST}: the key that made the release ({coordinator[:16]}…) has not signed")
    files = _states(contents, subjects, predicate.get("decoder_sha256"))
    said = {CHANGED: "changed after signing"}
    problems += [f"{n}: {said.get(s, s)}" for n, s in files.items() if s in (CHANGED, MISSING, EXTRA)]
    problems += _statement_problems(contents, files)
    gates, second = None, None
    if files.get(GATES) == AS_SIGNED:
        gates, about = check_gates_document(contents.document(GATES), contents.document(STUDY), predicate, subjects)
        problems += [f"{GATES}: {problem}" for problem in about]
        by = gates.override.key_id if gates is not None and gates.override is not None else None
        second = next((name for name, key in trust.keys.items() if key_id(key) == by), None)
    # In a simulation one machine plays all sites, and none of them can sign.
    joined = _joined(contents) if files.get(SITES) == AS_SIGNED and predicate.get("simulation") is not True else []
    known = expected.get("sites", {})
    held = set(signers.trusted.values())
    waiting = {s: known.get(s, "") for s in joined if s not in signers.trusted and known.get(s) not in held}
    for site in joined:
        if known.get(site) and signers.trusted.get(site, known[site]) != known[site]:
            problems.append(f"{site}: signed with another key than the manifest names for this site")
    return Verification(contents.source, statement, files, signers, waiting, tuple(problems), gates, second)


def in_words(found: Verification) -> list[str]:
    """One screen: every file, then who signed and who has not."""
    width = max(len(name) for name in found.files)
    lines = [f"  {name:<{width}}  {state}" for name, state in found.files.items()]
    lines += [f"signed by {name} (key {identity[:16]}…)" for name, identity in found.signers.trusted.items()]
    for identity in found.signers.unknown:
        site = next((site for site, theirs in found.waiting.items() if theirs == identity), None)
        whose = f"; the manifest says that it is {site}'s" if site else ""
        lines.append(f"signed by a key that is not among yours ({identity[:16]}…{whose}): proves nothing to you")
    lines += [f"not signed yet by {site}, which took part" for site in found.waiting]
    if found.files.get(PRIVACY) == AS_SIGNED and not any(p.startswith(PRIVACY) for p in found.problems):
        lines.append(f"{PRIVACY} fits the schema of a privacy statement")
    if found.gates is None:
        return [*lines, f"no {GATES}: no gate was recorded"]
    lines += found.gates.in_words()
    if found.gates.override is not None and found.second is None:
        lines.append("  its key is not among yours: somebody else than the coordinator signed, and who is not shown")
    elif found.second is not None:
        lines.append(f"  its key is {found.second}, which you trust")
    return lines


def _states(contents: Contents, subjects: Mapping[str, dict[str, str]], decoder: Any) -> dict[str, str]:
    """The state of every file that was signed or is there, the signed ones first."""
    states = {}
    for name, digest in subjects.items():
        held = contents.digests.get(name)
        states[name] = MISSING if held is None else AS_SIGNED if _fits(held, digest) else CHANGED
    of_a_run = (contents.digests.get(DECODER) or {}).get("sha256") == decoder is not None and not contents.archive
    allowed = {MANIFEST} if contents.archive else {MANIFEST, *KEYS}
    for name in contents.digests:
        if name not in states and name not in allowed:
            states[name] = LEFT if of_a_run and name in BESIDE else EXTRA
    return states


def _fits(held: Mapping[str, str], signed: Mapping[str, str]) -> bool:
    return all(held[algorithm] == signed[algorithm] for algorithm in held if algorithm in signed)


def subjects_of(statement: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Name and digests of every subject; `VerifyError` if the statement is not that of a release."""
    try:
        if (statement["_type"], statement["predicateType"]) != (STATEMENT_TYPE, PREDICATE_TYPE):
            raise KeyError
        dict(statement["predicate"])
        signers = statement["predicate"].get("signers", {})
        expected = [*signers.get("sites", {}).items(), *([("", signers["coordinator"])] if signers else [])]
        found = {}
        for subject in statement["subject"]:
            name, digest = subject["name"], subject["digest"]
            plain = isinstance(name, str) and name == Path(name).name and name not in ("", "..", MANIFEST)
            if not plain or name in found or not isinstance(digest["sha256"], str):
                raise KeyError
            found[name] = dict(digest)
        if not found or not all(isinstance(key, str) for _, key in expected):
            raise KeyError
    except (KeyError, TypeError, AttributeError, ValueError):
        raise VerifyError("signed, but not the manifest of a release", fix="name the directory of a release") from None
    return found


def _statement_problems(contents: Contents, files: Mapping[str, str]) -> list[str]:
    if files.get(PRIVACY) != AS_SIGNED:
        return []
    try:
        problem = problem_of(json.loads(contents.kept[PRIVACY]))
    except (KeyError, ValueError, RecursionError):
        problem = "it is not JSON"
    if problem is None:
        return []
    return [f"{PRIVACY}: signed, but it does not fit the schema of a privacy statement: {problem}"]


def _failed_gates(contents: Contents) -> str:
    """The gates that keep a candidate in quarantine, by name where its gates.json is at hand."""
    with suppress(TypeError, KeyError, AttributeError):
        names = [str(gate["name"]) for gate in contents.document(GATES)["gates"] if gate["passed"] is not True]
        return f"the gate{'s' if len(names) > 1 else ''} {', '.join(names)}"
    return "gates of the study"


def _joined(contents: Contents) -> list[str]:
    with suppress(TypeError, KeyError, AttributeError):
        return sorted(str(site) for site in contents.document(SITES)["joined"])
    return []


def _keys_in(folder: Path) -> dict[str, Ed25519PublicKey]:
    return {path.stem: load_public_key(path) for path in sorted(folder.glob("*.pub"))}
