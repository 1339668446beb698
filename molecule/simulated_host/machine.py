"""This machine: its folders, its Docker Engine, and the progress of steps."""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CACHE = ROOT / ".cache"
PLUGIN = CACHE / "docker/cli-plugins/docker-compose"
SOCKET = "/var/run/docker.sock"


class HostError(Exception):
    """A problem that the user can solve."""


@contextlib.contextmanager
def step(text: str) -> Iterator[None]:
    """Print what starts, and how long it took."""
    started = time.monotonic()
    print(text, end=" ", file=sys.stderr, flush=True)
    try:
        yield
    except BaseException:
        print("failed", file=sys.stderr)
        raise
    print(f"{time.monotonic() - started:.1f} s", file=sys.stderr)


@functools.cache
def docker_command() -> tuple[str, ...]:
    """Return the Docker client's command, with sudo if only root may use the socket."""
    clients = [path for path in ("/usr/bin/docker", "/usr/local/bin/docker") if os.access(path, os.X_OK)]
    if not (clients and PLUGIN.exists() and Path(SOCKET).exists()):
        raise HostError(f"Docker Engine or its Compose plugin is missing: run {HERE / 'setup'}")
    command = (clients[0], "--host", f"unix://{SOCKET}")
    return command if os.access(SOCKET, os.W_OK) else ("sudo", *command)


def docker(*arguments: str, data: bytes | None = None, check: bool = True) -> str:
    done = subprocess.run([*docker_command(), *arguments], input=data, capture_output=True, check=False)
    if check and done.returncode:
        raise HostError(f"docker {arguments[0]}: {done.stderr.decode().strip()}")
    return done.stdout.decode().strip()
