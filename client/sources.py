"""Where the site's patients come from: a file, or one read-only query of a database (`[site.sql]`).

A query is read in a transaction that cannot write, within a time and a number of rows, and its cells follow the rules
of a file's. What a driver says in an error may quote a cell, so only its type and its fixed code are repeated.
"""

from __future__ import annotations

import logging
import re
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pyarrow as pa

from client.site import SiteConfig
from client.sql_cells import ColumnCells, order_of
from client.sql_config import SqlSection
from common.errors import CohortiumError, DataError, SiteError
from common.schema import Schema
from common.table import Table, TableReport, check_header, inspect_table, parse_columns

if TYPE_CHECKING:
    from sqlalchemy import URL, Connection, Engine

SOURCE = "[site.sql]"
BATCH = 2_000  # rows held as Python values at a time
CONNECT_SECONDS = 30
ROW_LOGGERS = ("sqlalchemy.engine.Engine", "sqlalchemy.dialects.postgresql")
HEADER_FIX = 'name the columns as in the schema; PostgreSQL folds to lower case what is not quoted: select age as "Age"'
MEANINGS = {
    "57014": "the query took longer than timeout_seconds",
    "SQLITE_INTERRUPT": "the query took longer than timeout_seconds",
    "25006": "the query writes, and the transaction is read-only",
    "SQLITE_READONLY": "the query writes, and the database is opened for reading only",
    "28P01": "the database refuses the password",
    "28000": "the database refuses this user",
    "42501": "this user may not read what the query asks for",
    "42P01": "a table of the query does not exist",
    "42703": "a column of the query does not exist",
    "42601": "the query is not valid SQL",
    "SQLITE_CANTOPEN": "the file cannot be opened for reading",
    "SQLITE_NOTADB": "the file is no SQLite database",
}


def inspect_patients(config: SiteConfig, schema: Schema) -> tuple[Table, TableReport]:
    """The site's patients as they are, without the columns its policy withholds, and a report on every column."""
    withheld = config.policy.withheld(schema)
    if config.site.sql is None:
        assert config.site.data is not None  # site.toml has either
        return inspect_table(config.site.data, schema, withheld)
    return inspect_query(config.site.sql, schema, withheld)


def inspect_query(sql: SqlSection, schema: Schema, withheld: Sequence[str] = ()) -> tuple[Table, TableReport]:
    """The rows of the query matched to the schema by name; `DataError` or `SiteError` for what cannot be read."""
    query, url = sql.read_query(), sql.read_url()  # before the driver is asked for
    wanted = [name for name in schema.names if name not in withheld]
    columns = [ColumnCells(schema[name], schema.missing_values) for name in wanted]
    keys: list[Any] = []
    with _guarded(), _reading(url, sql) as connection:
        deadline = time.monotonic() + sql.timeout_seconds
        result = connection.exec_driver_sql(query)
        header = list(result.keys())
        check_header(header, wanted, SOURCE, HEADER_FIX)
        positions = [header.index(name) for name in wanted]
        key = _key_position(header, sql.key)
        rows = 0
        while batch := result.fetchmany(BATCH):
            rows += len(batch)
            if rows > sql.max_rows:
                raise DataError(f"{SOURCE}: the query gives more than max_rows = {sql.max_rows} rows", fix="raise it")
            if time.monotonic() > deadline:
                raise DataError(f"{SOURCE}: {MEANINGS['57014']}", fix="raise timeout_seconds or simplify the query")
            cells = list(zip(*batch, strict=True))
            for column, position in zip(columns, positions, strict=True):
                column.add(cells[position])
            if key is not None:
                keys += cells[key]
    arrays = {column.name: column.array() for column in columns}
    if key is not None:
        order = pa.array(order_of(keys, sql.key or ""), pa.int64())
        arrays = {name: array.take(order) for name, array in arrays.items()}
    shown = [name for name in header if name != sql.key]
    return parse_columns(SOURCE, shown, arrays, schema)


def _key_position(header: list[str], key: str | None) -> int | None:
    if key is None:
        return None
    if header.count(key) != 1:
        raise DataError(
            f"{SOURCE}: the key column {key!r} occurs {header.count(key)} times in the result, expected once",
            fix="select it once, or correct key in [site.sql]",
        )
    return header.index(key)


