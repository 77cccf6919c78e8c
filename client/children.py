"""A child process of `cohortium-site start`: started, watched line by line, restarted with growing pauses, ended."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

LogFormat = Literal["text", "json"]
LONGEST_PAUSE = 60.0
STEADY = 120.0  # seconds of running after which the next pause is short again
_COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_FLOWER = re.compile(r"^(INFO|WARNING|ERROR|DEBUG)\s*:\s*")


class Log:
    """Lines on standard error: text for people, JSON for collectors."""

    def __init__(self, form: LogFormat) -> None:
        self._form = form
        self._lock = threading.Lock()

    def __call__(self, source: str, event: str, **fields: Any) -> None:
        """Write one line."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        if self._form == "json":
            line = json.dumps({"time": now, "source": source, "event": event} | fields, ensure_ascii=False)
        else:
            words = [str(fields["message"])] if set(fields) == {"message"} else []
            words = words or [event, *(f"{name}={value}" for name, value in fields.items() if value not in ("", 0))]
            line = f"{now} {source}: {' '.join(words)}"
        with self._lock:
            try:
                print(line, file=sys.stderr, flush=True)
            except OSError:
                return  # a collector that went away stops no training


class Child:
    """One process under a name; `heard` gets every line of its output, an event's fields or None and the text."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: Log,
        heard: Callable[[dict[str, Any] | None, str], None],
    ) -> None:
        self.name, self.command = name, list(command)
        self._environment, self._log, self._heard = dict(environment), log, heard
        self.process: subprocess.Popen[str] | None = None
        self.last: deque[str] = deque(maxlen=60)
        self._reader: threading.Thread | None = None
        self._starts, self._started, self.not_before = 0, 0.0, 0.0
        self.since = 0.0  # time of the last start

    @property
    def running(self) -> bool:
        """Whether the process is alive."""
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        """Start the process in a session of its own, so that Ctrl-C reaches it only through its parent."""
        self.last.clear()
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=self._environment,
            text=True,
            errors="backslashreplace",
            start_new_session=True,
        )
        self._started, self.since = time.monotonic(), time.time()
        self._reader = threading.Thread(target=self._read, args=(self.process,), name=self.name, daemon=True)
        self._reader.start()
        self._log("start", "started", process=self.name, pid=self.process.pid)

    def ended(self) -> int | None:
        """The exit code of a process that has ended since the last call; all its output has been read by then."""
        if self.process is None or (code := self.process.poll()) is None:
            return None
        with contextlib.suppress(ProcessLookupError):  # what it left behind: a worker in the middle of a round
            os.killpg(self.process.pid, signal.SIGKILL)
        if self._reader is not None:
            self._reader.join(5.0)
        self.process = None
        steady = time.monotonic() - self._started > STEADY
        self._starts = 1 if steady else self._starts + 1
        pause = min(LONGEST_PAUSE, 2.0 ** (self._starts - 1))
        self.not_before = time.monotonic() + pause
        self._log("start", "ended", process=self.name, code=code, pause=pause)
        return code

    def stop(self, patience: float) -> None:
        """SIGTERM, and SIGKILL after `patience` seconds."""
        process = self.process
        if process is None or process.poll() is not None:
            return
        process.terminate()
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its own session: nothing else is in this group
            process.wait()
        if self._reader is not None:
            self._reader.join(2.0)

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            text = _FLOWER.sub("", _COLOURS.sub("", line).rstrip()).strip()
            if not text:
                continue
            fields = _event(text)
            if fields is None:
                self.last.append(text)
                self._log(self.name, "output", message=text)
            else:
                self._log(self.name, **fields)
            self._heard(fields, text)


def _event(text: str) -> dict[str, Any] | None:
    """A line that one of our own processes wrote as an event."""
    if not text.startswith('{"event": '):
        return None
    try:
        fields = json.loads(text)
    except ValueError:
        return None
    return fields if isinstance(fields, dict) and not {"source", "time"} & set(fields) else None
