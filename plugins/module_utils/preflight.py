# SPDX-License-Identifier: MIT
"""Checks before a change: each returns a problem with its fix, or None.

server.py imports this only where something would change, to save the time that an import costs.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import shutil
from typing import Any, Callable, Mapping

from . import advice, compose, container, docker, gpus, ports, shell
from .identity import CHECKS as IDENTITY
from .identity import Context
from .settings import forced

# vLLM's image takes about 10 GB compressed and 25 GB unpacked.
IMAGE_BYTES = 25 * 10**9
# How long a file system may take to answer; seconds.
_FILE_SYSTEM = 5
# Paths that answer without the API key.
UNGUARDED = "/health, /metrics, /ping, /tokenize and /invocations"


def check_engine(_context: Context) -> str | None:
    """The Docker Engine is new enough and can give a container a GPU."""
    output = docker.run(["info", "--format", "{{json .}}"])
    try:
        info = dict(json.loads(output.out))
    except (ValueError, TypeError):
        info = {}
    found = info.get("ServerVersion")
    if not found:
        message = "; ".join(info.get("ServerErrors") or []) or output.err or "no message"
        return (
            f"`docker info` does not report the Docker Engine's version: {message.rstrip('.')}. Check the Docker service "
            "(`systemctl status docker`), and run the play again."
        )
    if docker.is_older(found, docker.OLDEST_ENGINE):
        return f"The Docker Engine is {found}; {docker.OLDEST_ENGINE} or newer is needed. Upgrade it."
    if "nvidia" in (info.get("Runtimes") or {}) or shutil.which("nvidia-container-runtime-hook"):
        return None
    for directory in info.get("CDISpecDirs") or ["/etc/cdi", "/var/run/cdi"]:
        if os.path.isdir(directory) and any("nvidia" in name for name in os.listdir(directory)):
            return None
    return advice.NO_DRIVER


def check_compose(_context: Context) -> str | None:
    """The Compose plugin is new enough."""
    output = docker.run(["compose", "version", "--short"])
    found = output.out.strip()
    if output.code == 0 and docker.is_older(found, docker.OLDEST_COMPOSE):
        return f"The Compose plugin is {found}; {docker.OLDEST_COMPOSE} or newer is needed. Upgrade it."
    return None


def utilization(service: Mapping[str, Any]) -> float:
    """Return the share of the card that the server will take."""
    command = [str(word) for word in service["command"]]
    return float((compose.option(command, "--gpu-memory-utilization") or ["0.9"])[0])


def container_of(pid: int | None) -> str:
    """Return ` of container NAME` for a process in a container, otherwise an empty text."""
    try:
        with open(f"/proc/{pid}/cgroup", encoding="utf-8") as stream:
            match = re.search(r"[0-9a-f]{64}", stream.read())
    except OSError:
        return ""
    if not match:
        return ""
    name = (docker.ask(["inspect", "--format", "{{.Name}}", match.group(0)]) or "").strip()
    return f" of container {name.lstrip('/')}" if name else ""


def check_memory(context: Context) -> str | None:
    """The card has enough free memory, counting what the server holds as free."""
    gpu, referee = context.state["gpu"], context.state["referee"]
    if not gpu or gpu["memory_total_mib"] is None or gpu["memory_used_mib"] is None:
        return None
    try:
        share = utilization(context.service)
    except ValueError:  # in edited files; vLLM itself will refuse it
        return None
    own = sum(
        process["memory_mib"] or 0 for process in referee["processes"] if process["gpu_uuid"] == gpu["uuid"]
    )
    total = gpu["memory_total_mib"]
    needed, free = int(share * total), total - gpu["memory_used_mib"] + own
    # The free memory of a MIG instance is not known here.
    if free >= needed or gpus.is_divided(gpu):
        return None
    holders = [
        f"{process['name'] or '?'} (pid {process['pid'] or '?'}{container_of(process['pid'])}, "
        f"{'?' if process['memory_mib'] is None else process['memory_mib']} MiB)"
        for process in referee["other_processes"]
        if process["gpu_uuid"] == gpu["uuid"]
    ]
    held_by = ", ".join(holders) or "processes that nvidia-smi doesn't list"
    return (
        f"GPU {gpu['index']} ({gpu['name']}) has {free} MiB free, but the server needs {needed} MiB ({share} of {total} MiB). "
        f"The rest is held by {held_by}. Stop what isn't needed there, choose another card, or lower "
        "vllm_gpu_memory_utilization."
    )


def check_training(context: Context) -> str | None:
    """The card isn't set aside for training."""
    gpu = context.state["gpu"]
    if not gpu or "training" in context.force:
        return None
    if not any(gpus.is_called(gpu, str(name).strip()) for name in context.training_gpus):
        return None
    return (
        f"GPU {gpu['index']} ({gpu['name']}) is set aside for training (vllm_gpu_training_gpus). Choose another card, "
        f"or use it anyway with {forced('training')}."
    )


def check_mig(context: Context) -> str | None:
    """The card isn't divided: a container on all of it would use only its first instance."""
    gpu = context.state["gpu"]
    if not gpu or gpus.is_instance(gpu) or "mig" in context.force or not gpus.is_divided(gpu):
        return None
    names = [f"{uuid}, {profile}" for card, profile, uuid in gpus.instances() if card == gpu["uuid"]]
    return (
        f"GPU {gpu['index']} ({gpu['name']}, {gpu['uuid']}) is divided (MIG), so vLLM would not get all of it. Set "
        f"gpu_device_id to one of its instances ({' or '.join(names) or '`nvidia-smi -L` lists none yet'}), or use the "
        f"whole card anyway with {forced('mig')}."
    )


