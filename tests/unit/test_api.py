"""Asking the API, of real servers on loopback: those that are well, and those that never end."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from ansible_collections.mlops.vllm_gpu.plugins.module_utils import api, shell

OK = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s"
Answer = Callable[[socket.socket, bytes], None]


@pytest.fixture
def serve() -> Iterator[Callable[..., api.Address]]:
    """A server that gives each request, its path and headers, to a function."""
    with contextlib.ExitStack() as ended:

        def start(answer: Answer, host: str = "127.0.0.1") -> api.Address:
            listening = ended.enter_context(
                socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
            )

            def accept() -> None:
                with contextlib.suppress(OSError):
                    while True:
                        connection, _peer = listening.accept()
                        with connection, contextlib.suppress(OSError):
                            answer(connection, connection.recv(2**16))

            threading.Thread(target=accept, daemon=True).start()
            return api.Address(host, listening.getsockname()[1])

        yield start


def says(*bodies: bytes, status: bytes = b"200 OK") -> Answer:
    """Give the n-th request the n-th body, and the last one from then on."""
    left = list(bodies)

    def answer(connection: socket.socket, _request: bytes) -> None:
        body = left.pop(0) if len(left) > 1 else left[0]
        connection.sendall((OK % (len(body), body)).replace(b"200 OK", status))

    return answer


def drip(head: bytes, piece: bytes, pause: float = 0.05) -> Answer:
    def answer(connection: socket.socket, _request: bytes) -> None:
        connection.sendall(head)
        while True:
            connection.sendall(piece)
            time.sleep(pause)

    return answer


def service(where: api.Address, **changes: Any) -> dict[str, Any]:  # noqa: ANN401
    port = {"published": str(where.port), "host_ip": where.host}
    return {"command": ["m", "--port", "8000"], "ports": [port], "environment": {}, **changes}


def models(*names: str) -> bytes:
    return json.dumps({"data": [{"id": name} for name in names]}).encode()


@pytest.mark.parametrize(
    ("head", "piece"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n", b"x"),
        (b"HTTP/1.1 200 OK\r\n\r\n", b"x"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
        (b"HTTP/1.1 200 OK\r\n", b"X-A: b\r\n"),
        (b"HTTP/1.1 200 OK\r\nX-A: ", b"b"),
        (b"", b"H"),
        (b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 100 Continue\r\n\r\n"),
    ],
    ids=["body", "body without length", "chunks", "headers", "a header", "status line", "100 Continue"],
)
def test_an_answer_that_drips_ends_at_the_deadline(
    serve: Callable[..., api.Address], head: bytes, piece: bytes
) -> None:
    where = serve(drip(head, piece))
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"no whole answer to /health within 0\.4 s"):
        api._get(where, "/health", deadline=0.4)  # noqa: SLF001 - the deadline is what it is about
    assert 0.35 < time.monotonic() - began < 3


def test_silence_ends_at_the_deadline(serve: Callable[..., api.Address]) -> None:
    where = serve(lambda _connection, _request: time.sleep(2))
    with pytest.raises(TimeoutError):
        api._get(where, "/health", deadline=0.3)  # noqa: SLF001


def test_an_answer_within_the_deadline_counts_although_it_drips(serve: Callable[..., api.Address]) -> None:
    def answer(connection: socket.socket, _request: bytes) -> None:
        for one in OK % (2, b"ok"):
            connection.sendall(bytes([one]))
            time.sleep(0.002)

    assert api._get(serve(answer), "/health", deadline=5) == (200, b"ok")  # noqa: SLF001


@pytest.mark.parametrize(
    "head", [b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n"]
)
def test_an_answer_without_end_is_not_read_to_its_end(serve: Callable[..., api.Address], head: bytes) -> None:
    where = serve(drip(head, b"x" * 2**20, pause=0))
    with pytest.raises(shell.Problem, match="/v1/models answers with more than 4 MiB"):
        api._get(where, "/v1/models")  # noqa: SLF001


@pytest.mark.parametrize(
    "answer", [b"", b"SSH-2.0-OpenSSH_9.2\r\n", b"\x00\xff" * 9, b"HTTP/1.1 999999 x\r\n\r\n"]
)
def test_what_is_no_http_is_no_answer(serve: Callable[..., api.Address], answer: bytes) -> None:
    where = serve(lambda connection, _request: connection.sendall(answer))
    found = api.probe(service(where), placed=True)
    assert (found["healthy"], found["url"]) == (False, where.url)
    assert found["error"].startswith(f"no answer from {where.url} (")


def test_headers_without_end(serve: Callable[..., api.Address]) -> None:
    where = serve(drip(b"HTTP/1.1 200 OK\r\n", b"X-A: b\r\n" * 1000, pause=0))
    assert "no answer from" in api.probe(service(where), placed=True)["error"]


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        where = api.Address("127.0.0.1", gone.getsockname()[1])
    found = api.probe(service(where), placed=True)
    assert "refused" in found["error"]
    assert not found["healthy"]


def test_a_redirection_is_not_followed(serve: Callable[..., api.Address]) -> None:
    asked: list[bytes] = []

    def other(connection: socket.socket, request: bytes) -> None:
        asked.append(request)
        connection.sendall(OK % (2, b"ok"))

    elsewhere = serve(other)

    def answer(connection: socket.socket, _request: bytes) -> None:
        connection.sendall(
            b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: %s/\r\n\r\n" % elsewhere.url.encode()
        )

    found = api.probe(service(serve(answer)), placed=True)
    assert (found["healthy"], found["error"]) == (False, "/health answers 302")
    assert asked == []


def test_no_proxy_is_asked(serve: Callable[..., api.Address], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert api.probe(service(serve(says(b"", models("m")))), placed=True)["error"] is None


def test_all_rungs(serve: Callable[..., api.Address]) -> None:
    for host in ("127.0.0.1", "127.0.0.2", "::1"):
        where = serve(says(b"", models("m", "other")), host)
        found = api.probe(service(where), placed=True)
        assert found == {"url": where.url, "healthy": True, "models": ["m", "other"], "error": None}


def test_a_server_that_is_not_placed_yet_is_not_asked_for_its_models(
    serve: Callable[..., api.Address],
) -> None:
    found = api.probe(service(serve(says(b""))), placed=False)
    assert found["healthy"]
    assert found["error"] == "it answers, and is asked for its models once it is on its GPU"


@pytest.mark.parametrize("key", ["sk-0123456789", "pa$word-12345678", "a$$b'\"\\`{}", "!~"])
def test_the_key_is_sent_as_it_is_and_really_asked_for(serve: Callable[..., api.Address], key: str) -> None:
    def answer(connection: socket.socket, request: bytes) -> None:
        told = f"\r\nAuthorization: Bearer {key}\r\n".encode() in request
        if b"GET /health" in request or told:
            return says(models("m"))(connection, request)
        return says(b"", status=b"401 Unauthorized")(connection, request)

    where = serve(answer)
    assert api.probe(service(where, environment={"VLLM_API_KEY": key}), placed=True)["error"] is None
    assert api.probe(service(where), placed=True)["error"] == "/v1/models answers 401"
    found = api.probe(service(where, environment={"VLLM_API_KEY": key + "x"}), placed=True)
    assert found["error"] == "/v1/models answers 401 to the API key in .env"
    everybody = service(serve(says(b"", models("m"))), environment={"VLLM_API_KEY": key})
    assert (
        api.probe(everybody, placed=True)["error"] == "/v1/models answers without the API key that .env sets"
    )


@pytest.mark.parametrize("status", [b"503 Service Unavailable", b"404 Not Found", b"204 No Content"])
def test_a_server_that_is_not_well(serve: Callable[..., api.Address], status: bytes) -> None:
    found = api.probe(service(serve(says(b"", status=status))), placed=True)
    assert (found["healthy"], found["error"]) == (False, f"/health answers {status.decode()[:3]}")


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b"[]",
        b"hello",
        b"\xff",
        b"null",
        b'{"data": 5}',
        b'{"data": [{}]}',
        b'{"data": ["m"]}',
        b"[" * 10**5,
    ],
)
def test_an_answer_that_is_no_list_of_models_is_one(serve: Callable[..., api.Address], body: bytes) -> None:
    """So that nobody waits for a program that will never say anything else."""
    found = api.probe(service(serve(says(b"", body))), placed=True)
    assert found["healthy"]
    assert found["error"].startswith("/v1/models answers with no list of models (")


def test_another_model(serve: Callable[..., api.Address]) -> None:
    found = api.probe(service(serve(says(b"", models("x", "y")))), placed=True)
    assert found["error"] == "it serves x, y, not m"


def test_health_and_then_nothing_is_no_judgement(serve: Callable[..., api.Address]) -> None:
    def answer(connection: socket.socket, request: bytes) -> None:
        if b"/health" in request:
            connection.sendall(OK % (0, b""))

    where = serve(answer)
    found = api.probe(service(where), placed=True)
    assert not found["healthy"]
    assert found["error"].startswith(f"no answer from {where.url} (")


@pytest.mark.parametrize(
    ("port", "url"),
    [
        ({"published": "8000", "host_ip": "127.0.0.1"}, "http://127.0.0.1:8000"),
        ({"published": "9000"}, "http://127.0.0.1:9000"),
        ({"published": "9000", "host_ip": ""}, "http://127.0.0.1:9000"),
        ({"published": "9000", "host_ip": "0.0.0.0"}, "http://127.0.0.1:9000"),
        ({"published": "9000", "host_ip": "10.0.0.5"}, "http://10.0.0.5:9000"),
        ({"published": "9000", "host_ip": "::"}, "http://[::1]:9000"),
        ({"published": "9000", "host_ip": "0:0:0:0:0:0:0:1"}, "http://[::1]:9000"),
    ],
)
def test_where_the_api_answers(port: dict[str, str], url: str) -> None:
    assert api.address({"ports": [port]}).url == url


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["org/model", "--port", "8000"], ["org/model"]),
        (["org/model", "--served-model-name", "a", "b", "--port", "1"], ["a", "b"]),
        (["org/model", "--served-model-name=a"], ["a"]),
        (["org/model", "--served_model_name", "a", "-tp", "1"], ["a"]),
        (["org/model", "--served-model-name", "a", "--served-model-name", "b"], ["b"]),
        (["/models/tiny"], ["/models/tiny"]),
    ],
)
def test_served_names(arguments: list[str], names: list[str]) -> None:
    assert api.served_names({"command": arguments}) == names
