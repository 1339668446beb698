"""What protects a host: the record of what was proven, and the lock."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.mlops.vllm_gpu.plugins.module_utils import lock, record

FILES = {"docker-compose.serving.yml": b"services: {}\n", ".env": b"GPU_DEVICE_ID=0\n\xff\r\n"}


def kept(directory: Path, which: str) -> record.Proven:
    proven = record.load(str(directory), which)
    assert proven is not None
    return proven


def proof(number: int) -> dict[str, Any]:
    return {"number": number, "requested": "1", "gpu": {"uuid": f"GPU-{number}"}}


def test_nothing_was_proven_yet(tmp_path: Path) -> None:
    assert record.load(str(tmp_path), "current") is None
    assert record.load(str(tmp_path), "previous") is None


def test_files_come_back_byte_for_byte_and_the_last_two_are_kept(tmp_path: Path) -> None:
    for number in range(4):
        record.save(str(tmp_path), {**FILES, ".env": FILES[".env"] * (number + 1)}, proof(number))
    assert kept(tmp_path, "current").record == proof(3)
    assert kept(tmp_path, "current").files[".env"] == FILES[".env"] * 4
    assert kept(tmp_path, "previous").record == proof(2)
    # For the referee, which reads no JSON: which card the index meant.
    assert (tmp_path / ".proven/current/gpu").read_text(encoding="utf-8") == "1 GPU-3\n"
    # Older ones, which hold secrets too, are gone.
    assert len(list((tmp_path / ".proven").glob("state.*"))) == 2
    for path in (tmp_path / ".proven").rglob("*"):
        if path.is_file() and not path.is_symlink():
            assert path.stat().st_mode & 0o777 == 0o600


def test_the_same_state_once_more_keeps_the_previous_one(tmp_path: Path) -> None:
    for number in (1, 2):
        record.save(str(tmp_path), FILES, proof(number))
    record.save(str(tmp_path), {**FILES, ".env": b"# a note"}, proof(2), again=True)
    assert kept(tmp_path, "current").files[".env"] == b"# a note"
    assert kept(tmp_path, "previous").record == proof(1)


@pytest.mark.parametrize("broken", ["{", "[]", ""])
def test_a_record_that_cannot_be_read_is_none(tmp_path: Path, broken: str) -> None:
    record.save(str(tmp_path), FILES, proof(1))
    (tmp_path / ".proven/current/record.json").write_text(broken, encoding="utf-8")
    assert record.load(str(tmp_path), "current") is None


def test_a_crash_while_saving_leaves_the_old_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record.save(str(tmp_path), FILES, proof(1))

    def crash(*_arguments: object) -> None:
        raise KeyboardInterrupt

    for name in ("_point", "write_whole"):
        with monkeypatch.context() as patch:
            patch.setattr(record, name, crash)
            with pytest.raises(KeyboardInterrupt):
                record.save(str(tmp_path), FILES, proof(2))
        assert kept(tmp_path, "current").record == proof(1)


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / ".env"
    path.write_bytes(b"old")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        record.write_whole(str(path), b"new", 0o600)
    assert path.read_bytes() == b"old"
    assert [one.name for one in tmp_path.iterdir()] == [".env"]


@pytest.fixture
def clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A lock of its own, and a clock that the test sets."""
    now = [1000.0]
    monkeypatch.setattr(lock, "PATH", str(tmp_path / "lock"))
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


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
        clock[0] += lock.RENEWAL - 1
        assert lock.renew("a")
        assert lock.take("b", "B") is not None


def test_a_look_before_a_long_step_keeps_the_lock_through_it(clock: list[float]) -> None:
    lock.take("a", "A")
    assert lock.renew("a", lock.STEP + 30)
    clock[0] += lock.STEP + 29
    assert lock.take("b", "B") is not None
    clock[0] += 2
    assert lock.take("b", "B") is None


def test_the_lock_of_a_killed_play_runs_out(clock: list[float]) -> None:
    lock.take("a", "A")
    clock[0] += lock.STEP + 29
    assert lock.take("b", "B") is not None
    clock[0] += 2
    assert lock.take("b", "B") is None
    # Whoever comes back from the dead must not go on.
    assert not lock.renew("a")
    assert not lock.release("a")


def test_a_lock_file_that_is_garbage_is_no_lock(clock: list[float]) -> None:
    Path(lock.PATH).write_bytes(b"\xff\x00not json")
    assert lock.take("a", "A") is None
    assert clock
