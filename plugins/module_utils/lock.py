# SPDX-License-Identifier: MIT
"""Let one play at a time change a host, and let the lock of a killed play expire.

A play is many short processes on the host, so the lock is a lease in a file, which its holder renews
with every read of the host. A step that changes something also holds the file's flock, from the check
of the lease to the end of the change, so that no other play can take the lease meanwhile. The file is
on a tmpfs: a reboot removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from typing import Any, Iterator, Mapping

from .shell import Problem

PATH = "/run/vllm_gpu.lock"
# How long a lease lasts after a step, and after a read while the play only waits: longer than a read
# of a slow host takes, but short, so that a killed play does not block others for long. Seconds.
LEASE = 90
WAITING_LEASE = 45
# How long to wait for the flock: while others read and write the lease, and for an earlier step of
# the same play that still runs although its connection was lost. Seconds.
_MOMENT = 5
_OWN_STEP = 300
_PAUSE = 0.1
_SIZE = 1024


class _Busy(Exception):  # noqa: N818 - not an error: a step is running
    """The flock is held by a step that changes something under `lease`."""

    def __init__(self, lease: dict[str, Any]) -> None:
        super().__init__()
        self.lease = lease


def _hold(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def _opened(wait: float, run: str | None = None) -> Iterator[int]:
    """Open the file and hold its flock; raise _Busy after `wait` seconds, or once the lease isn't that of `run`."""
    descriptor = os.open(PATH, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        tries = 1 + int(wait / _PAUSE)
        while not _hold(descriptor):
            tries -= 1
            lease = _read(descriptor)
            if tries <= 0 or (run is not None and lease.get("run") != run):
                raise _Busy(lease)
            time.sleep(_PAUSE)
        yield descriptor
    finally:
        os.close(descriptor)


def _read(descriptor: int) -> dict[str, Any]:
    try:
        return dict(json.loads(os.pread(descriptor, _SIZE, 0)))
    except (ValueError, TypeError):
        return {}


def _write(descriptor: int, lease: dict[str, Any]) -> None:
    # One write of a fixed size: a reader without the flock never sees part of a lease.
    os.pwrite(descriptor, json.dumps(lease).encode().ljust(_SIZE), 0)


def take(run: str, who: str, *, again: bool = False) -> dict[str, Any] | None:
    """Take the lock for `run`, or return the lease of the play that holds it.

    With `again`, also return the lease of a play that had it after `run` and has ended: the server is
    that play's by now. Times are of the monotonic clock, which setting the host's clock doesn't change.
    """
    try:
        with _opened(_MOMENT) as descriptor:
            lease, now = _read(descriptor), time.monotonic()
            if lease.get("run", run) != run and (again or lease.get("until", 0) > now):
                return lease
            _write(descriptor, {"run": run, "who": who, "renewed": now, "until": now + LEASE})
            return None
    except _Busy as busy:
        return busy.lease


def renew(run: str, seconds: int = WAITING_LEASE) -> bool:
    """Extend the lease of `run`; return False when another play has taken it."""
    try:
        with _opened(_MOMENT) as descriptor:
            lease, now = _read(descriptor), time.monotonic()
            if lease.get("run") != run:
                return False
            _write(descriptor, dict(lease, renewed=now, until=now + seconds))
            return True
    except _Busy as busy:
        # A step that holds the flock renews its own lease when it ends.
        return bool(busy.lease.get("run") == run)


@contextlib.contextmanager
def holding(run: str | None, seconds: int = LEASE) -> Iterator[None]:
    """Keep every other play out while the block runs; without a `run`, do nothing.

    An expired lease is still good while no other play has taken it. It is extended by `seconds` at the
    end of the block. Raises Problem where another play has had the lock since, or the host was restarted.
    """
    if run is None:
        yield
        return
    with contextlib.ExitStack() as stack:
        try:
            descriptor = stack.enter_context(_opened(_OWN_STEP, run))
        except _Busy as busy:
            raise Problem(_lost(busy.lease, run)) from None
        lease = _read(descriptor)
        if lease.get("run") != run:
            raise Problem(_lost(lease, run))
        try:
            yield
        finally:
            now = time.monotonic()
            _write(descriptor, dict(lease, renewed=now, until=now + seconds))


def _lost(lease: Mapping[str, Any], run: str) -> str:
    if lease.get("run") == run:
        return (
            f"An earlier step of this play is still running on this host after {_OWN_STEP} s, so this one has "
            f"changed nothing. `fuser -v {PATH}` shows its process; run the play again when it has ended."
        )
    cause = (
        f"{lease.get('who')} has taken this host's lock, because this play had stalled"
        if lease
        else "This host was restarted during the play, and its lock is gone"
    )
    return (
        f"{cause}. This step has changed nothing. Check the server with playbooks/verify.yml, and run this play "
        "again if it is still needed."
    )


def why_lost(run: str) -> str:
    """Return a message about who has the lease that `run` has lost."""
    descriptor = os.open(PATH, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        return _lost(_read(descriptor), run)
    finally:
        os.close(descriptor)


def release(run: str) -> bool:
    """Release the lock; return False where `run` doesn't hold it.

    The expired lease stays in the file: it shows a play that had stalled who has had the lock since.
    """
    try:
        with _opened(_MOMENT) as descriptor:
            lease, now = _read(descriptor), time.monotonic()
            if lease.get("run") != run:
                return False
            _write(descriptor, dict(lease, until=now))
            return True
    except _Busy:
        return False
