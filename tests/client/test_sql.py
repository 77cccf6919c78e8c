"""`[site.sql]`: what site.toml may say, and a site whose patients are in an SQLite file."""

import datetime
import decimal
import json
import sqlite3
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.check import check_site
from client.patients import load_patients
from client.site import load_site
from client.sources import inspect_query
from client.sql_cells import ColumnCells, order_of
from client.sql_config import SqlSection, has_password
from common.cells import parse_column
from common.errors import DataError, SiteError
from common.messages import JoinReply, Status
from common.schema import Column, parse_schema
from tests.client.hospital import MARKED, PROTOCOL, ROWS, SECRET, Hospital, join_request, table, train_request

pytest.importorskip("sqlalchemy", reason="SQLAlchemy is not installed: pip install 'cohortium[sql]'")
QUERY = "select * from patients order by id"
SITE = '[site]\nname = "anna"\nstate = "state"\n[site.sql]\n'


def config_error(folder: Path, text: str) -> str:
    (folder / "site.toml").write_text(text)
    with pytest.raises(SiteError) as caught:
        load_site(folder / "site.toml")
    assert SECRET not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        (f"url = 'postgresql://u:{SECRET}@h/d'\nquery = 'Q'", "holds a password"),
        (f"url = 'postgresql://u:a/{SECRET}@h/d'\nquery = 'Q'", "holds a password"),
        (f"url = 'postgresql://h/d?password={SECRET}'\nquery = 'Q'", "holds a password"),
        (f"url = 'postgresql://h/d?sslPassword={SECRET}'\nquery = 'Q'", "holds a password"),
        (f"url = '{SECRET}'\nquery = 'Q'", 'is not a database URL; write url = "env:'),
        (f"url = ['{SECRET}']\nquery = 'Q'", "url must be text in quotes"),
        ("url = 'env:'\nquery = 'Q'", "names nothing after env:"),
        ("url = 'env:X'", "either query or query_file"),
        ("url = 'env:X'\nquery = 'Q'\nquery_file = 'q.sql'", "either query or query_file"),
        ("query = 'Q'", "sql.url: is required"),
        (f"url = 'env:X'\nquery = \"select '{SECRET}'\"", "query: has no ORDER BY"),
        (f"url = 'env:X'\nquery = \"delete from x where y = '{SECRET}'\"", "query: must begin with SELECT"),
        ("url = 'env:X'\nqueri = 'Q'", "unknown key"),
        ("url = 'env:X'\nquery = 'Q'\nmax_rows = 0", "sql.max_rows"),
        ("url = 'env:X'\nquery = 'Q'\ntimeout_seconds = 0", "sql.timeout_seconds"),
    ],
)
def test_what_site_toml_may_not_say(tmp_path: Path, section: str, expected: str) -> None:
    assert expected in config_error(tmp_path, SITE + section.replace("'Q'", f"'{QUERY}'"))


def test_a_site_has_one_source(tmp_path: Path) -> None:
    both = SITE.replace("state =", "data = 'p.csv'\nstate =") + f"url = 'env:X'\nquery = '{QUERY}'\n"
    assert "cannot both be given" in config_error(tmp_path, both)
    head = '[site]\nname = "anna"\nstate = "state"\n'
    assert "is required" in config_error(tmp_path, head)
    assert "goes into [site.sql]" in config_error(tmp_path, head + f"data = 'postgresql://u:{SECRET}@h/d'\n")
    assert "is a section of its own" in config_error(tmp_path, head + f"sql = 'postgresql://u:{SECRET}@h/d'\n")


@pytest.mark.parametrize("url", ["postgresql://h/d", "postgresql://u@h:5432/d?sslmode=verify-full", "sqlite:////a:b@c"])
def test_a_url_without_a_password_may_stand_there(url: str) -> None:
    assert not has_password(url) and SqlSection(url=url, query=QUERY).read_url() == url


def test_the_secret_file_must_be_private(tmp_path: Path) -> None:
    path = tmp_path / "secret.txt"
    path.write_text(f"postgresql://u:{SECRET}@h/d\n")
    path.chmod(0o600)
    section = SqlSection(url="file:secret.txt", query=QUERY).within(tmp_path)
    assert section.read_url() == f"postgresql://u:{SECRET}@h/d"
    for mode in (0o640, 0o604, 0o620):
        path.chmod(mode)
        with pytest.raises(SiteError, match="others may read this file") as caught:
            section.read_url()
        assert SECRET not in str(caught.value) and "chmod 600" in str(caught.value)
    path.chmod(0o600)
    path.write_text("\n")
    with pytest.raises(SiteError, match="is empty"):
        section.read_url()
    path.unlink()
    with pytest.raises(SiteError, match="cannot be read"):
        section.read_url()


