"""Why a site is not connected, in one sentence: kept in state/run, so that `cohortium-site status` can say it too."""

from __future__ import annotations

import contextlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common.errors import CohortiumError, OutputError
from common.files import write_atomic


class Trouble:
    """The file state/run/trouble.json: there while something is wrong, and left by a start that ended with it.

    Only texts of our own errors, which hold no patient value. A disk that is full stops nothing.
    """

    def __init__(self, state: Path) -> None:
        self.path = state / "run" / "trouble.json"

    def note(self, error: CohortiumError) -> None:
        """This is wrong now."""
        since = datetime.now(UTC).isoformat(timespec="seconds")
        document = {"message": error.message, "fix": error.fix, "since": since}
        with contextlib.suppress(OutputError):
            write_atomic(self.path, json.dumps(document))

    def clear(self) -> None:
        """Nothing is wrong any more."""
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)

    def read(self) -> dict[str, Any] | None:
        """Message, fix and time of what is wrong; None if nothing is."""
        try:
            document = json.loads(self.path.read_text(encoding="utf-8"))
            return {name: str(document[name] or "") for name in ("message", "fix", "since")}
        except (OSError, ValueError, KeyError, TypeError):
            return None
