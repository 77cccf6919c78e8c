"""Ctrl-C for processes that a test starts."""

import signal


def interruptible() -> None:
    """As `preexec_fn`: a shell that runs the tests in the background ignores SIGINT, and its children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
