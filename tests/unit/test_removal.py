"""What teardown and a change remove: the server of this directory, the role's files, leftovers of killed plays."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.mlops.vllm_gpu.plugins.module_utils import compose, leftovers, record, removal, shell
from ansible_collections.mlops.vllm_gpu.plugins.module_utils import container as containers
from ansible_collections.mlops.vllm_gpu.plugins.modules import server_removed
from hypothesis import given
from hypothesis import strategies as st

HERE, PROJECTS = "/opt/vllm-gpu", ["vllm-gpu", "vllm"]


def container(name: str = "vllm-server", **labels: str) -> dict[str, Any]:
    """Return what `docker inspect` prints; labels are `project` and `working_dir`."""
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
    }


class Engine:
    """A fake `docker`, with a list of its changes."""

    def __init__(self, *containers: dict[str, Any], stuck: bool = False, others: str = "") -> None:
        self.containers = {raw["Id"]: raw for raw in containers}
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
def test_the_server_is_removed_by_its_id(monkeypatch: pytest.MonkeyPatch, project: str, name: str) -> None:
    docker = engine(monkeypatch, container(name, project=project, working_dir=HERE + "/"))
    found = containers.find()
    containers.check_owner(found, HERE)
    removal.remove(found)
    assert docker.changes == [f"stop id-of-{name}", f"rm --force id-of-{name}", "network rm net"]


@pytest.mark.parametrize(
    ("labels", "owner"),
    [
        ({"project": "vllm-gpu", "working_dir": "/opt/other"}, "from /opt/other, not from /opt/vllm-gpu"),
        ({"project": "vllm-gpu"}, "from None, not from /opt/vllm-gpu"),
        ({"project": "chat", "working_dir": HERE}, "belongs to the Compose project chat"),
        ({}, "belongs to no Compose project"),
    ],
)
def test_a_foreign_container_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, labels: dict[str, str], owner: str
) -> None:
    docker = engine(monkeypatch, OURS, container("0a1b_vllm-server", **labels))
    with pytest.raises(shell.Problem, match=owner) as refusal:
        containers.check_owner(containers.find(), HERE)
    assert "0a1b_vllm-server" in str(refusal.value)
    assert "Nothing was stopped or removed" in str(refusal.value)
    assert docker.changes == []


def test_a_server_that_could_not_be_removed_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    engine(monkeypatch, OURS, stuck=True)
    with pytest.raises(
        shell.Problem, match=r"Not removed .*the container vllm-server\. device or resource busy"
    ):
        removal.remove(containers.find())


def test_a_network_of_another_container_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    docker = engine(monkeypatch, OURS, others="another\n")
    removal.remove(containers.find())
    assert "network rm net" not in docker.changes


def planted(directory: Path) -> list[str]:
    """Create what killed plays leave in a directory; return the names."""
    proof = {"requested": "0", "gpu": {"uuid": "GPU-1"}, "image": "i", "image_id": "sha256:1", "models": []}
    for _ in range(3):
        record.save(str(directory), {".env": b"KEY=1\n"}, proof)
    current = str((directory / ".proven/current").readlink())
    names = [
        ".proven.kept/state.old/.env", ".vllm_gpu.ab_12345", ".proven/state.stale/.env", ".proven/current.new",
        ".proven/.vllm_gpu.abcdefgh", f".proven/{current}/.vllm_gpu.abcdefgh",
    ]  # fmt: skip
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("VLLM_API_KEY=secret", encoding="utf-8")
    return names


def test_leftovers_of_killed_plays_are_found_and_nothing_else(tmp_path: Path) -> None:
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
    assert sorted(path.name for path in tmp_path.iterdir()) == [".env", ".proven", ".vllm_gpu.notes.txt"]
    for which in ("current", "previous"):
        assert record.load(str(tmp_path), which)


def test_a_link_is_removed_and_its_target_stays(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / ".vllm_gpu.abcdefgh").symlink_to("mine")
    leftovers.remove(leftovers.leftovers(str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


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
def test_only_the_users_keys_stay_in_env(content: bytes, left: bytes, users: list[str]) -> None:
    assert server_removed.users_lines(content, KEYS) == (left, users)


@given(
    st.lists(
        st.sampled_from([b"VLLM_API_KEY=planted", b"MINE=1", b"#planted", b"'", b"X='", b"\xff", b"planted"])
    )
)
def test_no_key_of_the_role_stays_in_any_file(lines: list[bytes]) -> None:
    left, _users = server_removed.users_lines(b"\n".join(lines), KEYS)
    # All within the quotes of a user's key is the user's.
    if b"X='" not in lines:
        assert b"planted" not in left


def test_the_users_keys_stay_in_a_private_env(tmp_path: Path) -> None:
    env, real = tmp_path / ".env", tmp_path / "real"
    real.write_text("VLLM_API_KEY=s\nMINE=1\n", encoding="utf-8")
    env.symlink_to("real")
    before = real.read_bytes()
    removed, kept = [f"the role's keys and the comments in {env}"], [f"MINE in {env}"]

    def remove(*, check_mode: bool = False) -> tuple[list[str], list[str]]:
        return server_removed.remove_env(str(tmp_path), KEYS, check_mode=check_mode)

    assert remove(check_mode=True) == (removed, kept)
    assert real.read_bytes() == before
    assert remove() == (removed, kept)
    assert env.is_symlink()
    assert (real.read_bytes(), real.stat().st_mode & 0o777) == (b"MINE=1\n", 0o600)
    assert remove() == ([], kept)
    real.write_text("VLLM_API_KEY=s\n", encoding="utf-8")
    assert remove() == (sorted([str(env), str(real)]), [])
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_the_role_never_wrote_to(tmp_path: Path) -> None:
    for name in (".env", "docker-compose.serving.yml"):
        (tmp_path / name).touch()
    assert not server_removed.is_ours(str(tmp_path))
    (tmp_path / ".vllm_gpu.abcdefgh").touch()
    assert server_removed.is_ours(str(tmp_path))


@pytest.mark.parametrize(
    ("code", "out", "err", "reason"),
    [
        (
            1,
            "",
            "could not select device driver",
            "select device driver\n.*Install the NVIDIA Container Toolkit",
        ),
        (1, "a reason", "", "It reported: a reason"),
        (1, "", "", "nothing, with exit code 1"),
        (124, "", "Container vllm-server Recreate", "within 5 s, and was stopped.*Recreate"),
        (None, "", "no answer in 35 s", "within 5 s, and was stopped"),
    ],
)
def test_the_message_quotes_compose(
    monkeypatch: pytest.MonkeyPatch, code: int | None, out: str, err: str, reason: str
) -> None:
    monkeypatch.setattr(shell, "run", lambda *_words, **_options: shell.Output(code, out, err))
    with pytest.raises(shell.Problem, match=reason):
        compose.up("vllm-gpu", HERE, always=False, timeout=5)


def test_compose_gets_no_variable_that_overrides_env(monkeypatch: pytest.MonkeyPatch) -> None:
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
