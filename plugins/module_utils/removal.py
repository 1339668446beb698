# SPDX-License-Identifier: MIT
"""Find the server's container, check whose it is, and remove it: that one, by its id, and nothing else."""

from __future__ import annotations

import json
import os
from typing import Any, Mapping, NamedTuple, Sequence

from ansible_collections.mlops.vllm_gpu.plugins.module_utils import container, shell
from ansible_collections.mlops.vllm_gpu.plugins.module_utils.shell import Problem

# Compose's interim name too: it renames the old container while it makes the new one.
_NAME = "^/?([0-9a-f]+_)?vllm-server$"
# What docker may take beyond the container's own grace period; seconds.
_STOPPING = 60


class Container(NamedTuple):
    """A container with the server's name."""

    id: str
    name: str
    project: str | None
    project_dir: str | None
    started_at: str
    stop_timeout: int
    image: str
    # Whether Compose knows it for one of its own; otherwise its name is in the way.
    composed: bool
    storage: list[str]


def find() -> list[Container]:
    """Return the containers with the server's name, running or not: none, one, or two while Compose recreates it."""
    ids = (container.ask(["ps", "--all", "--quiet", "--no-trunc", "--filter", "name=" + _NAME]) or "").split()
    if not ids:
        return []
    answer = container.ask(["inspect", *ids])
    if answer is None:
        raise Problem(
            f"The container {container.CONTAINER} was replaced or removed while it was being checked: another "
            "program is changing it. Run the play again."
        )
    return [_container(one) for one in json.loads(answer)]


def _container(raw: Mapping[str, Any]) -> Container:
    labels = raw["Config"].get("Labels") or {}
    return Container(
        raw["Id"],
        raw["Name"].lstrip("/"),
        labels.get("com.docker.compose.project"),
        labels.get("com.docker.compose.project.working_dir"),
        raw["State"]["StartedAt"],
        raw["Config"].get("StopTimeout") or 10,
        raw["Config"]["Image"],
        "com.docker.compose.container-number" in labels,
        [
            "volume " + one["Name"] if one["Type"] == "volume" else one["Source"]
            for one in raw.get("Mounts") or []
        ],
    )


def check_owner(containers: Sequence[Container], projects: Sequence[str], project_dir: str) -> None:
    """Raise Problem for a container that was not started from `project_dir` in one of `projects`."""
    for one in containers:
        cure = "docker rm -f " + one.name
        if one.project is None:
            owner = "It belongs to no Compose project."
        elif one.project not in projects:
            owner = (
                f"It belongs to the Compose project {one.project}, which was started from {one.project_dir}."
            )
        elif os.path.realpath(one.project_dir or "/") != os.path.realpath(project_dir):
            owner = f"It was started from {one.project_dir}, not from {project_dir}."
            cure = f"ansible-playbook playbooks/teardown.yml -e vllm_gpu_project_dir={one.project_dir}"
        else:
            continue
        raise Problem(
            f"The container {one.name} on this host is not the server of {project_dir}. {owner} Nothing was "
            f"stopped or removed. If nobody needs it any more, remove it: {cure}"
        )


def remove(containers: Sequence[Container]) -> None:
    """Stop and remove the containers, and the default network of their projects where nothing else uses it.

    Volumes stay. Raises Problem unless docker shows afterwards that the containers are gone.
    """
    said = ""
    for one in containers:
        # Each may say that it is gone already; what counts is what docker shows afterwards.
        shell.run(["docker", "stop", one.id], timeout=one.stop_timeout + _STOPPING)
        said = shell.run(["docker", "rm", "--force", one.id], timeout=_STOPPING).err
    left = [one.name for one in find()]
    if left:
        raise Problem(
            f"There is still a container {' and '.join(left)} on this host: "
            f"{said or 'another program has made it anew. Run the play again.'}"
        )
    for project in sorted({one.project for one in containers if one.project}):
        _remove_network(project)


def _remove_network(project: str) -> None:
    """Remove a project's default network unless a container, running or not, still belongs to it."""
    labels = ["com.docker.compose.project=" + project, "com.docker.compose.network=default"]
    filters = [word for one in labels for word in ("--filter", "label=" + one)]
    for network in (container.ask(["network", "ls", "--quiet", "--no-trunc", *filters]) or "").split():
        if not container.ask(["ps", "--all", "--quiet", "--filter", "network=" + network]):
            # A network that stays does no harm; the next `up` uses it.
            shell.run(["docker", "network", "rm", network])
