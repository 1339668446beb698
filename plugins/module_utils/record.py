# SPDX-License-Identifier: MIT
"""Keep what was proven on a host: the files as they were then, and what they proved.

`.proven/current` and `.proven/previous` are links to directories that are
written whole before a link points to them, so that a crash at any moment
leaves both links on something complete. The record itself holds no secret;
the copy of `.env` beside it does, and has its mode.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from typing import Any, Dict, Mapping, NamedTuple, Optional

KEEP = ".proven"
RECORD = "record.json"
# Which card the index meant, for the referee, which reads no JSON: `INDEX UUID`.
GPU = "gpu"


class Proven(NamedTuple):
    """One proven state: the service's files by name, and the record."""

    files: Dict[str, bytes]
    record: Dict[str, Any]


def write_whole(path: str, content: bytes, mode: int) -> None:
    """Put a file in place whole: a reader, or a crash, sees the old or the new one.

    Raises OSError; the file at `path` is as it was then.
    """
    directory = os.path.dirname(path)
    descriptor, temporary = tempfile.mkstemp(prefix=".vllm_gpu.", dir=directory)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            os.fchmod(stream.fileno(), mode)
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def load(project_dir: str, which: str) -> Optional[Proven]:
    """Return the `current` or the `previous` proven state, or None.

    What can't be read counts as not there: it can't be gone back to.
    """
    directory = os.path.join(project_dir, KEEP, which)
    try:
        files = {}
        for name in os.listdir(directory):
            with open(os.path.join(directory, name), "rb") as stream:
                files[name] = stream.read()
        made = json.loads(files.pop(RECORD))
        del files[GPU]
    except (OSError, ValueError, KeyError):
        return None
    return Proven(files, made) if isinstance(made, dict) else None


def save(
    project_dir: str, files: Mapping[str, bytes], record: Mapping[str, Any], *, again: bool = False
) -> None:
    """Make `files` and `record` the current proven state, and the one before it the previous one.

    With `again`, it is the current one once more, perhaps with another comment
    in `.env`: the previous one stays, so that there is something to go back to.
    """
    keep = os.path.join(project_dir, KEEP)
    os.makedirs(keep, mode=0o700, exist_ok=True)
    fresh = tempfile.mkdtemp(prefix="state.", dir=keep)
    for name, content in files.items():
        write_whole(os.path.join(fresh, name), content, 0o600)
    write_whole(
        os.path.join(fresh, RECORD), json.dumps(record, indent=2, sort_keys=True).encode() + b"\n", 0o600
    )
    card = "{requested} {gpu[uuid]}\n".format(**record)
    write_whole(os.path.join(fresh, GPU), card.encode(), 0o600)
    current = _target(keep, "current")
    if current and not again:
        _point(keep, "previous", current)
    _point(keep, "current", os.path.basename(fresh))
    used = {_target(keep, "current"), _target(keep, "previous"), "current", "previous"}
    for name in os.listdir(keep):
        if name not in used:
            shutil.rmtree(os.path.join(keep, name), ignore_errors=True)


def _target(keep: str, link: str) -> Optional[str]:
    with contextlib.suppress(OSError):
        return os.readlink(os.path.join(keep, link))
    return None


def _point(keep: str, link: str, target: str) -> None:
    temporary = os.path.join(keep, link + ".new")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    os.symlink(target, temporary)
    os.replace(temporary, os.path.join(keep, link))
