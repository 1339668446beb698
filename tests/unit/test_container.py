"""The server's container, as the Docker Engine reports it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from typing import Any

import pytest
from ansible_collections.mlops.vllm_gpu.plugins.module_utils import container, shell

Docker = Callable[..., Callable[[], list[str]]]
RAW: dict[str, Any] = {
    "Id": "c1", "Name": "/vllm-server", "Image": "sha256:1", "RestartCount": 2,
    "State": {"Status": "running", "ExitCode": 0, "StartedAt": "2026-01-01T00:00:00Z"},
    "Config": {"Image": "i", "Env": ["A=b=c", "EMPTY=", "ODD"], "Cmd": ["m", "--x"], "Labels": None},
    "HostConfig": {"DeviceRequests": [{"DeviceIDs": [1]}, {"DeviceIDs": None}], "PortBindings": {}},
}  # fmt: skip


def test_there_is_no_container(docker: Docker) -> None:
    docker(err="Error: No such container: vllm-server", code=1)
    assert container.inspect() is None
    assert container.image_id("x") is None
    assert container.environment(None) == {}


def test_a_container_that_vanishes_while_it_is_read(monkeypatch: pytest.MonkeyPatch, docker: Docker) -> None:
    docker("c1")
    monkeypatch.setattr(container, "inspect", lambda _name: None)
    with pytest.raises(shell.Problem, match="another program is changing it"):
        container.find()


def test_a_container(docker: Docker) -> None:
    docker(json.dumps([RAW]))
    raw = container.inspect()
    assert raw == RAW
    found = container.describe(RAW)
    assert found["requested"] == ["1"]
    keys = ("health", "health_output", "stop_timeout", "restarts")
    assert [found[key] for key in keys] == [None, "", 10, 2]
    assert "b=c" not in str(found)
    assert container.environment(raw) == {"A": "b=c", "EMPTY": "", "ODD": ""}


def test_the_last_output_of_the_health_check() -> None:
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
    assert [(row["address"], row["port"]) for row in container.bindings({"PortBindings": bound})] == found


def test_the_service_that_a_container_was_created_from() -> None:
    host = {"PortBindings": {"8000/tcp": [{"HostIp": "127.0.0.1", "HostPort": "9000"}]}}
    assert container.made_from({**RAW, "HostConfig": host}) == {
        "image": "i",
        "command": ["m", "--x"],
        "environment": {"A": "b=c", "EMPTY": "", "ODD": ""},
        "ports": [{"host_ip": "127.0.0.1", "published": "9000"}],
    }


def test_the_containers_of_others(docker: Docker) -> None:
    own = ["vllm-server", "0a1b2c_vllm-server"]
    others = ["my_vllm-server", "vllm-server-2", "xvllm-server", "0g_vllm-server"]
    calls = docker("\n".join([*own, *others]))
    assert container.others("label=x", "status=running") == others
    assert calls() == ["ps --all --filter label=x --filter status=running --format {{.Names}}"]


def test_the_log_without_the_roles_own_requests(docker: Docker) -> None:
    own_requests = '"GET /health HTTP/1.1" 200\n"GET /v1/models HTTP/1.1" 200\n'
    docker(f'loading\n\n{own_requests}"GET /v1/x HTTP/1.1"\n', "error\n")
    assert container.log_tail(3) == ["loading", '"GET /v1/x HTTP/1.1"', "error"]
    assert container.log_tail(1) == ["error"]


@pytest.mark.parametrize(
    ("found", "judged", "problem"),
    [
        (None, None, None),
        (None, "c1", "replaced or removed while it was being checked"),
        ({"id": "c1", "status": "running"}, "c1", None),
        ({"id": "c2", "status": "running"}, "c1", "replaced or removed while it was being checked"),
        # Created after the referee found none: not proven, but not a problem of the host.
        ({"id": "c1", "status": "running"}, None, None),
        ({"id": "c1", "status": "paused"}, "c1", "docker unpause"),
    ],
)
def test_the_inspected_container_must_be_the_judged_one(
    found: dict[str, Any] | None, judged: str | None, problem: str | None
) -> None:
    with pytest.raises(shell.Problem, match=problem) if problem else contextlib.nullcontext():
        container.check_judged(found, judged)
