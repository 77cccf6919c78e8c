"""The hospital: checks its own policy, trains on its own rows and sends only what is accounted for."""

import os

# Whoever started this process, read before the slow imports: a parent that is gone by then would not be missed.
PARENT = os.getppid()
