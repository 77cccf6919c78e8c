"""The page as its readers meet it: every part there, nothing from outside, usable by keyboard and by ear."""

import functools
import json
import re
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from common.privacy.events import SampledGaussianSteps
from common.privacy.statement import privacy_statement
from common.study import Protocol, Study
from server.audit_records import Audit
from server.report.documents import NOT_THOROUGH, Documents
from server.report.page import SECTIONS, render
from tests.common.evaluation.evaluated import SCHEMA
from tests.server.report.documents import SITES, Tree, deployment, of_parts, simulation, wide

IDS = [
    "fidelity", "utility", "inference", "groups", "sites-evaluation", "frontier",
    "privacy", "exposure", "attacks", "audit", "gates", "method",
]  # fmt: skip
READERS = ["biostatistician", "dpo", "steward", "coordinator"]
GATES: dict[str, Any] = {
    "schema_version": 1,
    "passed": False,
    "gates": [
        {"name": "copies", "passed": True, "found": 0, "limit": 0, "fix": "", "evidence": "metrics.json"},
        {
            "name": "minimum patients",
            "passed": False,
            "found": 400,
            "limit": 500,
            "fix": "ask <more> hospitals",
            "evidence": {"sites.json": ["anna", "berta"]},
        },
    ],
    "override": None,
}


def audit_of(claim: float | str, epsilon: float = 0.4) -> Audit:
    best = {"guesses": 30, "correct": 20, "level": 0.01, "epsilon": epsilon, "reachable": 2.5}
    refuted = not isinstance(claim, str) and epsilon > claim
    line = {"strongest": best, "declared": [best], "claim": claim, "refuted": refuted}
    return Audit.model_validate(
        {
            "study": "s",
            "study_digest": "d" * 64,
            "twin_digest": "e" * 64,
            "mode": "constrained" if isinstance(claim, str) else "dpsgd",
            "delta": 1e-5,
            "confidence": 0.95,
            "unit": "one patient",
            "neighbouring_relation": "replace-one",
            "canaries": {"number": 30, "site": "anna", "patients": 220, "seeded": True},
            "lines": [
                {"adversary": "public", "score": "nearest row", **line},
                {"adversary": "member", "score": "reconstruction", **line},
            ],
            "cautions": ["No lower bound is evidence of privacy."],
        }
    )


def dpsgd() -> Documents:
    """Steps of DP-SGD cover everybody, so that every ε is finite."""
    study = {"study": {"name": "s", "schema": "s.json"}, "training": {"mode": "dpsgd"}, "privacy": {"epsilon": 8.0}}
    protocol = Protocol(Study.model_validate(study), SCHEMA)
    found = of_parts(protocol, simulation().metrics)
    steps: Any = {site: [SampledGaussianSteps(n, 4, 0.3, 1.5) for n in (1, 2, 3)] for site in SITES}
    return replace(found, statement=privacy_statement(protocol, steps, SITES))


KINDS = {
    "simulation": lambda: simulation(),
    "simulation without evaluation": lambda: simulation("none"),
    "deployment": lambda: deployment(),
    "deployment, exact counts": lambda: deployment("unnoised"),
    "deployment without evaluation": lambda: replace(deployment(), evaluation=None),
    "dpsgd": dpsgd,
    "200 columns": lambda: wide(),
}


@functools.cache
def rendered(kind: str) -> str:
    return render(KINDS[kind]())


@pytest.fixture(scope="module", params=KINDS)
def page(request: pytest.FixtureRequest) -> str:
    return rendered(request.param)


@pytest.fixture(scope="module")
def full() -> str:
    return render(replace(simulation(), audit=audit_of("infinity"), gates=GATES))


def test_every_part_is_there_and_named(page: str) -> None:
    tree = Tree(page)
    sections = [a["id"] for a in tree.all("section")]
    assert sections == ["first", *IDS] and len(SECTIONS) == len(IDS)
    assert [a["id"] for a in tree.all("table") if a.get("class") == "verdicts"] == READERS
    identities = Counter(a["id"] for _, a, _ in tree.elements if "id" in a)
    assert set(identities.values()) == {1}
    targets = {a["href"][1:] for a in tree.all("a")}
    assert targets <= set(identities) and {"main", *sections} <= targets
    assert all(a["aria-labelledby"] in identities for a in tree.all("section"))


def test_nothing_comes_from_outside(page: str) -> None:
    tree = Tree(page)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form", "video"} & {
        t for t, _, _ in tree.elements
    }
    loading = {"src", "href", "xlink:href", "data", "poster", "action", "srcset", "background"}
    for _, attributes, _ in tree.elements:
        assert not [name for name in attributes if name.startswith("on")]
        for name in loading & set(attributes):
            assert attributes[name].startswith(("#", "data:image/png;base64,"))
    assert all(target.startswith("#") for target in re.findall(r"url\(\s*[\"']?([^)\"']+)", page))
    assert "@import" not in page and "@font-face" not in page