Make = Callable[..., Hospital]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    path = tmp_path / "patients 100%.db"
    monkeypatch.setenv("COHORTIUM_TEST_URL", f"sqlite:///{path}")

    def build(query: str = QUERY, settings: str = "", policy: str = "") -> Hospital:
        with sqlite3.connect(path) as database:
            database.execute("drop table if exists patients")
            database.execute("create table patients (id integer primary key, age real, sex text, dead text)")
            rows = [(i, *line.split(",")) for i, line in enumerate(table().splitlines()[1:])]
            database.executemany("insert into patients values (?, ?, ?, ?)", rows)
        source = f"[site.sql]\nurl = 'env:COHORTIUM_TEST_URL'\nquery = '''{query}'''\n{settings}"
        return Hospital(tmp_path / "anna", policy, source=source)

    return build


def refused(hospital: Hospital, status: Status = Status.DATA_UNUSABLE) -> str:
    assert hospital.join(join_request()) == JoinReply(status, "anna")
    return hospital.reason(status)


def database(tmp_path: Path) -> sqlite3.Connection:
    return sqlite3.connect(tmp_path / "patients 100%.db")


def test_a_study_runs_on_sqlite_as_on_the_same_file(make: Make, tmp_path: Path) -> None:
    hospital = make().joined()
    assert hospital.train(train_request(1)).status is Status.OK
    ours, theirs = (load_patients(one.config, PROTOCOL) for one in (hospital, Hospital(tmp_path / "file")))
    assert len(ours) == ROWS and np.array_equal(ours.inputs.numpy(), theirs.inputs.numpy())
    assert np.array_equal(ours.levels.numpy(), theirs.levels.numpy())


