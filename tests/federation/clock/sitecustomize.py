"""A wrong clock for Python processes that have this folder on PYTHONPATH.

The file that COHORTIUM_TEST_CLOCK names holds the seconds by which `time.time` and `datetime.now` run ahead; it may
change meanwhile. Monotonic clocks stay right, as on a machine whose clock is set.
"""

import ctypes
import datetime
import gc
import os
import sys
import time
from pathlib import Path

FILE = Path(os.environ["COHORTIUM_TEST_CLOCK"])
_time, _gmtime = time.time, time.gmtime


def ahead() -> float:
    """Seconds, as the file says now."""
    try:
        return float(FILE.read_text())
    except (OSError, ValueError):  # being written
        return 0.0


def wrong_time() -> float:
    """time.time by the wrong clock."""
    # gRPC's core reads the machine's own clock and is given deadlines by it: it keeps that clock, else it would wait.
    caller = str(sys._getframe(1).f_globals.get("__name__", ""))
    return _time() + (0.0 if caller.startswith("grpc") else ahead())


def wrong_gmtime(seconds: float | None = None) -> time.struct_time:
    """time.gmtime by the wrong clock."""
    return _gmtime(_time() + ahead() if seconds is None else seconds)


def wrong_now(cls: type[datetime.datetime], tz: datetime.tzinfo | None = None) -> datetime.datetime:
    """datetime.now by the wrong clock."""
    return cls.fromtimestamp(_time() + ahead(), tz)


time.time, time.gmtime = wrong_time, wrong_gmtime
# In the type itself, which is immutable from Python: C extensions know its size and its identity.
gc.get_referents(vars(datetime.datetime))[0]["now"] = classmethod(wrong_now)
ctypes.pythonapi.PyType_Modified(ctypes.py_object(datetime.datetime))
