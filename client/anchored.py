"""The anchored decoder as the steward sees it: rows drawn from it, before any round is answered."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
from pyarrow import csv
from safetensors import SafetensorError
from safetensors.torch import load

from client.site import SiteConfig
from client.studies import Study, open_study
from common.arrow import mark_text, to_arrow, to_text
from common.errors import OutputError, SiteError, UsageError
from common.files import atomic_path
from common.generation import sample_prior
from common.model.vae import Decoder
from common.table import Table


def write_anchored_rows(config: SiteConfig, digest: str, out: Path, rows: int) -> int:
    """Write rows of the anchored decoder of a study to a new CSV file; returns how many.

    They come from noised statistics alone and cost nothing. `UsageError` if no study has this digest or it has no
    anchored decoder yet, `OutputError` if `out` exists.
    """
    study = find_study(config, digest)
    if out.exists():
        raise OutputError(f"{out}: exists", fix="choose another name")
    tables = list(_sampled(study, rows))
    schema, markers = study.protocol.schema, study.protocol.markers
    text = pa.concat_tables([to_text(to_arrow(table), schema) for table in tables])
    with atomic_path(out) as temporary:
        csv.write_csv(text if markers is None else mark_text(text, markers), temporary)
    return len(text)


def find_study(config: SiteConfig, digest: str) -> Study:
    """The one accepted study whose digest begins like this; `UsageError` otherwise."""
    folder = config.site.state / "studies"
    found = [path for path in sorted(folder.glob("*/protocol.json")) if path.parent.name.startswith(digest[:32])]
    if len(digest) < 8 or len(found) != 1:
        known = ", ".join(sorted(path.parent.name[:16] for path in folder.glob("*/protocol.json"))) or "none"
        raise UsageError(
            f"{digest!r} names {len(found) if len(digest) >= 8 else 'no'} study of this site",
            fix=f"give at least 8 digits of a digest; studies here: {known}",
        )
    return open_study(found[0], found[0].stat().st_mtime_ns)


def _sampled(study: Study, rows: int) -> Iterator[Table]:
    path = study.anchored_decoder_path
    if not path.exists():
        raise UsageError(
            f"{path}: there is no anchored decoder", fix="it comes with the request for the first round after an anchor"
        )
    decoder = Decoder(study.encoding, study.protocol.study.model, initialise=False)
    try:
        arrays = load(path.read_bytes())
        if {name: tuple(array.shape) for name, array in arrays.items()} != dict(study.shapes):
            raise ValueError("shapes")
    except (OSError, SafetensorError, ValueError):
        raise SiteError(f"{path}: cannot be read", fix="remove it; it comes again with the next request") from None
    decoder.load_arrays(arrays)
    return sample_prior(decoder, study.encoding, rows)
