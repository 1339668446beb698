"""End what a process has started."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path


def children(pid: int) -> list[int]:
    """Return the processes that this one has started itself."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (thread / "children").read_text(encoding="ascii").split())
    return found


def kill_tree(pid: int) -> None:
    """Kill a process with all that it has started.

    A process group is not enough: Ansible gives each of its workers a session of its own.
    """
    tree = [pid]
    for one in tree:  # which grows meanwhile
        with contextlib.suppress(OSError):
            os.kill(one, signal.SIGSTOP)
            tree += children(one)
    for one in tree:
        with contextlib.suppress(OSError):
            os.kill(one, signal.SIGKILL)
