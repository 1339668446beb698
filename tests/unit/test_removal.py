"""What teardown and a change may remove: the server of this directory, the role's files, what killed plays left."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.mlops.vllm_gpu.plugins.module_utils import (
    compose,
    leftovers,
    record,
    removal,
    shell,
)
from ansible_collections.mlops.vllm_gpu.plugins.module_utils import container as containers
from ansible_collections.mlops.vllm_gpu.plugins.modules import server_removed
from hypothesis import given
from hypothesis import strategies as st

HERE, PROJECTS = "/opt/vllm-gpu", ["vllm-gpu", "vllm"]


def container(name: str = "vllm-server", **labels: str) -> dict[str, Any]:
    """As `docker inspect` prints it; labels are `project` and `working_dir`."""
    names = {"project": "project", "working_dir": "project.working_dir"}
    return {
        "Id": f"id-of-{name}",
        "Name": f"/{name}",
        "Image": "sha256:1",
        "State": {"Status": "running", "ExitCode": 0, "StartedAt": "2026-01-01T00:00:00Z"},
        "HostConfig": {},
        "Config": {
            "Image": "vllm/vllm-openai:v1",
            "Labels": {f"com.docker.compose.{names[key]}": value for key, value in labels.items()},
        },
        "Mounts": [
            {"Type": "volume", "Name": "vllm_cache", "Source": "/var/lib/docker/volumes/vllm_cache/_data"},
            {"Type": "bind", "Source": "/srv/models"},
        ],
    }


class Engine:
    """What docker answers, and what it was told to change."""

    def __init__(self, *containers: dict[str, Any], stuck: bool = False, others: str = "") -> None:
        self.containers = {one["Id"]: one for one in containers}
        self.stuck, self.others = stuck, others
        self.changes: list[str] = []

    def __call__(self, argv: Sequence[str], **_options: object) -> shell.Output:
        words = list(argv[1:])
        if words[0] == "ps":
            return shell.Output(0, self.others if "network=net" in words else "\n".join(self.containers), "")
        if words[0] == "inspect":
            return shell.Output(0, json.dumps([self.containers[words[-1]]]), "")
        if words[:2] == ["network", "ls"]:
            return shell.Output(0, "net\n", "")
        self.changes.append(" ".join(words))
        if self.stuck:
            return shell.Output(1, "", "device or resource busy")
        if words[0] == "rm":
            del self.containers[words[-1]]
        return shell.Output(0, "", "")


def engine(monkeypatch: pytest.MonkeyPatch, *containers: dict[str, Any], **how: Any) -> Engine:  # noqa: ANN401
    made = Engine(*containers, **how)
    monkeypatch.setattr(shell, "run", made)
    return made


OURS = container(project="vllm-gpu", working_dir=HERE)


@pytest.mark.parametrize("project", PROJECTS)
@pytest.mark.parametrize("name", ["vllm-server", "0a1b2c_vllm-server"])
def test_our_server_is_removed_by_its_id(monkeypatch: pytest.MonkeyPatch, project: str, name: str) -> None:
    docker = engine(monkeypatch, container(name, project=project, working_dir=HERE + "/"))
    found = containers.find()
    containers.check_owner(found, HERE)
    removal.remove(found)
    assert docker.changes == [f"stop id-of-{name}", f"rm --force id-of-{name}", "network rm net"]


@pytest.mark.parametrize(
    ("labels", "owner"),
    [
        (
            {"project": "vllm-gpu", "working_dir": "/opt/elsewhere"},
            "from /opt/elsewhere, not from /opt/vllm-gpu",
        ),
        ({"project": "vllm-gpu"}, "from None, not from /opt/vllm-gpu"),
        ({"project": "chat", "working_dir": HERE}, "belongs to the Compose project chat"),
        ({}, "belongs to no Compose project"),
    ],
)
def test_a_container_of_somebody_else_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, labels: dict[str, str], owner: str
) -> None:
    docker = engine(monkeypatch, OURS, container("0a1b_vllm-server", **labels))
    with pytest.raises(shell.Problem, match=owner) as refusal:
        containers.check_owner(containers.find(), HERE)
    assert "0a1b_vllm-server" in str(refusal.value)
    assert "Nothing was stopped or removed" in str(refusal.value)
    assert docker.changes == []


def test_a_server_that_is_still_there_is_not_called_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    engine(monkeypatch, OURS, stuck=True)
    with pytest.raises(shell.Problem, match=r"still a container vllm-server.*device or resource busy"):
        removal.remove(containers.find())


def test_an_engine_that_gives_no_answer_is_not_one_without_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        shell, "run", lambda *_words, **_options: shell.Output(1, "", "Cannot connect to the Docker daemon")
    )
    with pytest.raises(shell.Problem, match="can't be reached"):
        containers.find()


def test_a_network_that_another_container_belongs_to_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    docker = engine(monkeypatch, OURS, others="another\n")
    removal.remove(containers.find())
    assert "network rm net" not in docker.changes


def planted(directory: Path) -> list[str]:
    """Leave in a directory what killed plays leave there; return the names."""
    for number in (1, 2, 3):
        record.save(
            str(directory),
            {".env": b"KEY=1\n"},
            {
                "requested": "0",
                "gpu": {"uuid": f"GPU-{number}"},
                "image": "i",
                "image_id": "sha256:1",
                "models": [],
            },
        )
    current = str((directory / ".proven/current").readlink())
    names = [
        ".proven.kept/state.old/.env", ".vllm_gpu.ab_12345", ".proven/state.stale/.env", ".proven/current.new",
        ".proven/.vllm_gpu.abcdefgh", f".proven/{current}/.vllm_gpu.abcdefgh",
    ]  # fmt: skip
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("VLLM_API_KEY=secret", encoding="utf-8")
    return names


def test_what_killed_plays_left_is_found_and_nothing_else(tmp_path: Path) -> None:
    assert leftovers.leftovers(str(tmp_path / "missing")) == []
    (tmp_path / ".env").touch()
    (tmp_path / ".vllm_gpu.notes.txt").touch()
    names = planted(tmp_path)
    found = leftovers.leftovers(str(tmp_path))
    assert sorted(found) == sorted(
        str(tmp_path / name.replace("/state.old/.env", "").replace("/state.stale/.env", "/state.stale"))
        for name in names
    )
    leftovers.remove([*found, str(tmp_path / "gone")])
    assert leftovers.leftovers(str(tmp_path)) == []
    assert sorted(one.name for one in tmp_path.iterdir()) == [".env", ".proven", ".vllm_gpu.notes.txt"]
    for which in ("current", "previous"):
        assert record.load(str(tmp_path), which)


def test_a_link_is_removed_and_not_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / ".vllm_gpu.abcdefgh").symlink_to("mine")
    leftovers.remove(leftovers.leftovers(str(tmp_path)))
    assert [one.name for one in tmp_path.iterdir()] == ["mine"]


KEYS = ["GPU_DEVICE_ID", "VLLM_API_KEY"]


@pytest.mark.parametrize(
    ("content", "left", "users"),
    [
        (b"GPU_DEVICE_ID=0\nVLLM_API_KEY=s\n# VLLM_API_KEY=old\n", b"", []),
        (b"A=1\r\nVLLM_API_KEY=s\nexport B='x\ny'\nA=2", b"A=1\r\nexport B='x\ny'\nA=2\n", ["A", "B"]),
        (b"VLLM_API_KEY='never closed\nsecret-too\nA=1\n", b"A=1\n", ["A"]),
        (b"export VLLM_API_KEY : s\n\xff=1\nA=\xff\n", b"A=\xff\n", ["A"]),
        (b"", b"", []),
    ],
)
def test_of_env_only_the_keys_of_the_user_stay(content: bytes, left: bytes, users: list[str]) -> None:
    assert server_removed.users_lines(content, KEYS) == (left, users)


@given(
    st.lists(
        st.sampled_from([b"VLLM_API_KEY=planted", b"MINE=1", b"#planted", b"'", b"X='", b"\xff", b"planted"])
    )
)
def test_no_key_of_the_role_stays_whatever_a_person_wrote(lines: list[bytes]) -> None:
    left, _users = server_removed.users_lines(b"\n".join(lines), KEYS)
    # A quote that a user's key opens makes all up to its end the user's.
    if b"X='" not in lines:
        assert b"planted" not in left


def test_env_keeps_its_users_keys_in_a_file_for_nobody_else(tmp_path: Path) -> None:
    env, real = tmp_path / ".env", tmp_path / "real"
    real.write_text("VLLM_API_KEY=s\nMINE=1\n", encoding="utf-8")
    env.symlink_to("real")
    before = real.read_bytes()
    gone = [f"the role's keys and the comments in {env}"]
    assert server_removed.remove_env(str(tmp_path), KEYS, check_mode=True) == (gone, [f"MINE in {env}"])
    assert real.read_bytes() == before
    assert server_removed.remove_env(str(tmp_path), KEYS, check_mode=False) == (gone, [f"MINE in {env}"])
    assert (env.read_bytes(), real.read_bytes(), env.stat().st_mode & 0o777) == (
        b"MINE=1\n",
        b"MINE=1\n",
        0o600,
    )
    assert server_removed.remove_env(str(tmp_path), KEYS, check_mode=False) == ([], [f"MINE in {env}"])
    real.write_text("VLLM_API_KEY=s\n", encoding="utf-8")
    assert server_removed.remove_env(str(tmp_path), KEYS, check_mode=False) == (
        sorted([str(env), str(real)]),
        [],
    )
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_the_role_never_wrote_to_is_not_its_own(tmp_path: Path) -> None:
    for name in (".env", "docker-compose.serving.yml"):
        (tmp_path / name).touch()
    assert not server_removed.is_ours(str(tmp_path))
    (tmp_path / ".vllm_gpu.abcdefgh").touch()
    assert server_removed.is_ours(str(tmp_path))


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (
            shell.Output(1, "", "could not select device driver"),
            "It reported: could not select device driver\n.*Install the NVIDIA Container Toolkit",
        ),
        (shell.Output(1, "said so", ""), "It reported: said so"),
        (shell.Output(1, "", ""), "nothing, with exit code 1"),
        (shell.Output(124, "", "Container vllm-server Recreate"), "within 5 s, and was stopped.*Recreate"),
        (shell.Output(None, "", "no answer in 35 s"), "within 5 s, and was stopped"),
    ],
)
def test_what_compose_reported_is_in_the_message(
    monkeypatch: pytest.MonkeyPatch, output: shell.Output, reason: str
) -> None:
    monkeypatch.setattr(shell, "run", lambda *_words, **_options: output)
    with pytest.raises(shell.Problem, match=reason):
        compose.up("vllm-gpu", HERE, always=False, timeout=5)


def test_compose_gets_nothing_that_could_beat_env(monkeypatch: pytest.MonkeyPatch) -> None:
    called: dict[str, Any] = {}

    def run(argv: Sequence[str], **options: Any) -> shell.Output:  # noqa: ANN401
        called.update(options, argv=argv)
        return shell.Output(0, "", "")

    monkeypatch.setattr(shell, "run", run)
    for key in ("GPU_DEVICE_ID", "COMPOSE_FILE", "COMPOSE_PROFILES", "VLLM_START_PERIOD"):
        monkeypatch.setenv(key, "7")
    compose.up("vllm-gpu", HERE, always=True, timeout=5)
    assert "7" not in called["env"].values()
    assert {"PATH", "HOME"} <= set(called["env"])
    assert called["argv"][-1] == "--force-recreate"
    assert called["timeout"] > 5
