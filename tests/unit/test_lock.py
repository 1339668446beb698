"""The lock of a host: one play at a time, also when a play stalls or the host restarts."""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from ansible_collections.mlops.vllm_gpu.plugins.module_utils import lock
from ansible_collections.mlops.vllm_gpu.plugins.module_utils.shell import Problem


@pytest.fixture
def clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Use a temporary lock file, and a clock that the test sets."""
    now = [1000.0]
    monkeypatch.setattr(lock, "PATH", str(tmp_path / "lock"))
    monkeypatch.setattr(lock, "_MOMENT", 0.2)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


@contextmanager
def busy() -> Iterator[None]:
    """Hold the flock, as a step of another process does."""
    descriptor = os.open(lock.PATH, os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(descriptor)


def holder(run: str, **options: bool) -> str | None:
    """Try to take the lock; return who has it, or None where it was taken."""
    lease = lock.take(run, run.upper(), **options)
    return None if lease is None else str(lease["who"])


@pytest.mark.usefixtures("clock")
def test_one_play_holds_the_lock_until_it_releases_it() -> None:
    assert holder("a") is None
    assert holder("b") == "A"
    assert not lock.release("b")
    assert lock.release("a")
    assert holder("b") is None


def test_a_play_that_is_alive_keeps_the_lock(clock: list[float]) -> None:
    holder("a")
    for _ in range(100):
        clock[0] += lock.WAITING_LEASE - 1
        assert lock.renew("a")
        assert holder("b") == "A"


def test_the_lock_of_a_killed_play_expires(clock: list[float]) -> None:
    holder("a")
    clock[0] += lock.LEASE - 1
    assert holder("b") == "A"
    clock[0] += 2
    assert holder("b") is None
    assert not lock.renew("a")
    assert not lock.release("a")


@pytest.mark.parametrize("garbage", [b"\xff\x00not json", b"[]", b"{}", b'{"until": 5}', b"7"])
@pytest.mark.usefixtures("clock")
def test_a_malformed_lock_file_is_no_lock(garbage: bytes) -> None:
    Path(lock.PATH).write_bytes(garbage)
    assert holder("a") is None


def test_a_step_keeps_other_plays_out_however_long_it_takes(clock: list[float]) -> None:
    holder("a")
    with lock.holding("a"):
        clock[0] += 10 * lock.LEASE
        assert holder("b") == "A"
        assert lock.renew("a")
        assert not lock.renew("b")
    clock[0] += lock.LEASE - 1
    assert holder("b") == "A"
    clock[0] += 2
    assert holder("b") is None


def test_a_stalled_play_changes_nothing_after_another_one_had_the_lock(clock: list[float]) -> None:
    holder("a")
    clock[0] += lock.LEASE + 1
    holder("b")
    message = r"^B has taken this host's lock.*has changed nothing"
    for moment in ("while B changes the server", "after B has ended"):
        with pytest.raises(Problem, match=message), lock.holding("a"):
            pytest.fail("the step went on " + moment)
        assert holder("a", again=True) == "B"
        lock.release("b")


def test_a_stalled_play_goes_on_where_nobody_took_the_lock(clock: list[float]) -> None:
    holder("a")
    clock[0] += 100 * lock.LEASE
    with lock.holding("a"):
        pass
    assert holder("b") == "A"
    assert holder("a", again=True) is None


def test_after_a_reboot_a_play_changes_nothing_but_may_take_the_lock_again(clock: list[float]) -> None:
    holder("a")
    Path(lock.PATH).unlink()
    clock[0] = 3.0
    with pytest.raises(Problem, match="restarted during the play"), lock.holding("a"):
        pytest.fail("the step went on")
    assert holder("a", again=True) is None


@pytest.mark.usefixtures("clock")
def test_a_failed_step_leaves_the_flock() -> None:
    holder("a")
    with pytest.raises(OSError, match="disk"), lock.holding("a"):
        raise OSError("disk")
    assert lock.release("a")
    assert holder("b") is None


@pytest.mark.usefixtures("clock")
def test_the_wait_for_a_step_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    holder("a")
    monkeypatch.setattr(lock, "_OWN_STEP", 0.3)
    with busy():
        started = time.perf_counter()
        assert holder("b") == "A"
        assert lock.renew("a")
        assert not lock.release("a")
        with pytest.raises(Problem, match="An earlier step of this play is still running"), lock.holding("a"):
            pytest.fail("two steps at once")
        monkeypatch.setattr(lock, "_OWN_STEP", 60)
        with pytest.raises(Problem, match=r"^A has taken"), lock.holding("b"):
            pytest.fail("the step of another play")
        assert time.perf_counter() - started < 5


@pytest.mark.usefixtures("clock")
def test_a_step_waits_for_an_earlier_one_of_the_same_play() -> None:
    holder("a")
    order: list[str] = []
    inside, let_go = threading.Event(), threading.Event()

    def earlier() -> None:
        with lock.holding("a"):
            inside.set()
            let_go.wait(10)
            order.append("earlier")

    thread = threading.Thread(target=earlier)
    thread.start()
    inside.wait(10)
    threading.Timer(0.3, let_go.set).start()
    with lock.holding("a"):
        order.append("next")
    thread.join()
    assert order == ["earlier", "next"]


@pytest.mark.usefixtures("clock")
def test_a_short_lease_replaces_a_long_one_completely() -> None:
    lock.take("a", "A" * 300)
    lock.release("a")
    holder("b")
    assert json.loads(Path(lock.PATH).read_bytes())["who"] == "B"
