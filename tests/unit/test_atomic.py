"""Files that are written whole."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from ansible_collections.mlops.vllm_gpu.plugins.module_utils import atomic


def test_a_link_is_written_through(tmp_path: Path) -> None:
    target, link = tmp_path / "etc/real", tmp_path / ".env"
    target.parent.mkdir()
    target.write_bytes(b"old")
    link.symlink_to("etc/real")
    atomic.write(str(link), b"new", 0o640, (os.geteuid(), os.getegid()), 10**18)
    assert str(link.readlink()) == "etc/real"
    status = target.stat()
    assert (target.read_bytes(), status.st_mode & 0o777, status.st_mtime_ns) == (b"new", 0o640, 10**18)
    assert [path.name for path in target.parent.iterdir()] == ["real"]


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / ".env"
    path.write_bytes(b"old")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        atomic.write(str(path), b"new", 0o600)
    assert path.read_bytes() == b"old"
    assert [one.name for one in tmp_path.iterdir()] == [".env"]
