# SPDX-License-Identifier: MIT
"""Run a command without a shell, and never for ever."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
from typing import IO, Mapping, NamedTuple, Sequence

# The engine of this very host, wherever the user's environment or Docker context
# points: the cards that nvidia-smi lists are of no other. The role's tasks that
# call docker have the same from vars/main/engine.yml.
ENGINE = {
    "DOCKER_HOST": "unix:///var/run/docker.sock",
    "DOCKER_CONTEXT": "",
    "DOCKER_TLS": "",
    "DOCKER_TLS_VERIFY": "",
}

# One call of the docker CLI; seconds. An engine that takes longer is stuck.
TIMEOUT = 20
# What a command may print; bytes. None of those here prints a hundredth of it.
LONGEST = 32 * 2**20


class Problem(Exception):  # noqa: N818 - it is a finding, for a person
    """A reason not to touch the host, with its cure, as one text for a person."""


class Output(NamedTuple):
    """What a command left behind; `code` is None when it ran into its time limit."""

    code: int | None
    out: str
    err: str


def run(
    argv: Sequence[str], stdin: bytes = b"", env: Mapping[str, str] | None = None, timeout: float = TIMEOUT
) -> Output:
    """Run `argv` without a shell, for at most `timeout` seconds, with the host's own engine for docker.

    What it prints goes to memory, not through pipes: a grandchild that holds a pipe open
    can't keep us waiting, and the kernel ends a program that prints without end.
    """
    env = dict(os.environ if env is None else env, **ENGINE)
    with _memory(stdin) as given, _memory() as out, _memory() as err:
        try:
            process = subprocess.Popen(
                argv,
                stdin=given,
                stdout=out,
                stderr=err,
                env=env,
                preexec_fn=_limit,  # noqa: PLW1509
            )
        except OSError as error:
            return Output(127, "", str(error))
        try:
            code: int | None = process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            # One that is stuck in the kernel survives even that.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)
            code = None
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read().decode("utf-8", "replace"))
    if code is None:
        return Output(None, "", f"no answer in {timeout} s")
    return Output(code, texts[0], texts[1].strip())


def _memory(content: bytes = b"") -> IO[bytes]:
    """Return an open file that never touches the disk."""
    stream = os.fdopen(os.memfd_create("vllm_gpu"), "w+b")
    stream.write(content)
    stream.seek(0)
    return stream


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (LONGEST, LONGEST))
