"""The check of the API, with real servers on loopback, some of which never end their answer."""

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
Serve = Callable[..., api.Address]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start servers that give each request, its path and headers, to a function."""
    with contextlib.ExitStack() as sockets:

        def start(answer: Answer, host: str = "127.0.0.1") -> api.Address:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listening = sockets.enter_context(socket.create_server((host, 0), family=family))

            def accept() -> None:
                with contextlib.suppress(OSError):
                    while True:
                        connection, _peer = listening.accept()
                        with connection, contextlib.suppress(OSError):
                            answer(connection, connection.recv(2**16))

            threading.Thread(target=accept, daemon=True).start()
            return api.Address(host, listening.getsockname()[1])

        yield start


def answers(*bodies: bytes, status: bytes = b"200 OK") -> Answer:
    """Answer the n-th request with the n-th body, and all later ones with the last."""
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
    ("head", "piece", "pause"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n", b"x", 0.05),
        (b"HTTP/1.1 200 OK\r\n\r\n", b"x", 0.05),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n", 0.05),
        (b"HTTP/1.1 200 OK\r\n", b"X-A: b\r\n", 0.05),
        (b"HTTP/1.1 200 OK\r\nX-A: ", b"b", 0.05),
        (b"", b"H", 0.05),
        (b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 100 Continue\r\n\r\n", 0.05),
        (b"", b"", 2),
    ],
    ids=["body", "body without length", "chunks", "headers", "a header", "status line", "100 Continue", "silence"],
)  # fmt: skip
def test_an_incomplete_answer_ends_at_the_deadline(
    serve: Serve, head: bytes, piece: bytes, pause: float
) -> None:
    where = serve(drip(head, piece, pause))
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"no complete answer to /health within 0\.4 s"):
        api._get(where, "/health", deadline=0.4)  # noqa: SLF001 - the deadline is what it is about
    assert 0.35 < time.monotonic() - started < 3


def test_a_slow_answer_within_the_deadline_counts(serve: Serve) -> None:
    def answer(connection: socket.socket, _request: bytes) -> None:
        for byte in OK % (2, b"ok"):
            connection.sendall(bytes([byte]))
            time.sleep(0.002)

    assert api._get(serve(answer), "/health", deadline=5) == (200, b"ok")  # noqa: SLF001


@pytest.mark.parametrize("length", [b"", b"Content-Length: 99999999999\r\n"])
def test_reading_stops_at_the_size_limit(serve: Serve, length: bytes) -> None:
    where = serve(drip(b"HTTP/1.1 200 OK\r\n" + length + b"\r\n", b"x" * 2**20, pause=0))
    with pytest.raises(shell.Problem, match="the answer to /v1/models is larger than 4 MiB"):
        api._get(where, "/v1/models")  # noqa: SLF001


@pytest.mark.parametrize(
    "answer",
    [
        *(
            (lambda connection, _request, text=text: connection.sendall(text))
            for text in (b"", b"SSH-2.0-OpenSSH_9.2\r\n", b"\x00\xff" * 9, b"HTTP/1.1 999999 x\r\n\r\n")
        ),
        drip(b"HTTP/1.1 200 OK\r\n", b"X-A: b\r\n" * 1000, pause=0),
        # /health answers, and nothing else: what is served is unknown.
        lambda connection, request: connection.sendall(OK % (0, b"")) if b"/health" in request else None,
    ],
    ids=["nothing", "SSH", "bytes", "odd status", "endless headers", "only /health"],
)
def test_no_answer(serve: Serve, answer: Answer) -> None:
    where = serve(answer)
    found = api.probe(service(where), placed=True)
    assert (found["healthy"], found["url"]) == (False, where.url)
    assert found["error"].startswith(f"no answer from {where.url} (")


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        where = api.Address("127.0.0.1", gone.getsockname()[1])
    found = api.probe(service(where), placed=True)
    assert "refused" in found["error"]
    assert not found["healthy"]


def test_a_redirection_is_not_followed(serve: Serve) -> None:
    requests: list[bytes] = []
    target = serve(lambda _connection, request: requests.append(request))
    answer = b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: %s/\r\n\r\n" % target.url.encode()
    where = serve(lambda connection, _request: connection.sendall(answer))
    found = api.probe(service(where), placed=True)
    assert (found["healthy"], found["error"], requests) == (False, "/health returned 302", [])


def test_no_proxy_is_used(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert api.probe(service(serve(answers(b"", models("m")))), placed=True)["error"] is None


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1"])
def test_a_server_that_works(serve: Serve, host: str) -> None:
    where = serve(answers(b"", models("m", "other")), host)
    found = api.probe(service(where), placed=True)
    assert found == {"url": where.url, "healthy": True, "models": ["m", "other"], "error": None}


@pytest.mark.parametrize("key", ["sk-0123456789", "pa$word-12345678", "a$$b'\"\\`{}", "!~"])
def test_the_key_is_sent_unchanged_and_must_be_needed(serve: Serve, key: str) -> None:
    def answer(connection: socket.socket, request: bytes) -> None:
        has_key = f"\r\nAuthorization: Bearer {key}\r\n".encode() in request
        if b"GET /health" in request or has_key:
            return answers(models("m"))(connection, request)
        return answers(b"", status=b"401 Unauthorized")(connection, request)

    where, open_to_all = serve(answer), serve(answers(b"", models("m")))
    for address, sent_key, error in (
        (where, key, None),
        (where, "", "/v1/models returned 401"),
        (where, key + "x", "/v1/models returned 401 for the API key in .env"),
        (open_to_all, key, "/v1/models answers without the API key that .env sets"),
    ):
        found = api.probe(service(address, environment={"VLLM_API_KEY": sent_key}), placed=True)
        assert found["error"] == error


@pytest.mark.parametrize("status", [b"503 Service Unavailable", b"404 Not Found", b"204 No Content"])
def test_an_unhealthy_server(serve: Serve, status: bytes) -> None:
    found = api.probe(service(serve(answers(b"", status=status))), placed=True)
    assert (found["healthy"], found["error"]) == (False, f"/health returned {status.decode()[:3]}")


NO_MODELS = [
    b"{}", b"[]", b"hello", b"\xff", b"null", b'{"data": 5}', b'{"data": [{}]}', b'{"data": ["m"]}', b"[" * 10**5,
]  # fmt: skip


@pytest.mark.parametrize(
    ("body", "placed", "error"),
    [
        # A program that answers like this will never become the server.
        *((body, True, "/v1/models did not return a list of models (") for body in NO_MODELS),
        (models("x", "y"), True, "it serves x, y, not m"),
        (b"", False, "it answers; its models are checked once it is on its GPU"),
    ],
)
def test_a_healthy_server_that_is_not_proven(serve: Serve, body: bytes, placed: bool, error: str) -> None:  # noqa: FBT001
    found = api.probe(service(serve(answers(b"", body))), placed=placed)
    assert found["healthy"]
    assert found["error"].startswith(error)


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
def test_the_address_of_the_api(port: dict[str, str], url: str) -> None:
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
