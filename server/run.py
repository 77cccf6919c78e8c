"""What one launch consists of on disk: the settings the ServerApp reads, and the names of everything it leaves."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import FederationError, OutputError
from common.files import write_atomic
from common.gates import GATES, QUARANTINE
from common.study import Protocol, Study

RUN_VARIABLE = "COHORTIUM_RUN"


@dataclass(frozen=True)
class RunSettings:
    """Handed to the ServerApp as a JSON file.

    `sites` is the number of sites to wait for before round 1; `resume` goes on from what `out` holds; `key` is the file
    with the coordinator's Ed25519 key, None for a simulation, whose coordinator has no identity. `record` names the
    site whose messages an audit keeps, in a simulation only.
    """

    protocol: Protocol
    out: Path
    sites: int
    simulation: bool
    resume: bool = False
    key: Path | None = None
    record: str | None = None

    def save(self, path: Path) -> None:
        """Write as JSON."""
        document = {
            "protocol": self.protocol.to_json(),
            "out": str(self.out),
            "sites": self.sites,
            "simulation": self.simulation,
            "resume": self.resume,
            "key": None if self.key is None else str(self.key),
            "record": self.record,
        }
        write_atomic(path, json.dumps(document, indent=1))

    @classmethod
    def load(cls, path: Path) -> RunSettings:
        """Read what `save` wrote; `FederationError` if there is no such file."""
        try:
            document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            record = document.get("record")
            if record is not None and not (isinstance(record, str) and document["simulation"] is True):
                raise ValueError("record")  # messages of a real site are never kept
            return cls(
                Protocol.from_json(document["protocol"]),
                Path(document["out"]),
                int(document["sites"]),
                bool(document["simulation"]),
                bool(document["resume"]),
                None if document["key"] is None else Path(document["key"]),
                record,
            )
        except (OSError, AttributeError, KeyError, TypeError, ValueError):
            raise FederationError(f"{path}: not the settings of a run", fix="launch through `cohortium`") from None


@dataclass(frozen=True)
class RunFiles:
    """Every file of a run, by role."""

    out: Path

    @property
    def study(self) -> Path:
        """The protocol as approved."""
        return self.out / "study.json"

    def complete(self, study: Study) -> bool:
        """Whether the ServerApp has left all that a release of this study needs, in quarantine or not."""
        needed = [self.cohort_csv, self.cohort_parquet]
        if study.evaluation.method != "none":
            needed.append(self.evaluation)
        return all(path.exists() or (self.quarantine / path.name).exists() for path in needed)

    @property
    def rounds(self) -> Path:
        """One JSON line a round."""
        return self.out / "rounds.jsonl"

    @property
    def sites(self) -> Path:
        """Who joined, with weights, and who did not and why."""
        return self.out / "sites.json"

    @property
    def nodes(self) -> Path:
        """Which of Flower's nodes is which site, and under which enrolment it takes part."""
        return self.out / "nodes.json"

    @property
    def waiting(self) -> Path:
        """Which sites have not decided yet, while they are being asked."""
        return self.out / "waiting.json"

    @property
    def decoder(self) -> Path:
        """The global decoder, replaced after every round."""
        return self.out / "decoder.safetensors"

    @property
    def anchor(self) -> Path:
        """What the anchor spent, asked and became, if the study has one."""
        return self.out / "anchor.json"

    @property
    def anchor_statistics(self) -> Path:
        """The noised statistics of all sites together; not part of a release, although nothing in it is private."""
        return self.out / "anchor.safetensors"

    @property
    def cohort_csv(self) -> Path:
        """The cohort as CSV."""
        return self.out / "cohort.csv"

    @property
    def cohort_parquet(self) -> Path:
        """The cohort as Parquet."""
        return self.out / "cohort.parquet"

    @property
    def evaluation(self) -> Path:
        """What the sites' evaluation of the cohort found, if the study has one."""
        return self.out / "evaluation.json"

    @property
    def release(self) -> Path:
        """Where the rows of the cohort come from, by site; only where the sites make them."""
        return self.out / "release.json"

    @property
    def failure(self) -> Path:
        """Why the ServerApp stopped, if it did."""
        return self.out / "failure.json"

    @property
    def log(self) -> Path:
        """What Flower and Ray printed."""
        return self.out / "runtime.log"

    @property
    def privacy(self) -> Path:
        """The privacy statement, machine-readable."""
        return self.out / "privacy.json"

    @property
    def metrics(self) -> Path:
        """Evaluation of the cohort."""
        return self.out / "metrics.json"

    @property
    def report(self) -> Path:
        """The report."""
        return self.out / "report.html"

    @property
    def gates(self) -> Path:
        """What every gate found."""
        return self.out / GATES

    @property
    def audit(self) -> Path:
        """The audit that was given for the release, if any."""
        return self.out / "audit.json"

    @property
    def inputs(self) -> Path:
        """Where a simulation read its patients, for a later release."""
        return self.out / "inputs.json"

    @property
    def quarantine(self) -> Path:
        """Where a candidate lies whose gates failed."""
        return self.out / QUARANTINE

    @property
    def schema(self) -> Path:
        """The cohort's Table Schema, markers included."""
        return self.out / "schema.json"

    @property
    def croissant(self) -> Path:
        """The data card."""
        return self.out / "croissant.json"

    @property
    def ro_crate(self) -> Path:
        """Metadata and provenance of the release as an RO-Crate."""
        return self.out / "ro-crate-metadata.json"

    @property
    def manifest(self) -> Path:
        """The signed list of everything released."""
        return self.out / "manifest.dsse.json"

    @property
    def ledger_heads(self) -> Path:
        """The last head of every site's ledger that the coordinator has seen."""
        return self.out / "ledger-heads.json"

    @property
    def ledgers(self) -> Path:
        """The sites' ledgers, in a simulation."""
        return self.out / "ledgers"


def claim_output(out: Path) -> RunFiles:
    """Create `out`, which must not exist or be empty: results of two runs are never mixed."""
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise OutputError(f"{out}: exists and is not empty", fix="name a new directory with --out, or remove it")
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OutputError(f"{out}: cannot be written to ({error.strerror})", fix="choose another directory") from None
    return RunFiles(out)
