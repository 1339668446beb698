# SPDX-License-Identifier: MIT
"""One play at a time on a host, and no lock that outlives a play for long.

A play is many short processes on the host, so the lock is a lease in a file:
its holder renews it with every look at the host, and a play that was killed
stops renewing. The file is on a tmpfs: a reboot forgets it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from typing import Any, Dict, Iterator, Optional

from ansible_collections.mlops.vllm_gpu.plugins.module_utils.shell import Problem

PATH = "/run/vllm_gpu.lock"
# How long a lease lasts: long enough for the longest step that doesn't renew it
# (besides the grace period of the old container, which is added); while the play
# only waits, and renews it with every look, short, so that a killed one is soon
# forgotten, and yet longer than a look at a slow host. Seconds.
STEP = 90
RENEWAL = 45


@contextlib.contextmanager
def _opened() -> Iterator[int]:
    descriptor = os.open(PATH, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def _read(descriptor: int) -> Dict[str, Any]:
    try:
        return dict(json.loads(os.pread(descriptor, 4096, 0)))
    except (ValueError, TypeError):
        return {}


def _write(descriptor: int, lease: Dict[str, Any]) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(lease).encode(), 0)


def take(run: str, who: str, grace: int = 30) -> Optional[Dict[str, Any]]:
    """Take the lock for `run`, or return the lease of the play that holds it.

    `grace` is the time that the old container may take to stop, in seconds.
    Times are of the monotonic clock: setting the host's clock changes nothing.
    """
    with _opened() as descriptor:
        lease, now = _read(descriptor), time.monotonic()
        if lease and lease["run"] != run and lease["until"] > now:
            return lease
        _write(descriptor, {"run": run, "who": who, "renewed": now, "until": now + STEP + grace})
        return None


def renew(run: str, seconds: int = RENEWAL) -> bool:
    """Let the lease of `run` last from now on; False when another play has taken it."""
    with _opened() as descriptor:
        lease, now = _read(descriptor), time.monotonic()
        if lease.get("run") != run:
            return False
        _write(descriptor, dict(lease, renewed=now, until=now + seconds))
        return True


@contextlib.contextmanager
def holding(run: Optional[str], seconds: int = STEP) -> Iterator[None]:
    """Keep every other play out for as long as the block runs; without a `run`, do nothing.

    The lease is checked and the change made under one hold of the file's lock, so
    that a play that stalled until its lease lapsed can't write over the next one's
    server. The lease lasts `seconds` from the end of the block.

    Raises Problem where the lease of `run` is no longer its own.
    """
    if run is None:
        yield
        return
    with _opened() as descriptor:
        lease = _read(descriptor)
        if lease.get("run") != run:
            raise Problem(
                "Another play ({0}) has taken this host's lock, because this one had stalled. Nothing more was "
                "changed here. Check the server with playbooks/verify.yml, and run this play again if it is "
                "still needed.".format(lease.get("who") or "which has ended by now")
            )
        try:
            yield
        finally:
            now = time.monotonic()
            _write(descriptor, dict(lease, renewed=now, until=now + seconds))


def release(run: str) -> bool:
    """Give the lock back; False where `run` doesn't hold it."""
    with _opened() as descriptor:
        if _read(descriptor).get("run") != run:
            return False
        os.ftruncate(descriptor, 0)
        return True
