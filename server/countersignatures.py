"""Collecting the sites' countersignatures into a release's manifest: each against an enrolled or trusted key."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from common.audit import logged
from common.bundles import MANIFEST, Trust, check_bundle, envelope_of, load_trust, read_contents
from common.errors import UsageError, VerifyError
from common.files import write_atomic
from common.keys import key_id
from common.signing import load_json, load_public_key, merge_signature, read_envelope
from server.consortium import audit_of, load_facts, locked
from server.enrol import load_registry
from server.release import manifest_text

LARGEST = 1 << 24


def enrolled_keys(consortium: Path) -> Trust:
    """The ledger keys of the consortium's sites; those of revoked sites, and former ones, as revoked."""
    registry = load_registry(consortium)
    keys = {site: _public(entry.ledger_key) for site, entry in registry.sites.items() if entry.active}
    held = {key_id(key) for key in keys.values()}
    gone = {site: _public(entry.ledger_key) for site, entry in registry.sites.items() if not entry.active}
    gone |= {f"{entry.site} (former)": _public(entry.ledger_key) for entry in registry.former}
    return Trust(keys, {name: key for name, key in gone.items() if key_id(key) not in held})


def add_signatures(
    bundle: Path, signatures: Sequence[Path], *, trust: Path | None = None, consortium: Path | None = None
) -> dict[str, str]:
    """Check every countersignature and put all into the manifest, or none; returns names and key ids of the new ones.

    `VerifyError` names the file that is not one of this very manifest by a trusted key of a site that took part.
    """
    if (trust is None) == (consortium is None):
        raise UsageError("--trust or --consortium: expected one of them", fix="say whose keys count")
    if not bundle.is_dir():
        raise UsageError(f"{bundle}: not a folder", fix="add signatures to the folder, then bundle it again")
    if consortium is None:
        assert trust is not None
        return _add(bundle, signatures, load_trust(trust))
    with locked(consortium):
        load_facts(consortium)
        own = {path.name: load_public_key(path) for path in sorted(consortium.glob("release.pub*"))}  # former ones too
        enrolled = enrolled_keys(consortium)
        return _add(bundle, signatures, Trust({**own, **enrolled.keys}, enrolled.revoked), consortium)


def _add(bundle: Path, paths: Sequence[Path], trust: Trust, consortium: Path | None = None) -> dict[str, str]:
    contents = read_contents(bundle)
    envelope, opened = envelope_of(contents)
    found = check_bundle(contents, trust).require()
    sites = found.statement["predicate"].get("signers", {}).get("sites", {})
    added: dict[str, str] = {}
    for path in paths:
        try:
            document = load_json(_read(path))
            signed = read_envelope(document)
        except ValueError:
            raise VerifyError(f"{path}: not a countersignature", fix="ask the site for it again") from None
        except VerifyError as error:
            raise VerifyError(f"{path}: {error.message}", fix="ask the site for it again") from None
        name, key = _signer(path, set(signed.signatures), trust)
        if sites and sites.get(name, key_id(key)) != key_id(key):
            raise VerifyError(f"{path}: {name} took part with another key than it signs with", fix="ask the site")
        if key_id(key) not in sites.values() and name not in found.waiting and key_id(key) not in opened.signatures:
            raise VerifyError(f"{path}: {name} took no part in this study", fix="leave it out")
        try:
            envelope = merge_signature(envelope, document, key)
        except VerifyError as error:
            raise VerifyError(f"{path}: {name}: {error.message}", fix=error.fix or "leave it out") from None
        added[name] = key_id(key)
    if consortium is None:
        write_atomic(bundle / MANIFEST, manifest_text(envelope))
        return added
    study = str(found.statement["predicate"].get("study", ""))
    with logged(audit_of(consortium), "add-signature", digest=study, signers=added):
        write_atomic(bundle / MANIFEST, manifest_text(envelope))
    return added


def _signer(path: Path, identities: set[str], trust: Trust) -> tuple[str, Ed25519PublicKey]:
    """The one trusted key that the file says has signed it."""
    for name, key in trust.revoked.items():
        if key_id(key) in identities:
            raise VerifyError(f"{path}: the key of {name} ({key_id(key)[:16]}…) is revoked", fix="leave it out")
    found = [(name, key) for name, key in trust.keys.items() if key_id(key) in identities]
    if len(identities) != 1 or len(found) != 1:
        listed = ", ".join(f"{identity[:16]}…" for identity in sorted(identities)) or "none"
        raise VerifyError(
            f"{path}: expected the signature of one known site, found {listed}", fix="compare the key with the site"
        )
    return found[0]


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(LARGEST)
    except OSError as error:
        raise VerifyError(
            f"{path}: cannot be read ({error.strerror})", fix="name a countersignature-NAME.json"
        ) from None


def _public(raw: str) -> Ed25519PublicKey:
    return Ed25519PublicKey.from_public_bytes(bytes.fromhex(raw))
