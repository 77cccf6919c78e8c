"""Attacks at the sites, as the coordinator reads them: planted copies stand out, fresh rows do not, noised or not."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from common.evaluation.attack_results import blind_guess, why_not
from common.evaluation.attacks.cells import AttackCells
from common.evaluation.plan import score_names
from common.evaluation.results import ALL, evaluation_results, not_measured
from common.evaluation.scores import attack_scores, scores
from common.evaluation.suppression import apply, suppress
from common.evaluation.tabulate import attack_cells, tabulate
from common.evaluation.unnoised_attacks import unnoised_attacks
from common.privacy.evaluation_release import evaluation_event, noised_counts
from common.privacy.holdout import holdout_slots
from common.study import Protocol
from common.table import Table
from tests.common.evaluation.evaluated import SCHEMA, evaluated_protocol, patients

PATIENTS = {"anna": 900, "berta": 700}
TABLES = {site: patients(rows, 40 + k) for k, (site, rows) in enumerate(PATIENTS.items())}
SECRETS = ["died", "stage"]
METHODS: dict[str, dict[str, Any]] = {
    "accounted": {"method": "accounted", "epsilon": 8.0},
    "unnoised": {"method": "unnoised", "min_count": 5},
}


def split(protocol: Protocol, table: Table) -> dict[Any, Table]:
    fit, held_out = holdout_slots(protocol.digest, len(table), protocol.study.evaluation.holdout)
    parts = {"fit": Table(SCHEMA, table.values[fit]), "holdout": Table(SCHEMA, table.values[held_out])}
    return {"everyone": table, **parts}


@cache
def found_with(method: str, share: float) -> dict[str, Any]:
    protocol = evaluated_protocol(groups=[], secrets=SECRETS, **METHODS[method])
    return evaluated(protocol, leaking(protocol, share))["results"]


def leaking(protocol: Protocol, share: float, rows: int = 800) -> Table:
    """A cohort of fresh rows, of which this share are copies of patients who took part."""
    fit = np.vstack([split(protocol, table)["fit"].values for table in TABLES.values()])
    copies = np.random.default_rng(1).permutation(fit)[: round(share * rows)]
    return Table(SCHEMA, np.vstack([copies, patients(rows - len(copies), 77).values]))


def evaluated(protocol: Protocol, cohort: Table, noise: bool = True) -> dict[str, Any]:
    answers = {}
    for number, (site, table) in enumerate(TABLES.items()):
        parts = split(protocol, table)
        plan, counts = tabulate(protocol, cohort, parts)
        if protocol.study.evaluation.method == "accounted":
            cells = plan.join(counts)
            answers[site] = noised_counts(cells, plan, evaluation_event(protocol.study), number) if noise else cells
        else:
            floor = protocol.study.evaluation.min_count
            shown = plan.join(apply(counts, suppress(plan, counts, floor)))
            found = scores(protocol, cohort, parts, floor)
            answers[site] = np.concatenate([shown, [found[name] for name in score_names(protocol)]])
    document = evaluation_results(protocol, cohort, {s: a[None, :] for s, a in answers.items()}, PATIENTS)
    json.dumps(document, allow_nan=False)
    return document


@pytest.mark.parametrize("method", METHODS)
def test_copies_of_patients_scream(method: str) -> None:
    found = found_with(method, 0.3)[ALL]["attacks"]
    exact = found["copies"]["exact"]
    assert exact["difference"]["low"] > 0.1 and exact["difference"]["low"] > exact["difference"]["chance_high"]
    assert exact["fit"]["low"] <= 240 / 1200 <= exact["fit"]["high"]  # all copied rows are of different patients
    assert exact["holdout"]["low"] == 0 and (exact["patients"], exact["control"]) == (1200, 400)
    for score in ("distance", "density"):
        area = found["membership"][score]["auroc"]
        assert area["value"] > area["chance_high"] and area["low"] > 0.5, (score, area)
    rate = found["membership"]["distance"]["true_positive_rate"]
    assert rate["low"] > 0.1 and rate["value"] > rate["chance_high"] and rate["false_positive_rate"] == 0.1
    # A copy is the nearest row to itself, and holds the patient's own outcome.
    assert found["inference"]["died"]["difference"]["value"] > 0


@pytest.mark.parametrize("method", METHODS)
def test_rows_of_the_same_population_stay_near_chance(method: str) -> None:
    results = found_with(method, 0.0)
    assert set(results) == {*PATIENTS, ALL}
    found = results[ALL]["attacks"]
    differences = [found["linkability"], *found["copies"].values(), *found["inference"].values()]
    assert len(differences) == 5
    for each in differences:
        gap = each["difference"]
        assert gap["low"] <= 0.02 and abs(gap["value"]) < 0.12, each
    for score in ("distance", "density"):
        area = found["membership"][score]["auroc"]
        assert 0.42 < area["value"] < 0.58 and area["low"] <= area["chance_high"]
        assert area["chance"] == 0.5 and area["chance_low"] < 0.5 < area["chance_high"]


def test_without_noise_the_areas_are_those_of_the_raw_scores() -> None:
    """Recomputed from scores of single patients, pooled over the sites, without tables."""
    protocol = evaluated_protocol(groups=[], secrets=SECRETS, epsilon=1e4)
    cohort = leaking(protocol, 0.15)
    found = evaluated(protocol, cohort, noise=False)["results"][ALL]["attacks"]
    attack = AttackCells(cohort, SECRETS)
    members, binned, density, died = [], [], [], []
    for table in TABLES.values():
        for population in ("fit", "holdout"):
            part = split(protocol, table)[population]
            cells = attack(part)
            members += [population == "fit"] * len(part)
            binned.append(cells["membership", "distance"])
            density.append(attack._density(part))
            died.append(cells["inference", "died"])
    truth, right = np.array(members), np.concatenate(died)
    areas = {name: entry["auroc"]["value"] for name, entry in found["membership"].items()}
    assert areas["distance"] == pytest.approx(roc_auc_score(truth, np.concatenate(binned)), abs=1e-12)
    assert areas["density"] == pytest.approx(roc_auc_score(truth, np.concatenate(density)), abs=0.02)
    inferred = found["inference"]["died"]
    for part, of in (("fit", truth), ("holdout", ~truth)):
        assert inferred[part]["value"] == pytest.approx(right[of].mean(), abs=1e-12)


def test_an_unnoised_rate_under_the_floor_is_not_told() -> None:
    """Nine copied patients of 675: under a floor of 15 nobody hears of them."""
    protocol = evaluated_protocol(method="unnoised", min_count=15, groups=[], secrets=SECRETS)
    parts = split(protocol, TABLES["anna"])
    cohort = Table(SCHEMA, np.vstack([parts["fit"].values[:9], patients(600, 78).values]))
    cells = attack_cells(AttackCells(cohort, SECRETS), parts)
    told = {floor: attack_scores(protocol, cells, floor) for floor in (9, 15)}
    assert told[15]["copies/exact/fit"] == 0.0
    assert told[9]["copies/exact/fit"] == pytest.approx(9 / 675) and len(parts["fit"]) == 675
    everyone = attack_scores(protocol, attack_cells(AttackCells(parts["fit"], SECRETS), parts), 15)
    assert everyone["copies/exact/fit"] == 1.0  # nobody is left over: that is a number under the floor as well
    people = {"anna": {"everyone": 900, "fit": 675, "holdout": 225}}
    exact = unnoised_attacks(protocol, len(cohort), {"anna": told[15]}, people)["copies"]["exact"]
    assert exact["fit"]["value"] == 0 and exact["fit"]["high"] > 14 / 675
    assert exact["difference"]["low"] < 0 < exact["difference"]["high"]


def test_a_site_that_hides_everything_is_left_out_and_said() -> None:
    protocol = evaluated_protocol(method="unnoised", min_count=15, groups=[], secrets=SECRETS)
    parts = split(protocol, TABLES["anna"])
    told = attack_scores(protocol, attack_cells(AttackCells(patients(300, 80), SECRETS), parts), 15)
    hidden = dict.fromkeys(told, float("nan"))
    people = {name: {"everyone": 900, "fit": 675, "holdout": 225} for name in ("anna", "berta")}
    both = unnoised_attacks(protocol, 300, {"anna": told, "berta": hidden}, people)
    assert both == unnoised_attacks(protocol, 300, {"anna": told}, people)
    assert both["membership"]["density"]["patients"] == 675
    none = unnoised_attacks(protocol, 300, {"berta": hidden}, people)
    assert "no site gave a value" in none["copies"]["near"]["reason"] and none["copies"]["near"]["fit"] is None


def test_models_of_patients_are_unnoised_only() -> None:
    protocol = evaluated_protocol(groups=[])
    found = not_measured(protocol, patients(300, 1))
    assert set(found) == {"trtr", "detection", "singling_out"} and "fitted to the site's patients" in found["trtr"]
    noised = found_with("accounted", 0.0)[ALL]
    assert noised["detection"] is None and noised["scores"] == {}
    exact = evaluated_protocol(groups=[], **METHODS["unnoised"])
    assert set(not_measured(exact, patients(300, 1))) == {"singling_out"}
    for site, results in found_with("unnoised", 0.0).items():
        detection = results["detection"]
        assert set(detection) == {"exact", "binned"} and 0.4 < detection["binned"]["value"] < 0.6, site
        assert results["scores"]["trtr/logistic_regression/1/auroc"] > 0.7
    assert "holdout" in not_measured(evaluated_protocol(groups=[], holdout=0.0), patients(300, 1))["attacks"]
    alive = patients(300, 1)
    alive["died"][:] = 0.0
    assert not_measured(protocol, alive)["utility"] == "not possible because the cohort has one outcome class only"


def test_rows_of_another_population_are_detected_without_holdout() -> None:
    protocol = evaluated_protocol(method="unnoised", min_count=5, groups=[], holdout=0.0)
    young = patients(600, 79).values
    young[:, 0] = 20.0
    found = scores(protocol, Table(SCHEMA, young), {"everyone": patients(200, 80)}, 5)
    assert set(found) == {"detection/exact/auroc", "detection/binned/auroc"} == set(score_names(protocol))
    assert found["detection/binned/auroc"] > 0.95


def test_what_is_too_small_to_attack_says_so() -> None:
    protocol = evaluated_protocol(groups=[])
    found = evaluated(protocol, leaking(protocol, 0.0, rows=19))["results"][ALL]["attacks"]
    for entry in (found["membership"]["density"], found["copies"]["near"], found["inference"]["died"]):
        assert "cohort has 19 rows" in entry["reason"]
    assert found["membership"]["density"]["auroc"] is None and found["copies"]["near"]["difference"] is None
    assert "held out: 3" in why_not(1000, 100, 3) and why_not(1000, 20, 20) == ""


def test_guesses_without_the_cohort() -> None:
    protocol = evaluated_protocol(groups=[], secrets=["stage", "age"])
    assert blind_guess(protocol, "stage") == pytest.approx(1 / 3) and blind_guess(protocol, "age") == pytest.approx(0.1)
