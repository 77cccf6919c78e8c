"""The coordinator's register of sites, sites.json in the consortium's folder: who is enrolled under which public keys.

It says whom the coordinator accepts; the SuperLink's own register, kept in step with it, says which node keys may
connect. A key that was revoked is never accepted again, here or there. The audit log is written before either.
"""

from __future__ import annotations

import difflib
import json
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import Field

from common.audit import logged, note_failure
from common.certificates import timestamp
from common.config import Section, validate
from common.enrolment import EnrolmentContent, read_enrolment
from common.errors import CohortiumError, FederationError, OutputError, UsageError, VerifyError
from common.files import write_atomic
from server.consortium import audit_of, load_facts, locked
from server.nodes import IN_USE, Control, find_node, register_node, unregister_node

FORMAT = 1
REGISTRY = "sites.json"
ROTATE = "the site runs `cohortium-site rotate-node-key` and sends the new request"


class SiteEntry(Section):
    """One enrolment of a site."""

    node_key: str
    ledger_key: str
    fingerprint: str
    requested_at: str
    enrolled_at: str
    revoked_at: str | None = None
    node_id: str | None = Field(default=None, description="at the SuperLink, while its key is registered there")

    @property
    def active(self) -> bool:
        """Whether the site is enrolled now."""
        return self.revoked_at is None


class FormerEntry(SiteEntry):
    """An enrolment that another one replaced."""

    site: str


class Registry(Section):
    """sites.json."""

    format: Literal[1] = FORMAT
    sites: dict[str, SiteEntry] = Field(default_factory=dict)
    former: tuple[FormerEntry, ...] = ()

    def with_site(self, site: str, entry: SiteEntry) -> Registry:
        """The same with one entry set."""
        return self.model_copy(update={"sites": {**self.sites, site: entry}})


def load_registry(directory: Path) -> Registry:
    """sites.json, empty if there is none yet; `OutputError` if it is damaged or newer."""
    path = directory / REGISTRY
    try:
        document = json.loads(path.read_bytes())
        format_ = document["format"]
    except FileNotFoundError:
        return Registry()
    except OSError as error:
        raise OutputError(f"{path}: cannot be read ({error.strerror})", fix="correct its permissions") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise OutputError(f"{path}: damaged", fix="restore it from its backup") from None
    if isinstance(format_, int) and format_ > FORMAT:
        raise OutputError(
            f"{path}: format {format_}, this version reads format {FORMAT}", fix="use the version that wrote it"
        )
    return validate(Registry, document, str(path), OutputError)


def enrol(request: Path, directory: Path, control: Control | None = None, *, replace: bool = False) -> SiteEntry:
    """Accept a request; with `control` its node key is registered at the SuperLink too. The same request twice is one.

    `VerifyError` if the request cannot be accepted at all, `UsageError` if `replace` would accept it; a refusal is
    logged too.
    """
    with locked(directory):
        load_facts(directory)
        log, about = audit_of(directory), {"site": "", "fingerprint": ""}
        try:
            content = read_enrolment(request)
            about = {"site": content.site, "fingerprint": content.fingerprint}
            registry = load_registry(directory)
            current = registry.sites.get(content.site)
            _check_keys(request, content, registry)
            replaced = current if current is not None and not _same(current, content) else None
            if replaced is not None:
                _check_replaces(request, content, replaced, replace=replace)
                _require_control(content.site, replaced, control)
        except CohortiumError as error:
            note_failure(log, "enrol refused", error, **about)
            raise
        with logged(log, "enrol", **about, replaces=replaced.fingerprint if replaced else ""):
            if replaced is not None:
                registry = _revoke(directory, registry, content.site, control)
                former = FormerEntry(site=content.site, **registry.sites[content.site].model_dump())
                registry = registry.model_copy(update={"former": (*registry.former, former)})
                current = None
            entry = current or SiteEntry(
                node_key=content.node_key,
                ledger_key=content.ledger_key,
                fingerprint=content.fingerprint,
                requested_at=content.created,
                enrolled_at=_now(),
            )
            if control is not None:  # noted here or not: the SuperLink's database may have been made anew since
                entry = entry.model_copy(update={"node_id": _register(request, content, control)})
            _save(directory, registry.with_site(content.site, entry))
    return entry


