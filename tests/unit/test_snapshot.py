"""A host as it was found: what is kept of it, and what comes back."""

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
    engine,
    record,
    restoration,
    shell,
    snapshot,
)
from ansible_collections.mlops.vllm_gpu.plugins.module_utils import docker as docker_command

from tests.unit.test_engine import inspected

OLD, NEW = "a" * 64, "b" * 64
PROJECT = "com.docker.compose.project"
MISSING = shell.Output(1, "", "Error: No such container: x")


class Docker:
    """An engine with a few containers, images and networks; what is done to it is noted."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.containers: dict[str, dict[str, Any]] = {}
        self.images = {"vllm:1": "sha256:1", "sha256:1": "sha256:1"}
        self.networks: list[dict[str, Any]] = []
        self.done: list[str] = []

    def add(
        self, id_: str, *, name: str = "vllm-server", running: bool = True, where: str = ""
    ) -> dict[str, Any]:
        labels = {f"{PROJECT}.working_dir": where or str(self.directory)}
        raw = inspected(
            config={"Labels": labels, "Image": "vllm:1", "StopTimeout": 3}, Id=id_, Name=f"/{name}"
        )
        status = "running" if running else "exited"
        raw["State"] = {"Running": running, "Status": status, "ExitCode": 0, "StartedAt": ""}
        self.containers[id_] = raw
        return raw

    def find(self, name: str) -> dict[str, Any] | None:
        found = [one for one in self.containers.values() if name in (one["Id"], one["Name"].lstrip("/"))]
        return found[0] if found else None

    def run(self, argv: list[str], timeout: float = 0, **_: object) -> shell.Output:  # noqa: PLR0911
        verb, *words = argv[1:]
        if verb == "inspect":
            one = self.find(words[-1])
            return shell.Output(0, json.dumps([one]), "") if one else MISSING
        if verb == "ps":
            pattern = words[-1].removeprefix("name=")
            ids = [id_ for id_, raw in self.containers.items() if re.search(pattern, raw["Name"])]
            return shell.Output(0, "\n".join(ids), "")
        if verb == "image" and words[0] == "inspect":
            found = self.images.get(words[-1])
            return shell.Output(0, found, "") if found else shell.Output(1, "", "No such image: x")
        if verb == "network" and words[0] == "ls":
            rows = [f"{one['Id']} {one['Name']} {one['Labels'].get(PROJECT, '')}" for one in self.networks]
            return shell.Output(0, "\n".join(rows), "")
        if verb == "network" and words[0] == "inspect":
            return shell.Output(0, json.dumps([one for one in self.networks if one["Id"] == words[1]]), "")
        if verb == "volume":
            return shell.Output(0, "vllm-gpu_cache\n", "")
        self.done.append(" ".join(argv[1:]))
        if verb == "rm":
            del self.containers[words[-1]]
        if verb == "network":
            self.networks = [one for one in self.networks if one["Id"] != words[1]]
        if verb == "stop":
            assert timeout > 3
        return shell.Output(0, "", "")

    def create(self, raw: dict[str, Any], name: str, image: str) -> str:
        self.done.append(f"create {name} from {image} as {raw['Id'][0]}")
        return NEW


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Docker:
    engine_ = Docker(tmp_path / "new/project")
    monkeypatch.setattr(shell, "run", engine_.run)
    monkeypatch.setattr(engine, "create", engine_.create)
    monkeypatch.setattr(engine, "create_network", lambda one: engine_.done.append(f"create {one['Name']}"))
    return engine_


def found(path: Path) -> tuple[object, ...]:
    """All that a file is, but its inode."""
    status = path.stat()
    link = str(path.readlink()) if path.is_symlink() else None
    return link, path.read_bytes(), status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns


@pytest.fixture
def project(docker: Docker) -> Path:
    docker.directory.mkdir(parents=True)
    for name, mode in (
        ("docker-compose.serving.yml", 0o644),
        (".env", 0o640),
        ("check_gpu_allocation.sh", 0o700),
    ):
        path = docker.directory / name
        path.write_text(f"the old {name}", encoding="ascii")
        path.chmod(mode)
        os.utime(path, (10**9, 10**9))
    if os.geteuid() == 0:
        os.chown(docker.directory / ".env", 0, 1234)
    return docker.directory


def take(project: Path, *, proven: bool = True, images: tuple[str, ...] = ("vllm:1",)) -> dict[str, Any]:
    kept = snapshot.take(str(project), list(images), proven=proven)
    snapshot.save(kept)
    return kept


def overwrite(path: Path) -> None:
    atomic.write(str(path), b"new", 0o600, (0, 0) if os.geteuid() == 0 else None)


@pytest.mark.parametrize(
    "harm",
    [
        overwrite,
        Path.unlink,
        lambda path: path.chmod(0o604),
        lambda path: os.chown(path, -1, 4321) if os.geteuid() == 0 else path.chmod(0o600),
        lambda path: (path.unlink(), path.symlink_to("/etc/hostname")),
    ],
    ids=["written", "removed", "mode", "group", "link"],
)
@pytest.mark.parametrize("name", ["docker-compose.serving.yml", ".env", "check_gpu_allocation.sh"])
def test_a_file_comes_back_by_all_that_it_was(
    project: Path, name: str, harm: Callable[[Path], object]
) -> None:
    before = {path.name: found(path) for path in project.iterdir()}
    take(project)
    harm(project / name)
    done = restoration.restore_files(snapshot.load(str(project)) or {})
    assert {path.name: found(path) for path in project.iterdir() if path.is_file()} == before
    assert done.restored == [str(project / name)]
    assert (done.removed, done.failed) == ([], [])


def test_what_did_not_change_is_not_named(project: Path) -> None:
    kept = take(project)
    assert restoration.restore_files(kept) == restoration.Outcome([], [], [])


def test_what_was_not_there_goes_again(project: Path) -> None:
    (project / "check_gpu_allocation.sh").unlink()
    kept = take(project)
    overwrite(project / "check_gpu_allocation.sh")
    assert restoration.restore_files(kept) == restoration.Outcome(
        [], [str(project / "check_gpu_allocation.sh")], []
    )
    assert not (project / "check_gpu_allocation.sh").exists()


@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_stays_one_and_what_it_leads_to_comes_back(project: Path, dangling: bool) -> None:  # noqa: FBT001
    real = project.parent / "real"
    (project / ".env").rename(real)
    (project / ".env").symlink_to("../real")
    if dangling:
        real.unlink()
    before = None if dangling else found(project / ".env")
    kept = take(project)
    overwrite(project / ".env")
    assert real.read_bytes() == b"new"
    restoration.restore_files(kept)
    assert str((project / ".env").readlink()) == "../real"
    assert real.exists() != dangling
    assert dangling or found(project / ".env") == before


def test_nothing_is_left_where_nothing_was(docker: Docker) -> None:
    project = docker.directory
    kept = take(project)
    for name in snapshot.FILES:
        overwrite(project / name)
    (project / ".vllm_gpu.killed").touch()
    (project / ".proven/state.half").mkdir()
    restoration.restore_files(kept)
    assert snapshot.drop(str(project)) == [f"{project}/.proven", str(project), str(project.parent)]
    assert not project.parent.exists()


def test_what_others_have_put_there_stays(docker: Docker) -> None:
    kept = take(docker.directory)
    (docker.directory / "notes.txt").touch()
    restoration.restore_files(kept)
    assert snapshot.drop(str(docker.directory)) == [f"{docker.directory}/.proven"]
    assert [path.name for path in docker.directory.iterdir()] == ["notes.txt"]


def test_only_root_can_read_what_is_kept(project: Path) -> None:
    take(project)
    path = Path(snapshot.path_in(str(project)))
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    path.parent.chmod(0o777)
    with pytest.raises(shell.Problem, match="can be changed by others than root"):
        snapshot.load(str(project))


def test_what_is_kept_and_cannot_be_read_is_a_problem(project: Path) -> None:
    take(project)
    Path(snapshot.path_in(str(project))).write_text("{", encoding="ascii")
    with pytest.raises(shell.Problem, match=r"Remove it with `rm .*before.json`"):
        snapshot.load(str(project))


def recorded(project: Path) -> None:
    proof = {"requested": "0", "gpu": {"uuid": "u"}, "image": "vllm:1", "image_id": "sha256:1", "models": []}
    record.save(str(project), {".env": (project / ".env").read_bytes()}, proof)


def test_what_is_proven_is_what_it_was(project: Path) -> None:
    recorded(project)
    kept = take(project)
    keep = str(project / ".proven")
    before = atomic.target(keep, "current")
    (project / ".proven/state.half").mkdir()
    atomic.point(keep, "previous", before or "")
    atomic.point(keep, "current", "state.half")
    restoration.restore_files(kept)
    assert (atomic.target(keep, "current"), atomic.target(keep, "previous")) == (before, None)


# --- a change that was interrupted --------------------------------------------------


def test_after_an_interrupted_change_its_beginning_counts(project: Path, docker: Docker) -> None:
    docker.add(OLD)
    take(project)
    before = found(project / ".env")
    snapshot.note_written(str(project), {str(project / ".env"): b"new"})
    overwrite(project / ".env")
    docker.images["vllm:1"] = "sha256:2"
    del docker.containers[OLD]
    docker.add(NEW)
    kept = take(project, proven=False, images=("vllm:1", "vllm:3"))
    assert kept["interrupted"]
    assert kept["container"]["Id"] == OLD
    assert kept["images"] == {"vllm:1": "sha256:1", "vllm:3": None}
    restoration.restore_files(kept)
    assert found(project / ".env") == before


def test_what_a_person_has_edited_since_an_interrupted_change_stays(project: Path, docker: Docker) -> None:
    docker.add(OLD)
    take(project)
    snapshot.note_written(str(project), {str(project / ".env"): b"new"})
    overwrite(project / ".env")
    (project / ".env").write_bytes(b"new, and what I want")
    edited = found(project / ".env")
    kept = take(project, proven=False)
    overwrite(project / ".env")
    restoration.restore_files(kept)
    assert found(project / ".env") == edited


def test_files_of_an_interrupted_change_are_not_the_old_servers(project: Path, docker: Docker) -> None:
    docker.add(OLD)
    take(project)
    overwrite(project / ".env")
    assert take(project, proven=True)["interrupted"]  # it still runs, but not from these


def test_a_change_that_came_to_its_end_all_the_same_is_over(project: Path, docker: Docker) -> None:
    docker.add(OLD)
    take(project)
    del docker.containers[OLD]
    docker.add(NEW)
    assert take(project, proven=True)["container"]["Id"] == NEW
    docker.containers.clear()
    recorded(project)  # and killed before it could forget
    assert snapshot.load(str(project))
    assert take(project, proven=False)["container"] is None


# --- the engine ----------------------------------------------------------------------


def test_the_container_is_made_again(project: Path, docker: Docker) -> None:
    docker.add(OLD)
    kept = take(project)
    del docker.containers[OLD]
    docker.add(NEW)
    docker.add("c" * 64, name="aaaaaaaaaaaa_vllm-server")
    docker.add("d" * 64, name="my-vllm-server")
    done = restoration.restore_engine(kept, restoration.Outcome([], [], []))
    assert docker.done == [
        f"stop {NEW}", f"rm --force {NEW}", f"stop {'c' * 64}", f"rm --force {'c' * 64}",
        "create vllm-server from vllm:1 as a",
    ]  # fmt: skip
    assert done.restored == ["the container vllm-server, with the settings that it had"]
    assert done.removed == ["the container that failed"] * 2


def test_a_name_that_means_another_image_is_not_made_from(project: Path, docker: Docker) -> None:
    docker.add(OLD)
    docker.images["vllm:1"] = "sha256:2"  # moved before this change, by somebody
    kept = take(project)
    del docker.containers[OLD]
    restoration.restore_engine(kept, restoration.Outcome([], [], []))
    assert docker.done == ["create vllm-server from sha256:1 as a"]


def test_the_old_container_gets_its_name_back(project: Path, docker: Docker) -> None:
    raw = docker.add(OLD)
    kept = take(project)
    kept = json.loads(json.dumps(kept))
    raw["Name"], raw["State"]["Running"] = f"/{OLD[:12]}_vllm-server", False
    docker.add(NEW)
    done = restoration.restore_engine(kept, restoration.Outcome([], [], []))
    assert docker.done == [f"stop {NEW}", f"rm --force {NEW}", f"rename {OLD} vllm-server"]
    assert done.restored == ["the name of the container vllm-server"]
    raw["Name"] = "/vllm-server"
    assert restoration.must_start(kept)
    raw["State"]["Running"] = True
    assert not restoration.must_start(kept)


def test_one_that_was_stopped_is_stopped_again_and_not_started(project: Path, docker: Docker) -> None:
    raw = docker.add(OLD, running=False)
    kept = json.loads(json.dumps(take(project)))
    raw["State"]["Running"] = True
    assert restoration.restore_engine(kept, restoration.Outcome([], [], [])).restored == [
        "the container vllm-server, stopped as before"
    ]
    assert docker.done == [f"stop {OLD}"]
    raw["State"]["Running"] = False
    assert not restoration.must_start(kept)


def test_somebody_elses_container_is_not_removed(project: Path, docker: Docker) -> None:
    kept = take(project)
    docker.add(NEW, where="/srv/elsewhere")
    assert restoration.restore_engine(kept, restoration.Outcome([], [], [])).removed == []
    assert docker.done == []


def test_an_image_gets_its_name_back_and_a_pulled_one_stays(project: Path, docker: Docker) -> None:
    kept = take(project, images=("vllm:1", "vllm:2"))
    docker.images.update({"vllm:1": "sha256:2", "vllm:2": "sha256:2"})
    assert restoration.restore_engine(kept, restoration.Outcome([], [], [])).restored == ["the image vllm:1"]
    assert docker.done == ["image tag sha256:1 vllm:1"]


def test_networks_of_the_change_go_and_those_that_were_there_stay_or_come_back(
    project: Path, docker: Docker
) -> None:
    def network(id_: str, name: str, **more: object) -> dict[str, Any]:
        return {"Id": id_, "Name": name, "Labels": {PROJECT: "vllm-gpu"}, "Containers": {}, **more}

    docker.networks = [network("1", "stays"), network("2", "gone")]
    kept = take(project)
    docker.networks = [
        network("1", "stays"), network("3", "vllm-gpu_default"), network("4", "used", Containers={"x": {}}),
        network("5", "mine", Labels={}),
    ]  # fmt: skip
    done = restoration.restore_engine(kept, restoration.Outcome([], [], []))
    assert docker.done == ["network rm 3", "create gone"]
    assert (done.restored, done.removed) == (["the network gone"], ["the network vllm-gpu_default"])


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
def test_what_could_not_be_made_again_is_said_before(
    docker: Docker, changes: dict[str, Any], reason: str
) -> None:
    assert docker
    (found,) = snapshot.obstacles({"container": inspected(**{"config": {"Image": "vllm:1"}, **changes})})
    assert found.startswith(reason)


def test_nothing_prevents_what_compose_has_made(docker: Docker) -> None:
    assert snapshot.obstacles({"container": docker.add(OLD)}) == []
    assert snapshot.obstacles({"container": None}) == []


def test_one_thing_that_cannot_be_put_back_keeps_no_other(
    project: Path, docker: Docker, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = take(project, images=("vllm:1",))
    docker.images["vllm:1"] = "sha256:2"
    docker.add(NEW)
    run = docker.run

    def failing(argv: list[str], **options: Any) -> shell.Output:  # noqa: ANN401
        return shell.Output(1, "", "no") if argv[1:3] == ["image", "tag"] else run(argv, **options)

    monkeypatch.setattr(shell, "run", failing)
    done = restoration.restore_engine(kept, restoration.Outcome([], [], []))
    assert done.failed == ["`docker image tag sha256:1 vllm:1` failed with exit code 1: no"]
    assert done.removed == ["the container that failed"]


@pytest.mark.parametrize("step", [["network", "rm"], ["image", "tag"]])
def test_what_else_fails_costs_no_server(
    project: Path, docker: Docker, monkeypatch: pytest.MonkeyPatch, step: list[str]
) -> None:
    docker.add(OLD)
    kept = take(project, images=("vllm:1",))
    del docker.containers[OLD]
    docker.images["vllm:1"] = "sha256:2"
    docker.networks = [
        {"Id": "3", "Name": "vllm-gpu_default", "Labels": {PROJECT: "vllm-gpu"}, "Containers": {}}
    ]
    docker.add(NEW)
    run = docker.run

    def failing(argv: list[str], **options: Any) -> shell.Output:  # noqa: ANN401
        return shell.Output(1, "", "no") if argv[1:3] == step else run(argv, **options)

    monkeypatch.setattr(shell, "run", failing)
    done = restoration.restore_engine(kept, restoration.Outcome([], [], []))
    assert len(done.failed) == 1
    assert any("the container vllm-server" in one for one in done.restored)


@pytest.mark.parametrize("step", ["stop", "rm"])
def test_an_engine_that_goes_away_in_the_middle_is_no_failed_step(
    project: Path, docker: Docker, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    kept = take(project)
    docker.add(NEW)
    run = docker.run

    def away(argv: list[str], **options: Any) -> shell.Output:  # noqa: ANN401
        answer = shell.Output(1, "", "Cannot connect to the Docker daemon at unix:///var/run/docker.sock.")
        return answer if argv[1] == step else run(argv, **options)

    monkeypatch.setattr(shell, "run", away)
    with pytest.raises(docker_command.Unanswered):
        restoration.restore_engine(kept, restoration.Outcome([], [], []))


def test_an_engine_that_is_away_is_waited_for(docker: Docker, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([docker_command.Unanswered("away"), docker_command.Unanswered("away"), None])

    def inspect() -> None:
        answer = next(answers)
        if answer:
            raise answer

    assert docker
    monkeypatch.setattr(container, "inspect", inspect)
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    restoration.wait_for_engine(10)
    answers = iter([docker_command.Unanswered("away")] * 2)
    with pytest.raises(docker_command.Unanswered):
        restoration.wait_for_engine(0)