def test_references_inside_pictures_stay_inside_them(page: str) -> None:
    defined = set(re.findall(r'\bid="([^"]+)"', page))
    used = re.findall(r'url\(#([^)]+)\)|xlink:href="#([^"]+)"', page)
    assert {a or b for a, b in used} <= defined


def test_tables_say_what_their_cells_are(page: str) -> None:
    tree = Tree(page)
    tables, captions = tree.all("table"), tree.all("caption")
    assert len(tables) == len(captions) > 0 and all(tree.texts["caption"])
    assert all(a.get("scope") in ("col", "row") for a in tree.all("th"))
    assert all("tbody" in parents or "thead" in parents for tag, _, parents in tree.elements if tag == "tr")


def test_pictures_are_described_and_landmarks_exist(page: str) -> None:
    tree = Tree(page)
    pictures = [a for tag, a, parents in tree.elements if tag == "svg" and "svg" not in parents]
    assert pictures and all(a["role"] == "img" and len(a["aria-label"]) > 10 for a in pictures)
    figures = tree.all("figure")
    assert len(figures) == len(tree.all("figcaption")) == len(pictures)
    assert tree.all("html") == [{"lang": "en"}] and len(tree.all("main")) == 1 and len(tree.all("h1")) == 1
    assert [a["aria-label"] for a in tree.all("nav")] == ["Contents"]
    first = next(a for tag, a, _ in tree.elements if tag == "a")
    assert first == {"class": "skip", "href": "#main"}
    levels = [int(tag[1]) for tag, _, _ in tree.elements if re.fullmatch(r"h[1-6]", tag)]
    assert all(b - a <= 1 for a, b in pairwise(levels))


def test_it_prints_to_a4(page: str) -> None:
    style = page[page.index("<style>") : page.index("</style>")]
    for rule in (
        "@page { size: A4;",
        "thead { display: table-header-group; }",
        "break-inside: avoid",
        "details::details-content { content-visibility: visible !important;",
        "#first + section { break-before: page; }",
        ":focus-visible",
        "prefers-color-scheme: dark",
    ):
        assert rule in style


def test_the_same_documents_give_the_same_bytes() -> None:
    assert render(deployment()) == rendered("deployment")


def test_size_is_bounded() -> None:
    assert len(rendered("simulation").encode()) < 1_500_000
    assert len(rendered("200 columns").encode()) < 1_500_000


def luminance(colour: str) -> float:
    parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_contrast_is_at_least_that_of_wcag_aa() -> None:
    style = rendered("deployment without evaluation")
    for block in re.findall(r":root \{([^}]*--alarm[^}]*)\}", style):
        colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block))
        for ink in ("ink", "soft", "link", "good", "part", "bad"):
            for ground in ("paper", "note", "alarm") if ink == "ink" else ("paper",):
                light, dark = sorted((luminance(colours[ink]), luminance(colours[ground])), reverse=True)
                assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, ground)
    assert len(re.findall(r":root \{[^}]*--alarm", style)) == 2


def test_every_column_is_in_the_table_and_the_worst_are_drawn() -> None:
    tree = Tree(rendered("200 columns"))
    assert all(f"marker_{number:03d}" in tree.text for number in range(199))
    drawn = [label for label in (a.get("aria-label", "") for a in tree.all("svg")) if label.startswith("Histogram of")]
    assert len(drawn) == 32 and drawn[0].startswith("Histogram of marker_007:")
    assert "168 columns nearer to chance are not drawn" in tree.text


def test_what_was_not_measured_says_why() -> None:
    text = Tree(rendered("200 columns")).text
    assert text.count(NOT_THOROUGH.capitalize()) >= 5 and "no test table was given" in text
    between = Tree(rendered("deployment without evaluation")).text
    assert "the patients of different hospitals never meet" in between
    assert "The study asked for none (evaluation.method)" in between


def test_no_run_without_finite_epsilon_has_a_place_on_an_axis_of_epsilon(full: str) -> None:
    labels = [a.get("aria-label", "") for a in Tree(full).all("svg")]
    assert not [label for label in labels if "ε" in label or "Lower bounds" in label]
    assert "There is nothing to plot" in full and "There is no finite claim" in full
    drawn = [a.get("aria-label", "") for a in Tree(render(replace(dpsgd(), audit=audit_of(8.0)))).all("svg")]
    assert sum("ε by site" in label for label in drawn) == 1 and sum("Lower bounds" in label for label in drawn) == 1


def test_a_finite_epsilon_never_stands_without_what_it_is_an_epsilon_of() -> None:
    tree = Tree(rendered("dpsgd"))
    row = tree.text[tree.text.index("What is promised") : tree.text.index("Under which assumptions")]
    for term in ("one patient", "replace-one", "δ = 1e-05", "public", "member", "coordinator", "proven"):
        assert term in row


