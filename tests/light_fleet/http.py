"""The part of HTTP that the Docker client and the role's checks of the API need."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit


class Request(NamedTuple):
    method: str
    words: list[str]  # of the path
    query: dict[str, str]
    headers: dict[str, str]
    body: Any


class Reply(NamedTuple):
    """An answer; after 101 the connection is the other protocol's."""

    status: int = 200
    body: object = b""

    def bytes(self) -> bytes:
        body = self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()
        kind = "application/octet-stream" if isinstance(self.body, bytes) else "application/json"
        ends = "Connection: Upgrade\r\nUpgrade: tcp" if self.status == 101 else f"Content-Length: {len(body)}"
        head = (
            f"HTTP/1.1 {self.status} {HTTPStatus(self.status).phrase}\r\nApi-Version: 1.41\r\nOstype: linux"
        )
        return f"{head}\r\nContent-Type: {kind}\r\n{ends}\r\n\r\n".encode() + body


async def read(reader: asyncio.StreamReader) -> Request:
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    method, target, _ = first.split()
    headers = {key.lower(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    url = urlsplit(target)
    words = [unquote(word) for word in url.path.split("/")[1:]]
    return Request(method, words, dict(parse_qsl(url.query)), headers, json.loads(body or "null"))


def serve(
    answer: Callable[[Request], Awaitable[Reply | None]],
) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
    """Return a server of connections; where `answer` returns None it closes the connection."""

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, ValueError):
            while True:
                request = await read(reader)
                reply = await answer(request)
                if reply is None:
                    break
                head, gap, body = reply.bytes().partition(b"\r\n\r\n")
                writer.write(head + gap + (b"" if request.method == "HEAD" else body))
                await writer.drain()
                if reply.status == 101 or request.headers.get("connection") == "close":
                    break
        writer.close()

    return converse
