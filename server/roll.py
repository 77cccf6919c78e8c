"""Who may take part in a deployment: the sites that the consortium's registry has enrolled, asked anew every time.

A node is known by its public key, and never by a node id noted earlier. The key is what the SuperLink authenticates
every request of a SuperNode by, and what was compared over the telephone; a node id is only the SuperLink's own random
name for it, and another one once its database was made anew. Which id has which key the SuperLink says itself: the list
of connected nodes, which a ServerApp may ask for with the token of its own run, holds the keys. So the Control API,
which commands, is not needed here. The list is believed as the ids in replies are: both come from the SuperLink.

flwr 1.41 checks which node sends a request, and that a reply comes under the id its message was addressed to, but not
that the two are one node. So a site is known by its ledger's key as well: no other node can sign the heads that every
result needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flwr.serverapp import Grid

from server.enrol import Registry, SiteEntry, load_registry
from server.nodes import openssh_line
from server.run import RunSettings

NOT_ENROLLED = "is not enrolled"
OTHER_NODE = "answers from another node than the one enrolled for it"
OTHER_LEDGER = "shows another ledger key than the enrolled one; its ledger is not the one known"
REVOKED = "was revoked"
OTHER_KEYS = "is enrolled with other keys since it joined"


@dataclass(frozen=True)
class Roll:
    """The registry in the folder `consortium`; a simulation has none (None), and there everybody is welcome.

    Every method reads sites.json; `OutputError` if it is damaged, since then nobody can be said to be enrolled.
    """

    consortium: Path | None = None

    @classmethod
    def of(cls, settings: RunSettings) -> Roll:
        """That of a launch: the registry lies beside the coordinator's key."""
        return cls(None if settings.key is None else settings.key.parent)

    def nodes(self, grid: Grid) -> dict[int, str]:
        """The connected nodes with their public keys (a line of OpenSSH, "" in a simulation)."""
        if self.consortium is None:
            return dict.fromkeys(grid.get_node_ids(), "")
        return {node.node_id: openssh_line(node.public_key) for node in grid.get_nodes()}

    def strangers(self, nodes: Mapping[int, str]) -> dict[int, str]:
        """Those of `nodes` whose key is not enrolled now, with the name under which it was, or ""."""
        if self.consortium is None:
            return {}
        names = {entry.node_key: (name, entry.active) for name, entry in self._registry().sites.items()}
        found = {node: names.get(key, ("", False)) for node, key in nodes.items()}
        return {node: name for node, (name, active) in found.items() if not active}

    def name(self, node_key: str) -> str:
        """The site that is enrolled with this key, or ""."""
        if self.consortium is None:
            return ""
        entries = self._registry().sites.items()
        return next((name for name, entry in entries if entry.active and entry.node_key == node_key), "")

    def refusal(self, site: str, node_key: str, ledger_key: str = "") -> str | None:
        """Why an answer in the name of `site` is not taken, None if it is; an empty ledger key is not compared."""
        if self.consortium is None:
            return None
        entry = self._active(site)
        if entry is None:
            return NOT_ENROLLED
        if entry.node_key != node_key:
            return OTHER_NODE
        return OTHER_LEDGER if ledger_key not in ("", entry.ledger_key) else None

    def enrolment(self, site: str) -> str:
        """The fingerprint of name and keys under which `site` is enrolled now, "" if it is not or in a simulation."""
        entry = None if self.consortium is None else self._active(site)
        return "" if entry is None else entry.fingerprint

    def lapsed(self, enrolments: Mapping[str, str]) -> dict[str, str]:
        """Of sites that take part under these fingerprints those that no longer may, with the reason."""
        if self.consortium is None:
            return {}
        registry, found = self._registry(), dict[str, str]()
        for site, fingerprint in enrolments.items():
            entry = registry.sites.get(site)
            if entry is None or not entry.active:
                found[site] = NOT_ENROLLED if entry is None else REVOKED
            elif entry.fingerprint != fingerprint:
                found[site] = OTHER_KEYS
        return found

    def _active(self, site: str) -> SiteEntry | None:
        entry = self._registry().sites.get(site)
        return entry if entry is not None and entry.active else None

    def _registry(self) -> Registry:
        return Registry() if self.consortium is None else load_registry(self.consortium)
