# SPDX-License-Identifier: MIT
"""Run a command without a shell, and never for ever."""

from __future__ import annotations

import os
import subprocess
from typing import Mapping, NamedTuple, Optional, Sequence

# The engine of this very host, wherever the user's environment or Docker context
# points: the cards that nvidia-smi lists are of no other. The role's tasks that
# call docker have the same from vars/main.yml.
ENGINE = {
    "DOCKER_HOST": "unix:///var/run/docker.sock",
    "DOCKER_CONTEXT": "",
    "DOCKER_TLS": "",
    "DOCKER_TLS_VERIFY": "",
}

# One call of the docker CLI; seconds. An engine that takes longer is stuck.
TIMEOUT = 20


class Problem(Exception):  # noqa: N818 - it is a finding, for a person
    """A reason not to touch the host, with its cure, as one text for a person."""


class Output(NamedTuple):
    """What a command left behind; `code` is None when it ran into its time limit."""

    code: Optional[int]
    out: str
    err: str


def run(
    argv: Sequence[str], stdin: bytes = b"", env: Optional[Mapping[str, str]] = None, timeout: float = TIMEOUT
) -> Output:
    """Run `argv` without a shell, for at most `timeout` seconds, with the host's own engine for docker."""
    env = dict(os.environ if env is None else env, **ENGINE)
    try:
        done = subprocess.run(argv, input=stdin, capture_output=True, timeout=timeout, check=False, env=env)
    except subprocess.TimeoutExpired:
        return Output(None, "", "no answer in {0} s".format(timeout))
    except OSError as error:
        return Output(127, "", str(error))
    return Output(
        done.returncode,
        done.stdout.decode("utf-8", "replace"),
        done.stderr.decode("utf-8", "replace").strip(),
    )
