"""croissant.json: the data card of a release in Croissant 1.1 (https://mlcommons.org/croissant/1.1), by mlcroissant.

Records are read from cohort.parquet, which has types: a reader of CSV files guesses, and takes a code "01" for 1 and a
category "None" for nothing. Importing this module takes a second; nothing here or in the library asks a network.
"""

from __future__ import annotations

import copy
from datetime import timedelta
from importlib.metadata import version
from typing import Any

import mlcroissant as mlc

from common.errors import OutputError
from common.schema import EPOCH, Column
from server.metadata import (
    BIASES,
    KEYWORDS,
    LIMITS,
    MARKED,
    MEDIA_TYPES,
    PRIVACY,
    ReleaseFacts,
    about,
    identifier,
    licence_url,
)
from server.release_readme import PURPOSES

VERSION = "http://mlcommons.org/croissant/1.1"
RAI_VERSION = "http://mlcommons.org/croissant/RAI/1.0"
SCHEMA_ORG, ML_COMMONS = "https://schema.org/", "http://mlcommons.org/croissant/"
RECORDS, LEVELS, PARQUET, CSV = "cohort", "levels", "cohort.parquet", "cohort.csv"
# What the library's own context lacks of that of Croissant 1.1, and the vocabulary of provenance.
CONTEXT: dict[str, Any] = {
    "arrayShape": "cr:arrayShape",
    "annotation": "cr:annotation",
    "containedIn": "cr:containedIn",
    "description": {"@container": "@language"},
    "isArray": "cr:isArray",
    "name": {"@container": "@language"},
    "prov": "http://www.w3.org/ns/prov#",
}
TYPES = {
    "number": mlc.DataType.FLOAT,
    "integer": mlc.DataType.INTEGER,
    "categorical": mlc.DataType.TEXT,
    "boolean": mlc.DataType.BOOL,
    "date": mlc.DataType.DATE,
}
CARDINALITY = "http://www.wikidata.org/entity/Q4049983"


def data_card(facts: ReleaseFacts) -> dict[str, Any]:
    """The data card as JSON-LD, the same for the same facts; `OutputError` if the library finds a fault in it."""
    context = mlc.Context(conforms_to=VERSION)  # type: ignore[arg-type]  # converted by the class itself
    context.rdf.context.update(CONTEXT)
    try:
        document = _with_zeros(_metadata(facts, context).to_json())
        # Read back as anybody else would: ids, types and references are checked on the way.
        mlc.Metadata.from_json(mlc.Context(), copy.deepcopy(document))
    except Exception as error:  # whatever the library stumbles over, readers of the card would too
        raise OutputError(
            f"croissant.json: the data card is not valid: {error}",
            fix="nothing was signed; report this as a defect of Cohortium, with the study",
        ) from None
    return document


def _metadata(facts: ReleaseFacts, context: mlc.Context) -> mlc.Metadata:
    protocol, release = facts.protocol, facts.protocol.study.release
    categorical = [column for column in protocol.schema.columns if column.kind == "categorical"]
    return mlc.Metadata(
        ctx=context,
        conforms_to=[VERSION, RAI_VERSION],
        name=facts.name,
        description=facts.description,
        version=facts.version,
        license=[licence_url(release.license)] if release.license else None,
        cite_as=release.citation,
        url=release.url,
        creators=[
            mlc.Organization(ctx=context, id=f"creator/{number}", name=name)
            for number, name in enumerate(facts.creators, start=1)
        ],
        publisher=[mlc.Organization(ctx=context, id="publisher", name=facts.consortium)] if facts.consortium else [],
        date_created=facts.date,  # type: ignore[arg-type]  # the class converts text
        date_published=facts.date,  # type: ignore[arg-type]
        keywords=list(KEYWORDS),
        distribution=[_file(facts, name, context) for name in facts.files],
        record_sets=[_records(facts, context), *(_levels(column, context) for column in categorical)],
        data_collection=facts.collection,
        data_collection_type=["Others"],
        data_collection_missing_data=facts.missing,
        data_biases=[BIASES],
        data_limitations=list(LIMITS),
        personal_sensitive_information=[PRIVACY],
        extra_properties={"identifier": protocol.digest, "prov:wasGeneratedBy": _provenance(facts)},
    )


def _file(facts: ReleaseFacts, name: str, context: mlc.Context) -> mlc.FileObject:
    found = facts.files[name]
    return mlc.FileObject(
        ctx=context,
        id=name,
        name=name,
        description=PURPOSES.get(name, name),
        content_url=name,
        content_size=f"{found.size} B",
        encoding_formats=[MEDIA_TYPES["." + name.rsplit(".", 1)[-1]]],
        sha256=found.sha256,
        same_as=[PARQUET] if name == CSV else None,
    )


