"""What holds for every test."""

from __future__ import annotations

import signal


def pytest_configure() -> None:
    # A shell lets what it starts in the background ignore Ctrl-C, and all that comes of it inherits that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
