# SPDX-License-Identifier: MIT
"""Check the server's API: it answers, and serves the wanted model to those who have the key."""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import json
import socket
import threading
from typing import Any, Mapping, NamedTuple

from . import compose
from .shell import Problem

# For a complete answer, in seconds: a busy server may need a few.
DEADLINE = 10
# Of a list of models; bytes.
_LIMIT = 4 * 2**20


class Address(NamedTuple):
    """Where the API answers as seen from the host itself."""

    host: str
    port: int

    @property
    def url(self) -> str:
        """The address as a URL."""
        return f"http://{'[' + self.host + ']' if ':' in self.host else self.host}:{self.port}"


def address(service: Mapping[str, Any]) -> Address:
    """Return where a service's API answers on this host; "any address" means loopback."""
    port = service["ports"][0]
    host = ipaddress.ip_address(port.get("host_ip") or "127.0.0.1")
    if host.is_unspecified:
        host = ipaddress.ip_address("127.0.0.1" if host.version == 4 else "::1")
    return Address(str(host), int(port["published"]))


def served_names(service: Mapping[str, Any]) -> list[str]:
    """Return the model names that the API must list, from the resolved command line."""
    command = [str(word) for word in service["command"]]
    return compose.option(command, "--served-model-name") or command[:1]


def _get(where: Address, path: str, key: str = "", deadline: float = DEADLINE) -> tuple[int, bytes]:
    """Return the status and the body of an answer; uses no proxy and follows no redirection.

    Raises TimeoutError unless it is complete within the deadline, and Problem where it is too long.
    """
    connection = http.client.HTTPConnection(where.host, where.port, timeout=deadline)
    connection.connect()
    stream = connection.sock

    # The socket's own timeout restarts with each byte: an answer that drips would never end.
    late = threading.Event()

    def hang_up() -> None:
        late.set()
        with contextlib.suppress(OSError):
            stream.shutdown(socket.SHUT_RDWR)

    alarm = threading.Timer(deadline, hang_up)
    alarm.daemon = True
    alarm.start()
    error: Exception | None = None
    try:
        connection.request("GET", path, headers={"Authorization": "Bearer " + key} if key else {})
        answer = connection.getresponse()
        body = answer.read(_LIMIT + 1)
    except (OSError, http.client.HTTPException) as problem:
        error = problem
    finally:
        alarm.cancel()
        connection.close()
    if late.is_set():
        raise TimeoutError(f"no complete answer to {path} within {deadline} s")
    if error:
        raise error
    if len(body) > _LIMIT:
        raise Problem(f"the answer to {path} is larger than {_LIMIT // 2**20} MiB")
    return answer.status, body


def probe(service: Mapping[str, Any], *, placed: bool) -> dict[str, Any]:
    """Check /health, and /v1/models with and without the key; `error` is None where all is well.

    /v1/models is only checked once the server is `placed` on its GPU.
    """
    where = address(service)
    key = str((service.get("environment") or {}).get("VLLM_API_KEY") or "")
    result: dict[str, Any] = {"url": where.url, "healthy": False, "models": [], "error": None}
    try:
        code, _body = _get(where, "/health")
        if code != 200:
            raise Problem(f"/health returned {code}")
        result["healthy"] = True
        if not placed:
            return dict(result, error="it answers; its models are checked once it is on its GPU")
        code, body = _get(where, "/v1/models", key)
        if code != 200:
            raise Problem(f"/v1/models returned {code}{' for the API key in .env' if key else ''}")
        result["models"] = [str(model["id"]) for model in json.loads(body)["data"]]
        missing = [name for name in served_names(service) if name not in result["models"]]
        if missing:
            raise Problem(f"it serves {', '.join(result['models'])}, not {', '.join(missing)}")
        if key and _get(where, "/v1/models")[0] == 200:
            raise Problem("/v1/models answers without the API key that .env sets")
    except Problem as problem:
        result["error"] = str(problem)
    except (OSError, http.client.HTTPException) as error:
        # Also where only /v1/models did not answer: what is served is unknown then.
        result.update(healthy=False, error=f"no answer from {where.url} ({error})")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        result["error"] = f"/v1/models did not return a list of models ({error})"
    return result
