# SPDX-License-Identifier: MIT
"""Change a file or a link in one step: a reader, or a crash, sees the old or the new one."""

from __future__ import annotations

import contextlib
import os
import tempfile

# How the name of a file that is being written starts.
TEMPORARY = ".vllm_gpu."


def write(
    path: str,
    content: bytes,
    mode: int,
    owner: tuple[int, int] | None = None,
    modified: int | None = None,
) -> None:
    """Put a file in place whole.

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


def target(directory: str, link: str) -> str | None:
    """Return where a link in a directory leads to, or None where it doesn't exist."""
    with contextlib.suppress(OSError):
        return os.readlink(os.path.join(directory, link))
    return None


def point(directory: str, link: str, target: str) -> None:
    """Make a link in a directory lead to `target`."""
    temporary = os.path.join(directory, link + ".new")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    os.symlink(target, temporary)
    os.replace(temporary, os.path.join(directory, link))
