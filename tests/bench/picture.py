"""The README's pictures: eight columns of the demo, and the first page of its report as a browser shows it."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

from server.report.figures_fidelity import marginals_figure

COLUMNS = (
    "age_years",
    "bmi",
    "crp",
    "visit3_bleeding_on_probing_pct",
    "race",
    "education",
    "previous_preterm_birth",
    "preterm_birth",
)
ACROSS = 4
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SIZE = (1280, 1620)
COLOURS = 64  # of a picture of text, which needs few


def run(arguments: argparse.Namespace) -> None:
    metrics = json.loads((arguments.demo / "metrics.json").read_text(encoding="utf-8"))
    by_name = {column["column"]: column for column in metrics["marginals"]}
    marginals_figure([by_name[name] for name in COLUMNS], ACROSS).savefig(arguments.png, dpi=110)


def photograph(arguments: argparse.Namespace) -> None:
    """The top of RUN/report.html at 1280 pixels, in a palette of few colours."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        raise SystemExit(f"no browser: install Chromium (looked for {', '.join(BROWSERS)})")
    page = arguments.run / "report.html"
    if not page.exists():
        raise SystemExit(f"{page}: does not exist; name the folder of a finished run")
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "shot.png"
        command = [browser, "--headless", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder}/profile"]
        # Chromium's sandbox does not start as root, as in a container; the page is our own and loads nothing.
        command += [
            "--no-sandbox",
            f"--window-size={SIZE[0]},{SIZE[1]}",
            f"--screenshot={shot}",
            page.resolve().as_uri(),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if not shot.exists():
            raise SystemExit(f"{browser} made no picture (code {done.returncode}): {done.stderr[-500:]}")
        with Image.open(shot) as image:
            image.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(arguments.png, optimize=True)
    print(f"{arguments.png}: {arguments.png.stat().st_size // 1024} KiB")
