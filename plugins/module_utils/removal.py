# SPDX-License-Identifier: MIT
"""Remove the server's container by its id."""

from __future__ import annotations

from typing import Any, Mapping, Sequence

from . import container, docker
from .shell import Problem

# How long docker may need beyond the container's grace period; seconds.
_STOPPING = 60


def remove(containers: Sequence[Mapping[str, Any]]) -> None:
    """Stop and remove the containers, and the unused default networks of their projects.

    Volumes stay. Raises Problem where a container still exists afterwards.
    """
    error = ""
    for found in containers:
        # Errors, such as "already removed", don't matter; the check below does.
        docker.run(["stop", found["id"]], timeout=found["stop_timeout"] + _STOPPING)
        error = docker.run(["rm", "--force", found["id"]], timeout=_STOPPING).err
    left = [found["name"] for found in container.find()]
    if left:
        raise Problem(
            f"Not removed from this host: the container {' and '.join(left)}. "
            f"{error or 'Another program has created it again. Run the play again.'}"
        )
    for project in sorted({found["project"] for found in containers if found["project"]}):
        _remove_network(project)


def _remove_network(project: str) -> None:
    """Remove a project's default network unless a container, running or not, still belongs to it."""
    labels = (f"{container.PROJECT_LABEL}={project}", "com.docker.compose.network=default")
    filters = [word for label in labels for word in ("--filter", f"label={label}")]
    for network in (docker.ask(["network", "ls", "--quiet", "--no-trunc", *filters]) or "").split():
        if not docker.ask(["ps", "--all", "--quiet", "--filter", f"network={network}"]):
            # A failure does no harm.
            docker.run(["network", "rm", network])
