# SPDX-License-Identifier: MIT
"""What the modules share: arguments, and how they fail."""

from __future__ import annotations

import contextlib
import os
from typing import Any, Iterator, Mapping

from . import compose, dotenv, files, outgoing, paths, settings
from .shell import Problem

WANTED_OPTIONS: dict[str, Any] = {
    "project_dir": {"type": "path", "required": True},
    "compose": {"type": "str", "required": True},
    "referee": {"type": "str", "required": True},
    "env_example": {"type": "str", "required": True},
    "env": {"type": "dict", "required": True},
    "extra_args": {"type": "raw", "default": []},
    "server_env": {"type": "dict", "default": {}},
    "secrets": {"type": "dict", "default": {}, "no_log": True},
    "secret_env": {"type": "dict", "default": {}, "no_log": True},
}


def invocation(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return a module's arguments without `wanted`: its 40 kB would be in every event of every host."""
    return {"module_args": {key: value for key, value in params.items() if key != "wanted"}}


def hidden(text: str, project_dir: str) -> str:
    """Return a message without secrets.

    Most modules are not given them, so every value that the compose file passes on and that is long
    enough counts as one.
    """
    secrets = outgoing.known(project_dir, {})
    with contextlib.suppress(Problem):
        passed_on = compose.passed_on(files.read(os.path.join(project_dir, paths.COMPOSE_FILE))[0] or b"")
        values = dotenv.texts(files.read(os.path.join(project_dir, paths.ENV_FILE))[0] or b"")
        secrets.update(
            value
            for key, value in values.items()
            if key in passed_on and len(value) >= settings.SHORTEST_SECRET
        )
    return str(outgoing.clean(text, secrets))


@contextlib.contextmanager
def failing(module: Any, project_dir: str, *, done: str = "written") -> Iterator[None]:
    """Let the module fail, without secrets, where the block raises Problem or can't change a file."""
    try:
        yield
    except Problem as problem:
        module.fail_json(msg=hidden(str(problem), project_dir))
    except OSError as error:
        module.fail_json(
            msg=f"{error.filename or project_dir} could not be {done}: {error.strerror}. Correct that (is the disk full, "
            "or mounted read-only?), and run the play again."
        )
