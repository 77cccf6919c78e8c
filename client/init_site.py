"""What `cohortium-site init` and its relatives make: a site's folder, its keys, and the request to be enrolled.

The folder holds site.toml (policy), connection.toml (where the coordinator is), ca.pem, release.pub if given,
keys/node.key, state/ledger.key, and enrolment-NAME.json, the only file that is sent. Made whole or not at all.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic_core import PydanticUndefined

from client.connection import check_address, load_connection
from client.policy import PolicySection
from client.site import SiteConfig, load_site
from common.audit import AUDIT_LOG, AuditLog, logged, note_failure
from common.certificates import check_ca
from common.console import distribution_version
from common.enrolment import enrolment_text, make_enrolment
from common.errors import CohortiumError, SiteError, UsageError
from common.files import write_atomic
from common.folders import aside, new_folder
from common.handover import follow_handover
from common.keys import (
    NODE_KEY,
    create_key,
    key_id,
    load_p384,
    new_p384,
    openssh_public,
    private_bytes,
    replace_private,
)
from common.privacy.ledger_keys import load_key, load_or_create_key
from common.signing import load_public_key, public_pem
from common.study import SITE_NAME

TABLES = (".csv", ".parquet")


@dataclass(frozen=True)
class Enrolled:
    """What was made, in public words."""

    folder: Path
    request: Path
    fingerprint: str
    kept: Path | None = None

    def describe(self) -> str:
        """For the steward's screen."""
        kept = f"The old node key is {self.kept}; delete it once the new one is enrolled.\n" if self.kept else ""
        return (
            f"{kept}Send {self.request} to the coordinator; it holds public keys only.\n"
            f"Read this fingerprint out to him over the telephone: {self.fingerprint}\n"
            f"Back up {self.folder / 'state'}: without its ledger and ledger.key the site cannot go on."
        )

    def to_json(self) -> dict[str, Any]:
        """For scripts."""
        return {"folder": str(self.folder), "request": str(self.request), "fingerprint": self.fingerprint}


def init_site(
    directory: Path, site: str, data: Path, superlink: str, ca: Path, release_key: Path | None = None
) -> Enrolled:
    """Make a site's folder; nothing is left behind if it fails."""
    if not re.fullmatch(SITE_NAME, site):
        raise UsageError(
            f"--site {site!r}: expected 1 to 64 letters, digits, dots, dashes and underscores", fix="choose a name"
        )
    if data.suffix.lower() not in TABLES:
        raise UsageError(f"--data {data}: expected a .csv or .parquet file", fix="export the table in one of these")
    try:
        check_address(superlink)
    except ValueError as error:
        raise UsageError(f"--superlink: {error}", fix="take the address the coordinator gave you") from None
    check_ca(ca, SiteError)
    pinned = load_public_key(release_key) if release_key else None
    with new_folder(directory) as folder:
        (folder / "keys").mkdir(mode=0o700)
        (folder / "state").mkdir(mode=0o700)
        write_atomic(folder / "ca.pem", ca.read_bytes())
        if release_key:
            write_atomic(folder / "release.pub", release_key.read_bytes())
        write_atomic(folder / "site.toml", site_toml(site, Path(os.path.abspath(data))))  # noqa: PTH100
        fingerprint = key_id(pinned) if pinned else None
        write_atomic(folder / "connection.toml", connection_toml(superlink, fingerprint))
        load_site(folder / "site.toml")
        load_connection(folder / "connection.toml")
        node = new_p384()
        create_key(folder / "keys" / "node.key", node, openssh=True)
        write_atomic(folder / "keys" / "node.key.pub", openssh_public(node) + "\n")
        ledger = load_or_create_key(folder / "state" / "ledger.key")
        request = make_enrolment(site, node, ledger, distribution_version())
        write_atomic(folder / f"enrolment-{site}.json", enrolment_text(request))
        about = {"fingerprint": request.content.fingerprint, "release_key": fingerprint or ""}
        AuditLog(folder / "state" / AUDIT_LOG, site).append("init", **about)
    return Enrolled(directory, directory / f"enrolment-{site}.json", request.content.fingerprint)


