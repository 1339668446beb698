"""The snapshot of a host before a change, and its restoration."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.mlops.vllm_gpu.plugins.module_utils import (
    atomic,
    container,
    engine_api,
    record,
    restoration,
    shell,
    snapshot,
)
from ansible_collections.mlops.vllm_gpu.plugins.module_utils import docker as docker_command

from tests.unit.test_engine_api import inspected

OLD, NEW = "a" * 64, "b" * 64
PROJECT = "com.docker.compose.project"
MISSING = shell.Output(1, "", "Error: No such container: x")


class Docker:
    """A Docker Engine with a few containers, images and networks; `done` lists the changes."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.containers: dict[str, dict[str, Any]] = {}
        self.images = {"vllm:1": "sha256:1", "sha256:1": "sha256:1"}
        self.networks: list[dict[str, Any]] = []
        self.done: list[str] = []

    def add(
        self, id_: str, name: str = "vllm-server", *, running: bool = True, where: str = ""
    ) -> dict[str, Any]:
        labels = {f"{PROJECT}.working_dir": where or str(self.directory)}
        config = {"Labels": labels, "Image": "vllm:1", "StopTimeout": 3}
        raw = inspected(config=config, Id=id_, Name=f"/{name}")
        status = "running" if running else "exited"
        raw["State"] = {"Running": running, "Status": status, "ExitCode": 0, "StartedAt": ""}
        self.containers[id_] = raw
        return raw

    def find(self, name: str) -> dict[str, Any] | None:
        names = (raw for raw in self.containers.values() if name in (raw["Id"], raw["Name"].lstrip("/")))
        return next(names, None)

    def run(self, argv: list[str], timeout: float = 0, **_: object) -> shell.Output:  # noqa: PLR0911
        verb, *words = argv[1:]
        if verb == "inspect":
            raw = self.find(words[-1])
            return shell.Output(0, json.dumps([raw]), "") if raw else MISSING
        if verb == "ps":
            pattern = words[-1].removeprefix("name=")
            ids = [id_ for id_, raw in self.containers.items() if re.search(pattern, raw["Name"])]
            return shell.Output(0, "\n".join(ids), "")
        if verb == "image" and words[0] == "inspect":
            found = self.images.get(words[-1])
            return shell.Output(0, found, "") if found else shell.Output(1, "", "No such image: x")
        if verb == "network" and words[0] == "ls":
            rows = [f"{row['Id']} {row['Name']} {row['Labels'].get(PROJECT, '')}" for row in self.networks]
            return shell.Output(0, "\n".join(rows), "")
        if verb == "network" and words[0] == "inspect":
            return shell.Output(0, json.dumps([row for row in self.networks if row["Id"] == words[1]]), "")
        if verb == "volume":
            return shell.Output(0, "vllm-gpu_cache\n", "")
        self.done.append(" ".join(argv[1:]))
        if verb == "rm":
            del self.containers[words[-1]]
        if verb == "network":
            self.networks = [row for row in self.networks if row["Id"] != words[1]]
        if verb == "stop":
            assert timeout > 3
        return shell.Output(0, "", "")

    def create(self, raw: dict[str, Any], name: str, image: str) -> str:
        self.done.append(f"create {name} from {image} as {raw['Id'][0]}")
        return NEW


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Docker:
    fake = Docker(tmp_path / "new/project")
    monkeypatch.setattr(shell, "run", fake.run)
    monkeypatch.setattr(engine_api, "create", fake.create)
    monkeypatch.setattr(engine_api, "create_network", lambda row: fake.done.append(f"create {row['Name']}"))
    return fake


def attributes(path: Path) -> tuple[object, ...]:
    """Return all of a file but its inode."""
    status = path.stat()
    link = str(path.readlink()) if path.is_symlink() else None
    return link, path.read_bytes(), status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns


@pytest.fixture
def project(docker: Docker) -> Path:
    docker.directory.mkdir(parents=True)
    for name, mode in zip(snapshot.FILES, (0o644, 0o640, 0o700), strict=True):
        path = docker.directory / name
        path.write_text(f"the old {name}", encoding="ascii")
        path.chmod(mode)
        os.utime(path, (10**9, 10**9))
    if os.geteuid() == 0:
        os.chown(docker.directory / ".env", 0, 1234)
    return docker.directory


