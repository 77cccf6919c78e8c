"""The coordinator as witness of the sites' ledgers: what he has seen, kept durably and countersigned (privacy.md, 4).

A site that restores an old copy of its ledger forgets spends, and nothing inside the copy shows it. Therefore every
reply carries the signed head of the ledger, and the coordinator takes a reply only if its ledger extends the last one
he has seen. He cannot see what lies between two heads, and other studies of the site may lengthen the ledger too.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.errors import FederationError
from common.files import write_atomic
from common.messages import WITNESS_FIELDS
from common.privacy.ledger_keys import SignedHead, public_hex, sign_head
from common.records import MessageError

ROLLED_BACK = "the site's ledger was rolled back"


@dataclass(frozen=True)
class Seen:
    """The last head of one site's ledger, and the message under which it was shown (round 0: when joining).

    `unattributed` entries were first shown when the site joined again: spends whose replies never arrived.
    """

    key: str
    length: int
    head: str
    study: str = ""
    round: int = 0
    payload_digest: str = ""
    unattributed: int = 0


class Witness:
    """The last head of every site, in the file `path`. `save` makes durable what was seen since the last call."""

    def __init__(self, path: Path, key: Ed25519PrivateKey) -> None:
        self.path = path
        self._key = key
        self._seen: dict[str, Seen] = _load(path) if path.exists() else {}
        self._changed = False

    def __getitem__(self, site: str) -> Seen:
        return self._seen[site]

    def __contains__(self, site: object) -> bool:
        return site in self._seen

    def joined(self, head: SignedHead) -> None:
        """Take down the ledger of a site that joins; `MessageError` if it is unsigned or was rolled back."""
        if not head.holds:
            raise MessageError("the head of the site's ledger is not signed by the key it names")
        last = self._seen.get(head.site)
        if last is None:
            self._set(head.site, Seen(head.key, head.length, head.head))
            return
        if head.key != last.key:
            raise MessageError(f"{ROLLED_BACK}: it is signed by another key")
        if self._extends(last, head.length, head.head):
            grown = last.unattributed + head.length - last.length
            self._set(head.site, Seen(head.key, head.length, head.head, unattributed=grown))

    def spent(self, site: str, signed: tuple[int, str, str], study: str, number: int, payload_digest: str) -> None:
        """Take down (length, head, signature) that came with an update; `MessageError` if it must not be used.

        A new update needs a new entry, or one that the site showed when it joined again: that of a lost reply. The same
        update for the same round may come again with the same head.
        """
        length, head, signature = signed
        last = self._seen[site]
        if not SignedHead(site, length, head, signature, last.key).holds:
            raise MessageError("the head of the site's ledger is not signed by the key with which it joined")
        if self._extends(last, length, head):
            self._set(site, Seen(last.key, length, head, study, number, payload_digest))
        elif (last.study, last.round, last.payload_digest) != (study, number, payload_digest):
            if last.unattributed < 1:
                raise MessageError("the update came without a new entry in the site's ledger")
            self._set(site, Seen(last.key, length, head, study, number, payload_digest, last.unattributed - 1))

    def countersigned(self, site: str) -> SignedHead:
        """The last head of this site under the coordinator's own key and signature."""
        seen = self._seen[site]
        signature = sign_head("countersignature", self._key, site, seen.length, seen.head)
        return SignedHead(site, seen.length, seen.head, signature, public_hex(self._key))

    def request_fields(self, site: str) -> dict[str, Any]:
        """The same as the fields of a request to this site."""
        seen = self.countersigned(site)
        return dict(zip(WITNESS_FIELDS, (seen.length, seen.head, seen.signature, seen.key), strict=True))

    def save(self) -> None:
        """Write the file if anything is new; `OutputError` if that fails."""
        if not self._changed:
            return
        sites = {site: asdict(seen) for site, seen in sorted(self._seen.items())}
        write_atomic(self.path, json.dumps({"coordinator_key": public_hex(self._key), "sites": sites}, indent=1))
        self._changed = False

    def _extends(self, last: Seen, length: int, head: str) -> bool:
        """Whether the ledger grew; False if it is the same, `MessageError` if it cannot be a continuation."""
        if length < last.length or (length == last.length and head != last.head):
            raise MessageError(ROLLED_BACK)
        return length > last.length

    def _set(self, site: str, seen: Seen) -> None:
        self._seen[site] = seen
        self._changed = True


def _load(path: Path) -> dict[str, Seen]:
    try:
        document: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["sites"]
        return {site: Seen(**fields) for site, fields in document.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise FederationError(
            f"{path}: not the heads of the sites' ledgers", fix="restore the file; rollbacks cannot be seen without it"
        ) from None
