"""What the Docker command's answers mean: yes, no, or no answer at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from ansible_collections.mlops.vllm_gpu.plugins.module_utils import container, shell

Docker = Callable[..., Callable[[], list[str]]]
RAW: dict[str, Any] = {
    "Id": "c1", "Image": "sha256:1", "RestartCount": 2,
    "State": {"Status": "running", "ExitCode": 0, "StartedAt": "2026-01-01T00:00:00Z"},
    "Config": {"Image": "i", "Env": ["A=b=c", "EMPTY=", "ODD"], "Cmd": ["m", "--x"], "Labels": None},
    "HostConfig": {"DeviceRequests": [{"DeviceIDs": [1]}, {"DeviceIDs": None}], "PortBindings": {}},
}  # fmt: skip


def test_an_answer(docker: Docker) -> None:
    calls = docker("hello\n")
    assert container.ask(["inspect", "x"]) == "hello\n"
    assert calls() == ["inspect x"]


@pytest.mark.parametrize(
    "said",
    [
        "Error: No such container: vllm-server",
        "Error response from daemon: No such container: x",
        "Error: No such object: x",
        "Error response from daemon: No such image: x:latest",
        "error: no such object: x",
        "Error response from daemon: no such volume",
        "Error response from daemon: No such network: x",
    ],
)
def test_no(docker: Docker, said: str) -> None:
    docker(err=said, code=1)
    assert container.ask(["inspect", "x"]) is None


@pytest.mark.parametrize(
    "said",
    [
        "Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker daemon running?",
        "failed to connect to the docker API at unix:///var/run/docker.sock; check if the path is correct",
        "error during connect: Get http://%2Fvar%2Frun%2Fdocker.sock/v1.24/info: EOF",
        "dial unix /var/run/docker.sock: connect: connection refused",
        "read unix @->/run/docker.sock: read: connection reset by peer",
        "unexpected EOF",
        # Both at once is no answer, not "no".
        "error during connect: no such container: x",
    ],
)
def test_no_answer_is_not_no(docker: Docker, said: str) -> None:
    docker(err=said, code=1)
    with pytest.raises(container.Unanswered) as problem:
        container.ask(["inspect", "x"])
    assert said in str(problem.value)


def test_an_engine_that_is_too_slow_is_no_answer(docker: Docker, monkeypatch: pytest.MonkeyPatch) -> None:
    docker(sleep=5)
    run = shell.run
    monkeypatch.setattr(shell, "run", lambda argv, **_options: run(argv, timeout=0.2))
    with pytest.raises(
        container.Unanswered, match=r"`docker inspect` gave no answer in 0\.2 s\. Check the Docker"
    ):
        container.ask(["inspect", "x"])


@pytest.mark.parametrize(
    ("said", "quoted"),
    [
        ("permission denied while trying to connect to the Docker daemon socket", None),
        ("invalid reference format", None),
        ("Error response from daemon: client version 1.24 is too old", None),
        ("no such host", None),
        ("open /root/.docker/config.json: no such file or directory", None),
        ("", "no message"),
    ],
)
def test_any_other_failure_is_quoted(docker: Docker, said: str, quoted: str | None) -> None:
    docker(err=said, code=125)
    with pytest.raises(shell.Problem) as problem:
        container.ask(["image", "inspect", "x"])
    assert str(problem.value) == f"`docker image inspect x` failed with exit code 125: {quoted or said}"
    assert not isinstance(problem.value, container.Unanswered)


def test_no_docker_command_is_a_failure_and_not_no(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(shell.Problem, match=r"failed with exit code 127: .*No such file"):
        container.ask(["inspect", "x"])


def test_there_is_no_container(docker: Docker) -> None:
    docker(err="Error: No such container: vllm-server", code=1)
    assert container.inspect() is None
    assert container.image_id("x") is None
    assert container.environment(None) == {}


def test_a_container(docker: Docker) -> None:
    docker(json.dumps([RAW]))
    raw = container.inspect()
    assert raw == RAW
    found = container.describe(RAW)
    assert found["requested"] == ["1"]
    assert (found["health"], found["health_output"], found["stop_timeout"], found["restarts"]) == (
        None,
        "",
        10,
        2,
    )
    assert "b=c" not in str(found)
    assert container.environment(raw) == {"A": "b=c", "EMPTY": "", "ODD": ""}


def test_what_the_health_check_said_last() -> None:
    health = {"Status": "unhealthy", "Log": [{"Output": "old"}, {"Output": " refused\n"}]}
    found = container.describe({**RAW, "State": {**RAW["State"], "Health": health}})
    assert (found["health"], found["health_output"]) == ("unhealthy", "refused")
    for empty in ({"Status": "starting", "Log": []}, {"Status": "starting", "Log": None}, {}, None):
        assert container.describe({**RAW, "State": {**RAW["State"], "Health": empty}})["health_output"] == ""


@pytest.mark.parametrize(
    ("bound", "found"),
    [
        (None, []),
        ({}, []),
        ({"80/tcp": None}, []),
        ({"80/tcp": [{"HostPort": ""}]}, []),
        ({"80/tcp": [{"HostPort": "1-2"}]}, []),
        ({"80/tcp": [{"HostIp": "127.0.0.1", "HostPort": "9000"}]}, [("127.0.0.1", 9000)]),
        ({"80/tcp": [{"HostIp": "::1", "HostPort": "9000"}]}, [("::1", 9000)]),
        ({"80/tcp": [{"HostIp": "", "HostPort": "9000"}]}, [("0.0.0.0", 9000), ("::", 9000)]),
        ({"80/tcp": [{"HostPort": "1"}, {"HostIp": "10.0.0.1", "HostPort": "2"}]},
         [("0.0.0.0", 1), ("::", 1), ("10.0.0.1", 2)]),
    ],
)  # fmt: skip
def test_bindings(bound: Any, found: list[tuple[str, int]]) -> None:  # noqa: ANN401
    assert [(one["address"], one["port"]) for one in container.bindings({"PortBindings": bound})] == found


def test_what_a_container_was_made_from_reads_like_a_service() -> None:
    host = {"PortBindings": {"8000/tcp": [{"HostIp": "127.0.0.1", "HostPort": "9000"}]}}
    assert container.made_from({**RAW, "HostConfig": host}) == {
        "image": "i",
        "command": ["m", "--x"],
        "environment": {"A": "b=c", "EMPTY": "", "ODD": ""},
        "ports": [{"host_ip": "127.0.0.1", "published": "9000"}],
    }


@pytest.mark.parametrize(("name", "own"), [
    ("vllm-server", True), ("0a1b2c_vllm-server", True), ("my_vllm-server", False), ("vllm-server-2", False),
    ("vllm-server\n", False), ("xvllm-server", False),
])  # fmt: skip
def test_its_own_name(name: str, own: bool) -> None:  # noqa: FBT001
    assert bool(container.OWN_NAME.match(name)) == own


def test_names(docker: Docker) -> None:
    calls = docker("a\nb\n")
    assert container.names("label=x", "status=running") == ["a", "b"]
    assert calls() == ["ps --all --filter label=x --filter status=running --format {{.Names}}"]


def test_the_log_without_the_roles_own_requests(docker: Docker) -> None:
    docker(
        'loading\n\n"GET /health HTTP/1.1" 200\n"GET /v1/models HTTP/1.1" 200\n"GET /v1/x HTTP/1.1"\n',
        "error\n",
    )
    assert container.log_tail(3) == ["loading", '"GET /v1/x HTTP/1.1"', "error"]
    assert container.log_tail(1) == ["error"]
