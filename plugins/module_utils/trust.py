# SPDX-License-Identifier: MIT
"""Read only files that nobody but root, or the user whom Ansible becomes, can change."""

from __future__ import annotations

import errno
import os
import shlex
import stat
from typing import NamedTuple

from .shell import Problem

# The largest file of the service that is read; bytes.
LARGEST = 1 << 20
# As many links as Linux itself follows.
_MOST_LINKS = 40


class Found(NamedTuple):
    """A file's content and status."""

    content: bytes
    status: os.stat_result


def check(path: str) -> str:
    """Return `path` with all links resolved; it need not exist.

    Raises Problem, with the fix, where somebody else could change it, or a directory or link on the way.
    """
    at, sticky, left, links = "/", False, _parts(os.path.abspath(path)), 0
    _check_entry(at, os.lstat(at))
    while left:
        at = os.path.join(at, left.pop(0))
        try:
            status = os.lstat(at)
        except FileNotFoundError:
            return os.path.join(at, *left)
        except OSError as error:
            raise Problem(unreadable(path, error)) from error
        if stat.S_ISLNK(status.st_mode):
            # In a sticky directory, its owner could replace it.
            if sticky and status.st_uid not in _trusted():
                raise Problem(_planted(at, status))
            links += 1
            if links > _MOST_LINKS:
                raise Problem(unreadable(path, OSError(errno.ELOOP, os.strerror(errno.ELOOP))))
            target = os.path.join(os.path.dirname(at), os.readlink(at))
            at, left, sticky = "/", _parts(os.path.normpath(target)) + left, False
            continue
        _check_entry(at, status)
        sticky = bool(status.st_mode & stat.S_ISVTX)
    return at


def read(path: str, largest: int = LARGEST) -> Found | None:
    """Return the regular file at `path`, or None; raise Problem for what can't be trusted."""
    try:
        # Opening a FIFO must not block.
        descriptor = os.open(check(path), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Problem(unreadable(path, error)) from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise Problem(f"{path} is not a regular file. Move it away.")
    with os.fdopen(descriptor, "rb") as stream:
        content = stream.read(largest + 1)
    if len(content) > largest:
        raise Problem(f"{path} is larger than {largest >> 20} MiB, too large for its purpose. Move it away.")
    return Found(content, status)


def unreadable(path: str, error: OSError) -> str:
    """Return the message about a file that exists and can't be read."""
    return f"{path} can't be read: {error.strerror}. Make it a readable file, or move it away."


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part]


def _trusted() -> tuple[int, int]:
    return 0, os.geteuid()


def _check_entry(path: str, status: os.stat_result) -> None:
    """Raise Problem where somebody else could change what is at `path`."""
    mode = status.st_mode
    # In a sticky directory, such as /tmp, nobody can replace another user's file.
    sticky = stat.S_ISDIR(mode) and bool(mode & stat.S_ISVTX)
    group = mode & stat.S_IWGRP and (status.st_gid != 0 or _has_acl(path))
    if status.st_uid not in _trusted() or ((group or mode & stat.S_IWOTH) and not sticky):
        raise Problem(_planted(path, status))


def _has_acl(path: str) -> bool:
    """Return whether there is an ACL: the group's write bit may then mean other users."""
    try:
        return "system.posix_acl_access" in os.listxattr(path)
    except OSError:
        return False


def _planted(path: str, status: os.stat_result) -> str:
    name = shlex.quote(path)
    cure = (
        f"chown -h root: {name}"
        if stat.S_ISLNK(status.st_mode)
        else f"chown root: {name} && chmod go-w {name}"
    )
    return (
        f"{path} (owner {status.st_uid}, group {status.st_gid}, mode {stat.S_IMODE(status.st_mode):04o}) can be changed "
        "by others than root, so it can't be trusted. Check its content, then run: " + cure
    )
