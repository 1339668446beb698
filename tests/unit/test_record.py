"""What was proven: written whole, read with distrust."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from ansible_collections.mlops.vllm_gpu.plugins.module_utils import record
from ansible_collections.mlops.vllm_gpu.plugins.module_utils.shell import Problem

RECORD = {"requested": "0", "gpu": {"uuid": "GPU-1"}, "image": "i", "image_id": "sha256:1", "models": ["m"]}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    record.save(str(tmp_path), {".env": b"A=1\n"}, RECORD)
    return tmp_path


def test_there_may_be_none(tmp_path: Path, project: Path) -> None:
    assert record.load(str(tmp_path / "nowhere"), "current") is None
    assert record.load(str(project), "previous") is None


def test_what_was_kept_comes_back(project: Path) -> None:
    assert record.load(str(project), "current") == record.Proven({".env": b"A=1\n"}, RECORD)


def unusable(project: Path, why: str) -> None:
    with pytest.raises(Problem) as problem:
        record.load(str(project), "current")
    assert why in str(problem.value)
    assert f"`rm -rf {project}/.proven/current`" in str(problem.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"7", b'"text"', b"null", b"\xff\xfe"])
def test_a_record_that_is_no_record(project: Path, content: bytes) -> None:
    (project / ".proven/current/record.json").write_bytes(content)
    unusable(project, "its record.json is not JSON of the expected form")


@pytest.mark.parametrize("key", sorted(RECORD))
def test_a_record_that_lacks_something(project: Path, key: str) -> None:
    content = "{" + ",".join(f'"{name}": 1' for name in RECORD if name != key) + "}"
    (project / ".proven/current/record.json").write_text(content, encoding="ascii")
    unusable(project, f"{key} is missing in it")


@pytest.mark.parametrize("name", ["record.json", "gpu"])
def test_a_record_without_a_file(project: Path, name: str) -> None:
    (project / ".proven/current" / name).unlink()
    unusable(project, f"{name} is missing in it")


@pytest.mark.parametrize("target", ["/tmp", "..", ".", "../elsewhere", "state.x/../.."])  # noqa: S108
def test_a_record_that_leads_elsewhere(project: Path, target: str) -> None:
    link = project / ".proven/current"
    link.unlink()
    link.symlink_to(target)
    unusable(project, f"it leads to {target}")


def test_a_record_whose_directory_is_gone(project: Path) -> None:
    link = project / ".proven/current"
    (project / ".proven" / link.readlink()).rename(project / "elsewhere")
    unusable(project, "No such file or directory")


def test_a_record_in_the_place_of_a_link(project: Path) -> None:
    link = project / ".proven/current"
    state = project / ".proven" / link.readlink()
    link.unlink()
    state.rename(link)
    unusable(project, "it is no symbolic link")


@pytest.mark.parametrize("path", [".", ".proven", ".proven/current/", ".proven/current/.env"])
def test_a_record_that_others_could_write(project: Path, path: str) -> None:
    (project / path).chmod((project / path).stat().st_mode | 0o002)
    with pytest.raises(Problem, match="can be changed by others than root"):
        record.load(str(project), "current")


def test_a_link_is_written_through(tmp_path: Path) -> None:
    target, link = tmp_path / "etc/real", tmp_path / ".env"
    target.parent.mkdir()
    target.write_bytes(b"old")
    link.symlink_to("etc/real")
    record.write_whole(str(link), b"new", 0o640, (os.geteuid(), os.getegid()), 10**18)
    assert str(link.readlink()) == "etc/real"
    status = target.stat()
    assert (target.read_bytes(), status.st_mode & 0o777, status.st_mtime_ns) == (b"new", 0o640, 10**18)
    assert [path.name for path in target.parent.iterdir()] == ["real"]
