"""The site's patients as a study sees them: encoded, in their roles, the same from first message to last."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from client.site import SiteConfig
from client.state import StateError
from common.encoding import EncodedTable, TableEncoding
from common.errors import DataError
from common.files import write_atomic
from common.privacy.channel_release import role_slots
from common.study import Protocol
from common.table import OutOfBounds, read_table


def load_patients(config: SiteConfig, protocol: Protocol) -> EncodedTable:
    """The site's encoded table; kept in memory between rounds while the file is unchanged."""
    path = config.site.data
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})", fix="correct `data` in site.toml") from None
    return _read(path, stat.st_mtime_ns, stat.st_size, config.policy.out_of_bounds, protocol)


@functools.lru_cache(maxsize=32)
def _read(path: Path, _time: int, _size: int, out_of_bounds: OutOfBounds, protocol: Protocol) -> EncodedTable:
    table, _ = read_table(path, protocol.schema, out_of_bounds=out_of_bounds)
    return TableEncoding(protocol.schema).encode(table)


def trained_patients(data: EncodedTable, protocol: Protocol) -> EncodedTable:
    """Those who train: all, or the `fit` slots of a study with roles."""
    share = protocol.study.channel.release_share
    return data if share == 0 else data.take(role_slots(protocol.digest, len(data), share)[0])


def released_patients(data: EncodedTable, protocol: Protocol) -> EncodedTable:
    """Those from whom the channel draws: all, or the `release` slots of a study with roles."""
    share = protocol.study.channel.release_share
    return data if share == 0 else data.take(role_slots(protocol.digest, len(data), share)[1])


@dataclass(frozen=True)
class Enrolled:
    """The table with which the site joined: its number of patients, and its SHA-256, which never leaves the site."""

    patients: int
    table: str

    @classmethod
    def of(cls, data: EncodedTable) -> Enrolled:
        """What `data` is to be recognised by."""
        content = hashlib.sha256(data.inputs.numpy().tobytes())
        content.update(np.ascontiguousarray(data.levels.numpy()).tobytes())
        return cls(len(data), content.hexdigest())

    @classmethod
    def load(cls, path: Path) -> Enrolled:
        """Read what `save` wrote; `StateError` if it is missing or damaged."""
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            return cls(int(document["patients"]), str(document["table"]))
        except (OSError, ValueError, KeyError, TypeError):
            raise StateError(
                f"{path}: what the site joined with is missing or damaged", fix="restore it from a backup"
            ) from None

    def save(self, path: Path) -> None:
        """Write durably."""
        write_atomic(path, json.dumps(asdict(self)))

    def require(self, data: EncodedTable, path: Path, *, roles: bool) -> None:
        """`DataError` if `data` is not the table the site joined with: its statements count those patients.

        With `roles`, not even the order of its rows may differ: a patient who has trained must never release.
        """
        found = Enrolled.of(data)
        if found.patients != self.patients:
            raise DataError(
                f"{path}: the table has {found.patients} patients and had {self.patients} when the site joined this"
                " study, whose noise and statements count those",
                fix="restore the table the study began with, or start a new study",
            )
        if roles and found.table != self.table:
            raise DataError(
                f"{path}: the table or the order of its rows changed since the site joined this study, which keeps"
                " patients who train apart from patients who release",
                fix="restore the table the study began with, or start a new study",
            )
