# SPDX-License-Identifier: MIT
"""Run the docker command; no other Python file does."""

from __future__ import annotations

import re
from typing import Mapping, Sequence

from . import shell
from .shell import Problem

# The oldest supported versions.
OLDEST_ENGINE, OLDEST_COMPOSE = "20.10", "2.18"
_ABSENT = re.compile(r"no such (container|image|object|network|volume)", re.IGNORECASE)
_AWAY = re.compile(
    r"cannot connect to the docker daemon|failed to connect to the docker api|error during connect|"
    r"connection refused|connection reset|unexpected eof|is the docker daemon running",
    re.IGNORECASE,
)


class Unanswered(Problem):
    """The Docker Engine did not answer; it may be restarting."""


def version(text: str) -> tuple[int, ...]:
    """Return the numbers that a version starts with: (20, 10, 24) of `20.10.24+dfsg1`."""
    match = re.match(r"v?(\d+(?:\.\d+)*)", text)
    return tuple(int(part) for part in match.group(1).split(".")) if match else ()


def is_older(found: str, oldest: str) -> bool:
    """Return whether the version `found` is older than `oldest`."""
    return version(found) < version(oldest)


def run(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    timeout: float = shell.TIMEOUT,
    ending: int | None = None,
) -> shell.Output:
    """Run a docker command.

    With `ending`, a timeout also terminates the plugin that docker has started, which would otherwise
    go on; it is killed after so many seconds.
    """
    if ending is None:
        return shell.run(["docker", *argv], env=env, timeout=timeout)
    limited = ["timeout", f"--kill-after={ending}", str(timeout), "docker", *argv]
    return shell.run(limited, env=env, timeout=timeout + 2 * ending)


def ask(argv: Sequence[str], timeout: float = shell.TIMEOUT) -> str | None:
    """Return what a docker command prints, or None where the object doesn't exist.

    Raises Unanswered where the Docker Engine can't be reached or is too slow, and Problem, with
    docker's own message, for every other failure.
    """
    output = run(argv, timeout=timeout)
    if output.code == 0:
        return output.out
    if output.code is None:
        raise Unanswered(
            f"`docker {argv[0]}` gave {output.err}. Check the Docker service (`systemctl status docker`, "
            "`journalctl -u docker`), and run the play again."
        )
    if _AWAY.search(output.err):
        raise Unanswered(
            f"The Docker Engine can't be reached: {output.err} Check the Docker service (`systemctl status "
            "docker`), and run the play again."
        )
    if _ABSENT.search(output.err):
        return None
    raise Problem(
        f"`docker {' '.join(argv[:4])}` failed with exit code {output.code}: {output.err or 'no message'}"
    )


def do(*argv: str, timeout: float = shell.TIMEOUT) -> None:
    """Run a docker command that must succeed; raise as ask() does."""
    if ask(argv, timeout) is None:
        raise Problem(f"`docker {' '.join(argv)}` failed: no such object.")
