"""What a comparison shows: table, figure, page and document."""

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from pydantic import ValidationError

from common.errors import FederationError
from server.compare_figure import FigureData, epsilon_terms, figure_data, label_positions
from server.compare_records import Comparison, exposure_in_words, spread
from server.compare_report import comparison_notes, render_comparison, write_comparison
from server.report import figures_frontier
from tests.server.comparison import Compare, Runs, by_line, plan, statement_of

HOSTILE = "<script>alert(1)</script>"


# ---------------------------------------------------------------- the table


def test_the_table_gives_mean_and_range_over_seeds(compare: Compare) -> None:
    found = compare(epsilons=[1.0], seeds=3)
    assert [(line.run, line.runs, line.finished) for line in found.table] == [
        ("constrained", 3, 3), ("dpsgd ε = 1", 3, 3), ("non-private", 3, 3),
    ]  # fmt: skip
    value = found.table[0].metrics["tstr_gradient_boosting"]
    assert value is not None
    assert (value.mean, value.low, value.high, value.count) == pytest.approx((0.75, 0.74, 0.76, 3))
    assert found.seeds == [0, 1, 2] and "0.750 (0.740-0.760)" in render_comparison(found)
    assert found.real["gradient_boosting"] == spread([0.78] * 3)
    assert found.table[0].metrics["correlation"] is None


def test_a_seed_that_fails_or_has_no_value_is_counted(compare: Compare, runs: Runs) -> None:
    runs.trouble["dpsgd-eps1-seed0"] = FederationError("diverged")
    runs.undefined = ("dpsgd-eps1-seed1",)
    found = compare(epsilons=[1.0], seeds=3)
    line = found.table[1]
    value = line.metrics["tstr_gradient_boosting"]
    assert (line.finished, line.runs, line.failed) == (2, 3, ["diverged"])
    assert value is not None and value.count == 1 and value.mean == pytest.approx(0.621)
    page = render_comparison(found)
    assert "(2 of 3 seeds)" in page and "0.621, 1 of 2 seeds" in page and "1 of 3 runs failed: diverged" in page
    assert found.utility_reason == "one outcome class only"


def test_one_infinite_seed_makes_the_line_infinite(compare: Compare, runs: Runs) -> None:
    runs.silent["dpsgd-eps1-seed1"] = ["anna"]
    line = compare(epsilons=[1.0], seeds=2).table[1]
    assert line.epsilon == "infinity"


def test_spread() -> None:
    assert spread([]) is None and spread([None, None]) is None
    found = spread([0.1, None, 0.3])
    assert found is not None and (found.low, found.high, found.count) == (0.1, 0.3, 2)
    equal = spread([0.1] * 3)
    assert equal is not None and equal.low == equal.mean == equal.high


def test_exposure_in_words(folder: Path) -> None:
    protocols = by_line(plan(folder, epsilons=[1.0]))

    def words(line: str) -> str:
        statement = statement_of(protocols[line])
        return exposure_in_words(statement["mode"], [entry["exposure"] for entry in statement["entries"]])

    assert "at most 1.2 a round (2wC); no noise" in words("constrained")  # 2 * 0.6 * 1
    clip = protocols["dpsgd ε = 1"].study.training.gradient_clip
    assert f"clipped to {clip:g} and noised" in words("dpsgd ε = 1") and "no noise" not in words("dpsgd ε = 1")
    assert "nothing bounds" in words("non-private")
    noised = plan(folder, "[privacy]\nupdate_noise = 3.0\n", epsilons=[1.0]).runs[0].protocol
    entries = statement_of(noised, silent=["berta"])["entries"]
    assert "every update carries noise" in exposure_in_words("constrained", [e["exposure"] for e in entries])


# ---------------------------------------------------------------- the figure


def data_of(comparison: Comparison) -> FigureData:
    found = figure_data(comparison)
    assert found is not None
    return found


