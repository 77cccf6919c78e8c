"""Counts a SuperLink's HTTP requests by path. Python loads this by itself where the folder is in PYTHONPATH.

The counts are in the file that COHORTIUM_BENCH_REQUESTS names, as JSON, at most 0.2 s old.
"""

import os
import sys

if "server.superlink" in sys.orig_argv and "COHORTIUM_BENCH_REQUESTS" in os.environ:
    import json
    import threading
    import time
    from collections import Counter
    from pathlib import Path
    from typing import Any

    import uvicorn

    counts: Counter[str] = Counter()
    original = uvicorn.Server.__init__

    def counted(self: uvicorn.Server, config: uvicorn.Config) -> None:
        inner: Any = config.app
        # The gate hands what it lets pass to the same application: by itself it is counted as what the sites sent.
        listener = "sites" if type(inner).__name__ == "FleetOnly" else "server"

        async def app(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "http":
                counts[f"{listener} {scope['path']}"] += 1
            await inner(scope, receive, send)

        config.app = app
        original(self, config)

    def write(path: Path) -> None:
        said = 0
        while True:
            time.sleep(0.2)
            if counts.total() != said:
                said = counts.total()
                path.with_suffix(".new").write_text(json.dumps(counts))
                path.with_suffix(".new").replace(path)

    uvicorn.Server.__init__ = counted
    threading.Thread(target=write, args=(Path(os.environ["COHORTIUM_BENCH_REQUESTS"]),), daemon=True).start()
