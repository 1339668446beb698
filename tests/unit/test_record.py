"""Records of proven states: written completely, and checked when they are read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.mlops.vllm_gpu.plugins.module_utils import atomic, record
from ansible_collections.mlops.vllm_gpu.plugins.module_utils.shell import Problem

RECORD = {"requested": "0", "gpu": {"uuid": "GPU-1"}, "image": "i", "image_id": "sha256:1", "models": ["m"]}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    record.save(str(tmp_path), {".env": b"A=1\n"}, RECORD)
    return tmp_path


def test_a_saved_state_is_loaded_unchanged(project: Path) -> None:
    assert record.load(str(project), "current") == record.Proven({".env": b"A=1\n"}, RECORD)
    assert record.load(str(project), "previous") is None
    assert record.load(str(project / "nowhere"), "current") is None


def unusable(project: Path, why: str) -> None:
    with pytest.raises(Problem) as problem:
        record.load(str(project), "current")
    assert why in str(problem.value)
    assert f"`rm -rf {project}/.proven/current`" in str(problem.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"7", b'"text"', b"null", b"\xff\xfe"])
def test_a_record_that_is_malformed(project: Path, content: bytes) -> None:
    (project / ".proven/current/record.json").write_bytes(content)
    unusable(project, "its record.json is not JSON of the expected form")


@pytest.mark.parametrize("key", sorted(RECORD))
def test_a_record_that_lacks_a_key(project: Path, key: str) -> None:
    content = "{" + ",".join(f'"{name}": 1' for name in RECORD if name != key) + "}"
    (project / ".proven/current/record.json").write_text(content, encoding="ascii")
    unusable(project, f"{key} is missing in it")


@pytest.mark.parametrize("name", ["record.json", "gpu"])
def test_a_record_without_a_file(project: Path, name: str) -> None:
    (project / ".proven/current" / name).unlink()
    unusable(project, f"{name} is missing in it")


@pytest.mark.parametrize("target", ["/tmp", "..", ".", "../elsewhere", "state.x/../.."])  # noqa: S108
def test_a_link_that_leads_elsewhere(project: Path, target: str) -> None:
    link = project / ".proven/current"
    link.unlink()
    link.symlink_to(target)
    unusable(project, f"it leads to {target}")


def test_a_link_to_a_missing_directory(project: Path) -> None:
    link = project / ".proven/current"
    (project / ".proven" / link.readlink()).rename(project / "elsewhere")
    unusable(project, "No such file or directory")


def test_a_directory_in_place_of_a_link(project: Path) -> None:
    link = project / ".proven/current"
    state = project / ".proven" / link.readlink()
    link.unlink()
    state.rename(link)
    unusable(project, "it is not a symbolic link")


@pytest.mark.parametrize("path", [".", ".proven", ".proven/current/", ".proven/current/.env"])
def test_a_record_that_others_could_write(project: Path, path: str) -> None:
    (project / path).chmod((project / path).stat().st_mode | 0o002)
    with pytest.raises(Problem, match="can be changed by others than root"):
        record.load(str(project), "current")


FILES = {"docker-compose.serving.yml": b"services: {}\n", ".env": b"GPU_DEVICE_ID=0\n\xff\r\n"}


def load(directory: Path, which: str) -> record.Proven:
    proven = record.load(str(directory), which)
    assert proven is not None
    return proven


def proof(number: int) -> dict[str, Any]:
    return {**RECORD, "number": number, "requested": "1", "gpu": {"uuid": f"GPU-{number}"}}


def test_the_last_two_states_are_kept(tmp_path: Path) -> None:
    for number in range(4):
        record.save(str(tmp_path), {**FILES, ".env": FILES[".env"] * (number + 1)}, proof(number))
    assert load(tmp_path, "current").record == proof(3)
    assert load(tmp_path, "current").files[".env"] == FILES[".env"] * 4
    assert load(tmp_path, "previous").record == proof(2)
    assert (tmp_path / ".proven/current/gpu").read_text(encoding="utf-8") == "1 GPU-3\n"
    # Older ones, which hold secrets, are removed.
    assert len(list((tmp_path / ".proven").glob("state.*"))) == 2
    for path in (tmp_path / ".proven").rglob("*"):
        if path.is_file() and not path.is_symlink():
            assert path.stat().st_mode & 0o777 == 0o600


def test_saving_the_same_state_again_keeps_the_previous_one(tmp_path: Path) -> None:
    for number in (1, 2):
        record.save(str(tmp_path), FILES, proof(number))
    record.save(str(tmp_path), {**FILES, ".env": b"# a note"}, proof(2), again=True)
    assert load(tmp_path, "current").files[".env"] == b"# a note"
    assert load(tmp_path, "previous").record == proof(1)


def test_a_crash_while_saving_leaves_the_old_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record.save(str(tmp_path), FILES, proof(1))

    def crash(*_arguments: object) -> None:
        raise KeyboardInterrupt

    for name in ("point", "write"):
        with monkeypatch.context() as patch:
            patch.setattr(atomic, name, crash)
            with pytest.raises(KeyboardInterrupt):
                record.save(str(tmp_path), FILES, proof(2))
        assert load(tmp_path, "current").record == proof(1)


def test_writing_replaces_the_target_of_a_link(tmp_path: Path) -> None:
    target, link = tmp_path / "etc/real", tmp_path / ".env"
    target.parent.mkdir()
    target.write_bytes(b"old")
    link.symlink_to("etc/real")
    atomic.write(str(link), b"new", 0o640, (os.geteuid(), os.getegid()), 10**18)
    assert str(link.readlink()) == "etc/real"
    status = target.stat()
    assert (target.read_bytes(), status.st_mode & 0o777, status.st_mtime_ns) == (b"new", 0o640, 10**18)
    assert [path.name for path in target.parent.iterdir()] == ["real"]


def test_a_failed_write_leaves_only_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / ".env"
    path.write_bytes(b"old")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        atomic.write(str(path), b"new", 0o600)
    assert path.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == [".env"]