def revoke(site: str, directory: Path, control: Control | None = None) -> SiteEntry:
    """Accept the site no longer; its node key is unregistered at the SuperLink if it is registered there."""
    with locked(directory):
        load_facts(directory)
        registry = load_registry(directory)
        if site not in registry.sites:
            near = difflib.get_close_matches(site, registry.sites, n=1)
            known = f"did you mean {near[0]!r}?" if near else f"enrolled are: {', '.join(registry.sites) or 'none'}"
            raise UsageError(f"{directory / REGISTRY}: no site {site!r}", fix=known)
        entry = registry.sites[site]
        _require_control(site, entry, control)
        with logged(audit_of(directory), "revoke", site=site, fingerprint=entry.fingerprint):
            return _revoke(directory, registry, site, control).sites[site]


def _revoke(directory: Path, registry: Registry, site: str, control: Control | None) -> Registry:
    """First the coordinator's own word, durably, then the SuperLink's; again after a failure it goes on from there."""
    entry = registry.sites[site]
    if entry.active:
        entry = entry.model_copy(update={"revoked_at": _now()})
        registry = registry.with_site(site, entry)
        _save(directory, registry)
    if control is None:
        return registry
    try:
        # By key and not by the id noted here: the SuperLink's database may have been made anew since.
        node = find_node(entry.node_key, control)
        if node is not None and node.status != "unregistered":
            unregister_node(node.node_id, control)
    except FederationError as error:
        raise FederationError(
            f"{site} is marked as revoked, but the SuperLink may still accept its key: {error.message}",
            fix=f"run the command again. {error.fix}",
        ) from None
    registry = registry.with_site(site, entry.model_copy(update={"node_id": None}))
    _save(directory, registry)
    return registry


def _require_control(site: str, entry: SiteEntry, control: Control | None) -> None:
    if entry.node_id is not None and control is None:
        raise UsageError(
            f"{site}: its node key is registered at the SuperLink, which would go on accepting it",
            fix="name the SuperLink's Control API with --superlink",
        )


def _register(request: Path, content: EnrolmentContent, control: Control) -> str:
    with tempfile.TemporaryDirectory(prefix="cohortium-key-") as folder:
        public = Path(folder) / "node.pub"
        public.write_text(content.node_key + "\n", encoding="ascii")
        try:
            return register_node(public, control, content.site)
        except FederationError as error:
            if IN_USE not in error.message:
                raise
    node = find_node(content.node_key, control)
    if node is not None and node.status != "unregistered":
        return node.node_id
    raise VerifyError(
        f"{request}: the SuperLink has unregistered this node key before and does not take it again", fix=ROTATE
    )


def _check_keys(request: Path, content: EnrolmentContent, registry: Registry) -> None:
    """`VerifyError` if another site has one of the keys, or if the node key was revoked."""
    entries = [*registry.sites.items(), *((entry.site, entry) for entry in registry.former)]
    for site, entry in entries:
        if site != content.site and (entry.node_key == content.node_key or entry.ledger_key == content.ledger_key):
            raise VerifyError(
                f"{request}: one of the keys of {content.site} is enrolled for {site}",
                fix="every site makes keys of its own with `cohortium-site init`",
            )
        if entry.node_key == content.node_key and not entry.active:
            raise VerifyError(f"{request}: this node key was revoked at {entry.revoked_at}", fix=ROTATE)


def _check_replaces(request: Path, content: EnrolmentContent, current: SiteEntry, *, replace: bool) -> None:
    """Other keys for an enrolled name: only at the coordinator's word, and only from a newer request."""
    if not replace:
        raise UsageError(
            f"{request}: {content.site} is enrolled already, with another {_differing(current, content)}",
            fix="ask the site, and compare the fingerprint; if it did change its key, enrol with --replace",
        )
    if content.created <= current.requested_at:
        raise VerifyError(
            f"{request}: made at {content.created}, not after the enrolled one of {current.requested_at}",
            fix="ask the site for its latest request",
        )


def _same(entry: SiteEntry, content: EnrolmentContent) -> bool:
    return (entry.node_key, entry.ledger_key) == (content.node_key, content.ledger_key)


def _differing(entry: SiteEntry, content: EnrolmentContent) -> str:
    names = ["node key"] if entry.node_key != content.node_key else []
    if entry.ledger_key != content.ledger_key:
        names.append("ledger key: its ledger, and with it everything it has spent, is not the one known so far")
    return " and ".join(names)


def _save(directory: Path, registry: Registry) -> None:
    text = json.dumps(registry.model_dump(mode="json"), indent=2, ensure_ascii=False)
    write_atomic(directory / REGISTRY, text + "\n")


def _now() -> str:
    return timestamp(datetime.now(UTC))
