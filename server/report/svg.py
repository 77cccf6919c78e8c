"""A matplotlib figure as a small <svg> element that can stand beside others in one page."""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET
from contextlib import AbstractContextManager
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe-Ito colours, told apart by colour-blind readers; shapes and hatches say the same in grey.
REAL, SYNTHETIC, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#595959"
HATCH = "/////"
POINT = 4 / 3  # pixels of a page a point
LARGER = 1.25  # a picture may grow by so much where there is room
SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
# A "$" in a column's name is a dollar; text stays text; the same input gives the same bytes.
STYLE: dict[Any, Any] = {
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "cohortium",
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.linewidth": 0.6,
    "hatch.linewidth": 0.6,
    "path.simplify": True,
}
NUMBER = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")
DRAWN = ("d", "points", "x", "y", "width", "height", "transform", "cx", "cy", "r")


def figure(width: float, height: float) -> Figure:
    """An empty figure of `width` times `height` inches, which finds room for its labels."""
    return Figure(figsize=(width, height), layout="constrained")


def one_axis(width: float, height: float, left: float, bottom: float, right: float = 0.08, top: float = 0.25) -> Axes:
    """The axes of a figure with given margins, in inches: much quicker, for pictures of which there are many."""
    return Figure(figsize=(width, height)).add_axes(
        (left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height)
    )


def figure_of(axis: Axes) -> Figure:
    """The figure of `one_axis`."""
    drawn = axis.get_figure(root=True)
    assert drawn is not None  # `one_axis` made it
    return drawn


def quiet(axis: Axes) -> None:
    """No frame where nothing is measured."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(width=0.6, length=2.5, labelsize=7)


def shortened(text: str, most: int) -> str:
    """`text`, cut to `most` characters."""
    return text if len(text) <= most else text[: most - 1] + "…"


def to_svg(drawn: Figure, name: str, description: str) -> str:
    """The figure as an <svg> element: no date, numbers to a hundredth of a point, ids that begin with `name`.

    `name` must be unique in a page; `description` is what a screen reader says. Draw inside `drawing()`, so that the
    text of the figure is never read as mathematics.
    """
    buffer = io.StringIO()
    with drawing():
        drawn.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = re.sub(r"<!DOCTYPE[^>]*>", "", buffer.getvalue(), count=1)
    root = ET.fromstring(text)
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    for parent in list(root.iter()):
        for child in list(parent):
            # matplotlib's style sheet would hold for the whole page; the page has its one rule.
            if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style"):
                parent.remove(child)
    for element in root.iter():
        _simplify(element, name, used)
    width = float(root.get("width", "0").removesuffix("pt"))
    for attribute in ("width", "height", "version"):
        root.attrib.pop(attribute, None)
    root.set("role", "img")
    root.set("aria-label", description)
    root.set("style", f"max-width: {width * POINT * LARGER:.0f}px")
    ET.register_namespace("", SVG)
    ET.register_namespace("xlink", XLINK)
    return ET.tostring(root, encoding="unicode")


def drawing() -> AbstractContextManager[None]:
    """The style in which every figure is drawn and saved."""
    return matplotlib.rc_context(STYLE)


def _simplify(element: ET.Element, name: str, used: set[str]) -> None:
    element.tail = element.tail.strip() if element.tail else None
    if element.text and element.tag != f"{{{SVG}}}text":
        element.text = element.text.strip()
    identity = element.attrib.pop("id", None)
    if identity in used:
        element.set("id", f"{name}-{identity}")
    for key, value in list(element.attrib.items()):
        new = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", value)
        if key == f"{{{XLINK}}}href" and new.startswith("#"):
            new = f"#{name}-{new[1:]}"
        if key in DRAWN:
            new = re.sub(r"\s+", " ", NUMBER.sub(_shorter, new)).strip()
        if key == "style":
            new = re.sub(r"(font: [^;']*?px) '[^;]*", r"\1 Arial, Helvetica, sans-serif", new)
        element.set(key, new)


def _shorter(found: re.Match[str]) -> str:
    return f"{float(found.group()):.2f}".rstrip("0").rstrip(".")
