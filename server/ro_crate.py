"""ro-crate-metadata.json: what the files of a release are and how they came about, as an RO-Crate 1.2, by rocrate.

The folder of a release is then an RO-Crate as it stands (https://w3id.org/ro/crate/1.2). The library would date the
crate today and could fetch what it describes; it is given the run's date, and no address to fetch.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from rocrate.model.contextentity import ContextEntity
from rocrate.rocrate import ROCrate

from common.bundles import MANIFEST
from server.croissant import VERSION as CROISSANT_VERSION
from server.metadata import (
    CROISSANT,
    KEYWORDS,
    LIMITS,
    MEDIA_TYPES,
    NO_LICENCE,
    PRIVACY,
    SCHEMA,
    ReleaseFacts,
    identifier,
    licence_url,
)
from server.release_readme import PURPOSES

CRATE_VERSION = "1.2"
TABLE_SCHEMA = "https://datapackage.org/profiles/2.0/tableschema.json"
CONFORMS = {
    CROISSANT: (CROISSANT_VERSION, "Croissant 1.1"),
    SCHEMA: (TABLE_SCHEMA, "Table Schema of Data Package 2.0"),
}
MADE = ("cohort.csv", "cohort.parquet")


def crate_metadata(facts: ReleaseFacts) -> dict[str, Any]:
    """The metadata document as JSON-LD, the same for the same facts."""
    crate = ROCrate(version=CRATE_VERSION)
    protocol, release = facts.protocol, facts.protocol.study.release
    for name, found in facts.files.items():
        properties: dict[str, Any] = {
            "name": name,
            "description": PURPOSES.get(name, name),
            "encodingFormat": MEDIA_TYPES["." + name.rsplit(".", 1)[-1]],
            "contentSize": str(found.size),
            "sha256": found.sha256,
        }
        if name in CONFORMS:
            address, title = CONFORMS[name]
            properties["conformsTo"] = _add(crate, address, "CreativeWork", name=title, url=address)
        crate.add_file(dest_path=name, properties=properties)
    # Without a digest: it signs this file, and its signatures may grow.
    crate.add_file(
        dest_path=MANIFEST,
        properties={"name": MANIFEST, "description": PURPOSES[MANIFEST], "encodingFormat": "application/json"},
    )
    root = crate.root_dataset
    del root["datePublished"]
    said: dict[str, Any] = {
        "name": facts.name,
        "description": f"{facts.description} {PRIVACY} {' '.join(LIMITS)}",
        "datePublished": facts.date,
        "dateCreated": facts.date,
        "license": _licence(crate, release.license),
        "version": facts.version,
        "keywords": ", ".join(KEYWORDS),
        "creditText": release.citation,
        "url": release.url,
        "identifier": _add(
            crate, "#study-digest", "PropertyValue", name="SHA-256 of study and schema", value=protocol.digest
        ),
        "creator": [_organisation(crate, facts, name) for name in facts.creators],
        "publisher": _organisation(crate, facts, facts.consortium) if facts.consortium else None,
        "mentions": _study(crate, facts),
    }
    for key, value in said.items():
        if value:
            root[key] = value
    return crate.metadata.generate()


def _study(crate: ROCrate, facts: ReleaseFacts) -> ContextEntity:
    """The study as the action that made the cohort: sites took part, the software is its instrument."""
    number = version("cohortium")
    software = _add(
        crate,
        "#cohortium",
        "SoftwareApplication",
        name="Cohortium",
        softwareVersion=number,
        version=number,
        url=f"pkg:generic/cohortium@{number}",  # a package URL: it names the software and is no place to fetch it
    )
    sites = [_add(crate, f"#site-{identifier(site)}", "Organization", name=site) for site in facts.sites]
    return _add(
        crate,
        "#study",
        "CreateAction",
        name=facts.protocol.study.study.name,
        description=facts.collection,
        instrument=software,
        object=crate.get("study.json"),
        result=[crate.get(name) for name in MADE],
        participant=sites,
        **({} if facts.ended is None else {"endTime": facts.ended}),
    )


def _licence(crate: ROCrate, licence: str | None) -> ContextEntity | str:
    """An RO-Crate must say how it may be used; in words, where the study declares nothing."""
    if licence is None:
        return NO_LICENCE
    address = licence_url(licence)
    return _add(
        crate, address, "CreativeWork", name=licence, description="the licence that the study declares", url=address
    )


def _organisation(crate: ROCrate, facts: ReleaseFacts, name: str) -> ContextEntity:
    """The consortium is one entity, whether it publishes or creates."""
    known = name == facts.consortium
    return _add(crate, "#consortium" if known else f"#creator-{identifier(name)}", "Organization", name=name)


def _add(crate: ROCrate, identity: str, kind: str, **properties: Any) -> ContextEntity:
    entity = ContextEntity(crate, identity, properties={"@type": kind} | properties)
    crate.add(entity)
    return entity