def _records(facts: ReleaseFacts, context: mlc.Context) -> mlc.RecordSet:
    protocol = facts.protocol
    fields = [_field(column, facts, context) for column in protocol.schema.columns]
    for name, value in (protocol.markers.values() if protocol.markers else {}).items():
        kind = mlc.DataType.BOOL if isinstance(value, bool) else mlc.DataType.TEXT
        fields.append(_sourced(name, MARKED[name], [kind], context))
    rows = mlc.Field(
        ctx=context,
        id=f"{RECORDS}-rows",
        name="number of rows",
        value=facts.rows,
        data_types=[mlc.DataType.INTEGER, CARDINALITY],  # type: ignore[list-item]  # the class converts text
    )
    return mlc.RecordSet(
        ctx=context,
        id=RECORDS,
        name=RECORDS,
        description=f"One record for every synthetic row. {facts.collection}",
        fields=fields,
        annotations=[rows],
    )


def _field(column: Column, facts: ReleaseFacts, context: mlc.Context) -> mlc.Field:
    kinds = [TYPES[column.kind]]
    if column.name == facts.protocol.target:
        kinds.append(f"{ML_COMMONS}Label")  # type: ignore[arg-type]
    field = _sourced(column.name, _in_words(column, facts), kinds, context)
    field.annotations = _declared(column, context)
    if column.kind == "categorical":
        field.references = mlc.Source(ctx=context, field=f"{LEVELS}/{identifier(column.name)}/name")
    return field


def _sourced(name: str, description: str, kinds: list[Any], context: mlc.Context) -> mlc.Field:
    extract = mlc.Extract(ctx=context, column=name)
    return mlc.Field(
        ctx=context,
        id=f"{RECORDS}/{identifier(name)}",
        name=name,
        description=description,
        data_types=kinds,
        source=mlc.Source(ctx=context, file_object=PARQUET, extract=extract),
    )


def _in_words(column: Column, facts: ReleaseFacts) -> str:
    if column.is_numeric:
        low, high = (f"{bound:.15g}" if isinstance(bound, float) else bound for bound in _bounds(column))
        values = f"From {low} to {high}, as declared."
    else:
        values = f"One of {len(column.levels)} declared values."
    said = about(column, facts.protocol.schema)
    missing = "May be missing." if column.nullable else "Never missing."
    return " ".join([*([f"{said}."] if said else []), values, missing])


def _bounds(column: Column) -> tuple[Any, Any]:
    """As a person declares them: a date as YYYY-MM-DD, an integer without a point."""
    bounds = (column.minimum, column.maximum)
    if column.kind == "date":
        low, high = ((EPOCH + timedelta(days=days)).isoformat() for days in bounds)
        return low, high
    return (int(bounds[0]), int(bounds[1])) if column.kind == "integer" else bounds


def _declared(column: Column, context: mlc.Context) -> list[mlc.Field]:
    """Bounds and whether a value is required, as annotations with the properties that schema.org has for them."""
    said: list[tuple[str, str, Any, Any]] = []
    if column.is_numeric:
        low, high = _bounds(column)
        said += [("minimum", "minValue", low, TYPES[column.kind]), ("maximum", "maxValue", high, TYPES[column.kind])]
    said.append(("required", "valueRequired", column.required, mlc.DataType.BOOL))
    return [
        mlc.Field(
            ctx=context,
            id=f"{RECORDS}/{identifier(column.name)}/{name}",
            name=f"declared: {name}",
            data_types=[kind],
            equivalentProperty=[f"sc:{term}"],
            value=value,
        )
        for name, term, value, kind in said
    ]


def _levels(column: Column, context: mlc.Context) -> mlc.RecordSet:
    """The declared categories of a column, in declared order."""
    here = f"{LEVELS}/{identifier(column.name)}"
    return mlc.RecordSet(
        ctx=context,
        id=here,
        name=f"values of {column.name}",
        data_types=["sc:Enumeration"],  # type: ignore[list-item]
        key=[f"{here}/name"],
        fields=[mlc.Field(ctx=context, id=f"{here}/name", name="name", data_types=[mlc.DataType.TEXT])],
        data=[{f"{here}/name": level} for level in column.levels],
    )


def _provenance(facts: ReleaseFacts) -> dict[str, Any]:
    """The study as an activity of the W3C's PROV: the sites took part, and this software drew the rows."""
    activity = {
        "@type": "prov:Activity",
        "prov:label": f"Cohortium study {facts.protocol.study.study.name}",
        "prov:wasAssociatedWith": [
            {"@type": "prov:SoftwareAgent", "prov:label": f"cohortium {version('cohortium')}"},
            *({"@type": "prov:Organization", "prov:label": site} for site in facts.sites),
        ],
    }
    return activity | ({} if facts.ended is None else {"prov:endedAtTime": facts.ended})


def _with_zeros(document: dict[str, Any]) -> dict[str, Any]:
    """The library leaves out whatever is false in Python, a declared bound of 0 included."""
    for field in document["recordSet"][0]["field"]:
        notes = field.get("annotation", [])
        for note in notes if isinstance(notes, list) else [notes]:
            note.setdefault("value", 0)
    return document
