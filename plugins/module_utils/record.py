# SPDX-License-Identifier: MIT
"""Keep the proven states of a host: the files, and a record of what was proven.

`.proven/current` and `.proven/previous` are links to directories that are complete before a link
points to them, so a crash leaves both valid. The record holds no secret; the copy of `.env` beside it does.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import tempfile
from typing import Any, Mapping, NamedTuple

from . import atomic, trust
from .paths import PROVEN
from .shell import Problem

RECORD = "record.json"
# The card that the index meant, as `INDEX UUID`, for the referee, which reads no JSON.
CARD = "gpu"
# Keys that every record has.
_NEEDED = ("requested", "gpu", "image", "image_id", "models")


class Proven(NamedTuple):
    """One proven state: the service's files by name, and the record."""

    files: dict[str, bytes]
    record: dict[str, Any]


def load(project_dir: str, which: str) -> Proven | None:
    """Return the `current` or the `previous` proven state, or None where there is none.

    Raises Problem for one that can't be read or trusted: without it, the check for drift would be off.
    """
    link = os.path.join(project_dir, PROVEN, which)
    trust.check(link)
    try:
        target = os.readlink(link)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Problem(_unusable(link, "it is not a symbolic link")) from error
    if "/" in target or target in (".", ".."):
        raise Problem(_unusable(link, f"it leads to {target}"))
    directory = os.path.join(project_dir, PROVEN, target)
    try:
        found = {name: trust.read(os.path.join(directory, name)) for name in os.listdir(directory)}
        files = {name: file.content for name, file in found.items() if file is not None}
        proof = json.loads(files.pop(RECORD))
        if not isinstance(proof, dict):
            raise TypeError
        del files[CARD]
        for key in _NEEDED:
            proof[key]
    except OSError as error:
        raise Problem(_unusable(link, f"{error.filename}: {error.strerror}")) from error
    except KeyError as error:
        raise Problem(_unusable(link, f"{error.args[0]} is missing in it")) from error
    except (ValueError, TypeError) as error:
        raise Problem(_unusable(link, f"its {RECORD} is not JSON of the expected form")) from error
    return Proven(files, proof)


def _unusable(link: str, why: str) -> str:
    return (
        f"{link}, the record of what was proven on this host, can't be read: {why}. Remove it with `rm -rf "
        f"{shlex.quote(link)}`; the next serve.yml records the server that it proves."
    )


def save(
    project_dir: str, files: Mapping[str, bytes], record: Mapping[str, Any], *, again: bool = False
) -> None:
    """Make `files` and `record` the current proven state, and the one before it the previous one.

    With `again`, only unimportant bytes have changed, such as a comment in `.env`: the previous one stays.
    """
    directory = os.path.join(project_dir, PROVEN)
    os.makedirs(directory, mode=0o700, exist_ok=True)
    fresh = tempfile.mkdtemp(prefix="state.", dir=directory)
    for name, content in files.items():
        atomic.write(os.path.join(fresh, name), content, 0o600)
    atomic.write(
        os.path.join(fresh, RECORD), json.dumps(record, indent=2, sort_keys=True).encode() + b"\n", 0o600
    )
    card = f"{record['requested']} {record['gpu']['uuid']}\n"
    atomic.write(os.path.join(fresh, CARD), card.encode(), 0o600)
    current = atomic.target(directory, "current")
    if current and not again:
        atomic.point(directory, "previous", current)
    atomic.point(directory, "current", os.path.basename(fresh))
    # rmtree leaves the snapshot alone, which is a file.
    used = {atomic.target(directory, "current"), atomic.target(directory, "previous"), "current", "previous"}
    for name in os.listdir(directory):
        if name not in used:
            shutil.rmtree(os.path.join(directory, name), ignore_errors=True)
