"""Pictures: small, alone in their page, the same every time, with names as text."""

import re
import xml.etree.ElementTree as ET

import pytest

from server.report.figures_fidelity import correlation_map, folded_levels, marginal
from server.report.svg import drawing, figure, shortened, to_svg

COLUMN = {
    "column": "cost in $ & <b>",
    "kind": "categorical",
    "scale": "linear",
    "labels": ["$\\frac$", "b"],
    "synthetic": [0.5, 0.4],
    "real": [0.6, 0.3],
    "synthetic_missing": 0.1,
    "real_missing": 0.1,
}


def test_the_same_picture_twice_is_the_same_bytes_and_well_formed() -> None:
    first, second = (marginal(COLUMN, "m0", "words") for _ in range(2))
    assert first == second
    root = ET.fromstring(first)
    texts = [element.text for element in root.iter() if element.tag.endswith("}text")]
    assert "cost in $ & <b>" in texts and "$\\frac$" in texts and "missing" in texts
    assert root.get("aria-label") == "words" and root.get("role") == "img" and "width" not in root.attrib
    assert not [element for element in root.iter() if element.tag.endswith(("}metadata", "}style", "}script"))]


def test_ids_of_two_pictures_are_apart_and_lead_somewhere() -> None:
    texts = [marginal(COLUMN, name, "words") for name in ("m0", "m1")]
    ids = [set(re.findall(r'\bid="([^"]+)"', text)) for text in texts]
    assert ids[0] and not ids[0] & ids[1]
    for text, defined in zip(texts, ids, strict=True):
        assert set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text)) <= defined


def test_coordinates_are_rounded_without_losing_the_picture() -> None:
    with drawing():
        drawn = figure(2, 2)
        axis = drawn.subplots()
        axis.plot([0, 1 / 3, 1], [0, 1 / 7, -1e-5])
        text = to_svg(drawn, "line", "words")
    assert not re.findall(r'[ "]-?\d+\.\d{3,}', " ".join(re.findall(r' d="([^"]*)"', text)))
    path = next(d for d in re.findall(r' d="([^"]*)"', text) if d.count("L") == 2)
    x = [float(value) for value in re.findall(r"[ML] (\S+)", path)]
    assert (x[1] - x[0]) / (x[2] - x[0]) == pytest.approx(1 / 3, abs=0.001)


def test_many_levels_are_folded_and_none_is_lost() -> None:
    labels = [f"level {k}" for k in range(30)]
    shares = [k / 435 for k in range(30)]
    column = {**COLUMN, "labels": labels, "real": shares, "synthetic": shares[::-1]}
    lines = folded_levels(column)
    assert len(lines) == 9 and lines[-2][0] == "23 others" and lines[-1][0] == "missing"
    assert sum(line[1] for line in lines) == pytest.approx(1.1)


def test_a_map_is_an_image_inside_the_page() -> None:
    text = correlation_map([[1.0, -0.5], [-0.5, 1.0]], ["a", "b"], "patients", "map", "words")
    found = re.findall(r'xlink:href="([^"#]+)"', text)
    assert found and all(value.startswith("data:image/png;base64,") for value in found)


def test_long_names_are_cut() -> None:
    assert shortened("a" * 20, 10) == "a" * 9 + "…" and shortened("short", 10) == "short"
