"""What the steward decided: which studies and which app bundles may run here. Signed with the site's key.

A request that nobody has decided waits in the site's state, where `cohortium-site review` shows it, and expires. A
decision is a file of its own under the digest it is about; one that is not signed by this site's key counts as none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, get_args

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.errors import SiteError, VerifyError
from common.files import write_atomic
from common.signing import open_envelope, sign

Kind = Literal["study", "bundle"]
Verdict = Literal["approved", "denied"]
Standing = Literal["approved", "denied", "waiting", "expired"]
KINDS: tuple[Kind, ...] = get_args(Kind)
DIGEST = r"[0-9a-f]{64}"
WAITING_TIME = timedelta(days=14)
DECISION_TYPE = "urn:cohortium:decision:v1"


@dataclass(frozen=True)
class Request:
    """Something a coordinator asks this site to run, by its SHA-256; `content` is what the steward needs to see."""

    kind: Kind
    digest: str
    first_seen: str
    expires: str
    content: Mapping[str, Any]

    def expired(self, now: datetime) -> bool:
        """Whether nobody decided in time."""
        return now >= datetime.fromisoformat(self.expires)


@dataclass(frozen=True)
class Decision:
    """What was decided about a digest, when, by whom and why."""

    site: str
    kind: Kind
    digest: str
    verdict: Verdict
    by: str
    reason: str
    time: str


class Approvals:
    """The requests and decisions in the site's state folder."""

    def __init__(self, state: Path, site: str, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self.folder = state / "approvals"
        self.site = site
        self._clock = clock

    def ask(self, kind: Kind, digest: str, content: Mapping[str, Any]) -> Request:
        """Note a request, once; one that expired begins to wait anew."""
        known = self.request(kind, digest)
        now = self._clock()
        if known is not None and not known.expired(now):
            return known
        request = Request(kind, digest, _text(now), _text(now + WAITING_TIME), dict(content))
        write_atomic(self._path(kind, digest, "request"), json.dumps(asdict(request), indent=1))
        return request

    def request(self, kind: Kind, digest: str) -> Request | None:
        """The request on disk; None if there is none that can be read."""
        try:
            fields = json.loads(self._path(kind, digest, "request").read_text(encoding="utf-8"))
            request = Request(**fields)
            _times = [datetime.fromisoformat(text) for text in (request.first_seen, request.expires)]
        except (OSError, ValueError, TypeError):
            return None
        return request if (request.kind, request.digest) == (kind, digest) else None

    def requests(self) -> list[Request]:
        """Everything that was ever asked, oldest first."""
        found: list[Request] = []
        for kind in KINDS:
            for path in self.folder.glob(f"{kind}-*.request.json"):
                digest = path.name.removeprefix(f"{kind}-").removesuffix(".request.json")
                request = self.request(kind, digest) if re.fullmatch(DIGEST, digest) else None
                found += [request] if request is not None else []
        return sorted(found, key=lambda request: request.first_seen)

    def decide(
        self, kind: Kind, digest: str, verdict: Verdict, *, by: str, reason: str, key: Ed25519PrivateKey
    ) -> Decision:
        """Write a signed decision; a later one replaces it. `SiteError` if nobody asked."""
        if self.request(kind, digest) is None:
            raise SiteError(
                f"no {kind} with digest {digest[:16]}… has been asked for here",
                fix="`cohortium-site review` lists what is waiting",
            )
        decision = Decision(self.site, kind, digest, verdict, by, reason, _text(self._clock()))
        envelope = sign({"_type": DECISION_TYPE, **asdict(decision)}, key)
        write_atomic(self._path(kind, digest, "decision"), json.dumps(envelope, indent=1))
        return decision

    def decision(self, kind: Kind, digest: str, key: Ed25519PrivateKey) -> Decision | None:
        """The decision about a digest, None if there is none; `SiteError` if there is one this site did not sign."""
        path = self._path(kind, digest, "decision")
        if not path.exists():
            return None
        try:
            document = open_envelope(json.loads(path.read_text(encoding="utf-8")), key.public_key())
            if document.pop("_type", None) != DECISION_TYPE:
                raise ValueError("another document")
            decision = Decision(**document)
            if (decision.site, decision.kind, decision.digest) != (self.site, kind, digest):
                raise ValueError("another decision")
            if decision.verdict not in get_args(Verdict):
                raise ValueError("no verdict")
        except (OSError, ValueError, TypeError, VerifyError):
            raise SiteError(
                f"{path}: this decision is damaged, about something else, or not signed by this site's key",
                fix="remove the file and decide again with `cohortium-site approve` or `deny`",
            ) from None
        return decision

    def standing(self, kind: Kind, digest: str, key: Ed25519PrivateKey) -> Standing:
        """How a digest stands: decided, waiting, or expired without a decision."""
        decision = self.decision(kind, digest, key)
        if decision is not None:
            return decision.verdict
        request = self.request(kind, digest)
        return "expired" if request is not None and request.expired(self._clock()) else "waiting"

    def _path(self, kind: Kind, digest: str, what: str) -> Path:
        if kind not in KINDS or not re.fullmatch(DIGEST, digest):
            raise ValueError(f"not a kind and a SHA-256: {kind!r}")
        return self.folder / f"{kind}-{digest}.{what}.json"


def _text(time: datetime) -> str:
    return time.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
