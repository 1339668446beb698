"""Files that others could change are not read, and no file blocks the play."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from ansible_collections.mlops.vllm_gpu.plugins.module_utils import trust
from ansible_collections.mlops.vllm_gpu.plugins.module_utils.shell import Problem

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")


@pytest.fixture
def env(tmp_path: Path) -> Path:
    path = tmp_path / "project/.env"
    path.parent.mkdir(mode=0o755)
    path.write_text("A=1\n", encoding="ascii")
    path.chmod(0o640)
    return path


def refused(path: Path, named: Path) -> None:
    with pytest.raises(Problem) as refusal:
        trust.read(str(path))
    assert str(refusal.value).startswith(f"{named} (owner ")
    assert f" root: {named}" in str(refusal.value)


def test_a_trusted_file_is_read(env: Path) -> None:
    found = trust.read(str(env))
    assert found
    assert (found.content, found.status.st_mode & 0o777) == (b"A=1\n", 0o640)
    assert trust.read(str(env.with_name("none"))) is None
    assert trust.read("/nowhere/at/all") is None


@pytest.mark.parametrize("mode", [0o642, 0o646, 0o777])
def test_a_file_that_everybody_can_write(env: Path, mode: int) -> None:
    env.chmod(mode)
    refused(env, env)


@pytest.mark.parametrize("level", [0, 1])
def test_a_directory_that_everybody_can_write_on_the_way(env: Path, level: int) -> None:
    env.parents[level].chmod(0o777)
    refused(env, env.parents[level])
    env.parents[level].chmod(0o1777)  # as /tmp: nobody can replace another user's file
    assert trust.read(str(env))


@as_root
@pytest.mark.parametrize("level", [None, 0, 1])
def test_a_path_that_another_user_owns(env: Path, level: int | None) -> None:
    named = env if level is None else env.parents[level]
    os.chown(named, 1234, -1)
    refused(env, named)


@as_root
def test_a_group_that_can_write(env: Path) -> None:
    env.chmod(0o660)
    assert trust.read(str(env))  # root's own group
    os.chown(env, -1, 1234)
    refused(env, env)
    env.chmod(0o640)
    assert trust.read(str(env))


def test_the_target_of_a_link_is_checked(env: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    target = elsewhere / "real"
    target.write_text("B=2\n", encoding="ascii")
    env.unlink()
    env.symlink_to("../elsewhere/real")
    found = trust.read(str(env))
    assert found
    assert found.content == b"B=2\n"
    elsewhere.chmod(0o777)
    refused(env, elsewhere)
    elsewhere.chmod(0o755)
    target.chmod(0o666)
    refused(env, target)


@as_root
def test_a_link_of_another_user_in_a_sticky_directory(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    link = tmp_path / "project"
    link.symlink_to("/etc")
    assert trust.check(f"{link}/hostname") == "/etc/hostname"
    os.lchown(link, 1234, -1)
    refused(link / "hostname", link)


def test_a_link_to_itself(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("a")
    with pytest.raises(Problem, match="Too many levels of symbolic links"):
        trust.read(str(tmp_path / "a"))


def test_a_path_that_is_not_a_file(env: Path) -> None:
    env.unlink()
    os.mkfifo(env)
    with pytest.raises(Problem, match="is not a regular file"):
        trust.read(str(env))
    env.unlink()
    env.mkdir()
    with pytest.raises(Problem, match="is not a regular file"):
        trust.read(str(env))
    with pytest.raises(Problem, match="Not a directory"):
        trust.read("/etc/hostname/.env")


def test_a_file_that_is_too_large(env: Path) -> None:
    env.write_bytes(b"x" * (1 << 20))
    assert trust.read(str(env))
    env.write_bytes(b"x" * (1 << 20) + b"x")
    with pytest.raises(Problem, match="is larger than 1 MiB"):
        trust.read(str(env))
