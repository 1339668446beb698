# SPDX-License-Identifier: MIT
"""Remove the server's container: that one, by its id, and nothing else."""

from __future__ import annotations

from typing import Any, Mapping, Sequence

from . import container, docker
from .shell import Problem

# What docker may take beyond the container's own grace period; seconds.
_STOPPING = 60


def remove(containers: Sequence[Mapping[str, Any]]) -> None:
    """Stop and remove the containers, and the default network of their projects where nothing else uses it.

    Volumes stay. Raises Problem unless docker shows afterwards that the containers are gone.
    """
    error = ""
    for found in containers:
        # Each may report that it is gone already; what counts is what docker shows afterwards.
        docker.run(["stop", found["id"]], timeout=found["stop_timeout"] + _STOPPING)
        error = docker.run(["rm", "--force", found["id"]], timeout=_STOPPING).err
    left = [found["name"] for found in container.find()]
    if left:
        raise Problem(
            f"There is still a container {' and '.join(left)} on this host: "
            f"{error or 'another program has made it anew. Run the play again.'}"
        )
    for project in sorted({found["project"] for found in containers if found["project"]}):
        _remove_network(project)


def _remove_network(project: str) -> None:
    """Remove a project's default network unless a container, running or not, still belongs to it."""
    labels = (f"{container.PROJECT_LABEL}={project}", "com.docker.compose.network=default")
    filters = [word for label in labels for word in ("--filter", f"label={label}")]
    for network in (docker.ask(["network", "ls", "--quiet", "--no-trunc", *filters]) or "").split():
        if not docker.ask(["ps", "--all", "--quiet", "--filter", f"network={network}"]):
            # A network that stays does no harm; the next `up` uses it.
            docker.run(["network", "rm", network])
