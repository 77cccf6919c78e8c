"""README.txt of a release: what every file is and how to verify them; signed like the others."""

from __future__ import annotations

from collections.abc import Iterable

from common.bundles import KEYS, MANIFEST
from common.gates import GatesDocument

README, CHANNEL_RELEASE = "README.txt", "release.json"
PURPOSES = {
    "cohort.csv": "the synthetic cohort",
    "cohort.parquet": "the same with types",
    "report.html": "the report: open it in a browser",
    "privacy.json": "what is claimed for every site against every adversary",
    "metrics.json": "fidelity, utility, inference, groups, attacks: un-noised",
    "evaluation.json": "how the sites' patients compare with the cohort, from what the sites sent",
    "gates.json": "what every gate found before the release, and whether one was overridden",
    "audit.json": "what attackers found of canaries in a twin of the study: lower bounds, no evidence of privacy",
    "anchor.json": "the anchor: what was asked and spent, and which generator was chosen",
    "anchor.safetensors": "the sites' noised statistics together (not part of the release)",
    "rounds.jsonl": "one line a round: sites, certificate; round 0: an anchor without rounds",
    "sites.json": "who took part, with which weight",
    "study.json": "the protocol as approved",
    "schema.json": "the cohort's columns as a Frictionless Table Schema",
    "croissant.json": "the data card, in Croissant 1.1",
    "ro-crate-metadata.json": "files, licence and provenance; makes this folder an RO-Crate 1.2",
    CHANNEL_RELEASE: "where the cohort's rows come from, by site",
    "manifest.dsse.json": "SHA-256 and SHA-512 of every released file, with the signatures",
    KEYS[0]: "public key of the manifest",
    README: "what every file is, and how to verify them",
    "decoder.safetensors": "the global decoder (not part of the release)",
    "ledger-heads.json": "how far the coordinator has seen every site's ledger (not part of the release)",
    "inputs.json": "where the simulation read its patients (not part of the release)",
    "ledgers": "the sites' ledgers (not part of the release)",
    "site-logs": "the sites' own logs (not part of the release)",
    "nodes.json": "which of Flower's nodes is which site (not part of the release)",
    "runtime.log": "what Flower and Ray printed",
}
VERIFY = f"""\
The rows of the cohort are synthetic: a model drew them. That is no statement about privacy; what is claimed, for whom,
against whom and under which assumptions, is in privacy.json and in report.html.

To verify, install Cohortium; no network is needed. Ask for the coordinator's public key another way than this release,
and compare its fingerprint over the telephone:

  cohortium verify . --key release.pub
  cohortium verify . --trust keys

`keys` is a folder of the public keys that you trust, NAME.pub for each; then it also says which hospitals
countersigned. An archive (.tar.zst) is verified as it is, without unpacking it.

Without Cohortium: {MANIFEST} is a DSSE envelope. Its payload (base64) is an in-toto statement with the SHA-256 and
SHA-512 of every file; its signatures are Ed25519, over DSSE's pre-authentication encoding of the payload.
"""


def readme(names: Iterable[str], gates: GatesDocument | None = None) -> str:
    """The text for a release of the named files with these gates; the same for the same names and gates."""
    everything = sorted({*names, README, MANIFEST})
    width = max(map(len, everything))
    listing = "\n".join(f"  {name:<{width}}  {PURPOSES.get(name, '')}".rstrip() for name in everything)
    opened = "" if gates is None else "\n".join(gates.in_words()) + "\n\n"
    return f"A release of Cohortium\n\n{opened}{listing}\n\n{VERIFY}"
