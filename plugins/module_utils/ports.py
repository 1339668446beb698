# SPDX-License-Identifier: MIT
"""Find out which program listens on a port, and whether the server could."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
import sys
from typing import Any, Iterator, Mapping, NamedTuple

from . import container

# What listens on a published port, with and without Docker's userland proxy.
_DOCKER = ("docker-proxy", "dockerd")


def problem(address: str, port: int, own: Mapping[str, Any] | None) -> str | None:
    """Return why the server can't listen there, or None; `own` is its current container."""
    error = try_to_listen(address, 0)
    if error:
        return (
            f"This host can't listen on {address} (vllm_gpu_bind_address): {error.strerror}. Use one of its "
            "own addresses."
        )
    found = own or {"bindings": [], "status": ""}
    mine = [bound["address"] for bound in found["bindings"] if bound["port"] == port]
    running = bool(mine) and found["status"] in ("running", "restarting")
    # A running one has its port; between two starts another container may have taken it.
    lost = found["status"] == "restarting" and bool(publishers(port))
    others = [
        other
        for other in listeners(port)
        if overlap(other.address, address)
        and not (
            running
            and other.address in mine
            and (found["status"] == "running" or (other.program in ("", *_DOCKER) and not lost))
        )
    ]
    # Listening there, if only for a moment, could prevent a restart of the server for good.
    error = None if running else try_to_listen(address, port)
    if error and error.errno != errno.EADDRINUSE:
        return f"This host can't listen on port {port} of {address} (vllm_gpu_port): {error.strerror}."
    if not others and error is None:
        return None
    names = publishers(port) if all(other.program in ("", *_DOCKER) for other in others) else []
    who, cure = "another program", "Stop it"
    if names:
        who, cure = f"container {', '.join(names)}", "Stop that container"
    elif others and others[0].program:
        who, cure = f"{others[0].program} (pid {others[0].pid})", "Stop that program"
    return f"Port {port} on {address} is already in use by {who}. {cure}, or choose another vllm_gpu_port."


def overlap(address: str, other: str) -> bool:
    """Return whether two addresses can't be listened on at once on the same port."""
    first, second = ipaddress.ip_address(address), ipaddress.ip_address(other)
    if first == second:
        return True
    # On Linux, :: includes IPv4.
    return any(
        any_address.is_unspecified and any_address.version in (6, specific.version)
        for any_address, specific in ((first, second), (second, first))
    )


def try_to_listen(address: str, port: int) -> OSError | None:
    """Listen on a TCP port (0: any free one) for a moment; return why that can't be done, or None."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
            probe.listen(1)
            if port == 0:  # nobody can connect to a broadcast address
                with socket.create_connection(probe.getsockname()[:2], timeout=2):
                    pass
        except OSError as error:
            return error
    return None


def publishers(port: int) -> list[str]:
    """Return the names of the other containers that publish a TCP port."""
    return container.others(f"publish={port}/tcp", "status=running")


class Listener(NamedTuple):
    """A program that listens on a TCP port; its name is empty where that can't be read."""

    address: str
    program: str
    pid: int


def listeners(port: int) -> list[Listener]:
    """Return the listeners on a TCP port."""
    sockets = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        # A host may have no IPv6.
        with contextlib.suppress(OSError), open(table, encoding="utf-8") as stream:
            for row in list(stream)[1:]:
                field = row.split()
                address, _colon, number = field[1].rpartition(":")
                if field[3] == "0A" and int(number, 16) == port:
                    sockets[f"socket:[{field[9]}]"] = _address(address)
    owners = dict(_owners(set(sockets)))
    return [Listener(address, *owners.get(inode, ("", 0))) for inode, address in sockets.items()]


def _address(text: str) -> str:
    """Return an address of /proc/net/tcp, whose 32-bit words have this machine's byte order, in its usual form."""
    words = [bytes.fromhex(text[at : at + 8]) for at in range(0, len(text), 8)]
    packed = b"".join(word[::-1] if sys.byteorder == "little" else word for word in words)
    address = ipaddress.ip_address(packed)
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)


def _owners(inodes: set[str]) -> Iterator[tuple[str, tuple[str, int]]]:
    """Yield the name and the pid of the program that has each of the sockets open."""
    for pid in filter(str.isdigit, os.listdir("/proc") if inodes else []):
        with contextlib.suppress(OSError):
            for descriptor in os.listdir(f"/proc/{pid}/fd"):
                inode = os.readlink(f"/proc/{pid}/fd/{descriptor}")
                if inode in inodes:
                    with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as stream:
                        yield inode, (stream.read().strip(), int(pid))
