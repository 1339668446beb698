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
import shlex
import shutil
import tempfile
from typing import Any, Mapping, NamedTuple

from ansible_collections.mlops.vllm_gpu.plugins.module_utils import trust
from ansible_collections.mlops.vllm_gpu.plugins.module_utils.shell import Problem

KEEP = ".proven"
# How the host was before a change that hasn't ended (snapshot.py).
BEFORE = "before.json"
# How the name of a file that is being written starts.
TEMPORARY = ".vllm_gpu."
RECORD = "record.json"
# Which card the index meant, for the referee, which reads no JSON: `INDEX UUID`.
GPU = "gpu"
# What is read of a record without asking whether it's there.
_NEEDED = ("requested", "gpu", "image", "image_id", "models")


class Proven(NamedTuple):
    """One proven state: the service's files by name, and the record."""

    files: dict[str, bytes]
    record: dict[str, Any]


def write_whole(
    path: str,
    content: bytes,
    mode: int,
    owner: tuple[int, int] | None = None,
    modified: int | None = None,
) -> None:
    """Put a file in place whole: a reader, or a crash, sees the old or the new one.

    A link stays, and what it leads to is replaced. `owner` is a user and a group,
    `modified` a time in nanoseconds. Raises OSError; the file is as it was then.
    """
    path = os.path.realpath(path)
    descriptor, temporary = tempfile.mkstemp(prefix=TEMPORARY, dir=os.path.dirname(path))
    try:
        with os.fdopen(descriptor, "wb") as stream:
            if owner is not None:
                os.fchown(stream.fileno(), *owner)
            os.fchmod(stream.fileno(), mode)
            stream.write(content)
            stream.flush()
            if modified is not None:
                os.utime(stream.fileno(), ns=(modified, modified))
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def load(project_dir: str, which: str) -> Proven | None:
    """Return the `current` or the `previous` proven state, or None where there is none.

    Raises Problem for one that can't be read or trusted: as "none", it would turn
    off what guards the server by it.
    """
    link = os.path.join(project_dir, KEEP, which)
    trust.check(link)
    try:
        target = os.readlink(link)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Problem(_unusable(link, "it is no symbolic link")) from error
    # It leads to its neighbour, and nowhere else.
    if "/" in target or target in (".", ".."):
        raise Problem(_unusable(link, f"it leads to {target}"))
    directory = os.path.join(project_dir, KEEP, target)
    try:
        found = {name: trust.read(os.path.join(directory, name)) for name in os.listdir(directory)}
        files = {name: one.content for name, one in found.items() if one is not None}
        made = json.loads(files.pop(RECORD))
        if not isinstance(made, dict):
            raise TypeError
        del files[GPU]
        for key in _NEEDED:
            made[key]
    except OSError as error:
        raise Problem(_unusable(link, f"{error.filename}: {error.strerror}")) from error
    except KeyError as error:
        raise Problem(_unusable(link, f"{error.args[0]} is missing in it")) from error
    except (ValueError, TypeError) as error:
        raise Problem(_unusable(link, f"its {RECORD} is not JSON of the expected form")) from error
    return Proven(files, made)


def _unusable(link: str, why: str) -> str:
    return (
        f"{link}, which says what was proven on this host, can't be read: {why}. Remove it with `rm -rf "
        f"{shlex.quote(link)}`; the next serve.yml records the server that it proves."
    )


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
    current = target(keep, "current")
    if current and not again:
        point(keep, "previous", current)
    point(keep, "current", os.path.basename(fresh))
    # What is kept of a change that goes on is a file, which rmtree leaves alone.
    used = {target(keep, "current"), target(keep, "previous"), "current", "previous"}
    for name in os.listdir(keep):
        if name not in used:
            shutil.rmtree(os.path.join(keep, name), ignore_errors=True)


def target(keep: str, link: str) -> str | None:
    """Return where a link in the directory `keep` leads to, or None where it doesn't exist."""
    with contextlib.suppress(OSError):
        return os.readlink(os.path.join(keep, link))
    return None


def point(keep: str, link: str, target: str) -> None:
    """Make a link in the directory `keep` lead to `target`, in one step."""
    temporary = os.path.join(keep, link + ".new")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    os.symlink(target, temporary)
    os.replace(temporary, os.path.join(keep, link))
