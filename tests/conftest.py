"""Settings of every test run."""

from __future__ import annotations

import signal


def pytest_configure() -> None:
    # A shell makes its background jobs ignore Ctrl-C, and their children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