def _port(service: Mapping[str, Any]) -> tuple[str, int]:
    port = service["ports"][0]
    return str(port.get("host_ip") or "0.0.0.0"), int(port["published"])  # noqa: S104 - Compose's own default


def check_port(context: Context) -> str | None:
    """The host has the address, and no other program listens there on the port."""
    return ports.problem(*_port(context.service), context.state["container"])


def check_exposure(context: Context) -> str | None:
    """Only this host can reach the API, or it needs a key."""
    address, port = _port(context.service)
    if ipaddress.ip_address(address).is_loopback or "exposure" in context.force:
        return None
    if (context.service.get("environment") or {}).get("VLLM_API_KEY"):
        return None
    return (
        f"The API would listen on {address}:{port} without a key. Set vllm_gpu_api_key (it guards /v1 only: "
        f"{UNGUARDED} need none), keep vllm_gpu_bind_address at 127.0.0.1, or accept that with "
        f"{forced('exposure')}."
    )


def check_project(context: Context) -> str | None:
    """The Compose project has no containers of anybody else."""
    project = context.state["project"]
    others = container.others(f"label={container.PROJECT_LABEL}={project}")
    if not others:
        return None
    return (
        f"The Compose project {project} on this host has containers that are not this role's: {', '.join(others)}. "
        "Move them to a project of another name (COMPOSE_PROJECT_NAME, or `name:` in their compose file), or "
        "remove them."
    )


def check_disk(context: Context) -> str | None:
    """An image that must be pulled will fit."""
    if context.state["image_present"]:
        return None
    root = (docker.ask(["info", "--format", "{{.DockerRootDir}}"]) or "").strip()
    if not os.path.isdir(root):
        return None
    free = shutil.disk_usage(root).free
    if free >= IMAGE_BYTES:
        return None
    return (
        f"{root} has {free // 10**9} GB free, and the image {context.state['image']} that must be pulled may need "
        f"{IMAGE_BYTES // 10**9} GB. Free some space, for example with `docker image prune`; or, if you know that it "
        "fits, run `docker pull` yourself."
    )


def _is(test: str, path: str) -> bool | None:
    """Return what `test -d` or `-e` finds; None where the file system hangs, such as NFS without its server."""
    code = shell.run(["test", test, path], timeout=_FILE_SYSTEM).code
    return None if code is None else code == 0


def _binds(context: Context) -> list[Mapping[str, Any]]:
    return [volume for volume in context.service.get("volumes") or [] if volume["type"] == "bind"]


def check_caches(context: Context) -> str | None:
    """Each directory for a cache or for models exists, as Docker would create an empty one."""
    found = {str(volume["source"]): _is("-d", str(volume["source"])) for volume in _binds(context)}
    hanging = [path for path, exists in found.items() if exists is None]
    if hanging:
        return (
            f"The file system of {' and '.join(hanging)} gave no answer within {_FILE_SYSTEM} s. Check its mount, for "
            "example whether its NFS server can be reached, and run the play again."
        )
    missing = [path for path, exists in found.items() if not exists]
    if not missing:
        return None
    return (
        f"There is no directory {' and no '.join(missing)} on this host (vllm_gpu_hf_cache, "
        "vllm_gpu_compile_cache, vllm_gpu_models). Create it, or correct the path."
    )


def check_model(context: Context) -> str | None:
    """A model that is given as a path exists."""
    model = str(context.service["command"][0])
    for volume in _binds(context):
        inside = str(volume["target"]).rstrip("/") + "/"
        path = os.path.join(volume["source"], model[len(inside) :])
        # check_caches reports a missing directory, and one that hangs.
        if model.startswith(inside) and _is("-d", volume["source"]) and _is("-e", path) is False:
            return f"The model {model} is not on this host: {path} does not exist. Copy it there, or correct vllm_gpu_model."
    return None


def check_listing(context: Context) -> str | None:
    """The driver lists the processes on the cards; otherwise no new server could be proven."""
    state = context.state
    found, verdict = state["container"], state["referee"]
    seen = verdict["processes"] or verdict["other_processes"]
    if seen or not verdict["processes_listed"] or not found or not state["serving"]:
        return None
    return (
        f"nvidia-smi lists no process on any GPU of this host, although {container.CONTAINER} is running and "
        "answers. No server could be proven to be on its card, so the running one was left alone. This happens, for "
        "example, in an LXC guest, where the driver sees other process ids: run the play on the LXC host itself."
    )


def check_wsl(_context: Context) -> str | None:
    """The host is not WSL2, whose driver gives each container every card."""
    with open("/proc/sys/kernel/osrelease", encoding="utf-8") as stream:
        if "microsoft" in stream.read().lower():
            return "This host is WSL2, where the driver ignores which GPU a container requests. Use a native Linux host."
    return None


CHECKS: list[Callable[[Context], str | None]] = [
    check_wsl,
    check_engine,
    check_compose,
    check_project,
    *IDENTITY,
    check_training,
    check_mig,
    check_listing,
    check_memory,
    check_port,
    check_exposure,
    check_caches,
    check_model,
    check_disk,
]
