"""The page: the first page by reader, then every part, rendered by one set of templates."""

from __future__ import annotations

from importlib.metadata import version

from server.report.blocks import BASES, Reader, Section
from server.report.documents import Documents
from server.report.environment import environment
from server.report.sections_attacks import attacks, audit
from server.report.sections_fidelity import fidelity
from server.report.sections_outcome import groups, inference, utility
from server.report.sections_privacy import exposure, frontier, privacy
from server.report.sections_release import alarms, gates, method
from server.report.sections_sites import federated
from server.report.verdicts import biostatistician
from server.report.verdicts_privacy import coordinator, data_protection_officer, data_steward

READERS = (biostatistician, data_protection_officer, data_steward, coordinator)
SECTIONS = (
    fidelity,
    utility,
    inference,
    groups,
    federated,
    frontier,
    privacy,
    exposure,
    attacks,
    audit,
    gates,
    method,
)


def readers_of(documents: Documents) -> tuple[Reader, ...]:
    """The first page, by reader."""
    return tuple(reader(documents) for reader in READERS)


def sections_of(documents: Documents) -> tuple[Section, ...]:
    """Every part, in the order of the page; a part that is not possible says why."""
    return tuple(section(documents) for section in SECTIONS)


def render(documents: Documents) -> str:
    """The page as HTML that needs no network. The same documents give the same bytes."""
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            study=documents.protocol.study.study.name,
            digest=documents.protocol.digest,
            consortium=documents.consortium,
            rows=documents.rows,
            columns=len(documents.protocol.schema.columns),
            joined=len(documents.sites["joined"]),
            version=version("cohortium"),
            bases=BASES,
            alarms=alarms(documents),
            readers=readers_of(documents),
            sections=sections_of(documents),
        )
    )
