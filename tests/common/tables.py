"""Small tables on disk for the tests of reading them."""

import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from common.errors import DataError
from common.schema import Schema, parse_schema
from common.table import read_table

SCHEMA = parse_schema(
    {
        "missingValues": ["", "NA"],
        "fields": [
            {"name": "age", "type": "number", "constraints": {"minimum": 0, "maximum": 120}},
            {"name": "parity", "type": "integer", "constraints": {"minimum": 0, "maximum": 12}},
            {"name": "ward", "type": "string", "constraints": {"enum": ["01", "1", "02"], "required": True}},
            {"name": "died", "type": "boolean"},
            {
                "name": "admitted",
                "type": "date",
                "constraints": {"minimum": "2000-01-01", "maximum": "2020-12-31"},
            },
        ],
    }
)
HEADER = "age,parity,ward,died,admitted"
GOOD = "40.5,2,01,true,2010-05-06"
SECRET = "Zq7731"


def only(kind: str, **constraints: Any) -> Schema:
    field = {"name": "x", "type": kind, "constraints": constraints}
    return parse_schema({"fields": [field], "missingValues": ["", "-9"]})


def csv_file(folder: Path, *lines: str, header: str = HEADER, name: str = "site.csv") -> Path:
    path = folder / name
    path.write_text("".join(f"{line}\n" for line in (header, *lines)), encoding="utf-8", newline="")
    return path


def parquet_file(folder: Path, **columns: Any) -> Path:
    path = folder / "site.parquet"
    pq.write_table(pa.table(columns), path)
    return path


def error_of(path: Path, schema: Schema = SCHEMA, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read_table(path, schema, **options)
    text = str(caught.value)
    assert str(path) in text and "How to mend it" in text and SECRET not in text
    return text


def days(text: str) -> int:
    return datetime.date.fromisoformat(text).toordinal() - 719163