def take(project: Path, *, proven: bool = True, images: tuple[str, ...] = ("vllm:1",)) -> dict[str, Any]:
    saved = snapshot.take(str(project), list(images), proven=proven)
    snapshot.save(saved)
    return saved


def restore_engine(saved: dict[str, Any]) -> restoration.Outcome:
    return restoration.restore_engine(saved, restoration.Outcome([], [], []))


def overwrite(path: Path) -> None:
    atomic.write(str(path), b"new", 0o600, (0, 0) if os.geteuid() == 0 else None)


@pytest.mark.parametrize(
    "change",
    [
        overwrite,
        Path.unlink,
        lambda path: path.chmod(0o604),
        lambda path: os.chown(path, -1, 4321) if os.geteuid() == 0 else path.chmod(0o600),
        lambda path: (path.unlink(), path.symlink_to("/etc/hostname")),
    ],
    ids=["written", "removed", "mode", "group", "link"],
)
@pytest.mark.parametrize("name", snapshot.FILES)
def test_a_file_is_restored_with_all_its_attributes(
    project: Path, name: str, change: Callable[[Path], object]
) -> None:
    before = {path.name: attributes(path) for path in project.iterdir()}
    saved = take(project)
    assert restoration.restore_files(saved) == restoration.Outcome([], [], [])
    change(project / name)
    outcome = restoration.restore_files(snapshot.load(str(project)) or {})
    assert {path.name: attributes(path) for path in project.iterdir() if path.is_file()} == before
    assert outcome == restoration.Outcome([str(project / name)], [], [])


def test_a_file_that_did_not_exist_is_removed(project: Path) -> None:
    path = project / "check_gpu_allocation.sh"
    path.unlink()
    saved = take(project)
    overwrite(path)
    assert restoration.restore_files(saved) == restoration.Outcome([], [str(path)], [])
    assert not path.exists()


@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_stays_and_its_target_is_restored(project: Path, dangling: bool) -> None:  # noqa: FBT001
    real = project.parent / "real"
    (project / ".env").rename(real)
    (project / ".env").symlink_to("../real")
    if dangling:
        real.unlink()
    before = None if dangling else attributes(project / ".env")
    saved = take(project)
    overwrite(project / ".env")
    assert real.read_bytes() == b"new"
    restoration.restore_files(saved)
    assert str((project / ".env").readlink()) == "../real"
    assert real.exists() != dangling
    assert dangling or attributes(project / ".env") == before


def test_a_directory_that_did_not_exist_is_removed(docker: Docker) -> None:
    project = docker.directory
    saved = take(project)
    for name in snapshot.FILES:
        overwrite(project / name)
    (project / ".vllm_gpu.killed").touch()
    (project / ".proven/state.half").mkdir()
    restoration.restore_files(saved)
    assert snapshot.drop(str(project)) == [f"{project}/.proven", str(project), str(project.parent)]
    assert not project.parent.exists()


def test_files_of_others_stay(docker: Docker) -> None:
    saved = take(docker.directory)
    (docker.directory / "notes.txt").touch()
    restoration.restore_files(saved)
    assert snapshot.drop(str(docker.directory)) == [f"{docker.directory}/.proven"]
    assert [path.name for path in docker.directory.iterdir()] == ["notes.txt"]


def test_only_root_can_read_a_snapshot(project: Path) -> None:
    take(project)
    path = Path(snapshot.path_in(str(project)))
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    path.parent.chmod(0o777)
    with pytest.raises(shell.Problem, match="can be changed by others than root"):
        snapshot.load(str(project))


def test_a_snapshot_that_cannot_be_read_is_a_problem(project: Path) -> None:
    take(project)
    Path(snapshot.path_in(str(project))).write_text("{", encoding="ascii")
    with pytest.raises(shell.Problem, match=r"Remove it with `rm .*before.json`"):
        snapshot.load(str(project))


def recorded(project: Path) -> None:
    proof = {"requested": "0", "gpu": {"uuid": "u"}, "image": "vllm:1", "image_id": "sha256:1", "models": []}
    record.save(str(project), {".env": (project / ".env").read_bytes()}, proof)


def test_the_links_to_proven_states_are_restored(project: Path) -> None:
    recorded(project)
    saved = take(project)
    directory = str(project / ".proven")
    before = atomic.target(directory, "current")
    (project / ".proven/state.half").mkdir()
    atomic.point(directory, "previous", before or "")
    atomic.point(directory, "current", "state.half")
    restoration.restore_files(saved)
    assert (atomic.target(directory, "current"), atomic.target(directory, "previous")) == (before, None)


