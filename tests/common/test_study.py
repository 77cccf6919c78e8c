import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import CohortiumError, SchemaError, StudyError
from common.schema import parse_schema
from common.study import (
    ModelSection,
    PrivacySection,
    Protocol,
    ReleaseSection,
    Study,
    TrainingSection,
    load_protocol,
)

SCHEMA: dict[str, Any] = {
    "fields": [
        {"name": "age", "type": "number", "constraints": {"minimum": 0, "maximum": 100}},
        {"name": "ward", "type": "string", "constraints": {"enum": ["a", "b", "c"]}},
        {"name": "died", "type": "boolean"},
    ],
    "cohortium:target": "died",
}
MINIMAL = '[study]\nname = "trial"\nschema = "schema.json"\n'


def study_file(folder: Path, text: str = MINIMAL, schema: Any = SCHEMA) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "schema.json").write_text(json.dumps(schema))
    (folder / "study.toml").write_text(text)
    return folder / "study.toml"


def problem_of(folder: Path, text: str = MINIMAL, overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(StudyError) as caught:
        load_protocol(study_file(folder, text), overrides)
    return str(caught.value)


def test_name_and_schema_are_enough_and_every_default_is_valid(tmp_path: Path) -> None:
    protocol = load_protocol(study_file(tmp_path))
    study = protocol.study
    assert (study.study.name, study.study.seed, study.sites, protocol.target) == ("trial", None, {}, "died")
    # pydantic does not check defaults by itself: written out, they must be accepted and change nothing.
    assert Study.model_validate(study.document()) == study
    for section in (ModelSection, TrainingSection, PrivacySection, ReleaseSection):
        assert section.model_validate(section().model_dump(by_alias=True)) == section()
        assert all(field.description for field in section.model_fields.values())
    assert study.training.mode == "constrained" and study.release.method == "prior"


def test_a_study_written_out_is_the_same_study(tmp_path: Path) -> None:
    text = MINIMAL + '[training]\nrounds = 7\n[model]\nhidden = [8, 4]\n[sites]\n"north.1" = 30\nsouth = 2\n'
    protocol = load_protocol(study_file(tmp_path, text))
    assert protocol.study.sites == {"north.1": 30, "south": 2} and protocol.study.model.hidden == (8, 4)
    document = json.loads(json.dumps(protocol.to_json(), allow_nan=False))
    again = Protocol.from_json(document)
    assert again.study == protocol.study and again.digest == protocol.digest and again.target == protocol.target


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[trainning]\nrounds = 2\n", "[trainning]: unknown key; did you mean 'training'?"),
        ("[training]\nround = 2\n", "[training] round: unknown key; did you mean 'rounds'?"),
        ("[training]\nlearning_rat = 2\n", "did you mean 'learning_rate'?"),
        ("[model]\nlatent_dims = 2\n", "did you mean 'latent_dim'?"),
        ("[privacy]\ndetla = 1e-5\n", "did you mean 'delta'?"),
        ("[release]\nrow = 5\n", "did you mean 'rows'?"),
        (
            "[privacy]\nzzz = 1e-5\n",
            "[privacy] zzz: unknown key; known keys: update_noise, accept_useless_noise, delta",
        ),
        ("[training]\nrounds = -1\n", "[training] rounds"),
        ("[training]\nmode = 'dp'\n", "[training] mode"),
        ("[training]\nupdate_norm = inf\n", "[training] update_norm"),
        ("[training]\nupdate_norm = -1\n", "[training] update_norm"),
        ("[training]\nlearning_rate = nan\n", "[training] learning_rate"),
        ("[model]\nhidden = [8, 7]\n", "[model] hidden"),
        ("[model]\nhidden = []\n", "[model] hidden"),
        ("[model]\nlogit_scale = 0.5\n", "[model] logit_scale"),
        (
            "[model]\ndecoder_lipschitz = 2.0\n",
            "decoder_lipschitz (2) is the whole certificate and includes logit_scale",
        ),
        ("[privacy]\ndelta = 1\n", "[privacy] delta"),
        *((f"[privacy]\nmax_epsilon = {bad}\n", "[privacy] max_epsilon") for bad in ("0", "-1", "inf", "true", "'3'")),
        ("[release]\nmethod = 'chanel'\n", "[release] method"),
        ("[channel]\nepsilon = 0\n", "[channel] epsilon"),
        ("[channel]\nrelease_share = 1\n", "[channel] release_share"),
        ("[channel]\nencoder = 'public'\n", "[channel] encoder"),
        ("[sites]\nnorth = 0\n", "[sites] north"),
        ("[sites]\n'a b' = 3\n", "[sites] a b"),
        ("[sites]\n'../x' = 3\n", "[sites] ../x"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, expected: str) -> None:
    found = problem_of(tmp_path, MINIMAL + text)
    assert expected in found and "1 problem(s)" in found and str(tmp_path / "study.toml") in found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "[study]: is required"),
        ("[study]\nname = 'x'\n", "[study] schema: is required"),
        ("[study]\nschema = 'schema.json'\n", "[study] name: is required"),
        ("study = 5\n", "[study]"),
        (MINIMAL + "nmae = 3\n", "[study] nmae: unknown key; did you mean 'name'?"),
        (MINIMAL.replace("trial", "../trial"), "[study] name"),
        (MINIMAL + "seed = -1\n", "[study] seed"),
        (MINIMAL + "schema_path = 'x'\n", "[study] schema_path: unknown key; did you mean 'schema'?"),
        (
            MINIMAL + "target = 'age'\n",
            "[study] target = 'age' is not a column of the schema with two or more categories",
        ),
        (MINIMAL + "target = 'x'\n", "name one of: ward, died"),
        ("[study\n", "not valid TOML"),
    ],
)
def test_the_study_section(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in problem_of(tmp_path, text)


def test_every_problem_is_listed_at_once(tmp_path: Path) -> None:
    text = problem_of(tmp_path, MINIMAL + "[training]\nround = 3\nbatch_size = 1\n[modle]\nx = 1\n")
    assert "3 problem(s)" in text and "'rounds'" in text and "batch_size" in text and "'model'" in text


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="cannot be read"):
        load_protocol(tmp_path / "absent.toml")
    (tmp_path / "study.toml").write_text(MINIMAL)
    with pytest.raises(SchemaError, match="cannot be read"):
        load_protocol(tmp_path / "study.toml")


