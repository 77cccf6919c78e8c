"""Does a hospital's file fit the study's schema? Column by column, in counts and row numbers, never in values."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table as Grid
from rich.text import Text

from client.site import load_site
from client.sources import inspect_patients
from common.cells import ColumnReport
from common.schema import Schema, load_schema
from common.table import OutOfBounds, TableReport, inspect_table


@dataclass(frozen=True)
class FileCheck:
    """What checking one file against one schema found, under the site's policy for values outside their bounds."""

    schema: Schema
    report: TableReport
    out_of_bounds: OutOfBounds
    withheld: tuple[str, ...] = ()

    @property
    def problems(self) -> list[str]:
        """Every reason why the file cannot be used; empty if it fits."""
        return self.report.problems(self.out_of_bounds)

    @property
    def fits(self) -> bool:
        """Whether the study can use the file as it is."""
        return not self.problems

    @property
    def warnings(self) -> list[str]:
        """What the steward should know although the file can be used."""
        found = [
            f"column {column.name!r}: {warning}"
            for column in self.report.columns
            if column.name not in self.withheld
            for warning in _column_warnings(column)
        ]
        if self.withheld:
            found.append(f"columns that this site withholds are missing: {', '.join(map(repr, self.withheld))}")
        if self.report.undeclared:
            names = ", ".join(repr(name) for name in self.report.undeclared)
            found.append(f"columns that the schema does not declare are ignored: {names}")
        return found

    def column_fits(self, report: ColumnReport) -> bool:
        """Whether one column can be used under the policy."""
        return report.fits and not (self.out_of_bounds == "refuse" and (report.below or report.above))

    def to_json(self) -> dict[str, Any]:
        """Everything found, as plain JSON data."""
        columns = []
        for column, report in zip(self.schema.columns, self.report.columns, strict=True):
            facts = asdict(report) | {"kind": column.kind, "required": column.required, "rows": self.report.rows}
            columns.append(facts | {"fits": self.column_fits(report), "warnings": _column_warnings(report)})
        return {
            "file": self.report.source,
            "schema_sha256": self.schema.digest,
            "fits": self.fits,
            "rows": self.report.rows,
            "out_of_bounds": self.out_of_bounds,
            "columns": columns,
            "undeclared": list(self.report.undeclared),
            "problems": self.problems,
            "warnings": self.warnings,
        }


def check_file(schema: str | Path, data: str | Path, out_of_bounds: OutOfBounds = "clip") -> FileCheck:
    """Check the CSV or Parquet file `data` against `schema`.

    Raises `SchemaError` for an unusable schema, and `DataError` for a file of which no column can be reported on.
    """
    loaded = load_schema(schema)
    _, report = inspect_table(data, loaded)
    return FileCheck(loaded, report, out_of_bounds)


def check_site(site: str | Path, schema: str | Path) -> FileCheck:
    """Check the table or query of site.toml at `site`, as its policy lets a study see it, against `schema`."""
    config, loaded = load_site(site), load_schema(schema)
    withheld = config.policy.withheld(loaded)
    _, report = inspect_patients(config, loaded)
    return FileCheck(loaded, report, config.policy.out_of_bounds, withheld)


def render(check: FileCheck) -> list[Grid | Text]:
    """The check as a steward reads it: one line a column, then what to mend, the warnings and the verdict."""
    report = check.report
    grid = Grid(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    grid.add_column("column", overflow="fold")
    grid.add_column("kind", no_wrap=True)
    for heading in ("missing", "below", "above", "invalid"):
        grid.add_column(heading, justify="right", no_wrap=True)
    grid.add_column("verdict", no_wrap=True)
    for column, found in zip(check.schema.columns, report.columns, strict=True):
        bounds = [str(found.below), str(found.above)] if column.is_numeric else ["", ""]
        if not check.column_fits(found):
            verdict = Text("mend", style="bold red")
        elif found.all_missing or found.constant or found.below or found.above:
            verdict = Text("see note", style="yellow")
        else:
            verdict = Text("fits")
        grid.add_row(
            Text(column.name),
            column.kind,
            str(found.missing),
            *bounds,
            str(found.invalid),
            verdict,
        )
    lines: list[Grid | Text] = [Text(f"{report.rows} data rows in {report.source}"), grid]
    lines += [Text(f"To mend: {problem}", style="red") for problem in check.problems]
    if report.clipped and check.out_of_bounds == "clip":
        lines.append(
            Text(f"Note: {report.clipped} value(s) outside their bounds are moved to the bound.", style="yellow")
        )
    lines += [Text(f"Note: {warning}", style="yellow") for warning in check.warnings]
    if check.fits:
        lines.append(Text(f"Verdict: the file fits the schema ({report.rows} rows).", style="bold green"))
    else:
        bad = sum(not check.column_fits(found) for found in report.columns)
        lines.append(Text(f"Verdict: the file does not fit the schema ({bad} column(s) to mend).", style="bold red"))
    return lines


def _column_warnings(report: ColumnReport) -> list[str]:
    if report.all_missing:
        return ["no value in any row"]
    return ["the same value in every row that has one"] if report.constant else []
