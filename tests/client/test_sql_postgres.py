"""A site whose patients are in a real PostgreSQL."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from client.patients import load_patients
from common.messages import JoinReply, Status
from tests.client.hospital import MARKED, PROTOCOL, ROWS, SECRET, Hospital, join_request, table, train_request
from tests.client.postgres import PASSWORD, Server, postgres

VARIABLE = "COHORTIUM_TEST_DATABASE_URL"
QUERY = "select * from patients order by id"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with postgres() as running:
        lines = [line.split(",") for line in table().splitlines()[1:]]
        rows = ",".join(f"({i}, {age}, '{sex}', {dead})" for i, (age, sex, dead) in enumerate(lines))
        running.run(
            "create table patients (id int primary key, age numeric, sex text, dead boolean)",
            f"insert into patients values {rows}",
            f"create table faulty as select id, sex, dead, case id when 7 then '{SECRET}' else age::text end as age"
            " from patients",
            "create table others as select * from patients",
            f"create role reader login password '{PASSWORD}'",
            "grant select on patients, faulty to reader",
            "create function wipe() returns int language sql as 'delete from patients returning 1'",
            "create sequence counter",
            "grant usage on counter to reader",
        )
        yield running


Make = Callable[..., Hospital]


@pytest.fixture
def make(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    def build(query: str, settings: str = "", user: str = "reader", policy: str = "", **url: str) -> Hospital:
        monkeypatch.setenv(VARIABLE, server.url(user, **url))
        source = f"[site.sql]\nurl = 'env:{VARIABLE}'\nquery = '''{query}'''\n{settings}"
        hospital = Hospital(tmp_path / "anna", policy, source=source)
        hospital.data.unlink()
        return hospital

    return build


def refused(hospital: Hospital, status: Status = Status.DATA_UNUSABLE) -> str:
    assert hospital.join(join_request()) == JoinReply(status, "anna")
    reason = hospital.reason(status)
    log = (hospital.state / "audit.jsonl").read_text()
    assert PASSWORD not in log and "127.0.0.1" not in log
    return reason


def test_a_study_runs_on_a_query_as_on_the_same_file(make: Make, tmp_path: Path) -> None:
    hospital = make(QUERY).joined()
    for number in (1, 2):
        assert hospital.train(train_request(number)).status is Status.OK
    file = Hospital(tmp_path / "file")
    ours, theirs = load_patients(hospital.config, PROTOCOL), load_patients(file.config, PROTOCOL)
    assert len(ours) == ROWS
    assert np.array_equal(ours.inputs.numpy(), theirs.inputs.numpy())
    assert np.array_equal(ours.levels.numpy(), theirs.levels.numpy())


@pytest.mark.parametrize("scheme", ["postgresql", "postgresql+psycopg"])
def test_percent_and_colon_are_not_parameters(make: Make, scheme: str) -> None:
    query = "select age::numeric, sex, dead from patients where sex like '%' and 'a:b' = 'a:b' order by id;"
    assert make(query, scheme=scheme).join(join_request()).status is Status.OK


def test_a_key_fixes_the_order_without_order_by(make: Make, tmp_path: Path) -> None:
    hospital = make("select * from patients where id >= 0 union all select * from patients where false", 'key = "id"')
    ours = load_patients(hospital.config, PROTOCOL)
    assert np.array_equal(ours.inputs.numpy(), load_patients(Hospital(tmp_path / "f").config, PROTOCOL).inputs.numpy())
    backwards = make("select * from patients order by id desc", 'key = "id"')
    assert np.array_equal(load_patients(backwards.config, PROTOCOL).inputs.numpy(), ours.inputs.numpy())


@pytest.mark.parametrize(
    "query",
    [
        "with gone as (delete from patients returning *) select * from gone order by id",
        "with more as (insert into patients values (99, 1, 'f', true) returning *) select * from more order by id",
        "select age, sex, dead, nextval('counter') from patients order by id",
        "select age, sex, dead from patients order by id for update",
        "select age, sex, dead, wipe() from patients order by id",
    ],
)
def test_not_even_the_owner_of_the_tables_can_write(make: Make, server: Server, query: str) -> None:
    reason = refused(make(query, user="owner"))
    if query.startswith("with"):  # a cursor reads only, before the transaction is asked
        assert "NotSupportedError 0A000" in reason
    else:
        assert "the query writes, and the transaction is read-only" in reason and "25006" in reason
    assert server.run("select count(*) from patients") == [(ROWS,)]
    assert server.run("select is_called from counter") == [(False,)]


def test_the_transaction_cannot_be_made_to_write_again(make: Make) -> None:
    query = "select set_config('transaction_read_only', 'off', true), age, sex, dead from patients order by id"
    assert "[site.sql]" in refused(make(query, user="owner"))


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("select * from faulty order by id", "column 'age': 1 value(s) are not finite numbers"),
        ("select age::numeric, sex, dead from faulty order by id", "could not be read (DataError 22P02)"),
        ("select age, sex, dead, 1/(id-7) as x from patients order by id", "DivisionByZero"),
        ("select * from nowhere order by id", "a table of the query does not exist"),
        ("select * from others order by id", "this user may not read what the query asks for"),
        ("select age, sexx, dead from patients order by id", "a column of the query does not exist"),
        ("select age, sex, dead from patients order by", "the query is not valid SQL"),
        ("select age, sex from patients order by id", "column 'dead' is missing"),
        ("select age as Age, sex, dead, age from patients order by id", "column 'age' occurs 2 times"),
        (f"select '{SECRET}' as x from patients order by id", "no column of the schema is in the header"),
        ("select * from patients where id < 0 order by id", "no data rows"),
        ("select *, null::int as y from patients where false order by id", "no data rows"),
        ("select age, sex, null::boolean as dead from patients order by id", "40 missing value(s) in a required"),
        ("select age, array[sex] as sex, dead from patients order by id", "column 'sex' holds list"),
        ("select now() as age, sex, dead from patients order by id", "moments with a time zone"),
        ("select pg_sleep(20)::text as age, sex, dead from patients order by id", "longer than timeout_seconds"),
    ],
)
def test_what_a_database_says_is_not_repeated(make: Make, query: str, expected: str) -> None:
    reason = refused(make(query, "timeout_seconds = 1"))
    assert expected in reason or (expected == "DivisionByZero" and "22012" in reason), reason


def test_more_rows_than_allowed(make: Make) -> None:
    assert "more than max_rows = 39 rows" in refused(make(QUERY, f"max_rows = {ROWS - 1}"))
    assert make(QUERY, f"max_rows = {ROWS}").join(join_request()).status is Status.OK


def test_a_wrong_password_and_a_database_that_is_gone(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    hospital = make(QUERY, password="wrong-" + PASSWORD)
    assert "OperationalError" in refused(hospital)
    monkeypatch.setenv(VARIABLE, f"postgresql://reader:{PASSWORD}@127.0.0.1:1/postgres")
    assert "OperationalError" in refused(hospital)
    monkeypatch.setenv(VARIABLE, f"postgresql+asyncpg://reader:{PASSWORD}@127.0.0.1:1/postgres")
    assert "only the driver psycopg" in refused(hospital, Status.SITE_MISCONFIGURED)


def test_notices_that_quote_patients_stay_in_the_database(
    make: Make, server: Server, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    server.run(
        "create or replace function loud(t text) returns text language plpgsql as"
        " $$ begin raise warning 'seen %', t; return t; end $$"
    )
    for name in ("sqlalchemy", "sqlalchemy.engine.Engine", "psycopg"):  # SQLAlchemy would log every row
        caplog.set_level("DEBUG", name)
    assert make("select loud(age::text) as age, sex, dead from patients order by id").join(join_request()).status is (
        Status.OK
    )
    captured = capfd.readouterr()
    assert MARKED not in caplog.text + captured.out + captured.err


def test_a_database_that_lives_stops_the_study(make: Make, server: Server) -> None:
    hospital = make("select * from patients where id >= 0 order by id").joined()
    assert hospital.train(train_request(1)).status is Status.OK
    server.run("update patients set id = id + 100 where id = 0")  # the same patients in another order
    try:
        assert hospital.train(train_request(2)).status is Status.DATA_UNUSABLE
        assert "the order of its rows changed" in hospital.reason(Status.DATA_UNUSABLE)
        assert [number for number, _ in hospital.spends()] == [1]
    finally:
        server.run("update patients set id = 0 where id = 100")
    assert hospital.train(train_request(2)).status is Status.OK


def test_withheld_columns_are_not_even_selected(make: Make) -> None:
    hospital = make("select sex, dead from patients order by id", policy='withheld_columns = ["age"]')
    assert hospital.join(join_request()).status is Status.OK
