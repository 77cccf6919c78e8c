"""What un-noised counts this site has published before, so that two answers do not give away what one of them hides."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from common.digest import sha256_of
from common.errors import SiteError
from common.evaluation.counts import CountPlan, Counts, Key
from common.evaluation.suppression import Mask, apply, changed_too_little, suppress
from common.files import write_atomic
from common.schema import Schema

Document = dict[str, dict[str, list[float]]]


class Published:
    """The latest exact counts of every table and the cells that were ever hidden; a file that never leaves the site."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def publish(self, plan: CountPlan, counts: Counts, schema: Schema, floor: int) -> dict[Key, np.ndarray]:
        """The counts that may leave, NaN where hidden; remembered on disk before this returns.

        A cell that was hidden once stays hidden, and a cell whose count differs from an earlier published one by less
        than the floor is hidden from now on: their difference would be a small count. `SiteError` if the file that
        remembers cannot be read.
        """
        known = self._load()
        before: dict[Key, Mask] = {}
        for table in plan.tables:
            earlier = known.get(_name(table.key, schema))
            if earlier is not None:
                hidden = np.array(earlier["hidden"], dtype=bool).reshape(table.shape)
                last = np.array(earlier["counts"], dtype=np.float64).reshape(table.shape)
                before[table.key] = hidden | (~hidden & changed_too_little(counts[table.key], last, floor))
        masks = suppress(plan, counts, floor, hidden_before=before)
        for table in plan.tables:
            known[_name(table.key, schema)] = {
                "counts": counts[table.key].ravel().tolist(),
                "hidden": masks[table.key].ravel().astype(float).tolist(),
            }
        write_atomic(self.path, json.dumps(known))
        self.path.chmod(0o600)
        return apply(counts, masks)

    def _load(self) -> Document:
        if not self.path.exists():
            return {}
        try:
            document = json.loads(self.path.read_text(encoding="utf-8"))
            if not isinstance(document, dict):
                raise ValueError
        except (OSError, ValueError):
            raise SiteError(
                f"{self.path}: the counts this site has published before cannot be read",
                fix="restore the file from a backup; without it a second answer could give away what the first one hid",
            ) from None
        return document


def _name(key: Key, schema: Schema) -> str:
    """The table and the declarations its cells come from: the same table in another study has the same name."""
    columns = {field["name"]: field for field in schema.descriptor["fields"] if field["name"] in key[1:]}
    return sha256_of({"key": list(key), "columns": columns if len(key) > 1 else dict(schema.descriptor)})