def test_the_snapshot_of_an_interrupted_change_counts(project: Path, docker: Docker) -> None:
    docker.add(OLD)
    take(project)
    before = attributes(project / ".env")
    snapshot.note_written(str(project), {str(project / ".env"): b"new"})
    overwrite(project / ".env")
    docker.images["vllm:1"] = "sha256:2"
    del docker.containers[OLD]
    docker.add(NEW)
    saved = take(project, proven=False, images=("vllm:1", "vllm:3"))
    assert saved["interrupted"]
    assert saved["container"]["Id"] == OLD
    assert saved["images"] == {"vllm:1": "sha256:1", "vllm:3": None}
    restoration.restore_files(saved)
    assert attributes(project / ".env") == before


def test_edits_after_an_interrupted_change_stay(project: Path, docker: Docker) -> None:
    docker.add(OLD)
    take(project)
    snapshot.note_written(str(project), {str(project / ".env"): b"new"})
    overwrite(project / ".env")
    (project / ".env").write_bytes(b"new, and what I want")
    edited = attributes(project / ".env")
    saved = take(project, proven=False)
    overwrite(project / ".env")
    restoration.restore_files(saved)
    assert attributes(project / ".env") == edited


def test_files_of_an_interrupted_change_do_not_belong_to_the_old_server(
    project: Path, docker: Docker
) -> None:
    docker.add(OLD)
    take(project)
    overwrite(project / ".env")
    assert take(project, proven=True)["interrupted"]


def test_a_completed_change_is_not_interrupted(project: Path, docker: Docker) -> None:
    docker.add(OLD)
    take(project)
    del docker.containers[OLD]
    docker.add(NEW)
    assert take(project, proven=True)["container"]["Id"] == NEW
    docker.containers.clear()
    recorded(project)  # and killed before it removed its snapshot
    assert snapshot.load(str(project))
    assert take(project, proven=False)["container"] is None


def test_the_container_is_created_again(project: Path, docker: Docker) -> None:
    docker.add(OLD)
    saved = take(project)
    del docker.containers[OLD]
    docker.add(NEW)
    docker.add("c" * 64, "aaaaaaaaaaaa_vllm-server")
    docker.add("d" * 64, "my-vllm-server")
    outcome = restore_engine(saved)
    assert docker.done == [
        f"stop {NEW}", f"rm --force {NEW}", f"stop {'c' * 64}", f"rm --force {'c' * 64}",
        "create vllm-server from vllm:1 as a",
    ]  # fmt: skip
    assert outcome.restored == ["the container vllm-server, with the settings that it had"]
    assert outcome.removed == ["the container that failed"] * 2


def test_the_container_is_created_from_its_image_and_not_from_a_moved_name(
    project: Path, docker: Docker
) -> None:
    docker.add(OLD)
    docker.images["vllm:1"] = "sha256:2"  # moved before this change
    saved = take(project)
    del docker.containers[OLD]
    restore_engine(saved)
    assert docker.done == ["create vllm-server from sha256:1 as a"]


def test_the_name_of_the_old_container_is_restored(project: Path, docker: Docker) -> None:
    raw = docker.add(OLD)
    saved = json.loads(json.dumps(take(project)))
    raw["Name"], raw["State"]["Running"] = f"/{OLD[:12]}_vllm-server", False
    docker.add(NEW)
    outcome = restore_engine(saved)
    assert docker.done == [f"stop {NEW}", f"rm --force {NEW}", f"rename {OLD} vllm-server"]
    assert outcome.restored == ["the name of the container vllm-server"]
    raw["Name"] = "/vllm-server"
    assert restoration.must_start(saved)
    raw["State"]["Running"] = True
    assert not restoration.must_start(saved)


def test_a_container_that_was_stopped_is_stopped_again(project: Path, docker: Docker) -> None:
    raw = docker.add(OLD, running=False)
    saved = json.loads(json.dumps(take(project)))
    raw["State"]["Running"] = True
    assert restore_engine(saved).restored == ["the container vllm-server, stopped as before"]
    assert docker.done == [f"stop {OLD}"]
    raw["State"]["Running"] = False
    assert not restoration.must_start(saved)


def test_a_container_of_another_directory_is_not_removed(project: Path, docker: Docker) -> None:
    saved = take(project)
    docker.add(NEW, where="/srv/elsewhere")
    assert restore_engine(saved).removed == []
    assert docker.done == []


