"""What the engine knows of the server's container."""

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


def test_the_containers_of_others(docker: Docker) -> None:
    own = ["vllm-server", "0a1b2c_vllm-server"]
    others = ["my_vllm-server", "vllm-server-2", "xvllm-server", "0g_vllm-server"]
    calls = docker("\n".join([*own, *others]))
    assert container.others("label=x", "status=running") == others
    assert calls() == ["ps --all --filter label=x --filter status=running --format {{.Names}}"]


def test_the_log_without_the_roles_own_requests(docker: Docker) -> None:
    docker(
        'loading\n\n"GET /health HTTP/1.1" 200\n"GET /v1/models HTTP/1.1" 200\n"GET /v1/x HTTP/1.1"\n',
        "error\n",
    )
    assert container.log_tail(3) == ["loading", '"GET /v1/x HTTP/1.1"', "error"]
    assert container.log_tail(1) == ["error"]


@pytest.mark.parametrize(
    ("found", "judged", "fine"),
    [
        (None, None, True),
        (None, "c1", False),
        ({"id": "c1", "status": "running"}, "c1", True),
        ({"id": "c2", "status": "running"}, "c1", False),
        # One that came after the referee had seen none: it is not proven, and no problem of the host.
        ({"id": "c1", "status": "running"}, None, True),
        ({"id": "c1", "status": "paused"}, "c1", False),
    ],
)
def test_the_container_that_is_inspected_is_the_one_that_was_judged(
    found: dict[str, Any] | None,
    judged: str | None,
    fine: bool,  # noqa: FBT001
) -> None:
    with (
        contextlib.nullcontext()
        if fine
        else pytest.raises(
            shell.Problem, match=r"replaced or removed while it was being checked|docker unpause"
        )
    ):
        container.check_judged(found, judged)