def test_failed_gates_and_an_override_stand_on_the_first_page(full: str) -> None:
    first = full[full.index('id="first"') : full.index('id="fidelity"')]
    assert "Gates failed: minimum patients. This cohort must not be released." in first
    assert "Failed gate: minimum patients" in first and "400; limit 500" in first
    assert "ask &lt;more&gt; hospitals" in first
    override = {"reason": "ethics vote 12", "by": "Dr. B", "key_id": "ab:cd", "at": "2026-01-01T00:00:00Z"}
    bare = replace(deployment(), evaluation=None)
    page = render(replace(bare, gates=GATES | {"override": override}))
    first = page[page.index('id="first"') : page.index('id="fidelity"')]
    assert "Released by override although gates failed (minimum patients). Reason: ethics vote 12." in first
    assert 'class="note alarm"' in first and "ab:cd" in first and "must not be released" not in first
    passed = {**GATES, "passed": True, "gates": GATES["gates"][:1]}
    text = Tree(render(replace(bare, gates=passed))).text
    assert "1 of 1 passed" in text and "must not be released" not in text


def test_an_audit_stands_beside_claim_and_reach(full: str) -> None:
    text = Tree(full).text
    assert "ε ≥ 0.40" in text and "the most it could have shown: 2.50; claim: none (ε is infinite)" in text
    refuted = Tree(render(replace(dpsgd(), audit=audit_of(0.3)))).text
    assert "claim refuted" in refuted and "Do not use this cohort." in refuted


def test_the_line_and_the_copy_check_are_explained(full: str) -> None:
    text = Tree(full).text
    assert "The 0.09 line is 1/11" in text and "It is a convention, no law" in text
    assert "Why there is no average distance to the closest record" in text


def test_what_the_sites_counted_is_drawn_and_tabled() -> None:
    tree = Tree(rendered("deployment"))
    labels = [a.get("aria-label", "") for a in tree.all("svg")]
    assert sum(label.startswith("Histogram of") for label in labels) == len(SCHEMA.columns)
    assert "Noised counts of n = 400 patients" in tree.text and "all sites: gradient boosting, true" in tree.text
    scores = Tree(rendered("deployment, exact counts")).text
    assert "Scores that the sites sent" in scores and "berta: logistic regression, true" in scores


def test_results_of_the_sites_that_this_version_does_not_know_are_named() -> None:
    found = deployment()
    assert found.evaluation is not None
    more = {site: {**one, "novel": 1} for site, one in found.evaluation["results"].items()}
    text = Tree(render(replace(found, evaluation={**found.evaluation, "results": more}))).text
    assert "evaluation.json holds more than this page shows: novel." in text


def test_attacks_that_the_sites_counted_are_tabled_and_reach_the_first_page() -> None:
    found = deployment()
    assert found.evaluation is not None
    text = Tree(render(found)).text
    assert "Attacks on the sites' own patients" in text and "Attacks at the sites, all together" in text
    for words in ("membership, density ratio, AUROC", "exact copies, share of patients", "linking the two halves"):
        assert f"all sites: {words}" in text
    assert "Not measured: " in text and "singling out" in text
    planted: Any = json.loads(json.dumps(found.evaluation))
    difference = planted["results"]["all sites"]["attacks"]["copies"]["exact"]["difference"]
    difference.update({"value": 0.4, "low": 0.3, "high": 0.5})
    alarm = Tree(render(replace(found, evaluation=planted))).text
    assert "Above chance: all sites, exact copies" in alarm and "above chance" in alarm


def test_names_are_text_everywhere() -> None:
    name = """<script>alert(1)</script> & x" onload="y' $\\frac$ ünïcode"""
    found = simulation("none")
    metrics: Any = found.metrics
    renamed = [{**column, "column": name} if k == 0 else column for k, column in enumerate(metrics["marginals"])]
    sites = {"joined": {name: {"patients": 1, "weight": 1.0}}, "not_joined": {name: name}}
    rounds = [{**line, "answered": [name], "dropped": {name: name}} for line in found.rounds]
    fidelity = {**metrics["fidelity"], "missingness": {**metrics["fidelity"]["missingness"], name: 0.0}}
    document = {**metrics, "marginals": renamed, "fidelity": fidelity}
    statement: Any = {**found.statement, "entries": [{**entry, "site": name} for entry in found.statement["entries"]]}
    page = render(replace(found, metrics=document, sites=sites, rounds=rounds, statement=statement))
    tree = Tree(page)
    assert "script" not in {tag for tag, _, _ in tree.elements} and name in tree.text
    assert not [a for _, attributes, _ in tree.elements for a in attributes if a.startswith("on")]
