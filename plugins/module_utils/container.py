# SPDX-License-Identifier: MIT
"""Read the server's container, its image and its log from the Docker Engine."""

from __future__ import annotations

import json
import os
import re
from typing import Any, Iterable, Mapping

from . import docker
from .shell import Problem

CONTAINER = "vllm-server"
# While Compose recreates a container, the old one's name starts with its id.
_OWN_NAME = "([0-9a-f]+_)?" + CONTAINER
# The Compose project, and the one until 0.2, which any folder named `vllm` shares.
PROJECT, EARLIER_PROJECT = "vllm-gpu", "vllm"
# Labels of Compose.
PROJECT_LABEL = "com.docker.compose.project"
_DIRECTORY_LABEL = PROJECT_LABEL + ".working_dir"
_HASH_LABEL = "com.docker.compose.config-hash"
_NUMBER_LABEL = "com.docker.compose.container-number"

_IN_CHANGE = (
    f"The container {CONTAINER} was replaced or removed while it was being checked: another program is changing it, "
    "or the Docker Engine is stopping. Run the play again."
)
_OWN_REQUESTS = re.compile(r'"GET /(health|v1/models) HTTP')


def inspect(name: str = CONTAINER) -> dict[str, Any] | None:
    """Return what `docker inspect` shows of a container, secrets included, or None."""
    answer = docker.ask(["inspect", "--type", "container", name])
    return dict(json.loads(answer)[0]) if answer is not None else None


def find() -> list[dict[str, Any]]:
    """Describe the containers with the server's name, running or not: none, one, or two while Compose recreates it."""
    ids = docker.ask(["ps", "--all", "--quiet", "--no-trunc", "--filter", f"name=^/?{_OWN_NAME}$"]) or ""
    found = [inspect(name) for name in ids.split()]
    if None in found:
        raise Problem(_IN_CHANGE)
    return [describe(raw) for raw in found if raw]


def environment(raw: Mapping[str, Any] | None) -> dict[str, str]:
    """Return the environment that a container was created with."""
    pairs = (pair.partition("=") for pair in ((raw or {}).get("Config") or {}).get("Env") or [])
    return {key: value for key, _is, value in pairs}


def describe(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the role needs to know about a container; nothing of its environment."""
    state, host = raw["State"], raw["HostConfig"]
    labels = raw["Config"].get("Labels") or {}
    health = state.get("Health") or {}
    last_check = (health.get("Log") or [{}])[-1]
    return {
        "id": raw["Id"],
        "name": raw["Name"].lstrip("/"),
        "status": state["Status"],
        "exit_code": state["ExitCode"],
        "error": state.get("Error", ""),
        "oom_killed": state.get("OOMKilled", False),
        "started_at": state["StartedAt"],
        "health": health.get("Status"),
        "health_output": str(last_check.get("Output") or "").strip(),
        "was_ready": False,
        "restarts": raw.get("RestartCount", 0),
        "bindings": bindings(host),
        "image": raw["Config"]["Image"],
        "image_id": raw["Image"],
        "stop_timeout": raw["Config"].get("StopTimeout") or 10,
        # One without this label blocks the name: Compose would not replace it.
        "composed": _NUMBER_LABEL in labels,
        "project": labels.get(PROJECT_LABEL),
        "project_dir": labels.get(_DIRECTORY_LABEL),
        "config_hash": labels.get(_HASH_LABEL),
        "requested": [
            str(gpu) for request in host.get("DeviceRequests") or [] for gpu in request.get("DeviceIDs") or []
        ],
        "storage": [
            "volume " + mount["Name"] if mount["Type"] == "volume" else mount["Source"]
            for mount in raw.get("Mounts") or []
        ],
        "networks": list((raw.get("NetworkSettings") or {}).get("Networks") or {}),
    }


def bindings(host_config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the host's addresses and ports that a container publishes."""
    return [
        {"address": address, "port": int(binding["HostPort"])}
        for published in (host_config.get("PortBindings") or {}).values()
        for binding in published or []
        if str(binding.get("HostPort", "")).isdigit()
        for address in ([binding["HostIp"]] if binding.get("HostIp") else ["0.0.0.0", "::"])  # noqa: S104 - Docker's default
    ]


def made_from(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return a container's settings in the form in which Compose resolves a service."""
    return {
        "image": raw["Config"]["Image"],
        "command": list(raw["Config"].get("Cmd") or []),
        "environment": environment(raw),
        "ports": [
            {"host_ip": bound["address"], "published": str(bound["port"])}
            for bound in bindings(raw["HostConfig"])
        ],
    }


def image_id(image: str) -> str | None:
    """Return the id of an image, or None where it would have to be pulled."""
    answer = docker.ask(["image", "inspect", "--format", "{{.Id}}", image])
    return answer.strip() if answer is not None else None


def others(*filters: str) -> list[str]:
    """Return the names of the containers, other than the server's, that match all `filters` of `docker ps`."""
    words = [word for text in filters for word in ("--filter", text)]
    names = (docker.ask(["ps", "--all", *words, "--format", "{{.Names}}"]) or "").split()
    return [name for name in names if not re.fullmatch(_OWN_NAME, name)]


def log_tail(count: int) -> list[str]:
    """Return the last lines of the server's log, both streams."""
    output = docker.run(["logs", "--tail", str(10 * count), CONTAINER])
    lines = (output.out + "\n" + output.err).splitlines()
    return [line for line in lines if line.strip() and not _OWN_REQUESTS.search(line)][-count:]


def check_owner(containers: Iterable[Mapping[str, Any]], project_dir: str) -> None:
    """Raise Problem for a container that the role did not start from `project_dir`."""
    for found in containers:
        cure = f"docker rm -f {found['name']}"
        if found["project"] is None:
            owner = "It belongs to no Compose project."
        elif found["project"] not in (PROJECT, EARLIER_PROJECT):
            owner = f"It belongs to the Compose project {found['project']}, which was started from {found['project_dir']}."
        elif os.path.realpath(found["project_dir"] or "/") != os.path.realpath(project_dir):
            owner = f"It was started from {found['project_dir']}, not from {project_dir}."
            cure = f"ansible-playbook playbooks/teardown.yml -e vllm_gpu_project_dir={found['project_dir']}"
        else:
            continue
        raise Problem(
            f"The container {found['name']} on this host is not the server of {project_dir}. {owner} Nothing was "
            f"stopped or removed. If nobody needs it any more, remove it: {cure}"
        )


def check_judged(found: Mapping[str, Any] | None, judged: str | None) -> None:
    """Raise Problem unless the container is the one that the referee has just `judged`, and isn't paused."""
    if judged and (found is None or found["id"] != judged):
        raise Problem(_IN_CHANGE)
    if found and found["status"] == "paused":
        raise Problem(f"The container {CONTAINER} is paused. Resume it with: docker unpause {CONTAINER}")
