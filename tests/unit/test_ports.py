"""Which program has a port, with real sockets."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from ansible_collections.mlops.vllm_gpu.plugins.module_utils import ports, shell


@pytest.fixture
def taken() -> Iterator[Callable[..., int]]:
    """Listen on an address, on any port or on a given one."""
    with contextlib.ExitStack() as sockets:

        def listen(address: str, port: int = 0) -> int:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            server = sockets.enter_context(socket.socket(family))
            if family == socket.AF_INET6:
                server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(address != "::"))
            server.bind((address, port))
            server.listen()
            return int(server.getsockname()[1])

        yield listen


def port_problem(address: str, port: int, **container: Any) -> str | None:  # noqa: ANN401
    return ports.problem(address, port, container or None)


@pytest.mark.parametrize(
    ("listens", "wanted", "clash"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("127.0.0.1", "127.0.0.2", False),
        ("127.0.0.2", "127.0.0.1", False),
        ("127.0.0.1", "0.0.0.0", True),
        ("0.0.0.0", "127.0.0.2", True),
        ("::1", "::1", True),
        ("::1", "127.0.0.1", False),
        ("127.0.0.1", "::1", False),
        ("::", "127.0.0.1", True),
        ("::", "::1", True),
        ("127.0.0.1", "::", True),
        ("0.0.0.0", "::1", False),
    ],
)
def test_a_port_that_is_in_use(
    taken: Callable[..., int],
    listens: str,
    wanted: str,
    clash: bool,  # noqa: FBT001
) -> None:
    port = taken(listens)
    (found,) = ports.listeners(port)
    assert (found.address, found.pid) == (listens, os.getpid())
    assert ports.overlap(listens, wanted) == clash
    problem = port_problem(wanted, port)
    if clash:
        user = f"{found.program} (pid {os.getpid()})"
        assert f"Port {port} on {wanted} is already in use by {user}. Stop that" in str(problem)
    else:
        assert problem is None


def test_a_free_port(taken: Callable[..., int]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    assert ports.listeners(port) == []
    assert port_problem("127.0.0.1", port) is None
    # The client's side of a connection has a port but does not listen.
    server = taken("127.0.0.1")
    with socket.create_connection(("127.0.0.1", server)) as client:
        assert ports.listeners(client.getsockname()[1]) == []


@pytest.mark.parametrize("address", ["192.0.2.1", "2001:db8::1", "::ffff:192.0.2.1"])
def test_an_address_that_the_host_lacks(address: str) -> None:
    problem = port_problem(address, 8000)
    assert f"This host can't listen on {address} (vllm_gpu_bind_address): " in str(problem)
    # Also where the port is the server's current one.
    mine = {"status": "running", "bindings": [{"address": address, "port": 8000}]}
    assert port_problem(address, 8000, **mine) == problem


def test_a_port_without_permission(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_address: str, port: int) -> OSError | None:
        return OSError(errno.EACCES, "Permission denied") if port else None

    monkeypatch.setattr(ports, "try_to_listen", refuse)
    assert port_problem("127.0.0.1", 1) == (
        "This host can't listen on port 1 of 127.0.0.1 (vllm_gpu_port): Permission denied."
    )


DOCKER = ("docker-proxy", "dockerd", "")


@pytest.mark.parametrize("address", ["224.0.0.1", "127.255.255.255"])
def test_an_address_that_nobody_can_connect_to(address: str) -> None:
    assert port_problem(address, 8000) is not None


@pytest.mark.parametrize("program", [*DOCKER, "python3"])
@pytest.mark.parametrize("status", ["running", "restarting", "exited", "created"])
@pytest.mark.parametrize("bound", ["127.0.0.1", "0.0.0.0"])
@pytest.mark.parametrize("published_by", ["vllm-server", "grafana"])
def test_a_port_that_docker_listens_on(  # noqa: PLR0913, PLR0917 - parameters of pytest
    monkeypatch: pytest.MonkeyPatch,
    taken: Callable[..., int],
    program: str,
    status: str,
    bound: str,
    published_by: str,
) -> None:
    """The server's own port is free, unless another container took it between two of its starts."""
    port = taken("127.0.0.1")
    monkeypatch.setattr(ports, "listeners", lambda _port: [ports.Listener("127.0.0.1", program, 7)])
    monkeypatch.setattr(shell, "run", lambda *_a, **_k: shell.Output(0, published_by + "\n", ""))
    problem = port_problem("127.0.0.1", port, status=status, bindings=[{"address": bound, "port": port}])
    own = status == "restarting" and published_by == "vllm-server" and program in DOCKER
    # A running server has its port, whatever listens there (rootless Docker has no docker-proxy).
    if bound == "127.0.0.1" and (status == "running" or own):
        assert problem is None
    elif program == "python3":
        assert "python3 (pid 7). Stop that program" in str(problem)
    elif published_by == "grafana":
        assert "container grafana. Stop that container" in str(problem)
    else:
        assert ("docker-proxy (pid 7)" if program == "docker-proxy" else "in use by ") in str(problem)


@pytest.mark.parametrize(
    ("address", "other", "clash"),
    [
        ("10.0.0.1", "10.0.0.1", True),
        ("10.0.0.1", "10.0.0.2", False),
        ("0.0.0.0", "10.0.0.2", True),
        ("0.0.0.0", "::1", False),
        ("::", "10.0.0.1", True),
        ("::", "::1", True),
        ("::", "0.0.0.0", True),
        ("::1", "0:0:0:0:0:0:0:1", True),
        ("::1", "::2", False),
    ],
)
def test_addresses_that_overlap(address: str, other: str, clash: bool) -> None:  # noqa: FBT001
    assert ports.overlap(address, other) == ports.overlap(other, address) == clash
