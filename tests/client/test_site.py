import re
from pathlib import Path
from typing import Any

import pytest

from client.policy import PolicySection
from client.site import SiteConfig, load_site
from common.errors import ExitCode, SiteError
from common.schema import parse_schema
from common.study import Protocol, Study

MINIMAL = '[site]\nname = "st-anna"\ndata = "patients.csv"\nstate = "state"\n'


def write(folder: Path, text: str) -> Path:
    path = folder / "site.toml"
    path.write_text(text, encoding="utf-8")
    return path


def protocol(**sections: dict[str, Any]) -> Protocol:
    schema = parse_schema({"fields": [{"name": "sex", "type": "string", "constraints": {"enum": ["f", "m"]}}]})
    study = {"study": {"name": "s", "schema": "schema.json"} | sections.pop("study", {})} | sections
    return Protocol(Study.model_validate(study), schema)


def config(folder: Path, policy: str = "") -> SiteConfig:
    return load_site(write(folder, MINIMAL + "[policy]\n" + policy))


def test_paths_are_relative_to_the_file_and_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hospital").mkdir()
    write(tmp_path / "hospital", MINIMAL)
    monkeypatch.chdir(tmp_path)
    site = load_site("hospital/site.toml").site
    assert site.data == tmp_path / "hospital" / "patients.csv" and site.state == tmp_path / "hospital" / "state"
    absolute = MINIMAL.replace('"patients.csv"', '"/data/patients.parquet"')
    assert load_site(write(tmp_path, absolute)).site.data == Path("/data/patients.parquet")


def test_the_defaults_are_the_careful_ones(tmp_path: Path) -> None:
    loaded = load_site(write(tmp_path, MINIMAL))
    assert (loaded.site.device, loaded.site.threads) == ("auto", None)
    policy = loaded.policy
    assert policy.modes == ("constrained",) and not policy.simulation and policy.out_of_bounds == "clip"
    assert policy.min_patients == 20 and policy.max_update_norm == 10.0 and policy.max_epsilon is None


def test_every_key_is_read(tmp_path: Path) -> None:
    text = MINIMAL + (
        'device = "cuda:1"\nthreads = 3\n[policy]\nmodes = ["none", "constrained"]\nout_of_bounds = "refuse"\n'
        "min_patients = 7\nmax_update_norm = 0.25\nmax_epsilon = 3\nmax_release_rows = 50\nsimulation = true\n"
        'evaluation = "unnoised"\n'
    )
    loaded = load_site(write(tmp_path, text))
    assert (loaded.site.device, loaded.site.threads) == ("cuda:1", 3)
    assert loaded.policy.model_dump() == {
        "modes": ("none", "constrained"),
        "out_of_bounds": "refuse",
        "min_patients": 7,
        "evaluation": "unnoised",
        "max_update_norm": 0.25,
        "max_epsilon": 3.0,
        "max_release_rows": 50,
        "simulation": True,
        "withheld_columns": (),
        "anchor": True,
        "stop_after_anchor": False,
        "min_count": 11,
        "max_epsilon_per_study": None,
        "max_epsilon_per_year": None,
        "max_memory_mb": None,
        "opening_hours": (),
        "timezone": None,
    }


