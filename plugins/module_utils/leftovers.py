# SPDX-License-Identifier: MIT
"""Files that killed plays left in the service's directory: half-written ones, and copies with secrets."""

from __future__ import annotations

import os
import re
import shutil

from . import atomic, paths

# Names that atomic.write() uses until a file is complete.
_TEMPORARY = re.compile(re.escape(atomic.TEMPORARY) + r"[a-z0-9_]{8}\Z")
# A copy that earlier versions of acceptance.yml made.
_KEPT = paths.PROVEN + ".kept"


def _names(directory: str) -> list[str]:
    return sorted(os.listdir(directory)) if os.path.isdir(directory) else []


def leftovers(project_dir: str) -> list[str]:
    """Return the paths that killed plays left; nothing that is proven or the user's."""
    proven = os.path.join(project_dir, paths.PROVEN)
    found = [
        os.path.join(project_dir, name)
        for name in _names(project_dir)
        if _TEMPORARY.match(name) or name == _KEPT
    ]
    # A linked file is written in its target's directory.
    for name in _names(project_dir):
        path = os.path.join(project_dir, name)
        if os.path.islink(path) and not os.path.isdir(path):
            there = os.path.dirname(os.path.realpath(path))
            found += [os.path.join(there, other) for other in _names(there) if _TEMPORARY.match(other)]
    links = [os.path.join(proven, name) for name in paths.LINKS]
    used = {os.readlink(link) for link in links if os.path.islink(link)}
    for name in _names(proven):
        path = os.path.join(proven, name)
        if name in used:
            found += [os.path.join(path, part) for part in _names(path) if _TEMPORARY.match(part)]
        elif name.startswith("state.") or name.endswith(".new") or _TEMPORARY.match(name):
            found.append(path)
    return found


def interrupted(project_dir: str) -> list[str]:
    """Return the leftovers, and the snapshot of an interrupted change, which the next change removes at its end."""
    before = os.path.join(project_dir, paths.PROVEN, paths.BEFORE)
    return leftovers(project_dir) + ([before] if os.path.lexists(before) else [])


def remove(found: list[str]) -> None:
    """Remove files, links and directories; missing ones are ignored."""
    for path in found:
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        elif os.path.lexists(path):
            os.unlink(path)