def test_overrides(tmp_path: Path) -> None:
    path = study_file(tmp_path, MINIMAL + "[training]\nrounds = 9\nlocal_epochs = 3\n")
    overrides = (
        "training.rounds=20",
        "training.update_norm = 0.25",
        "model.hidden=[8, 4]",
        "training.mode=none",
        'study.name="new name"',
        "study.seed=5",
        "sites.north.east=12",
        "training.rounds=21",
    )
    study = load_protocol(path, overrides).study
    assert (study.training.rounds, study.training.update_norm, study.training.local_epochs) == (21, 0.25, 3)
    assert (study.model.hidden, study.training.mode, study.study.name) == ((8, 4), "none", "new name")
    assert (study.study.seed, study.sites) == (5, {"north.east": 12})


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.rounds", "is not section.key=value"),
        ("rounds=3", "is not section.key=value"),
        ("training.=3", "is not section.key=value"),
        ("", "is not section.key=value"),
        ("training.rounds=", "[training] rounds"),
        ("training.rounds=many", "(found 'many')"),
        ("training.round=3", "did you mean 'rounds'?"),
        ("trainig.rounds=3", "did you mean 'training'?"),
    ],
)
def test_bad_overrides(tmp_path: Path, override: str, expected: str) -> None:
    assert expected in problem_of(tmp_path, overrides=(override,))


def test_an_override_of_what_is_no_section(tmp_path: Path) -> None:
    assert "'study' is not a section" in problem_of(tmp_path, "study = 5\n", ("study.name=x",))


