"""What a site has accounted before, kept on its disk, because every message may meet a fresh process.

Deployed, Flower starts a process for every message. Calibrating noise and approving a budget are functions of public
numbers that take tenths of a second, and the libraries they need take a second to import; both would be paid in every
round. While a memory is open (`remembering`), a function marked `remembered` looks there first.

The file is signed with the key of the site's ledger, and holds only for the very code and libraries that wrote it: one
that was edited, copied from elsewhere or written by another version is as good as none, and everything is computed
again. No statement on ε is made from it: it decides how much noise is added and what is approved, and what was spent
stands in the ledger and is accounted anew by whoever reads that.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, lru_cache, update_wrapper
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic, ParamSpec, TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.errors import OutputError
from common.files import write_atomic

Arguments = ParamSpec("Arguments")
# A number, or a tuple of numbers and words: what survives JSON.
Value = TypeVar("Value")

_PURPOSE = b"cohortium accounting memory\n"
_LIBRARIES = ("cohortium", "dp-accounting", "numpy", "scipy")
_MOST_VALUES = 1000
_OPEN: ContextVar[dict[str, Any] | None] = ContextVar("memory", default=None)


class Remembered(Generic[Arguments, Value]):
    """A pure function of printable arguments, cached in the process, and on disk while a memory is open."""

    def __init__(self, function: Callable[Arguments, Value]) -> None:
        self._name = f"{function.__module__}.{function.__qualname__}"
        self._cached = lru_cache(maxsize=4096)(function)
        self.cache_clear = self._cached.cache_clear
        update_wrapper(self, function)

    def __call__(self, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Value:
        """The value for these arguments."""
        memory = _OPEN.get()
        if memory is None:
            return self._cached(*args, **kwargs)
        key = f"{self._name}{args!r}{kwargs or ''}"
        if key not in memory:
            memory[key] = self._cached(*args, **kwargs)
        return memory[key]


def remembered(function: Callable[Arguments, Value]) -> Remembered[Arguments, Value]:
    """Mark a pure function whose values are worth keeping; what it raises is not kept."""
    return Remembered(function)


@contextmanager
def remembering(path: Path, site: str, key: Ed25519PrivateKey) -> Iterator[None]:
    """Open the memory at `path`, signed by `key`; what is computed meanwhile is written when it closes.

    A memory that cannot be read or written costs time and nothing else.
    """
    values = _read(path, site, key)
    known = len(values)
    token = _OPEN.set(values)
    try:
        yield
    finally:
        _OPEN.reset(token)
        if len(values) > known:
            _write(path, site, key, values)


def _read(path: Path, site: str, key: Ed25519PrivateKey) -> dict[str, Any]:
    """The values that this very software kept for this site under this key; none in any doubt."""
    try:
        signature, _, text = path.read_text(encoding="utf-8").partition("\n")
        key.public_key().verify(bytes.fromhex(signature), _PURPOSE + text.encode())
        document = json.loads(text)
        if (document["site"], document["software"]) != (site, _software()):
            return {}
        values = document["values"].items()
        return {name: tuple(value) if isinstance(value, list) else value for name, value in values}
    except (OSError, InvalidSignature, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _write(path: Path, site: str, key: Ed25519PrivateKey, values: dict[str, Any]) -> None:
    newest = dict(list(values.items())[-_MOST_VALUES:])
    text = json.dumps({"site": site, "software": _software(), "values": newest}, indent=1)
    signature = key.sign(_PURPOSE + text.encode()).hex()
    try:
        write_atomic(path, f"{signature}\n{text}")
    except (OSError, OutputError):
        return  # the ledger, which is written next, says so if the disk is full


@cache
def _software() -> str:
    """Identifies the code that accounts: every module beside this one, and the libraries they call."""
    digest = hashlib.sha256()
    for module in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(f"{module.name}\n".encode() + module.read_bytes())
    libraries = " ".join(f"{name} {version(name)}" for name in _LIBRARIES)
    return f"{libraries} {digest.hexdigest()}"