def rotate_node_key(directory: Path) -> Enrolled:
    """A new node key and a new request; the old key stays beside it until the coordinator has enrolled the new one.

    The ledger's key stays: it is what shows the coordinator that the new request comes from the same site.
    """
    config = load_site(directory / "site.toml")
    path = load_connection(directory / "connection.toml").node_key
    ledger = load_key(config.site.state / "ledger.key")
    node, kept = new_p384(), None
    if path.exists():
        load_p384(path, NODE_KEY)  # another file must not be moved away as if it were the old key
        kept = aside(path)
    made = make_enrolment(config.site.name, node, ledger, distribution_version())
    request, fingerprint = directory / f"enrolment-{config.site.name}.json", made.content.fingerprint
    with logged(_audit(config), "rotate-node-key", fingerprint=fingerprint):
        if kept is not None:
            replace_private(path, private_bytes(node, openssh=True), kept)
        else:
            create_key(path, node, openssh=True)
        write_atomic(path.with_name(f"{path.name}.pub"), openssh_public(node) + "\n")
        write_atomic(request, enrolment_text(made))
    return Enrolled(directory, request, fingerprint, kept)


def follow_release_key(directory: Path, handover: Path) -> str:
    """Pin the key that the pinned one named its successor; returns its SHA-256.

    Nothing changes if it did not, and the refusal is logged.
    """
    log = _audit(load_site(directory / "site.toml"))
    path, public = directory / "connection.toml", directory / "release.pub"
    pinned = load_connection(path).release_key
    if pinned is None:
        raise SiteError(
            f"{path}: no release key is pinned, so there is none to follow",
            fix="compare the fingerprint of release.pub over the telephone and put it in as release_key",
        )
    old = load_public_key(public)
    if key_id(old) != pinned:
        raise SiteError(
            f"{public}: its SHA-256 is {key_id(old)}, connection.toml pins {pinned}",
            fix="put back the release.pub that belongs to the pinned key",
        )
    try:
        new = follow_handover(handover, old)
    except CohortiumError as error:
        note_failure(log, "follow-release-key refused", error, fingerprint="", former=pinned)
        raise
    content = path.read_text(encoding="utf-8").replace(pinned, key_id(new))
    with logged(log, "follow-release-key", fingerprint=key_id(new), former=pinned):
        write_atomic(aside(public), public_pem(old))
        write_atomic(public, public_pem(new))
        write_atomic(path, content)
    return key_id(new)


def _audit(config: SiteConfig) -> AuditLog:
    return AuditLog(config.site.state / AUDIT_LOG, config.site.name)


def site_toml(site: str, data: Path) -> str:
    """A commented site.toml with every policy key at its default."""
    lines = [
        "# What this hospital runs on and what it allows, whatever the coordinator asks. It never leaves the site.",
        "",
        "[site]",
        "# The site's name in the consortium; the enrolment and the ledger carry it, so do not change it.",
        f"name = {_quoted(site)}",
        "# Patient table, .csv or .parquet.",
        f"data = {_quoted(str(data))}",
        "# Ledger, its key, the encoder and the site's log. Back it up.",
        'state = "state"',
        '# "auto", "cpu" or "cuda".',
        'device = "auto"',
        "",
        "# Every key stands at its default; remove the # to change it.",
        "[policy]",
        *_policy_lines(),
    ]
    return "\n".join(lines) + "\n"


def _policy_lines() -> Iterator[str]:
    for name, field in PolicySection.model_fields.items():
        yield f"# {field.description or name}"
        default = None if field.default is PydanticUndefined else field.default
        if isinstance(default, bool):
            yield f"# {name} = {str(default).lower()}"
        elif isinstance(default, str | int | float | tuple):
            yield f"# {name} = {json.dumps(default, ensure_ascii=False)}"
        else:
            yield f"# {name} ="


def connection_toml(superlink: str, release_key: str | None) -> str:
    """A commented connection.toml; paths are relative to it."""
    pinned = f"release_key = {_quoted(release_key)}" if release_key else '# release_key = "..."'
    return f"""# Where the coordinator's SuperLink is, and which keys speak for either side.
# Paths are relative to this file.

[connection]
# HOST:PORT; the one outbound connection of this site.
superlink = {_quoted(superlink)}
# The consortium's CA; no other authority is believed.
root_certificates = "ca.pem"
# Private key of Flower's node authentication, mode 0600.
node_key = "keys/node.key"
# SHA-256 of the coordinator's release key.
{pinned}
"""


def _quoted(text: str) -> str:
    """A TOML basic string."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