@contextmanager
def _guarded() -> Iterator[None]:
    """Any failure of SQLAlchemy or a driver becomes a `DataError` without its text."""
    try:
        yield
    except (CohortiumError, MemoryError):
        raise
    except ImportError:
        raise SiteError(
            f"{SOURCE}: this installation has no database drivers", fix="pip install 'cohortium[sql]'"
        ) from None
    except Exception as error:
        code = _code(error)
        meaning = MEANINGS.get(code, "the database could not be read")
        named = f"{type(error).__name__} {code}".strip()
        raise DataError(
            f"{SOURCE}: {meaning} ({named})",
            fix="try the query with the database's own client as the same user; its messages may quote patients, and"
            " are not repeated here",
        ) from None


def _code(error: BaseException) -> str:
    """SQLSTATE or SQLite's name of the error: fixed words of the database, never a cell."""
    driver = getattr(error, "orig", None) or error
    code = getattr(driver, "sqlstate", None) or getattr(driver, "sqlite_errorname", None)
    return code if isinstance(code, str) and re.fullmatch(r"[0-9A-Z]{5}|SQLITE_[A-Z_]{1,40}", code) else ""


@contextmanager
def _reading(text: str, sql: SqlSection) -> Iterator[Connection]:
    """A connection within a transaction that cannot write and that is rolled back in the end."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import SQLAlchemyError

    try:
        url = make_url(text)
    except (SQLAlchemyError, ValueError):
        raise SiteError(
            f"{SOURCE} url: is not a database URL", fix="write postgresql://USER:PASSWORD@HOST/DATABASE there"
        ) from None
    for name in ROW_LOGGERS:  # at DEBUG they write rows, whatever this process logs otherwise
        logging.getLogger(name).setLevel(logging.WARNING)
    postgresql = url.get_backend_name() == "postgresql"
    engine = _postgresql(url) if postgresql else _sqlite(url, sql.timeout_seconds)
    try:
        with engine.connect() as plain:
            options = {"postgresql_readonly": True, "stream_results": True} if postgresql else {}
            connection = plain.execution_options(no_parameters=True, **options)
            with connection.begin() as transaction:
                if postgresql:
                    _limit(connection, sql.timeout_seconds)
                yield connection
                transaction.rollback()
    finally:
        engine.dispose()


def _postgresql(url: URL) -> Engine:
    from sqlalchemy import NullPool, create_engine

    if url.drivername not in ("postgresql", "postgresql+psycopg"):
        raise SiteError(
            f"{SOURCE} url: only the driver psycopg is supported", fix="begin it with postgresql+psycopg://"
        )
    settings = {"connect_timeout": CONNECT_SECONDS, "application_name": "cohortium-site"}
    return create_engine(
        url.set(drivername="postgresql+psycopg"),
        poolclass=NullPool,
        hide_parameters=True,
        connect_args={name: value for name, value in settings.items() if name not in url.query},
    )


def _limit(connection: Connection, seconds: int) -> None:
    """Time and silence for this transaction only, and proof that it cannot write."""
    plain = connection.execution_options(stream_results=False)
    plain.exec_driver_sql(f"SET LOCAL statement_timeout = {seconds * 1000}")
    plain.exec_driver_sql("SET LOCAL client_min_messages = error")  # a notice may quote a row
    if plain.exec_driver_sql("SHOW transaction_read_only").scalar() != "on":
        raise SiteError(f"{SOURCE}: the database gave no read-only transaction", fix="ask its administrator")
    connection.execution_options(stream_results=True)


def _sqlite(url: URL, seconds: int) -> Engine:
    from sqlalchemy import NullPool, create_engine

    if url.drivername not in ("sqlite", "sqlite+pysqlite"):
        raise SiteError(
            f"{SOURCE} url: this kind of database is not supported: a transaction that cannot write is made for"
            " PostgreSQL and SQLite only",
            fix="use one of these, or export the table as Parquet",
        )
    path = Path(url.database or "")
    if not path.is_absolute() or url.query:
        raise SiteError(
            f"{SOURCE} url: SQLite needs the absolute path of a file and no options", fix="sqlite:////data/patients.db"
        )

    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, timeout=CONNECT_SECONDS)
        connection.execute("PRAGMA query_only = ON")
        deadline = time.monotonic() + seconds
        connection.set_progress_handler(lambda: time.monotonic() > deadline, 10_000)
        return connection

    return create_engine("sqlite://", creator=connect, poolclass=NullPool, hide_parameters=True)
