"""End a process with its children."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path


def children(pid: int) -> list[int]:
    """Return the children of a process."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (thread / "children").read_text(encoding="ascii").split())
    return found


def kill_tree(pid: int) -> None:
    """Kill a process with all its descendants.

    A process group is not enough: each of Ansible's workers has its own session.
    """
    tree = [pid]
    for member in tree:  # it grows during the loop
        with contextlib.suppress(OSError):
            os.kill(member, signal.SIGSTOP)
            tree += children(member)
    for member in tree:
        with contextlib.suppress(OSError):
            os.kill(member, signal.SIGKILL)
