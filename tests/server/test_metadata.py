"""schema.json, croissant.json and ro-crate-metadata.json, read by the libraries that others would read them with."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import frictionless
import mlcroissant as mlc
import numpy as np
import pyarrow.parquet as pq
import pytest
from rocrate.rocrate import ROCrate

from common.digest import sha256_of_file
from common.errors import OutputError
from common.schema import parse_schema
from common.study import Protocol, Study
from common.table import Table
from server import croissant
from server.cohort import write_cohort
from server.metadata import identifier, write_metadata
from server.release import write_descriptions
from server.run import RunFiles

ROOT = Path(__file__).parents[2]
LEVELS = ["01", "1", "None", "NA", "true", "über", '"', "<b>", "a, b"]
# Names that are something else in JSON-LD, in an address, in pandas or in HTML.
NAMES = ["age (years) <b>", "größe/cm", ".", "..", "a:b", "@id", "%2E", 'say "x"', "cohort/rows", "sc:name", "index"]
DECLARED: dict[str, Any] = {
    "license": "cc-by-4.0",
    "creators": ["Ärzte & Co.", "B"],
    "citation": "Us (2026)",
    "url": "https://example.org/cohort",
}
ENDED = "2026-03-01T23:59:59Z"


def make_protocol(**release: Any) -> Protocol:
    fields: list[dict[str, Any]] = [
        {"name": name, "type": "number", "title": "A title", "constraints": {"minimum": 0, "maximum": 99.5}}
        for name in NAMES
    ]
    fields += [
        {"name": "visits", "type": "integer", "constraints": {"minimum": -3, "maximum": 0, "required": True}},
        {"name": "code", "type": "string", "description": "A code.", "constraints": {"enum": LEVELS}},
        {"name": "stage", "type": "integer", "constraints": {"enum": [3, 1, 2]}},
        {"name": "born", "type": "date", "constraints": {"minimum": "1900-01-01", "maximum": "2020-12-31"}},
        {"name": "dead", "type": "boolean", "trueValues": ["yes"], "falseValues": ["no"]},
    ]
    schema = {"title": "Odd names", "cohortium:target": "dead", "missingValues": ["-", ""], "fields": fields}
    study = {"study": {"name": "odd", "schema": "schema.json"}, "release": {"rows": 40, **release}}
    return Protocol(Study.model_validate(study), parse_schema(schema))


def make_cohort(protocol: Protocol, rows: int) -> Table:
    random = np.random.default_rng(4)
    columns = []
    for column in protocol.schema.columns:
        if column.is_numeric:
            values = random.uniform(column.minimum, column.maximum, rows)
            values = values if column.kind == "number" else np.round(values)
        else:
            values = np.arange(rows) % len(column.levels) * 1.0
        if column.nullable:
            values[random.random(rows) < 0.2] = np.nan
        columns.append(values)
    return Table(protocol.schema, np.column_stack(columns))


def describe(out: Path, protocol: Protocol, consortium: str | None = None, ended: str | None = ENDED) -> RunFiles:
    """Everything that describes a release of a few files, in `out`."""
    out.mkdir()
    files = RunFiles(out)
    write_cohort([make_cohort(protocol, 40)], protocol.schema, files.cohort_csv, files.cohort_parquet, protocol.markers)
    files.study.write_text(json.dumps(protocol.to_json()))
    files.sites.write_text(json.dumps({"joined": {"St. Mary's": {}, "anna": {}}, "not_joined": {"zoe": "denied"}}))
    files.rounds.write_text(json.dumps({"round": 1} | ({} if ended is None else {"ended": ended})) + "\n")
    write_descriptions(files, protocol, NAMED, consortium)
    return files


NAMED = [
    "README.txt", "cohort.csv", "cohort.parquet", "croissant.json", "ro-crate-metadata.json", "rounds.jsonl",
    "schema.json", "sites.json", "study.json",
]  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> RunFiles:
    return describe(tmp_path_factory.mktemp("described") / "out", make_protocol(**DECLARED), "The consortium")


@pytest.fixture(scope="module")
def card(files: RunFiles) -> mlc.Dataset:
    return mlc.Dataset(files.croissant)


def test_the_data_card_is_complete_in_the_eyes_of_its_library(card: mlc.Dataset) -> None:
    issues, metadata = card.metadata.ctx.issues, card.metadata
    assert not issues.errors and not issues.warnings, issues.report()
    assert metadata.conforms_to[0] == "http://mlcommons.org/croissant/1.1"
    assert metadata.license == ["https://spdx.org/licenses/CC-BY-4.0"] and metadata.url == DECLARED["url"]
    assert [creator.name for creator in metadata.creators] == DECLARED["creators"]
    assert (metadata.cite_as, metadata.version) == ("Us (2026)", f"1.0.0+{make_protocol(**DECLARED).digest[:16]}")
    assert metadata.date_published is not None and metadata.date_published.date() == date(2026, 3, 1)
    assert metadata.personal_sensitive_information and "privacy.json" in metadata.personal_sensitive_information[0]
    assert "synthetic" in str(metadata.description) and "The consortium" in str(metadata.description)


def test_the_records_are_the_cohort(files: RunFiles, card: mlc.Dataset) -> None:
    expected = pq.read_table(files.cohort_parquet).to_pylist()
    found = list(card.records("cohort"))
    assert len(found) == len(expected) == 40
    ids = {name: f"cohort/{identifier(name)}" for name in expected[0]}
    assert len(set(ids.values())) == len(ids)
    seen: dict[str, set[Any]] = {name: set() for name in ids}
    for theirs, ours in zip(found, expected, strict=True):
        assert set(theirs) == set(ids.values())
        for name, value in ours.items():
            given = theirs[ids[name]]
            given = given.decode() if isinstance(given, bytes) else given.date() if isinstance(value, date) else given
            assert given == value and (value is None or type(given) is type(value)), name
            seen[name].add(value)
    assert {*LEVELS, None} >= seen["code"] >= {"01", "1", "None", "NA"} and None in seen["born"]


def test_every_field_says_what_the_schema_declares(card: mlc.Dataset) -> None:
    records, *levels = card.metadata.record_sets
    fields = {str(field.name): field for field in records.fields}
    protocol = make_protocol()
    assert list(fields)[: len(protocol.schema.names)] == list(protocol.schema.names)
    noted = {
        name: {note.id.rsplit("/", 1)[-1]: note.value for note in field.annotations} for name, field in fields.items()
    }
    assert all(noted[name] == {"minimum": 0, "maximum": 99.5, "required": False} for name in NAMES)
    assert noted["visits"] == {"minimum": -3, "maximum": 0, "required": True}
    assert noted["born"] == {"minimum": "1900-01-01", "maximum": "2020-12-31", "required": False}
    assert noted["code"] == noted["dead"] == {"required": False}
    assert fields["index"].description == "A title. From 0 to 99.5, as declared. May be missing."
    assert fields["code"].description == "A code. One of 9 declared values. May be missing."
    assert [str(kind).rsplit("/", 1)[-1] for kind in fields["dead"].data_types or []] == ["Boolean", "Label"]
    found = {str(level.name): [next(iter(line.values())) for line in level.data or []] for level in levels}
    assert found == {"values of code": LEVELS, "values of stage": ["3", "1", "2"]}
    assert fields["code"].references.field == "levels/code/name"
    assert [note.value for note in records.annotations] == [40]


def test_every_file_is_described_with_its_digest(files: RunFiles, card: mlc.Dataset) -> None:
    described = {file.name: file.sha256 for file in card.metadata.file_objects}
    assert described == {
        name: sha256_of_file(files.out / name) for name in NAMED if name not in ("croissant.json", files.ro_crate.name)
    }
    crate = ROCrate(str(files.out))
    listed = {entity.id: entity.get("sha256") for entity in crate.data_entities}
    digests = {name: sha256_of_file(files.out / name) for name in NAMED if name != files.ro_crate.name}
    assert listed == digests | {"manifest.dsse.json": None}  # the manifest signs both: it can stand in neither
    sizes = {entity.id: entity.get("contentSize") for entity in crate.data_entities if entity.id in digests}
    assert sizes == {name: str((files.out / name).stat().st_size) for name in digests}


def test_the_crate_says_whose_it_is_and_how_it_was_made(files: RunFiles) -> None:
    document = json.loads(files.ro_crate.read_text())
    entities = {entity["@id"]: entity for entity in document["@graph"]}
    assert len(entities) == len(document["@graph"])
    assert set(entities) == {entity.id for entity in ROCrate(str(files.out)).get_entities()}
    outside = {"https://w3id.org/ro/crate/1.2", *(c for e in entities.values() for c in references(e, "conformsTo"))}
    assert {target for entity in entities.values() for target in references(entity)} <= {*entities, *outside}

    def named(entity: dict[str, Any], key: str) -> list[str]:
        return [entities[target]["name"] for target in references(entity, key)]

    root, study = entities["./"], entities["#study"]
    assert (root["datePublished"], root["creditText"], root["url"]) == ("2026-03-01", "Us (2026)", DECLARED["url"])
    assert list(references(root, "license")) == ["https://spdx.org/licenses/CC-BY-4.0"]
    assert named(root, "license") == ["CC-BY-4.0"] and named(root, "creator") == DECLARED["creators"]
    assert entities["#study-digest"]["value"] == make_protocol(**DECLARED).digest
    assert study["@type"] == "CreateAction" and study["endTime"] == ENDED
    assert named(study, "participant") == ["St. Mary's", "anna"] and named(study, "instrument") == ["Cohortium"]
    assert named(study, "object") == ["study.json"] and named(study, "result") == ["cohort.csv", "cohort.parquet"]


def references(entity: dict[str, Any], only: str | None = None) -> Iterator[str]:
    for key, value in entity.items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, dict) and only in (None, key):
                yield item["@id"]


def test_without_words_of_the_consortium_nothing_is_claimed(tmp_path: Path) -> None:
    files = describe(tmp_path / "out", make_protocol(markers=False), ended=None)
    card = mlc.Dataset(files.croissant)
    metadata = card.metadata
    assert not metadata.ctx.issues.errors
    assert (metadata.license, metadata.cite_as, metadata.date_published, metadata.url) == (None, None, None, None)
    assert metadata.creators == [] and "A simulation on one machine" in str(metadata.description)
    assert len(metadata.record_sets[0].fields) == len(make_protocol().schema.columns)
    (root,) = (entity for entity in json.loads(files.ro_crate.read_text())["@graph"] if entity["@id"] == "./")
    assert root["license"].startswith("No licence is declared") and "creator" not in root
    assert "datePublished" not in root  # the library would have said today
    for path in (files.croissant, files.ro_crate):
        text = path.read_text()
        assert "ε" not in text and "epsilon" not in text and "anonym" not in text.lower() and "GDPR" not in text


def test_the_schema_describes_the_cohort_as_frictionless_reads_it(files: RunFiles, tmp_path: Path) -> None:
    marked = json.loads(files.schema.read_text())
    assert marked["fields"][: len(make_protocol().schema.columns)] == make_protocol().schema.descriptor["fields"]
    assert [field["name"] for field in marked["fields"][-3:]] == [
        "cohortium_study", "cohortium_release", "cohortium_synthetic",
    ]  # fmt: skip
    plain = describe(tmp_path / "plain", make_protocol(markers=False))
    assert json.loads(plain.schema.read_text()) == make_protocol().schema.descriptor
    for run in (files, plain):
        schema = frictionless.Schema.from_descriptor(json.loads(run.schema.read_text()))
        with frictionless.system.use_context(trusted=True):
            report = frictionless.validate(frictionless.Resource(path=str(run.cohort_csv), schema=schema))
        assert report.valid, report.flatten(["rowNumber", "fieldName", "type"])
        assert report.tasks[0].stats.get("rows") == 40


AGAIN = """
import sys
from pathlib import Path

