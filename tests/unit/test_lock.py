"""The lock of a host: one play at a time, also one that had stalled or whose host was restarted."""

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
    """A lock of its own, and a clock that the test sets."""
    now = [1000.0]
    monkeypatch.setattr(lock, "PATH", str(tmp_path / "lock"))
    monkeypatch.setattr(lock, "_MOMENT", 0.2)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


@contextmanager
def busy() -> Iterator[None]:
    """Another process holds the flock, as a step does that changes something."""
    descriptor = os.open(lock.PATH, os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(descriptor)


def test_one_play_holds_the_lock_until_it_gives_it_back(clock: list[float]) -> None:
    assert lock.take("a", "A") is None
    lease = lock.take("b", "B")
    assert lease is not None
    assert lease["who"] == "A"
    assert not lock.release("b")
    assert lock.release("a")
    assert lock.take("b", "B") is None
    assert clock


def test_a_play_that_is_alive_keeps_the_lock(clock: list[float]) -> None:
    lock.take("a", "A")
    for _ in range(100):
        clock[0] += lock.WAITING_LEASE - 1
        assert lock.renew("a")
        assert lock.take("b", "B") is not None


def test_the_lock_of_a_killed_play_runs_out(clock: list[float]) -> None:
    lock.take("a", "A")
    clock[0] += lock.LEASE - 1
    assert lock.take("b", "B") is not None
    clock[0] += 2
    assert lock.take("b", "B") is None
    # Whoever comes back from the dead must not go on.
    assert not lock.renew("a")
    assert not lock.release("a")


@pytest.mark.parametrize("garbage", [b"\xff\x00not json", b"[]", b"{}", b'{"until": 5}', b"7"])
def test_a_lock_file_that_is_garbage_is_no_lock(clock: list[float], garbage: bytes) -> None:
    Path(lock.PATH).write_bytes(garbage)
    assert lock.take("a", "A") is None
    assert clock


def test_a_step_keeps_every_other_play_out_however_long_it_takes(clock: list[float]) -> None:
    lock.take("a", "A")
    with lock.holding("a"):
        clock[0] += 10 * lock.LEASE
        lease = lock.take("b", "B")
        assert lease is not None
        assert lease["who"] == "A"
        assert lock.renew("a")
        assert not lock.renew("b")
    clock[0] += lock.LEASE - 1
    assert lock.take("b", "B") is not None
    clock[0] += 2
    assert lock.take("b", "B") is None


def test_a_play_that_stalled_changes_nothing_once_another_one_has_had_the_lock(clock: list[float]) -> None:
    lock.take("a", "A")
    clock[0] += lock.LEASE + 1
    lock.take("b", "B")
    for other in ("changes the server", "has ended"):
        with (
            pytest.raises(Problem, match=r"^B has taken this host's lock.*has changed nothing"),
            lock.holding("a"),
        ):
            pytest.fail("the step went on while B " + other)
        # Nor does it put anything back: the server is B's.
        lease = lock.take("a", "A", again=True)
        assert lease is not None
        assert lease["who"] == "B"
        lock.release("b")


def test_a_play_that_stalled_goes_on_where_nobody_took_the_lock(clock: list[float]) -> None:
    lock.take("a", "A")
    clock[0] += 100 * lock.LEASE
    with lock.holding("a"):
        pass
    assert lock.take("b", "B") is not None
    assert lock.take("a", "A", again=True) is None


def test_a_play_of_before_a_reboot_changes_nothing_but_may_take_the_lock_again(clock: list[float]) -> None:
    lock.take("a", "A")
    Path(lock.PATH).unlink()
    clock[0] = 3.0
    with pytest.raises(Problem, match="restarted during the play"), lock.holding("a"):
        pytest.fail("the step went on")
    assert lock.take("a", "A", again=True) is None


def test_the_next_play_may_have_the_lock_after_a_step_that_failed(clock: list[float]) -> None:
    lock.take("a", "A")
    with pytest.raises(OSError, match="disk"), lock.holding("a"):
        raise OSError("disk")
    assert lock.release("a")
    assert lock.take("b", "B") is None
    assert clock


def test_nobody_waits_for_ever_for_a_step(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    lock.take("a", "A")
    monkeypatch.setattr(lock, "_OWN_STEP", 0.3)
    with busy():
        started = time.perf_counter()
        assert lock.take("b", "B") is not None
        assert lock.renew("a")
        assert not lock.release("a")
        with pytest.raises(Problem, match="An earlier step of this play still runs"), lock.holding("a"):
            pytest.fail("two steps at once")
        monkeypatch.setattr(lock, "_OWN_STEP", 60)
        with pytest.raises(Problem, match=r"^A has taken"), lock.holding("b"):
            pytest.fail("the step of another play")
        assert time.perf_counter() - started < 5
    assert clock


def test_a_step_whose_connection_was_lost_is_waited_for_by_the_next_one(clock: list[float]) -> None:
    lock.take("a", "A")
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
    assert clock


def test_a_reader_without_the_flock_sees_a_whole_lease_at_any_time(clock: list[float]) -> None:
    lock.take("a", "A" * 300)
    lock.release("a")
    lock.take("b", "B")
    assert json.loads(Path(lock.PATH).read_bytes())["who"] == "B"
    assert clock