def test_the_file_is_opened_for_reading_only(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hospital = make("with x as (select 1) delete from patients returning *", 'key = "id"')
    before = (tmp_path / "patients 100%.db").read_bytes()
    assert "the query writes, and the database is opened for reading only" in refused(hospital)
    assert (tmp_path / "patients 100%.db").read_bytes() == before
    assert "could not be read" in refused(make("select load_extension('x'), patients.* from patients order by id"))
    monkeypatch.setenv("COHORTIUM_TEST_URL", f"sqlite:///{tmp_path}/none.db")
    assert "cannot be opened for reading" in refused(make())
    assert not (tmp_path / "none.db").exists()


@pytest.mark.parametrize(
    ("change", "query", "expected"),
    [
        (f"update patients set sex = '{SECRET}' where id = 3", QUERY, "column 'sex': 1 value(s) are not one of"),
        (f"update patients set age = '{SECRET}' where id = 3", QUERY, "column 'age' mixes number and text"),
        ("update patients set sex = x'00ff' where id = 3", QUERY, "column 'sex' holds bytes"),
        (f"update patients set sex = cast(x'ff{SECRET.encode().hex()}' as text) where id = 3", QUERY, "Operational"),
        ("select 1", "select * from nowhere order by 1", "(OperationalError SQLITE_ERROR)"),
        ("select 1", f"select json('{SECRET}') as age, sex, dead from patients order by id", "could not be read"),
        ("select 1", "select age, sex, sex as dead, dead from patients order by id", "column 'dead' occurs 2 times"),
    ],
)
def test_no_cell_in_any_reason(make: Make, tmp_path: Path, change: str, query: str, expected: str) -> None:
    hospital = make(query)
    with database(tmp_path) as connection:
        connection.execute(change)
    assert expected in refused(hospital)


def test_a_query_that_never_ends_is_stopped(make: Make) -> None:
    endless = (
        "with recursive n(i) as (select 1 union all select i + 1 from n) select i as age, 'f' as sex, 'true' as dead"
        " from n order by i"
    )
    assert "longer than timeout_seconds" in refused(make(endless, "timeout_seconds = 1"))


def test_the_key_must_identify_a_patient(make: Make, tmp_path: Path) -> None:
    unordered = "select * from patients"
    assert make(unordered, 'key = "id"').join(join_request()).status is Status.OK
    assert "key column 'age' has" in refused(make(unordered + " union all " + unordered, 'key = "age"'))
    assert "occurs 0 times" in refused(make(unordered, 'key = "number"'))
    with pytest.raises(DataError, match="1 row\\(s\\) without a value"):
        order_of([1, None], "id")
    with pytest.raises(DataError, match="of the type int and str"):
        order_of([1, "b"], "id")
    with pytest.raises(DataError, match="of the type float"):
        order_of([1.0, 2.0], "id")
    assert order_of([30, 10, 20], "id") == [1, 2, 0]


def test_the_order_is_fixed_for_the_whole_study(make: Make, tmp_path: Path) -> None:
    hospital = make().joined()
    with database(tmp_path) as connection:
        connection.execute("delete from patients where id = 5")
        connection.execute("insert into patients values (99, 50, 'f', 'true')")  # as many patients as before
    assert hospital.train(train_request(1)).status is Status.DATA_UNUSABLE
    assert "the order of its rows changed" in hospital.reason(Status.DATA_UNUSABLE) and hospital.spends() == []


def test_a_url_that_cannot_be_used(make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hospital = make()
    for url, expected in (
        ("", "'COHORTIUM_TEST_URL' is not set"),
        (SECRET, "is not a database URL"),
        (f"mysql+pymysql://u:{SECRET}@h/d", "this kind of database is not supported"),
        ("sqlite:///patients.db", "needs the absolute path"),
        ("sqlite://", "needs the absolute path"),
        (f"sqlite:///{tmp_path}/patients.db?mode=rwc", "no options"),
    ):
        monkeypatch.setenv("COHORTIUM_TEST_URL", url)
        assert expected in refused(hospital, Status.SITE_MISCONFIGURED)


def test_a_query_in_a_file(make: Make, tmp_path: Path) -> None:
    hospital = make()
    text = (hospital.folder / "site.toml").read_text().replace(f"query = '''{QUERY}'''", "query_file = 'query.sql'")
    (hospital.folder / "site.toml").write_text(text)
    hospital.config = load_site(hospital.folder / "site.toml")
    assert "cannot be read" in refused(hospital, Status.SITE_MISCONFIGURED)
    (hospital.folder / "query.sql").write_text("select * from patients")
    assert "has no ORDER BY" in refused(hospital, Status.SITE_MISCONFIGURED)
    (hospital.folder / "query.sql").write_text(QUERY)
    hospital.joined()


def test_the_steward_can_check_a_query(make: Make, tmp_path: Path) -> None:
    hospital = make(policy='withheld_columns = ["sex"]')
    (tmp_path / "schema.json").write_text(json.dumps(PROTOCOL.to_json()["schema"]))
    found = check_site(hospital.folder / "site.toml", tmp_path / "schema.json")
    assert found.fits and found.report.rows == ROWS
    assert "columns that this site withholds are missing: 'sex'" in found.warnings
    assert MARKED not in json.dumps(found.to_json())


MISSING = ("", "-9")


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        ("number", [1, 2.5, None, float("nan")], [1, 2.5, None, None]),
        ("number", [decimal.Decimal("1.25"), decimal.Decimal("NaN"), 3], [1.25, None, 3]),
        ("number", [1.0, "", -9, -9.0], [1, None, None, None]),
        ("number", ["1.5", "-9", " 2 "], [1.5, None, 2]),
        ("integer", [1, decimal.Decimal("2.00")], [1, 2]),
        ("date", [datetime.date(1970, 1, 3), datetime.datetime(1970, 1, 2, 23, 59), None], [2, 1, None]),
        ("date", ["1970-01-03", None], [2, None]),
        ("boolean", [True, None, False], [1, None, 0]),
        ("boolean", [1, 0, None], [1, 0, None]),
        ("categorical", ["01", None, "7"], [0, None, 1]),
        ("categorical", [7, None], [1, None]),
        ("categorical", [decimal.Decimal("7")], [1]),
        ("categorical", [uuid.UUID(int=0)], [2]),
    ],
)
@pytest.mark.parametrize("size", [1, 10])
def test_cells_become_what_a_file_would_give(kind: Any, values: list[Any], expected: list[Any], size: int) -> None:
    levels = ("01", "7", str(uuid.UUID(int=0))) if kind == "categorical" else ()
    column = Column("x", kind, minimum=0, maximum=1000, levels=levels)
    cells = ColumnCells(column, MISSING)
    for start in range(0, len(values), size):  # batches must not change anything
        cells.add(values[start : start + size])
    parsed, report = parse_column(cells.array(), column, MISSING)
    assert report.invalid == 0
    assert np.array_equal(parsed, [np.nan if v is None else v for v in expected], equal_nan=True)


def test_a_level_stored_as_a_float_is_refused_not_guessed() -> None:
    cells = ColumnCells(Column("x", "categorical", levels=("7",)), MISSING)
    cells.add([7.0])
    _, report = parse_column(cells.array(), Column("x", "categorical", levels=("7",)), MISSING)
    assert report.invalid == 1


def test_without_the_drivers_the_error_says_what_to_install(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sqlalchemy.engine", None)
    assert "pip install 'cohortium[sql]'" in refused(make(), Status.SITE_MISCONFIGURED)


def test_an_empty_withheld_list_reads_everything(make: Make) -> None:
    sql = make().config.site.sql
    assert sql is not None
    schema = parse_schema({"fields": [{"name": "sex", "type": "string", "constraints": {"enum": ["f", "m"]}}]})
    _, report = inspect_query(sql, schema)
    assert report.undeclared == ("id", "age", "dead")