def deny(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        raise AssertionError(f"{event} {arguments}")

sys.addaudithook(deny)
import json
from common.study import Protocol
from server.metadata import write_metadata
from server.run import RunFiles

files = RunFiles(Path(sys.argv[1]))
protocol = Protocol.from_json(json.loads(files.study.read_text()))
write_metadata(files, protocol, sys.argv[2:], "The consortium")
import mlcroissant
from rocrate.rocrate import ROCrate

assert len(list(mlcroissant.Dataset(files.croissant).records("cohort"))) == 40
assert ROCrate(str(files.out)).name == "odd: synthetic cohort"
"""


@pytest.mark.parametrize("seed", ["1", "2"])
def test_the_same_files_give_the_same_bytes_and_no_network_is_asked(files: RunFiles, tmp_path: Path, seed: str) -> None:
    copy = RunFiles(Path(shutil.copytree(files.out, tmp_path / "out")))
    copy.croissant.unlink()
    copy.ro_crate.unlink()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed}
    arguments = [sys.executable, "-c", AGAIN, str(copy.out), *NAMED]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert copy.croissant.read_bytes() == files.croissant.read_bytes()
    assert copy.ro_crate.read_bytes() == files.ro_crate.read_bytes()


def test_a_card_that_its_library_refuses_is_not_written(
    files: RunFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = RunFiles(Path(shutil.copytree(files.out, tmp_path / "out")))
    copy.croissant.unlink()
    monkeypatch.setattr(croissant, "PARQUET", "nowhere.parquet")  # no such file is described
    with pytest.raises(OutputError, match="the data card is not valid"):
        write_metadata(copy, make_protocol(), NAMED)
    assert not copy.croissant.exists()


def test_an_id_is_a_name_s_own() -> None:
    names = [*NAMES, "%2E%2E", "%2e", "...", "a b", "a%20b", "é", "cafe\u0301", "café"]
    assert len({identifier(name) for name in names}) == len(names)
    assert not any(set(identifier(name)) & set(' /:@#?"<>') for name in names)
    assert identifier("Größe_1") == "Größe_1" and identifier("a b") == "a%20b" and identifier("..") == "%2E%2E"
