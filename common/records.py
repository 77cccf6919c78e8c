"""Between typed messages and Flower's records: headers and arrays, checked before anything is made of them."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import ConfigRecord, RecordDict
from safetensors import deserialize
from safetensors.numpy import save

from common.digest import sha256_of
from common.privacy.ledger_keys import HEAD_HEX, KEY_HEX, SIGNATURE_HEX

if TYPE_CHECKING:  # a site's executor reads messages and must not load torch
    from torch import Tensor

PROTOCOL_VERSION = 2
ARRAYS, HEADER = "arrays", "header"
CONTENT = "content"
# Bytes that safetensors may need beyond the raw arrays: for a name's entry in its header, and for the whole.
NAME_OVERHEAD, DOCUMENT_OVERHEAD = 256, 1024


class MessageError(ValueError):
    """A message that is not what the protocol says; the text is safe to log and to send."""


def arrays_to_record(arrays: Mapping[str, Tensor]) -> ConfigRecord:
    """Float32 tensors by name as a Flower record."""
    return _packed({name: np.ascontiguousarray(array.numpy()) for name, array in arrays.items()})


def arrays_from_record(record: ConfigRecord | None, expected: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Float32 tensors with exactly the names and shapes of `expected`, all finite; else `MessageError`.

    Sizes are compared before anything is decoded, so that an oversized message costs nothing.
    """
    import torch

    arrays = {}
    for name, values in _unpacked(record, expected, "F32", np.dtype(np.float32)).items():
        if not np.isfinite(values).all():
            raise MessageError(f"array {name!r} has entries that are not finite")
        arrays[name] = torch.from_numpy(values)
    return arrays


def values_to_record(name: str, values: np.ndarray) -> ConfigRecord:
    """A float64 table under `name` as a Flower record."""
    return _packed({name: np.ascontiguousarray(values, dtype=np.float64)})


def values_from_record(record: ConfigRecord | None, name: str, shape: tuple[int, int]) -> np.ndarray:
    """A float64 table of exactly this name and shape, NaN for missing values, none infinite; else `MessageError`."""
    values = _unpacked(record, {name: shape}, "F64", np.dtype(np.float64))[name]
    if np.isinf(values).any():
        raise MessageError(f"array {name!r} has entries that are infinite")
    return values


def _packed(arrays: dict[str, np.ndarray]) -> ConfigRecord:
    # One safetensors document: Flower moves every array as several objects, each of which costs a request.
    return ConfigRecord({CONTENT: save(arrays)})


def _unpacked(
    record: ConfigRecord | None, expected: Mapping[str, tuple[int, ...]], kind: str, dtype: np.dtype[Any]
) -> dict[str, np.ndarray]:
    """The arrays named in `expected`, of these shapes and this dtype (safetensors calls it `kind`), and no others."""
    if record is None:
        raise MessageError("no arrays")
    content = record.get(CONTENT)
    if set(record.keys()) != {CONTENT} or not isinstance(content, bytes):
        raise MessageError("the arrays are not one safetensors document")
    limit = sum(dtype.itemsize * math.prod(shape) + NAME_OVERHEAD + len(name) for name, shape in expected.items())
    if len(content) > limit + DOCUMENT_OVERHEAD:
        raise MessageError(f"{len(content)} bytes of arrays, more than the study's {len(expected)} arrays take")
    try:
        found: dict[str, Any] = dict(deserialize(content))
    except Exception:  # whatever the library makes of hostile bytes
        raise MessageError("the arrays cannot be decoded") from None
    if set(found) != set(expected):
        raise MessageError(f"arrays named differently than the study's {len(expected)} arrays")
    arrays = {}
    for name, shape in expected.items():
        if (found[name]["dtype"], tuple(found[name]["shape"])) != (kind, shape):
            raise MessageError(f"array {name!r} is not {dtype.name} of shape {shape}")
        arrays[name] = np.frombuffer(found[name]["data"], dtype).reshape(shape).copy()
    return arrays


def arrays_digest(arrays: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over names, shapes and the exact bytes of arrays."""
    content = {
        name: [list(a.shape), hashlib.sha256(np.ascontiguousarray(a.numpy()).tobytes()).hexdigest()]
        for name, a in arrays.items()
    }
    return sha256_of(content)


def values_digest(values: np.ndarray) -> str:
    """SHA-256 (hex) over the shape and the exact bytes of a float64 table."""
    content = np.ascontiguousarray(values, dtype=np.float64)
    return sha256_of([list(content.shape), hashlib.sha256(content.tobytes()).hexdigest()])


def read_header(record: RecordDict, fields: Mapping[str, type]) -> dict[str, Any]:
    """The header's fields, exactly those named and of the types named; version checked first."""
    header = record.config_records.get(HEADER)
    if header is None:
        raise MessageError("no header")
    version = header.get("version")
    if version != PROTOCOL_VERSION:
        found = version if isinstance(version, int) else "that is no number"  # a peer's text is never repeated
        raise MessageError(f"protocol version {found}, this side speaks {PROTOCOL_VERSION}")
    if set(record.keys()) - {HEADER, ARRAYS}:
        raise MessageError("records that the protocol does not know")
    if set(header.keys()) != set(fields):
        raise MessageError("the header's fields are not those of the protocol")
    for name, kind in fields.items():
        value = header[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise MessageError(f"header field {name!r} is not of type {kind.__name__}")
    return dict(header)


def is_signed_head(length: int, head: str, signature: str, key: str | None = None) -> bool:
    """Whether these have the form of a signed head; who signed it is for the reader to check."""
    return (
        0 <= length < 1 << 63
        and re.fullmatch(HEAD_HEX, head) is not None
        and re.fullmatch(SIGNATURE_HEX, signature) is not None
        and (key is None or re.fullmatch(KEY_HEX, key) is not None)
    )
