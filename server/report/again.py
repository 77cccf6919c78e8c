"""A report rendered again from the files of a finished run, with an audit or a comparison that came later."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from common.bundles import MANIFEST
from common.errors import DataError, OutputError, SchemaError, StudyError
from common.evaluation.metrics import SCHEMA_VERSION
from common.files import write_atomic
from common.study import Protocol
from server.audit_records import Audit
from server.compare_records import Comparison
from server.release import examine_release
from server.report.documents import Documents
from server.report.page import render
from server.run import RunFiles

GATES = "gates.json"
NOT_A_RUN = "name the folder of a finished run or of an unpacked release"


def report_again(run: Path, out: Path | None, audit: Path | None, compare: Path | None) -> Path:
    """Write the page and return where it is: `out`, or a file named after the run in the working directory.

    Raises `DataError` for a folder that is no finished run, a file of it that cannot be read, an audit or comparison
    of another study; `VerifyError` if a signed file was changed; `OutputError` for an `out` that would lie beside a
    manifest, which names every file of its folder.
    """
    target = out if out is not None else Path(f"{run.resolve().name}-report.html")
    if (target.parent / MANIFEST).exists():
        raise OutputError(
            f"{target}: lies in the folder of a signed release, which must stay as it was signed",
            fix="name a file in another folder with --out",
        )
    if target.is_dir():
        raise OutputError(f"{target}: is a folder", fix="name a file with --out, such as report.html")
    page = render(documents_of(run, audit=audit, compare=compare))
    write_atomic(target, page)
    return target


def documents_of(run: Path, *, audit: Path | None = None, compare: Path | None = None) -> Documents:
    """The documents of the run in the folder `run`; see `report_again` for what it raises."""
    files = RunFiles(run)
    for needed in (files.study, files.sites, files.rounds, files.privacy):
        if not needed.is_file():
            raise DataError(f"{run}: not a finished run: it has no {needed.name}", fix=NOT_A_RUN)
    predicate: Mapping[str, Any] = {}
    if files.manifest.exists():
        predicate = examine_release(run).require().statement["predicate"]
    try:
        protocol = Protocol.from_json(_read(files.study))
    except (AttributeError, KeyError, TypeError, ValueError, StudyError, SchemaError):
        raise DataError(f"{files.study}: not the protocol of a study", fix=NOT_A_RUN) from None
    metrics = _optional(files.metrics)
    if metrics is not None and metrics.get("schema_version") != SCHEMA_VERSION:
        raise DataError(
            f"{files.metrics}: version {metrics.get('schema_version')!r}, expected {SCHEMA_VERSION}",
            fix="render it with the version of Cohortium that made the run",
        )
    channel = _optional(files.release)
    consortium = None
    if metrics is None:
        consortium = str(predicate.get("consortium", "a consortium that its files do not name"))
    rows = protocol.study.release.rows if channel is None else sum(channel["rows"].values())
    return Documents(
        protocol=protocol,
        sites=_read(files.sites),
        rounds=_lines(files.rounds),
        statement=_read(files.privacy),
        rows=rows if metrics is None else metrics["rows"]["synthetic"],
        metrics=metrics,
        evaluation=_optional(files.evaluation),
        channel=channel,
        consortium=consortium,
        gates=_optional(run / GATES),
        audit=None if audit is None else _of_study(Audit, audit, protocol),
        comparison=None if compare is None else _of_study(Comparison, compare, protocol),
        again=_how(audit, compare, signed=bool(predicate)),
    )


def _how(audit: Path | None, compare: Path | None, *, signed: bool) -> str:
    added = [name for name, path in (("an audit", audit), ("a comparison", compare)) if path is not None]
    return (
        f"Rendered again by “cohortium report” {version('cohortium')} from the files of the run"
        + (f" with {' and '.join(added)}" if added else "")
        + (", which are as they were signed." if signed else ", which nobody signed.")
        + " This page itself is not signed and no part of the release."
    )


def _of_study(kind: type[Any], path: Path, protocol: Protocol) -> Any:
    try:
        found = kind.model_validate(_read(path))
    except ValidationError:
        raise DataError(
            f"{path}: not what `cohortium {kind.__name__.lower()}` writes", fix="name its audit.json or compare.json"
        ) from None
    if found.study_digest != protocol.digest:
        raise DataError(
            f"{path}: of another study: digest {found.study_digest[:12]}…, the run's is {protocol.digest[:12]}…",
            fix="run `cohortium audit` or `cohortium compare` with the study.toml and --set of this run",
        )
    return found


def _optional(path: Path) -> Any:
    return _read(path) if path.exists() else None


def _read(path: Path) -> Any:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})", fix="name a file that is there") from None
    except ValueError:
        raise DataError(f"{path}: not JSON", fix="copy it again from where it was made") from None
    if not isinstance(found, dict):
        raise DataError(f"{path}: not a JSON object", fix="copy it again from where it was made")
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError:
        raise DataError(f"{path}: not one JSON object a line", fix="copy it again from where it was made") from None
    if not lines:
        raise DataError(f"{path}: has no round", fix=NOT_A_RUN)
    return lines