def test_only_dpsgd_stands_on_the_axis(compare: Compare) -> None:
    for panel in data_of(compare()).panels:
        assert [point.run for point in panel.points] == ["dpsgd ε = 1", "dpsgd ε = 3", "dpsgd ε = 10"]
        assert [point.epsilon for point in panel.points] == pytest.approx([1, 3, 10], rel=0.02)
        assert [level.label for level in panel.levels] == [
            "constrained: no finite ε for the weights",
            "non-private reference: no finite ε",
            "trained on real rows, for scale",
        ]


def test_a_constrained_run_with_a_finite_epsilon_is_a_level_all_the_same(compare: Compare) -> None:
    found = compare("[privacy]\nupdate_noise = 30.0\naccept_useless_noise = true\n", epsilons=[1.0])
    assert isinstance(found.table[0].epsilon, float)
    for panel in data_of(found).panels:
        assert [point.run for point in panel.points] == ["dpsgd ε = 1"]
        assert panel.levels[0].kind == "constrained" and "no finite" not in panel.levels[0].label


def test_a_dpsgd_run_without_a_finite_epsilon_is_not_drawn(compare: Compare, runs: Runs) -> None:
    runs.silent["dpsgd-eps3"] = ["berta"]
    panel = data_of(compare()).panels[0]
    assert [point.run for point in panel.points] == ["dpsgd ε = 1", "dpsgd ε = 10"]
    assert all("dpsgd" not in level.label for level in panel.levels)


def test_without_held_out_patients_the_figure_shows_fidelity(compare: Compare, folder: Path) -> None:
    found = compare(test=False)
    data = data_of(found)
    assert [panel.heading.split(" (")[0] for panel in data.panels] == ["Kolmogorov-Smirnov", "total variation"]
    assert [point.value.mean for point in data.panels[1].points] == [0.2] * 3
    assert {level.kind for panel in data.panels for level in panel.levels} == {"constrained", "non-private"}
    page = render_comparison(found)
    assert "the figure shows fidelity" in page and "no held-out patients were given (--test)" in page
    assert "AUROC" not in data.in_words and "no held-out patients" in comparison_notes(found, folder)


def drawn(monkeypatch: pytest.MonkeyPatch, data: FigureData) -> Figure:
    kept: list[Figure] = []
    monkeypatch.setattr(figures_frontier, "to_svg", lambda figure, *_: kept.append(figure) or "")
    figures_frontier.utility_against_epsilon(data)
    return kept[0]


def test_the_drawing_has_the_points_and_levels_of_its_data(compare: Compare, monkeypatch: pytest.MonkeyPatch) -> None:
    data = data_of(compare(seeds=2))
    figure = drawn(monkeypatch, data)
    assert len(figure.axes) == len(data.panels) == 2
    for axis, panel in zip(figure.axes, data.panels, strict=True):
        assert axis.get_xscale() == "log"
        (curve,) = axis.containers
        drawn_points = [np.asarray(values, float) for values in (curve[0].get_xdata(), curve[0].get_ydata())]
        np.testing.assert_allclose(drawn_points[0], [point.epsilon for point in panel.points])
        np.testing.assert_allclose(drawn_points[1], [point.value.mean for point in panel.points])
        bars = curve[2][0].get_segments()
        np.testing.assert_allclose([bar[1][1] - bar[0][1] for bar in bars], 0.01)
        drawn_lines = [(np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata())) for line in axis.lines]
        flat = [heights[0] for positions, heights in drawn_lines if positions == [0, 1]]  # over the whole width
        assert flat == [level.value.mean for level in panel.levels]
        texts = " ".join(text.get_text() for text in axis.texts)
        assert all(level.label in texts for level in panel.levels)
        assert all(f"{point.value.mean:.3f}" not in texts for point in panel.points)


