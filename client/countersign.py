"""A site signs a release as well: with its ledger's key, over the coordinator's manifest, once its own ledger agrees.

What the signature says: this manifest names a state of my ledger that it really had, for a study that I took part in.
It says nothing about patients, and what leaves is a signature over bytes that the coordinator made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.connection import load_connection
from client.site import SiteConfig, load_site
from common.audit import AUDIT_LOG, AuditLog, logged
from common.bundles import (
    PRIVACY,
    STUDY,
    Contents,
    Trust,
    Verification,
    check_bundle,
    envelope_of,
    read_contents,
)
from common.errors import LedgerError, VerifyError
from common.files import write_atomic
from common.keys import key_id
from common.privacy.ledger import GENESIS, Ledger
from common.privacy.ledger_entries import Findings
from common.privacy.statement import epsilon_in_words
from common.signing import add_signature, load_public_key

ASK = "do not sign; ask the coordinator about it"


@dataclass(frozen=True)
class Proposal:
    """What would be signed, checked and in words; `envelope` is the manifest as it stands in the bundle."""

    site: str
    found: Verification
    envelope: Mapping[str, Any]
    study: str
    digest: str
    rows: int | None
    epsilon: str
    length: int
    head: str

    def in_words(self) -> list[str]:
        """One screen."""
        rows = "an unknown number of" if self.rows is None else str(self.rows)
        coordinator = ", ".join(f"{name} ({key[:16]}…)" for name, key in self.found.signers.trusted.items())
        return [
            f"study     {self.study}, digest {self.digest}",
            f"rows      {rows} synthetic rows",
            f"privacy   {self.epsilon}",
            f"ledger    {self.length} entries of site {self.site}, head {self.head[:16]}…: as in this site's ledger",
            f"signed    by {coordinator}",
            *(f"  {name}  {state}" for name, state in self.found.files.items()),
            *(self.found.gates.in_words() if self.found.gates is not None else ["no gates.json: no gate was recorded"]),
        ]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "site": self.site,
            "study": self.study,
            "study_digest": self.digest,
            "rows": self.rows,
            "epsilon_in_words": self.epsilon,
            "ledger": {"length": self.length, "head": self.head},
            "verification": self.found.to_json(),
        }


def propose(bundle: Path, site_toml: Path, key: Path | None = None) -> Proposal:
    """Check a bundle from the site's side; nothing is signed.

    `VerifyError` if it is not what the coordinator signed (his key is `release.pub` beside site.toml, unless `key`
    names it, and the one that connection.toml pins) or does not speak of a study of this site; `LedgerError` if the
    site's own ledger does not hold, or never was in the state that the manifest names.
    """
    config = load_site(site_toml)
    contents = read_contents(bundle)
    document, _ = envelope_of(contents)
    pinned = load_public_key(key or site_toml.parent / "release.pub")
    _check_pinned(site_toml.parent, key_id(pinned))
    found = check_bundle(contents, Trust({"release.pub": pinned}), ["release.pub"]).require()
    name, predicate = config.site.name, found.statement["predicate"]
    with Ledger(_ledger_of(config), name) as ledger:
        site_key = key_id(ledger.require_key().public_key())
        findings = ledger.inspect()
    length, head = _same_ledger(name, predicate, findings)
    expected = predicate.get("signers", {}).get("sites", {}).get(name)
    if expected is not None and expected != site_key:
        raise VerifyError(f"{bundle}: names another ledger key for {name} than this site's", fix=ASK)
    study = str(predicate.get("study"))
    if not any(entry.study == study for entry in findings.entries[:length]):
        raise VerifyError(
            f"{bundle}: this site's ledger holds no spend for the study {study[:16]}… up to entry {length}", fix=ASK
        )
    title, rows = _study_and_rows(contents)
    privacy = contents.document(PRIVACY)
    if privacy is None or privacy["study_digest"] != study:
        raise VerifyError(f"{bundle}: its privacy.json is missing or of another study", fix=ASK)
    return Proposal(name, found, document, title, study, rows, epsilon_in_words(privacy), length, head)


def countersign(proposal: Proposal, site_toml: Path, out: Path | None = None) -> Path:
    """Sign what was proposed and write countersignature-NAME.json beside site.toml, or in the folder `out`.

    The line in the site's audit log comes first. `VerifyError` if this site's signature is in the bundle already.
    """
    config = load_site(site_toml)
    with Ledger(_ledger_of(config), config.site.name) as ledger:
        key = ledger.require_key()
    signed = add_signature(proposal.envelope, key)
    path = (out or site_toml.parent) / f"countersignature-{config.site.name}.json"
    log = AuditLog(config.site.state / AUDIT_LOG, config.site.name)
    about = {"key": key_id(key.public_key()), "ledger_length": proposal.length, "ledger_head": proposal.head}
    with logged(log, "countersign", study=proposal.study, digest=proposal.digest, **about):
        alone = {**signed, "signatures": signed["signatures"][-1:]}
        write_atomic(path, json.dumps(alone, indent=1))
    return path


def _ledger_of(config: SiteConfig) -> Path:
    path = config.site.state / "ledger.sqlite"
    if not path.is_file():
        raise LedgerError(f"{path}: there is no ledger yet", fix="a site countersigns only what it took part in")
    return path


def _check_pinned(folder: Path, found: str) -> None:
    path = folder / "connection.toml"
    pinned = load_connection(path).release_key if path.exists() else None
    if pinned is not None and pinned != found:
        raise VerifyError(
            f"{path}: pins the release key {pinned[:16]}…, found {found[:16]}…",
            fix="use the coordinator's key; after a change of keys `cohortium-site follow-release-key` comes first",
        )


def _same_ledger(name: str, predicate: Mapping[str, Any], findings: Findings) -> tuple[int, str]:
    """Length and head that the manifest names for this site; `LedgerError` if the ledger never had them."""
    try:
        named = predicate["ledgers"][name]
        length, head = named["length"], named["head"]
        if type(length) is not int or length < 0 or not isinstance(head, str):
            raise TypeError
    except (KeyError, TypeError):
        raise VerifyError(f"the manifest names no ledger of {name}: this site took no part", fix=ASK) from None
    if length > len(findings.entries):
        raise LedgerError(
            f"the manifest names {length} entries in the ledger of {name}, which has {len(findings.entries)}", fix=ASK
        )
    held = findings.entries[length - 1].hash if length else GENESIS
    if held != head:
        raise LedgerError(
            f"the manifest names another entry {length} than the ledger of {name} holds ({head[:16]}…, here"
            f" {held[:16]}…)",
            fix=ASK,
        )
    return length, head


def _study_and_rows(contents: Contents) -> tuple[str, int | None]:
    """The study's name and the number of rows, from the signed files; as many as are said to be released."""
    study, channel = contents.document(STUDY), contents.document("release.json")
    try:
        title, rows = str(study["study"]["study"]["name"]), study["study"]["release"]["rows"]
        if channel is not None:
            rows = sum(channel["rows"].values())
        return title, int(rows)
    except (KeyError, TypeError, ValueError, AttributeError):
        return "(without a study.json)", None
