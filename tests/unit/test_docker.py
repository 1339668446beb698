"""The answers of the docker command: yes, no, or no answer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from ansible_collections.mlops.vllm_gpu.plugins.module_utils import docker as docker_command
from ansible_collections.mlops.vllm_gpu.plugins.module_utils import shell

Docker = Callable[..., Callable[[], list[str]]]


def test_an_answer(docker: Docker) -> None:
    calls = docker("hello\n")
    assert docker_command.ask(["inspect", "x"]) == "hello\n"
    assert calls() == ["inspect x"]


@pytest.mark.parametrize(
    "message",
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
def test_no(docker: Docker, message: str) -> None:
    docker(err=message, code=1)
    assert docker_command.ask(["inspect", "x"]) is None


@pytest.mark.parametrize(
    "message",
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
def test_no_answer_is_not_no(docker: Docker, message: str) -> None:
    docker(err=message, code=1)
    with pytest.raises(docker_command.Unanswered) as problem:
        docker_command.ask(["inspect", "x"])
    assert message in str(problem.value)


def test_a_slow_engine_is_no_answer(docker: Docker, monkeypatch: pytest.MonkeyPatch) -> None:
    docker(sleep=5)
    run = shell.run
    monkeypatch.setattr(shell, "run", lambda argv, **_options: run(argv, timeout=0.2))
    message = r"`docker inspect` gave no answer in 0\.2 s\. Check the Docker"
    with pytest.raises(docker_command.Unanswered, match=message):
        docker_command.ask(["inspect", "x"])


@pytest.mark.parametrize(
    "message",
    [
        "permission denied while trying to connect to the Docker daemon socket",
        "invalid reference format",
        "Error response from daemon: client version 1.24 is too old",
        "no such host",
        "open /root/.docker/config.json: no such file or directory",
        "",
    ],
)
def test_any_other_failure_is_quoted(docker: Docker, message: str) -> None:
    docker(err=message, code=125)
    with pytest.raises(shell.Problem) as problem:
        docker_command.ask(["image", "inspect", "x"])
    reason = message or "no message"
    assert str(problem.value) == f"`docker image inspect x` failed with exit code 125: {reason}"
    assert not isinstance(problem.value, docker_command.Unanswered)


def test_a_missing_docker_command_is_not_no(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(shell.Problem, match=r"failed with exit code 127: .*No such file"):
        docker_command.ask(["inspect", "x"])


def test_the_engine_is_the_hosts_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "tcp://elsewhere:2375")
    monkeypatch.setenv("DOCKER_CONTEXT", "elsewhere")
    output = shell.run(["sh", "-c", "echo $DOCKER_HOST $DOCKER_CONTEXT"]).out
    assert output == "unix:///var/run/docker.sock\n"


def test_a_command_that_does_not_exist_or_end() -> None:
    assert shell.run(["/no/such/program"]).code == 127
    assert shell.run(["sleep", "5"], timeout=0.2) == shell.Output(None, "", "no answer in 0.2 s")


def test_no_shell_reads_a_command() -> None:
    assert shell.run(["printf", "%s", "$HOME;id"]).out == "$HOME;id"