def test_the_name_of_an_image_is_restored_and_a_pulled_image_stays(project: Path, docker: Docker) -> None:
    saved = take(project, images=("vllm:1", "vllm:2"))
    docker.images.update({"vllm:1": "sha256:2", "vllm:2": "sha256:2"})
    assert restore_engine(saved).restored == ["the image vllm:1"]
    assert docker.done == ["image tag sha256:1 vllm:1"]


def test_networks_of_the_change_are_removed_and_older_ones_restored(project: Path, docker: Docker) -> None:
    def network(id_: str, name: str, **more: object) -> dict[str, Any]:
        return {"Id": id_, "Name": name, "Labels": {PROJECT: "vllm-gpu"}, "Containers": {}, **more}

    docker.networks = [network("1", "stays"), network("2", "gone")]
    saved = take(project)
    docker.networks = [
        network("1", "stays"), network("3", "vllm-gpu_default"), network("4", "used", Containers={"x": {}}),
        network("5", "mine", Labels={}),
    ]  # fmt: skip
    outcome = restore_engine(saved)
    assert docker.done == ["network rm 3", "create gone"]
    assert (outcome.restored, outcome.removed) == (["the network gone"], ["the network vllm-gpu_default"])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"Image": "sha256:gone"}, "its image (vllm:1) is no longer on this host"),
        ({"host": {"AutoRemove": True}}, "it was started with --rm"),
        (
            {"host": {"NetworkMode": "container:abc"}},
            "its NetworkMode is another container's (container:abc)",
        ),
        ({"host": {"IpcMode": "container:abc"}}, "its IpcMode is another container's"),
    ],
)
@pytest.mark.usefixtures("docker")
def test_a_container_that_could_not_be_created_again(changes: dict[str, Any], reason: str) -> None:
    (found,) = snapshot.obstacles({"container": inspected(**{"config": {"Image": "vllm:1"}, **changes})})
    assert found.startswith(reason)


def test_a_container_of_compose_can_be_created_again(docker: Docker) -> None:
    assert snapshot.obstacles({"container": docker.add(OLD)}) == []
    assert snapshot.obstacles({"container": None}) == []


def fail(monkeypatch: pytest.MonkeyPatch, docker: Docker, command: list[str], message: str) -> None:
    """Let one docker command fail."""

    def run(argv: list[str], **options: Any) -> shell.Output:  # noqa: ANN401
        failed = argv[1 : 1 + len(command)] == command
        return shell.Output(1, "", message) if failed else docker.run(argv, **options)

    monkeypatch.setattr(shell, "run", run)


@pytest.mark.parametrize("step", ["network rm 3", "image tag sha256:1 vllm:1"])
def test_the_server_is_restored_although_another_step_fails(
    project: Path, docker: Docker, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    docker.add(OLD)
    saved = take(project)
    del docker.containers[OLD]
    docker.images["vllm:1"] = "sha256:2"
    docker.networks = [
        {"Id": "3", "Name": "vllm-gpu_default", "Labels": {PROJECT: "vllm-gpu"}, "Containers": {}}
    ]
    docker.add(NEW)
    fail(monkeypatch, docker, step.split()[:2], "no")
    outcome = restore_engine(saved)
    assert outcome.failed == [f"`docker {step}` failed with exit code 1: no"]
    assert "the container that failed" in outcome.removed
    assert "the container vllm-server, with the settings that it had" in outcome.restored


@pytest.mark.parametrize("step", ["stop", "rm"])
def test_a_docker_engine_that_goes_away_is_not_a_failed_step(
    project: Path, docker: Docker, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    saved = take(project)
    docker.add(NEW)
    fail(monkeypatch, docker, [step], "Cannot connect to the Docker daemon at unix:///var/run/docker.sock.")
    with pytest.raises(docker_command.Unanswered):
        restore_engine(saved)


@pytest.mark.usefixtures("docker")
def test_a_docker_engine_that_restarts_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([docker_command.Unanswered("away"), docker_command.Unanswered("away"), None])

    def inspect() -> None:
        answer = next(answers)
        if answer:
            raise answer

    monkeypatch.setattr(container, "inspect", inspect)
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    restoration.wait_for_engine(10)
    answers = iter([docker_command.Unanswered("away")] * 2)
    with pytest.raises(docker_command.Unanswered):
        restoration.wait_for_engine(0)
