# SPDX-License-Identifier: MIT
"""The server's container, its image and its log, as the Docker Engine of this host has them."""

from __future__ import annotations

import json
import re
from typing import Any, Mapping, Sequence

from ansible_collections.mlops.vllm_gpu.plugins.module_utils import shell
from ansible_collections.mlops.vllm_gpu.plugins.module_utils.shell import Problem

CONTAINER = "vllm-server"
# The Compose project, and the one that it had until 0.2: `vllm` is every folder's of that name.
PROJECT, EARLIER_PROJECT = "vllm-gpu", "vllm"
# While Compose recreates a container it has an interim name: the old id before its own.
OWN_NAME = re.compile(r"([0-9a-f]+_)?vllm-server\Z")

_OWN_REQUESTS = re.compile(r'"GET /(health|v1/models) HTTP')
_ABSENT = re.compile(r"no such (container|image|object|network|volume)", re.IGNORECASE)
_AWAY = re.compile(
    r"cannot connect to the docker daemon|failed to connect to the docker api|error during connect|"
    r"connection refused|connection reset|unexpected eof|is the docker daemon running",
    re.IGNORECASE,
)


class Unanswered(Problem):
    """The engine gave no answer, which says nothing about what is there; it may be restarting."""


def ask(argv: Sequence[str], timeout: float = shell.TIMEOUT) -> str | None:
    """Return what a docker command prints, or None where the engine says that there is no such thing.

    Raises Unanswered where the engine can't be reached or is too slow, and Problem,
    with docker's own words, for every other failure: neither means "no".
    """
    output = shell.run(["docker", *argv], timeout=timeout)
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


def inspect(name: str = CONTAINER) -> dict[str, Any] | None:
    """Return all that the engine knows of a container, or None. Its environment holds secrets."""
    answer = ask(["inspect", "--type", "container", name])
    return dict(json.loads(answer)[0]) if answer is not None else None


def environment(raw: Mapping[str, Any] | None) -> dict[str, str]:
    """Return the environment that a container was made with."""
    pairs = (one.partition("=") for one in ((raw or {}).get("Config") or {}).get("Env") or [])
    return {key: value for key, _is, value in pairs}


def describe(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the role needs to know of a container: nothing of its environment."""
    state, host = raw["State"], raw["HostConfig"]
    labels = raw["Config"].get("Labels") or {}
    health = state.get("Health") or {}
    last_check = (health.get("Log") or [{}])[-1]
    return {
        "id": raw["Id"],
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
        "project": labels.get("com.docker.compose.project"),
        "project_dir": labels.get("com.docker.compose.project.working_dir"),
        "config_hash": labels.get("com.docker.compose.config-hash"),
        "requested": [
            str(one) for request in host.get("DeviceRequests") or [] for one in request.get("DeviceIDs") or []
        ],
    }


def bindings(host_config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the addresses and ports of the host that a container was told to listen on."""
    return [
        {"address": address, "port": int(one["HostPort"])}
        for bound in (host_config.get("PortBindings") or {}).values()
        for one in bound or []
        if str(one.get("HostPort", "")).isdigit()
        for address in ([one["HostIp"]] if one.get("HostIp") else ["0.0.0.0", "::"])  # noqa: S104 - Docker's default
    ]


def made_from(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return a container's settings in the form in which Compose resolves a service."""
    return {
        "image": raw["Config"]["Image"],
        "command": list(raw["Config"].get("Cmd") or []),
        "environment": environment(raw),
        "ports": [
            {"host_ip": one["address"], "published": str(one["port"])} for one in bindings(raw["HostConfig"])
        ],
    }


def image_id(image: str) -> str | None:
    """Return the id of an image that the engine has, or None where it would be pulled."""
    answer = ask(["image", "inspect", "--format", "{{.Id}}", image])
    return answer.strip() if answer is not None else None


def names(*filters: str) -> list[str]:
    """Return the names of the containers, running or not, that all `filters` of `docker ps` hold for."""
    words = [word for one in filters for word in ("--filter", one)]
    return (ask(["ps", "--all", *words, "--format", "{{.Names}}"]) or "").split()


def log_tail(count: int) -> list[str]:
    """Return the last lines of the server's log, both streams."""
    output = shell.run(["docker", "logs", "--tail", str(10 * count), CONTAINER])
    lines = (output.out + "\n" + output.err).splitlines()
    # The role's own requests are no news.
    return [line for line in lines if line.strip() and not _OWN_REQUESTS.search(line)][-count:]