def test_a_figure_without_any_point(compare: Compare, runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    runs.trouble["dpsgd-eps1"] = FederationError("diverged")
    figure = drawn(monkeypatch, data_of(compare(epsilons=[1.0])))
    assert [list(axis.containers) for axis in figure.axes] == [[], []]


def test_labels_keep_apart() -> None:
    heights = label_positions([0.74, 0.745, 0.78, 0.741], 0.02, (0.5, 0.8))
    assert heights == pytest.approx([0.74, 0.78, 0.8, 0.76])
    top = label_positions([0.8, 0.8, 0.1], 0.05, (0.0, 0.8))
    assert max(top) <= 0.8 and np.diff(sorted(top)).min() >= 0.05 - 1e-9 and top[2] == 0.1
    assert label_positions([], 0.1, (0, 1)) == []


def test_the_figure_is_told_in_words(compare: Compare) -> None:
    words = data_of(compare(epsilons=[1.0])).in_words
    assert "dpsgd ε = 1, value 0.601" in words and "no finite ε for the weights, value 0.740" in words
    assert "Levels without a place on the ε axis" in words and "δ = 1e-05" in words


# ---------------------------------------------------------------- page, document and screen


def test_an_epsilon_never_stands_alone(compare: Compare, folder: Path) -> None:
    for seeds, as_if in ((1, False), (2, True)):
        found = compare(epsilons=[1.0], seeds=seeds)
        for text in (render_comparison(found), comparison_notes(found, folder), epsilon_terms(found)):
            for needed in ("one patient", "replac", "δ = 1e-05", "public, member, coordinator"):
                assert needed in text, needed
            assert ("as if, because the random numbers come from a seed" in text) == as_if
        for needed in ("δ = 1e-05", "one patient", "replace-one", "against public, member, coordinator"):
            assert needed in data_of(found).axis
        assert ("as if" in data_of(found).axis) == as_if
        (folder / "out").rename(folder / f"out{seeds}")


def test_names_are_escaped(compare: Compare, runs: Runs) -> None:
    runs.trouble["dpsgd-eps1"] = FederationError(f"site {HOSTILE} is missing")
    found = compare(epsilons=[1.0])
    found = found.model_copy(
        update={"target": HOSTILE, "notes": [HOSTILE], "utility_reason": HOSTILE, "caution": HOSTILE, "study": HOSTILE}
    )
    page = render_comparison(found)
    assert "<script" not in page and page.count("&lt;script&gt;") >= 6


def test_the_page_is_self_contained_and_cautious(compare: Compare) -> None:
    page = render_comparison(compare())
    assert "<svg" in page and 'role="img" aria-label="Utility of the cohort against ε.' in page
    assert 'src="' not in page and "<link" not in page and "@import" not in page
    assert page.count('href="http') == 0
    for name in ("constrained", "dpsgd-eps3", "non-private"):
        assert f'href="runs/{name}/report.html"' in page
    assert "Un-noised evaluation aggregates" in page and "n = 100 patients and n = 30 held-out" in page
    assert "anonym" not in page.lower() and "gdpr" not in page.lower()


def test_the_document_reads_back(compare: Compare, runs: Runs, folder: Path) -> None:
    runs.trouble["non-private"] = FederationError("too few")
    found = compare(epsilons=[1.0])
    write_comparison(found, folder / "out")
    text = (folder / "out" / "compare.json").read_text()
    assert Comparison.model_validate_json(text) == found
    document = json.loads(text)
    assert document["schema_version"] == 1 and document["study"] == "small"
    assert document["runs"][0]["result"]["privacy"]["epsilon"] == "infinity"
    assert document["runs"][1]["settings"]["privacy.epsilon"] == 1.0
    with pytest.raises(ValidationError):
        Comparison.model_validate(document | {"more": 1})
    with pytest.raises(ValidationError):
        Comparison.model_validate(document | {"schema_version": 2})
    assert sorted(p.name for p in (folder / "out").iterdir()) == ["compare.html", "compare.json", "runs"]
