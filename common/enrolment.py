"""The enrolment request: the public keys a site asks the coordinator to accept, signed with both private ones.

Both signatures cover the same canonical JSON, which names its purpose, so that neither can pass for anything else. They
show that whoever made the request holds both keys; that he is the hospital, the coordinator has to learn another way
(the fingerprint, read out over the telephone).
"""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import Field, field_validator

from common.config import Section, validate
from common.digest import canonical_json
from common.errors import VerifyError
from common.keys import openssh_public, p384_holds, parse_openssh_public, sign_p384
from common.privacy.ledger_keys import KEY_HEX, SIGNATURE_HEX, public_hex
from common.study import SITE_NAME

FORMAT = 1
PURPOSE = "cohortium enrolment request"
LARGEST = 1 << 16
ASK = "ask the site for its file enrolment-NAME.json, as `cohortium-site init` wrote it"
Instant = Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")]


class EnrolmentContent(Section):
    """What a site declares."""

    purpose: Literal["cohortium enrolment request"]
    format: Literal[1]
    site: str = Field(pattern=f"^{SITE_NAME}$")
    node_key: str = Field(max_length=400, description="one line of OpenSSH, P-384")
    ledger_key: str = Field(pattern=f"^{KEY_HEX}$", description="hex of the raw Ed25519 key")
    version: str = Field(pattern=r"^[\w.+!() -]{1,64}$", description="of Cohortium at the site")
    created: Instant

    @field_validator("node_key")
    @classmethod
    def _is_a_node_key(cls, value: str) -> str:
        parse_openssh_public(value)
        return value

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over site and both keys: what is read out over the telephone."""
        keys = {"site": self.site, "node_key": self.node_key, "ledger_key": self.ledger_key}
        return hashlib.sha256(canonical_json(keys)).hexdigest()


class Enrolment(Section):
    """A signed request."""

    content: EnrolmentContent
    ledger_signature: str = Field(pattern=f"^{SIGNATURE_HEX}$")
    node_signature: str = Field(pattern=r"^[0-9a-f]{16,300}$")


def make_enrolment(
    site: str, node: ec.EllipticCurvePrivateKey, ledger: Ed25519PrivateKey, version: str, now: datetime | None = None
) -> Enrolment:
    """A request for `site`, signed with both keys."""
    moment = (now or datetime.now(UTC)).astimezone(UTC)
    content = EnrolmentContent(
        purpose=PURPOSE,
        format=FORMAT,
        site=site,
        node_key=openssh_public(node),
        ledger_key=public_hex(ledger),
        version=version,
        created=f"{moment:%Y-%m-%dT%H:%M:%SZ}",
    )
    signed = canonical_json(content.model_dump(mode="json"))
    return Enrolment(
        content=content, ledger_signature=ledger.sign(signed).hex(), node_signature=sign_p384(node, signed)
    )


def enrolment_text(enrolment: Enrolment) -> str:
    """The request as it stands in its file."""
    return json.dumps(enrolment.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"


def read_enrolment(path: Path) -> EnrolmentContent:
    """What a request declares, if both keys signed it; `VerifyError` telling apart what is wrong with it."""
    try:
        with path.open("rb") as file:
            raw = file.read(LARGEST + 1)
    except OSError as error:
        raise VerifyError(f"{path}: cannot be read ({error.strerror})", fix=ASK) from None
    try:
        if len(raw) > LARGEST:
            raise ValueError
        document = json.loads(raw)
        content = document["content"]
        purpose, format_ = content["purpose"], content["format"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise VerifyError(f"{path}: not an enrolment request", fix=ASK) from None
    if purpose != PURPOSE:
        raise VerifyError(f"{path}: not an enrolment request but something else that was signed", fix=ASK)
    if isinstance(format_, int) and not isinstance(format_, bool) and format_ > FORMAT:
        raise VerifyError(
            f"{path}: an enrolment request of format {format_}, this version reads format {FORMAT}",
            fix="update Cohortium at the coordinator",
        )
    request = validate(Enrolment, document, str(path), VerifyError)
    signed = canonical_json(content)
    if not p384_holds(parse_openssh_public(request.content.node_key), signed, request.node_signature):
        raise VerifyError(
            f"{path}: the node key has not signed this request; it was edited, or made without that key", fix=ASK
        )
    try:
        public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(request.content.ledger_key))
        public.verify(bytes.fromhex(request.ledger_signature), signed)
    except (InvalidSignature, ValueError):
        raise VerifyError(
            f"{path}: the ledger key has not signed this request; it was edited, or made without that key", fix=ASK
        ) from None
    return request.content
