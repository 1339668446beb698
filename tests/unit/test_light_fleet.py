"""Light GPU hosts: their answers follow from what was done to them, and real programs accept them."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from subprocess import CompletedProcess
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from images import DEFAULT_IMAGE
from machine import ROOT, HostError

from tests.light_fleet.cards import read_json
from tests.light_fleet.container import Container
from tests.light_fleet.fleet import FIRST_PORT, Fleet

REFEREE = ROOT / "scripts/check_gpu_allocation.sh"
PROJECT = "--project-name vllm-gpu --project-directory /opt/vllm-gpu --file docker-compose.serving.yml --env-file .env"
UP = f"cd /opt/vllm-gpu && docker compose --ansi never --progress plain {PROJECT} up --detach --pull never"


class LightHost:
    """One light host, and commands that run on it."""

    def __init__(self, fleet: Fleet, name: str) -> None:
        self.fleet, self.name, self.directory = fleet, name, fleet.directory / name
        self.port = read_json(self.directory / "host.json")["port"]
        self.project = self.directory / "opt/vllm-gpu"

    def run(self, script: str, stdin: str = "", become: Sequence[str] = ()) -> CompletedProcess[str]:
        """Run a shell script on the host; its output includes standard error."""
        program = "import os, sys; os.execv('/bin/bash', ['bash', '-c', sys.argv[1]])"
        words = [*become, str(self.directory / "python3"), "-I", "-S", "-c", program, f"exec 2>&1; {script}"]
        return subprocess.run(
            words, capture_output=True, text=True, timeout=30, check=False, input=stdin or None
        )

    def set_up(self, gpu: int, **env: str) -> None:
        """Write the project's files by hand."""
        self.project.mkdir(exist_ok=True)
        shutil.copy(ROOT / "docker/docker-compose.serving.yml", self.project)
        values = {"GPU_DEVICE_ID": gpu, "VLLM_PORT": self.port, **env}
        (self.project / ".env").write_text("".join(f"{key}={value}\n" for key, value in values.items()))

    def verdict(self) -> str:
        """Return the referee's verdict, or if it is unknown, the cause."""
        report = json.loads(self.run("bash -s -- --json", REFEREE.read_text(encoding="utf-8")).stdout)
        return str(report["cause"] if report["verdict"] == "unknown" else report["verdict"])

    def api(self, path: str, key: str = "") -> tuple[int, str]:
        """Return the status and body of the API's answer; 0 for none."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            url = f"http://127.0.0.1:{self.port}{path}"
            with urlopen(Request(url, headers=headers), timeout=5) as answer:
                return answer.status, answer.read().decode()
        except HTTPError as error:
            return error.code, ""
        except OSError:
            return 0, ""

    def served_gpu(self) -> list[int]:
        """Return the cards that are in use."""
        return [card.index for card in self.fleet.cards(self.name) if card.used_mib]


def free_ports(count: int) -> int:
    """Return the first of so many consecutive free ports, away from those of other fleets."""
    for first in range(FIRST_PORT + 5000 + os.getpid() % 500 * 10, 32000, 10):
        sockets = [socket.socket() for _ in range(count)]
        try:
            for number, probe in enumerate(sockets):
                probe.bind(("127.0.0.1", first + number))
        except OSError:
            continue
        else:
            return first
        finally:
            for probe in sockets:
                probe.close()
    raise AssertionError("no ports")


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    """Two light hosts."""
    made = Fleet(tmp_path / "fleet")
    with made.locked():
        try:
            made.up(2, free_ports(2))
        except HostError as error:
            if "run this as root" not in str(error):
                raise
            pytest.skip(str(error))
    yield made
    made.down()


@pytest.fixture
def host(fleet: Fleet) -> LightHost:
    """One of them, with the files for a server on GPU 1."""
    made = LightHost(fleet, "light-0001")
    made.set_up(1)
    return made


def test_compose_makes_replaces_and_removes_the_server(host: LightHost) -> None:
    def events(*arguments: str) -> list[str]:
        done = host.run(" ".join([UP, *arguments]))
        assert done.returncode == 0, done.stdout
        return re.findall(r"Container vllm-server +(\w+)", done.stdout)

    assert events() == ["Creating", "Created", "Starting", "Started"]
    assert events() == ["Running"]
    assert events("--force-recreate") == ["Recreate", "Recreated", "Starting", "Started"]
    host.set_up(0)
    assert events() == ["Recreate", "Recreated", "Starting", "Started"]
    assert host.served_gpu() == [0]
    host.run("docker compose --project-name other down; docker compose --project-name vllm-gpu down")
    gone = host.run("docker inspect --type container --format x vllm-server").stdout
    assert gone.endswith("Error response from daemon: No such container: vllm-server\n")
    assert host.served_gpu() == []


def test_a_card_that_does_not_exist_is_refused_as_by_docker(host: LightHost) -> None:
    host.set_up(7)
    failed = host.run(UP)
    assert failed.returncode == 1
    assert "Error response from daemon: failed to create shim task" in failed.stdout
    assert "nvidia-container-cli: device error: 7: unknown device: unknown" in failed.stdout
    form = "{{.State.Status}} {{.State.ExitCode}} {{.RestartCount}}"
    assert host.run(f"docker inspect --format '{form}' vllm-server").stdout == "created 128 0\n"


def test_the_server_is_on_the_card_that_compose_requested(host: LightHost) -> None:
    assert host.verdict() == "no_such_container"
    assert host.run(UP).returncode == 0
    assert host.verdict() == "ok"
    (row,) = host.run(
        "nvidia-smi --query-compute-apps=gpu_uuid,pid,used_memory --format=csv,noheader"
    ).stdout.splitlines()
    uuid, pid, used = row.split(", ")
    top = host.run("docker top vllm-server -eo pid,comm").stdout.splitlines()
    assert [line.split()[1] for line in top if line.split()[0] == pid] == ["VLLM::EngineCor"]
    assert uuid == host.fleet.cards(host.name)[1].uuid
    # 0.9 of the RTX 5060 Ti's usable memory.
    assert used == f"{int((16311 - 398) * 0.9)} MiB"
    inside = host.run("docker exec vllm-server nvidia-smi -L").stdout
    assert inside == f"GPU 0: NVIDIA GeForce RTX 5060 Ti (UUID: {uuid})\n"


def test_what_is_not_simulated_is_refused(host: LightHost) -> None:
    host.run(UP)
    for call in ("docker run hello", "docker kill vllm-server", "docker exec vllm-server ls"):
        done = host.run(call)
        assert done.returncode != 0
        assert "light host: not simulated: POST /" in done.stdout


def test_the_state_of_a_container_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"RestartPolicy": {"Name": "unless-stopped"}}
    box = Container("id", "name", 1, 0, {"HostConfig": settings}, "image", started=100, crash="1")
    for after, status, restarts in (
        (0.1, "running", 0),
        (0.35, "restarting", 0),
        (0.5, "running", 1),
        (0.8, "restarting", 1),
        (1.0, "running", 2),
        (1.6, "running", 3),
    ):
        monkeypatch.setattr(time, "time", lambda after=after: 100 + after)
        assert box.life()[:2] == (status, restarts), after
        assert box.loaded() == 0
    settings["RestartPolicy"]["Name"] = "no"
    assert box.life() == ("exited", 0, 100, 1)
    # Without a crash it loads for as long as its delay.
    box.crash, box.delay = "", 4
    for after, loaded in ((0, 0), (2, 0.5), (4, 1), (8, 2)):
        monkeypatch.setattr(time, "time", lambda after=after: 100 + after)
        assert (box.life().status, box.loaded()) == ("running", loaded)


def test_a_server_that_crashes_never_answers(host: LightHost) -> None:
    host.fleet.fault(host.name, {"crash": "1"})
    host.run(UP)
    deadline = time.monotonic() + 10
    while host.run("docker inspect --format '{{.RestartCount}}' vllm-server").stdout == "0\n":
        assert time.monotonic() < deadline
    assert "EngineCore failed to start" in host.run("docker logs --tail 5 vllm-server").stdout
    assert host.api("/health") == (0, "")
    assert host.served_gpu() == []
    # On the other card it runs, without a wrong flag.
    host.set_up(0, VLLM_EXTRA_ARGS="--gpu-memory-utilisation 0.5")
    host.run(UP)
    assert "unrecognized arguments: --gpu-memory-utilisation" in host.run("docker logs vllm-server").stdout
    host.set_up(0)
    host.run(UP)
    assert host.verdict() == "ok"


def test_an_image_is_used_once_it_is_pulled(host: LightHost) -> None:
    other = DEFAULT_IMAGE.replace("v0.32.0", "v0.33.0")
    host.set_up(1, VLLM_IMAGE=other)
    assert f"No such image: {other}" in host.run(UP).stdout
    assert host.run(f"docker pull --quiet {other} && {UP}").returncode == 0
    assert host.run("docker inspect --format '{{.Config.Image}}' vllm-server").stdout == f"{other}\n"


def test_the_api_answers_when_the_server_is_ready(host: LightHost) -> None:
    host.set_up(1, VLLM_API_KEY="sk-light", VLLM_MODEL="acme/one", VLLM_EXTRA_ARGS="--served-model-name a b")
    host.fleet.fault(host.name, {"start_delay": "3600"})
    host.run(UP)
    # Docker opens the port at once, before the server answers.
    assert not is_free(host.port)
    assert host.api("/health") == (0, "")
    assert host.served_gpu() == []
    host.fleet.fault(host.name, {"start_delay": ""})
    host.run(f"{UP} --force-recreate")
    assert host.api("/health") == (200, "")
    assert host.served_gpu() == [1]
    assert host.api("/v1/models")[0] == 401
    status, body = host.api("/v1/models", "sk-light")
    assert (status, [model["id"] for model in json.loads(body)["data"]]) == (200, ["a", "b"])


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def test_a_port_that_another_program_has_is_refused(host: LightHost) -> None:
    with socket.create_server(("127.0.0.1", host.port)):
        failed = host.run(UP)
    assert failed.returncode == 1
    assert "bind: address already in use" in failed.stdout
    assert host.run(UP).returncode == 0
    assert host.run("docker compose --project-name vllm-gpu down").returncode == 0
    assert is_free(host.port)


def test_hosts_share_no_directory_or_card_with_each_other_or_this_machine(fleet: Fleet) -> None:
    mark = f"light-{os.getpid()}"
    first, second = (LightHost(fleet, name) for name in fleet.names)
    assert first.run(f"touch /run/{mark} /opt/{mark} && ls /run /opt").stdout.count(mark) == 2
    assert mark not in second.run("ls /run /opt").stdout
    assert not [path for path in (Path("/run") / mark, Path("/opt") / mark) if path.exists()]
    assert (first.directory / "run" / mark).exists()
    uuids = [card.uuid for name in fleet.names for card in fleet.cards(name)]
    assert len(set(uuids)) == 4
    # Its processor time is recorded for the benchmark.
    assert re.fullmatch(r"(?:\d+m[\d.]+s \d+m[\d.]+s\n){4}", (first.directory / "cpu").read_text() * 2)


def test_a_restarted_engine_keeps_its_containers_and_ends_with_its_hosts(host: LightHost) -> None:
    fleet = host.fleet
    host.run(UP)
    running = fleet.engine()
    fleet.stop_engine()
    done = host.run("docker inspect --format x vllm-server")
    assert "Cannot connect to the Docker daemon" in done.stdout
    assert host.verdict() == "engine_not_running"
    assert host.api("/health") == (0, "")
    fleet.up(2, host.port)
    assert fleet.engine() not in (None, running)
    assert host.verdict() == "ok"
    assert host.api("/health") == (200, "")
    (pid,) = [fleet.engine()]
    shutil.rmtree(fleet.directory)
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        # It is a child of this process, and so must be waited for.
        os.waitpid(pid or 0, os.WNOHANG)
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()
    assert is_free(host.port)


def test_hosts_that_could_not_work_are_refused(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="must not be in /opt or /run"):
        Fleet(Path("/opt/fleet")).check()
    port = free_ports(1)
    with socket.create_server(("127.0.0.1", port)), pytest.raises(HostError, match="is taken"):
        Fleet(tmp_path).up(1, port)
    assert Fleet(tmp_path).names == []


@pytest.mark.skipif(os.geteuid() != 0, reason="all tests here show it")
def test_they_need_no_root() -> None:
    # With the system's Python, as that of these tests may be readable for root only.
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "/usr/bin/python3"]
    with tempfile.TemporaryDirectory() as folder:
        os.chown(folder, 65534, 65534)
        fleet = Fleet(Path(folder) / "fleet")

        def call(*words: object) -> str:
            arguments = [*nobody, "-m", "tests.light_fleet", "--fleet", fleet.directory, *words]
            command = [*map(str, arguments)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            return done.stdout + done.stderr

        try:
            output = call("up", 1, "--first-port", free_ports(1))
            if "Permission denied" in output or "run this as root" in output:
                pytest.skip(output)
            host = LightHost(fleet, "light-0001")
            host.set_up(1)
            assert host.run(UP, become=nobody[:-1]).returncode == 0
            assert host.served_gpu() == [1]
        finally:
            output = call("down")
        assert output == ""


def test_the_role_changes_proves_and_restores(fleet: Fleet, tmp_path: Path) -> None:
    inventory = tmp_path / "hosts.yml"
    inventory.write_text(fleet.inventory(fleet.names))

    def serve(gpu: int, *arguments: str) -> dict[str, str]:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("ANSIBLE_")}
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
        play = [
            "ansible-playbook",
            "-i",
            str(inventory),
            "serve.yml",
            "-e",
            f"gpu_device_id={gpu}",
            *arguments,
        ]
        done = subprocess.run(play, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        recap = re.findall(r"^(light-\d+) +: ok=\d+ +(changed=\d+).*(failed=\d+)", done.stdout, re.MULTILINE)
        assert recap, done.stdout + done.stderr
        return {name: f"{changed} {failed}" for name, changed, failed in recap}

    first, second = (LightHost(fleet, name) for name in fleet.names)
    for host in (first, second):
        host.set_up(0)
        assert host.run(UP).returncode == 0
    assert (first.served_gpu(), second.served_gpu()) == ([0], [0])
    fleet.fault(second.name, {"crash": "1"})
    moved = serve(1)
    # The record of the server before, which no play had made; the files; the server; its record.
    assert moved[first.name] == "changed=4 failed=0"
    assert moved[second.name].endswith("failed=1")
    assert (first.served_gpu(), second.served_gpu()) == ([1], [0])
    assert (second.project / ".env").read_text() == f"GPU_DEVICE_ID=0\nVLLM_PORT={second.port}\n"
    assert serve(1, "--limit", first.name) == {first.name: "changed=0 failed=0"}
