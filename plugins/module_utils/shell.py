# SPDX-License-Identifier: MIT
"""Run a command without a shell and with a time limit."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
from typing import IO, Mapping, NamedTuple, Sequence

# The Docker Engine of this host, which has the cards that nvidia-smi lists, wherever the user's
# environment or Docker context points. vars/main/engine.yml has the same for the role's tasks.
ENGINE = {
    "DOCKER_HOST": "unix:///var/run/docker.sock",
    "DOCKER_CONTEXT": "",
    "DOCKER_TLS": "",
    "DOCKER_TLS_VERIFY": "",
}

# Of one call of docker; seconds.
TIMEOUT = 20
# The most that a command may print; bytes.
LONGEST = 32 * 2**20


class Problem(Exception):  # noqa: N818 - it is a finding for the operator
    """Why the host must not be changed, and how to fix that."""


class Output(NamedTuple):
    """What a command printed; `code` is None where it hit its time limit."""

    code: int | None
    out: str
    err: str


def run(
    argv: Sequence[str], stdin: bytes = b"", env: Mapping[str, str] | None = None, timeout: float = TIMEOUT
) -> Output:
    """Run `argv` for at most `timeout` seconds, with the host's own Docker Engine.

    Output goes to memory, not through pipes: a grandchild that holds a pipe open can't block this, and
    the kernel kills a program that prints without end.
    """
    env = dict(os.environ if env is None else env, **ENGINE)
    with memory_file(stdin) as given, memory_file() as out, memory_file() as err:
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
            # A process that is stuck in the kernel survives even that.
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


def memory_file(content: bytes = b"") -> IO[bytes]:
    """Return an open file that never touches the disk."""
    stream = os.fdopen(os.memfd_create("vllm_gpu"), "w+b")
    stream.write(content)
    stream.seek(0)
    return stream


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (LONGEST, LONGEST))
