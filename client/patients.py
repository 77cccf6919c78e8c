"""The site's patients as a study sees them: encoded, in their roles, the same from first message to last."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.memory import memory_limit, require_memory
from client.site import SiteConfig
from client.sources import inspect_patients
from client.state import StateError
from common.encoding import EncodedTable, TableEncoding
from common.errors import DataError
from common.files import write_atomic
from common.privacy.channel_release import role_slots
from common.privacy.holdout import holdout_slots
from common.study import Protocol
from common.table import Table, require_fit


def load_patients(config: SiteConfig, protocol: Protocol) -> EncodedTable:
    """The site's encoded table; that of a file is kept in memory between rounds while the file is unchanged.

    What the policy withholds is missing before anything is encoded. `DataError` for what does not fit, `RefusedError`
    where the table and training would need more memory than the policy allows.
    """
    if config.site.data is None:
        return _encode(config, protocol)
    path = config.site.data
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})", fix="correct `data` in site.toml") from None
    # Frozen models have a hash, although a type checker cannot see it.
    return _unchanged(config, protocol, stat.st_mtime_ns, stat.st_size)  # pyright: ignore[reportArgumentType]


@functools.lru_cache(maxsize=32)
def _unchanged(config: SiteConfig, protocol: Protocol, _time: int, _size: int) -> EncodedTable:
    return _encode(config, protocol)


def _encode(config: SiteConfig, protocol: Protocol) -> EncodedTable:
    with memory_limit(config.policy):
        return TableEncoding(protocol.schema).encode(load_table(config, protocol))


def load_table(config: SiteConfig, protocol: Protocol) -> Table:
    """The site's table as the study sees it, read now; raises as `load_patients` does."""
    table, report = inspect_patients(config, protocol.schema)
    require_fit(table, report, config.policy.out_of_bounds)
    require_memory(config.policy, protocol, len(table))
    return table


def trained_patients(data: EncodedTable, protocol: Protocol) -> EncodedTable:
    """Those who train: all who take part, or the `fit` slots of a study with roles."""
    return _take(data, roles_of(protocol, len(data)).fit)


def released_patients(data: EncodedTable, protocol: Protocol) -> EncodedTable:
    """Those from whom the channel draws: all who take part, or the `release` slots of a study with roles."""
    return _take(data, roles_of(protocol, len(data)).release)


def _take(data: EncodedTable, slots: NDArray[np.int64]) -> EncodedTable:
    return data if len(slots) == len(data) else data.take(slots)


@dataclass(frozen=True)
class Roles:
    """Slots (row numbers, ascending) that train, that the channel draws from, and that are held out of both."""

    fit: NDArray[np.int64]
    release: NDArray[np.int64]
    holdout: NDArray[np.int64]


def roles_of(protocol: Protocol, patients: int) -> Roles:
    """The role of every slot, fixed by the study's digest and the slot's number alone."""
    study = protocol.study
    taking_part, held_out = holdout_slots(protocol.digest, patients, study.evaluation.holdout)
    fit, release = role_slots(protocol.digest, len(taking_part), study.channel.release_share)
    return Roles(taking_part[fit], taking_part[release], held_out)


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

    def require(self, data: EncodedTable, source: str, *, exact: str = "") -> None:
        """`DataError` if `data` is not the table the site joined with: its statements count those patients.

        `exact` is the reason why not even the order of its rows may differ, if it may not.
        """
        found = Enrolled.of(data)
        if found.patients != self.patients:
            raise DataError(
                f"{source}: the table has {found.patients} patients and had {self.patients} when the site joined this"
                " study, whose noise and statements count those",
                fix="restore the table the study began with, or start a new study",
            )
        if exact and found.table != self.table:
            raise DataError(
                f"{source}: the table or the order of its rows changed since the site joined this study, {exact}",
                fix="restore the table the study began with, or start a new study",
            )


def require_enrolled(enrolled: Enrolled, config: SiteConfig, protocol: Protocol, data: EncodedTable) -> None:
    """`DataError` unless these are the patients with whom the site joined.

    Their order is compared where there are roles, since a patient who has trained must never release; and in a
    database, where one patient more and one less would move all others to other slots, and their number not show it.
    """
    exact = ""
    if protocol.study.channel.release_share > 0:
        exact = "which keeps patients who train apart from patients who release"
    elif protocol.study.evaluation.holdout > 0:
        exact = "which keeps patients who are held out apart from patients who train"
    elif config.site.sql is not None:
        exact = "and a database lives while a study needs every patient in his place: query a frozen table or view"
    enrolled.require(data, config.source, exact=exact)