def test_the_documented_file_is_read_and_shows_the_defaults(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "site-policy.md").read_text(encoding="utf-8")
    first, second, *_ = (part.split("```")[0] for part in text.split("```toml\n")[1:])
    assert load_site(write(tmp_path, first)).policy == PolicySection()
    every = re.sub(r"^# (?=[a-z_]+ = )", "", first, flags=re.MULTILINE)
    written = load_site(write(tmp_path, every)).policy
    assert written.model_fields_set == set(PolicySection.model_fields) - {"simulation"}
    for query in (second, re.sub(r"^# (?=[a-z_]+ = )", "", second, flags=re.MULTILINE)):
        loaded = load_site(write(tmp_path, MINIMAL.replace('data = "patients.csv"\n', "") + query))
        assert loaded.site.sql is not None and loaded.site.sql.max_rows == 1_000_000


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "[site] : is required"),
        (MINIMAL.replace("name =", "nam ="), "did you mean 'name'?"),
        (MINIMAL.replace("name =", "nam ="), "[site] name: is required"),
        (MINIMAL.replace('data = "patients.csv"\n', ""), "[site] data: is required"),
        (MINIMAL.replace('state = "state"\n', ""), "[site] state: is required"),
        (MINIMAL.replace('"st-anna"', '"../st-anna"'), "[site] name"),
        (MINIMAL.replace('"st-anna"', '""'), "[site] name"),
        (MINIMAL.replace('"st-anna"', f'"{"a" * 65}"'), "[site] name"),
        (MINIMAL.replace('"st-anna"', '"<script>"'), "[site] name"),
        (MINIMAL + 'device = "gpu"\n', "[site] device"),
        (MINIMAL + "threads = 0\n", "[site] threads"),
        (MINIMAL + '[policy]\nmodes = ["dpsg"]\n', "[policy] modes.0"),
        (MINIMAL + '[policy]\nout_of_bounds = "drop"\n', "[policy] out_of_bounds"),
        (MINIMAL + "[policy]\nmin_patients = 0\n", "[policy] min_patients"),
        (MINIMAL + "[policy]\nmax_update_norm = 0\n", "[policy] max_update_norm"),
        *((MINIMAL + f"[policy]\nmax_epsilon = {bad}\n", "max_epsilon") for bad in ("0", "-1", "inf", "true", "'3'")),
        (MINIMAL + "[policy]\nmax_update_nrom = 1\n", "did you mean 'max_update_norm'?"),
        (MINIMAL + "[polcy]\nmin_patients = 1\n", "did you mean 'policy'?"),
        (MINIMAL + "[policy\n", "not valid TOML"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, expected: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(SiteError) as caught:
        load_site(path)
    message = str(caught.value).replace("[site]:", "[site] :")
    assert expected in message and str(path) in message and caught.value.exit_code is ExitCode.SITE


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    text = MINIMAL + "threads = 0\n[policy]\nmin_patients = 0\nsimulate = true\n"
    with pytest.raises(SiteError) as caught:
        load_site(write(tmp_path, text))
    assert "3 problem(s)" in str(caught.value)
    assert all(key in str(caught.value) for key in ("threads", "min_patients", "did you mean 'simulation'?"))


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SiteError, match="cannot be read"):
        load_site(tmp_path / "none.toml")
    with pytest.raises(SiteError, match="cannot be read"):
        load_site(tmp_path)
    (tmp_path / "site.toml").write_bytes(b'[site]\nname = "\xe9"\n')
    with pytest.raises(SiteError, match="not valid TOML"):
        load_site(tmp_path / "site.toml")


def test_a_study_within_the_policy_meets_no_objection(tmp_path: Path) -> None:
    assert config(tmp_path).objections(protocol()) == []
    assert config(tmp_path).objections(protocol(sites={"st-anna": 40, "other": 3})) == []
    assert config(tmp_path, "max_update_norm = 2.0").objections(protocol(training={"update_norm": 2.0})) == []


@pytest.mark.parametrize(
    ("policy", "sections", "expected"),
    [
        ("", {"training": {"mode": "none"}}, ["mode 'none' is not among", "for simulations only"]),
        ('modes = ["none"]', {"training": {"mode": "none"}}, ["for simulations only"]),
        ("simulation = true", {"training": {"mode": "none"}}, ["mode 'none' is not among"]),
        ('modes = ["none"]\nsimulation = true', {}, ["mode 'constrained' is not among"]),
        ("", {"study": {"seed": 0}}, ["the study fixes a seed"]),
        ("", {"training": {"update_norm": 10.5}}, ["update_norm 10.5 exceeds this site's limit 10"]),
        ("max_update_norm = 0.5", {}, ["update_norm 1 exceeds this site's limit 0.5"]),
        ("", {"sites": {"other": 40}}, ["'st-anna' is not among them"]),
        (
            "max_update_norm = 0.5",
            {"study": {"seed": 1}, "sites": {"other": 1}},
            ["fixes a seed", "exceeds this site's limit", "not among them"],
        ),
    ],
)
def test_every_objection_is_raised(
    tmp_path: Path, policy: str, sections: dict[str, dict[str, Any]], expected: list[str]
) -> None:
    found = config(tmp_path, policy).objections(protocol(**sections))
    assert len(found) == len(expected)
    assert all(text in objection for text, objection in zip(expected, found, strict=True))


def test_a_simulation_may_be_seeded_and_unconstrained(tmp_path: Path) -> None:
    generous = config(tmp_path, 'simulation = true\nmodes = ["none"]')
    assert generous.objections(protocol(study={"seed": 3}, training={"mode": "none"})) == []
