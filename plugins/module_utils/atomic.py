# SPDX-License-Identifier: MIT
"""Replace a file or a link in one step: a reader or a crash never leaves a partial one."""

from __future__ import annotations

import contextlib
import os
import tempfile

# The start of a temporary file's name.
TEMPORARY = ".vllm_gpu."


def write(
    path: str, content: bytes, mode: int, owner: tuple[int, int] | None = None, modified: int | None = None
) -> None:
    """Write a file completely, or raise OSError and leave it as it was; a link's target is replaced.

    `owner` is a user and a group, `modified` a time in nanoseconds.
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


def target(directory: str, link: str) -> str | None:
    """Return the target of a link in a directory, or None where it doesn't exist."""
    with contextlib.suppress(OSError):
        return os.readlink(os.path.join(directory, link))
    return None


def point(directory: str, link: str, target: str) -> None:
    """Set the target of a link in a directory."""
    temporary = os.path.join(directory, link + ".new")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    os.symlink(target, temporary)
    os.replace(temporary, os.path.join(directory, link))