@settings(max_examples=40, deadline=None)
@given(st.permutations(["model", "training", "privacy", "release", "sites"]), st.randoms(use_true_random=False))
def test_the_digest_does_not_depend_on_the_order_of_keys(order: list[str], random: Any) -> None:
    def shuffled(section: dict[str, Any]) -> dict[str, Any]:
        items = list(section.items())
        random.shuffle(items)
        return dict(items)

    sections: dict[str, Any] = {
        "model": {"latent_dim": 4, "hidden": [8, 4]},
        "training": {"rounds": 5, "update_norm": 0.5},
        "privacy": {"delta": 1e-6},
        "release": {"rows": 50},
        "sites": {"a": 1, "b": 2},
    }
    study = {"name": "trial", "schema": "schema.json", "seed": 3}
    one = Protocol(Study.model_validate({"study": study, **sections}), parse_schema(SCHEMA))
    other = {"study": shuffled(study), **{name: shuffled(sections[name]) for name in order}}
    two = Protocol(Study.model_validate(other), parse_schema(shuffled(SCHEMA)))
    assert one.digest == two.digest


def test_the_digest_does_not_depend_on_paths_or_on_writing_out_defaults(tmp_path: Path) -> None:
    one = study_file(tmp_path / "a", MINIMAL)
    two = study_file(tmp_path / "b", MINIMAL.replace("schema.json", "dictionary.json") + "[training]\nrounds = 40\n")
    (tmp_path / "b" / "schema.json").rename(tmp_path / "b" / "dictionary.json")
    assert TrainingSection().rounds == 40
    assert load_protocol(one).digest == load_protocol(two).digest


def test_the_digest_tells_every_change_of_study_or_schema_apart() -> None:
    base: dict[str, Any] = {"study": {"name": "trial", "schema": "s.json"}}
    other_schema = {**SCHEMA, "fields": [{**SCHEMA["fields"][0], "title": "Age"}, *SCHEMA["fields"][1:]]}
    changes: list[dict[str, Any]] = [
        {},
        {"study": {**base["study"], "name": "other"}},
        {"study": {**base["study"], "seed": 0}},
        {"study": {**base["study"], "target": "ward"}},
        {"model": {"decoder_lipschitz": 20.000000000000004}},
        {"model": {"hidden": [128]}},
        {"training": {"update_norm": math.nextafter(1.0, 2.0)}},
        {"training": {"mode": "none"}},
        {"privacy": {"delta": 2e-5}},
        {"privacy": {"max_epsilon": 3}},
        {"release": {"rows": 9999}},
        {"sites": {"a": 1}},
        {"sites": {"a": 2}},
    ]
    digests = [Protocol(Study.model_validate({**base, **change}), parse_schema(SCHEMA)).digest for change in changes]
    digests.append(Protocol(Study.model_validate(base), parse_schema(other_schema)).digest)
    for one, two in itertools.combinations(digests, 2):
        assert one != two


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"study": None, "schema": SCHEMA},
        {"study": [], "schema": SCHEMA},
        {"study": {"study": {"name": "x", "schema": "s"}}},
        {"study": {"study": {"name": "x", "schema": "s"}}, "schema": {"fields": []}},
        {"study": {"study": {"name": "x", "schema": "s"}, "extra": 1}, "schema": SCHEMA},
    ],
)
def test_a_received_protocol_is_validated(document: dict[str, Any]) -> None:
    with pytest.raises(CohortiumError) as caught:
        Protocol.from_json(document)
    assert isinstance(caught.value, StudyError | SchemaError)


def test_target_of_study_wins_and_none_is_allowed() -> None:
    untargeted = parse_schema({"fields": SCHEMA["fields"]})
    study: dict[str, Any] = {"name": "trial", "schema": "s.json"}
    assert Protocol(Study.model_validate({"study": study}), untargeted).target is None
    chosen = Study.model_validate({"study": {**study, "target": "ward"}})
    assert Protocol(chosen, parse_schema(SCHEMA)).target == "ward"
