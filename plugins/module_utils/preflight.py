# SPDX-License-Identifier: MIT
"""What stands in the way of a change: each check returns a text with its cure, or None.

Asked where something would change; of a server that is proven, only whether its
card is still the one that it was.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import re
import shutil
import socket
from typing import Any, Callable, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from ansible_collections.mlops.vllm_gpu.plugins.module_utils import shell

OLDEST_ENGINE = (20, 10)
OLDEST_COMPOSE = (2, 18)
# vLLM's image takes about 10 GB compressed and 25 GB unpacked.
IMAGE_BYTES = 25 * 10**9
# The paths that answer without the API key, so that nobody takes it for a wall.
UNGUARDED = "/health, /metrics, /ping, /tokenize and /invocations"
# While Compose recreates a container it has an interim name: the old id before its own.
_OWN_NAME = re.compile(r"([0-9a-f]+_)?vllm-server\Z")
# What listens on a container's port, by whether the engine has its userland proxy.
_ENGINE = ("docker-proxy", "dockerd")


class Asked(NamedTuple):
    """What the checks look at."""

    state: Mapping[str, Any]
    service: Mapping[str, Any]
    wanted: Mapping[str, Any]
    force: Sequence[str]
    training_gpus: Sequence[str]


def version(text: str) -> Tuple[int, ...]:
    """Return the leading numbers of a version: `20.10.24+dfsg1` is (20, 10, 24)."""
    match = re.match(r"v?(\d+(?:\.\d+)*)", text)
    return tuple(int(part) for part in match.group(1).split(".")) if match else ()


def check_engine(_asked: Asked) -> Optional[str]:
    """The engine is new enough, and knows how to give a container a GPU."""
    output = shell.run(["docker", "info", "--format", "{{json .}}"])
    try:
        info = json.loads(output.out)
    except ValueError:
        return "The Docker engine doesn't answer `docker info`: {0}.".format(output.err)
    if version(info.get("ServerVersion") or "") < OLDEST_ENGINE:
        return "The Docker engine is {0}; 20.10 or newer is needed. Upgrade it.".format(
            info.get("ServerVersion")
        )
    if "nvidia" in (info.get("Runtimes") or {}) or shutil.which("nvidia-container-runtime-hook"):
        return None
    for directory in info.get("CDISpecDirs") or ["/etc/cdi", "/var/run/cdi"]:
        if os.path.isdir(directory) and any("nvidia" in name for name in os.listdir(directory)):
            return None
    return (
        'The engine doesn\'t know the NVIDIA driver (it would say: could not select device driver "nvidia"). '
        "Install the NVIDIA Container Toolkit, run `nvidia-ctk runtime configure --runtime=docker`, and restart "
        "the engine."
    )


def check_compose(_asked: Asked) -> Optional[str]:
    """The Compose plugin is new enough."""
    output = shell.run(["docker", "compose", "version", "--short"])
    if output.code == 0 and version(output.out.strip()) < OLDEST_COMPOSE:
        return "The Compose plugin is {0}; 2.18 or newer is needed. Upgrade it.".format(output.out.strip())
    return None


def option(command: Sequence[str], name: str) -> List[str]:
    """Return what an option of vLLM is given, the last time; its parser takes `_` for `-`, too."""
    values: List[str] = []
    for position, word in enumerate(command):
        head, is_pair, value = word.partition("=")
        if head.replace("_", "-") == name:
            following = itertools.takewhile(
                lambda one: not re.match("-[A-Za-z-]", one), command[position + 1 :]
            )
            values = [value] if is_pair else list(following)
    return values


def utilization(service: Mapping[str, Any]) -> float:
    """Return the share of the card that the server will take."""
    command = [str(word) for word in service["command"]]
    return float((option(command, "--gpu-memory-utilization") or ["0.9"])[0])


def container_of(pid: int) -> str:
    """Return the name of the container that a process runs in, as ` of container NAME`, or nothing."""
    try:
        with open("/proc/{0}/cgroup".format(pid), encoding="utf-8") as stream:
            match = re.search(r"[0-9a-f]{64}", stream.read())
    except OSError:
        return ""
    if not match:
        return ""
    name = shell.run(["docker", "inspect", "--format", "{{.Name}}", match.group(0)]).out.strip()
    return " of container {0}".format(name.lstrip("/")) if name else ""


def check_memory(asked: Asked) -> Optional[str]:
    """Enough of the card is free, not counting what our own server holds."""
    gpu, referee = asked.state["gpu"], asked.state["referee"]
    if not gpu or gpu["memory_total_mib"] is None or gpu["memory_used_mib"] is None:
        return None
    try:
        share = utilization(asked.service)
    except ValueError:
        share = -1.0
    if not 0 < share <= 1:
        return "vllm_gpu_memory_utilization (--gpu-memory-utilization) must be a number above 0 and up to 1, such as 0.90."
    own = sum(one["memory_mib"] or 0 for one in referee["processes"] if one["gpu_uuid"] == gpu["uuid"])
    needed = int(share * gpu["memory_total_mib"])
    free = gpu["memory_total_mib"] - gpu["memory_used_mib"] + own
    if free >= needed or is_divided(gpu):  # an instance's memory is its own, and its size isn't known here
        return None
    holders = [
        "{0} (pid {1}{2}, {3} MiB)".format(
            one["name"] or "?", one["pid"], container_of(one["pid"]), one["memory_mib"]
        )
        for one in referee["other_processes"]
        if one["gpu_uuid"] == gpu["uuid"]
    ]
    return (
        "GPU {0} ({1}) has {2} MiB free, but {3} of its {4} MiB are {5} MiB. The rest is held by {6}. End what "
        "isn't needed there, take another card, or set a smaller vllm_gpu_memory_utilization.".format(
            gpu["index"], gpu["name"], free, share, gpu["memory_total_mib"], needed,
            ", ".join(holders) or "processes that nvidia-smi doesn't list",
        )
    )  # fmt: skip


def check_training(asked: Asked) -> Optional[str]:
    """The card isn't set aside for training."""
    gpu, training = asked.state["gpu"], {str(one).strip().lower() for one in asked.training_gpus} - {""}
    odd = sorted(
        one for one in training if not re.match(r"\d+\Z|(gpu|mig)-.|[0-9a-f:]+:[0-9a-f]{2}\.[0-7]\Z", one)
    )
    if odd:
        return (
            "vllm_gpu_training_gpus names {0}, which is no index, UUID or PCI bus id (in YAML, a bus id needs "
            "quotes). Mend it: it would protect no card.".format(", ".join(odd))
        )
    if not gpu or "training" in asked.force:
        return None
    bus = gpu["pci_bus_id"].lower()
    names = {str(gpu["index"]), gpu["uuid"].lower(), bus, bus[4:], bus.split(":", 1)[1]}
    if (names | {gpu.get("card_uuid", "").lower()}) & training:
        return (
            "GPU {0} ({1}) is set aside for training (vllm_gpu_training_gpus). Take another card, or say that "
            'you mean it with -e \'{{"vllm_gpu_force": ["training"]}}\'.'.format(gpu["index"], gpu["name"])
        )
    return None


def is_divided(gpu: Mapping[str, Any]) -> bool:
    """Say whether a whole card is in MIG mode; a driver that is too old for the question has none."""
    query = ["nvidia-smi", "--id={0}".format(gpu["uuid"]), "--query-gpu=mig.mode.current"]
    return "Enabled" in shell.run([*query, "--format=csv,noheader"]).out.splitlines()


def check_mig(asked: Asked) -> Optional[str]:
    """The card isn't divided: a container on the whole of it would use one instance, whichever comes first."""
    gpu = asked.state["gpu"]
    if not gpu or gpu["uuid"].startswith("MIG-") or "mig" in asked.force or not is_divided(gpu):
        return None
    listed = shell.run(["nvidia-smi", "--list-gpus"]).out.partition(gpu["uuid"])[2].partition("\nGPU ")[0]
    instances = re.findall(r"MIG (\S+) .*UUID: (MIG-[^)]+)", listed)
    return (
        "GPU {0} ({1}, {2}) is divided (MIG), and vLLM would not get the whole of it. Name an instance of it as "
        'gpu_device_id ({3}), or say that you mean the whole card with -e \'{{"vllm_gpu_force": ["mig"]}}\'.'.format(
            gpu["index"],
            gpu["name"],
            gpu["uuid"],
            " or ".join("{1}, {0}".format(*one) for one in instances) or "`nvidia-smi -L` lists none yet",
        )
    )


def check_drift(asked: Asked) -> Optional[str]:
    """The index that was proven means the same physical card as then."""
    gpu, last = asked.state["gpu"], asked.state["last_proven"]
    if not gpu or not last or "drift" in asked.force:
        return None
    then = last["gpu"]
    requested = asked.state["gpu_device_id"] or last["requested"]
    if not requested.isdigit() or then["index"] != gpu["index"] or then["uuid"] == gpu["uuid"]:
        return None
    return (
        "GPU {0} is another card than it was: {1} ({2}) when the server was proven at {3}, now {4} ({5}). Name the "
        'card by its UUID, or accept the new numbering with -e \'{{"vllm_gpu_force": ["drift"]}}\'.'.format(
            gpu["index"], then["name"], then["uuid"], last["proven_at"], gpu["name"], gpu["uuid"]
        )
    )


def _port(service: Mapping[str, Any]) -> Tuple[str, int]:
    port = service["ports"][0]
    return str(port.get("host_ip") or "0.0.0.0"), int(port["published"])  # noqa: S104 - Compose's own default


def check_port(asked: Asked) -> Optional[str]:
    """The port is free, or ours."""
    address, port = _port(asked.service)
    container = asked.state["container"]
    status = container["status"] if container and port in container["ports"] else ""
    if status == "running":
        return None
    # While its restart policy brings it back, listening there for a moment could end that for good.
    busy = OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
    error = busy if status == "restarting" else try_to_listen(address, port)
    if error is None:
        return None
    if error.errno == errno.EADDRNOTAVAIL:
        return "This host has no address {0} (vllm_gpu_bind_address). Name one that it has.".format(address)
    program, pid = listener(port)
    names = publishers(port) if program in _ENGINE else []
    if status == "restarting" and not names and program in ("", *_ENGINE):
        return None
    if names:
        who, cure = ": container {0} does".format(", ".join(names)), "Stop that container"
    else:
        who, cure = ": {0} (pid {1}) does".format(program, pid) if program else "", "End that program"
    return "Port {0} on {1} can't be listened on ({2}){3}. {4}, or choose another vllm_gpu_port.".format(
        port, address, error.strerror, who, cure
    )


def try_to_listen(address: str, port: int) -> Optional[OSError]:
    """Listen on a TCP port for a moment; return why that can't be done, or None."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
            probe.listen(1)
        except OSError as error:
            return error
    return None


def publishers(port: int) -> List[str]:
    """Return the names of the running containers, other than the server's, that publish a TCP port."""
    output = shell.run(["docker", "ps", "--filter", "publish={0}/tcp".format(port), "--format", "{{.Names}}"])
    return [name for name in output.out.split() if not _OWN_NAME.match(name)]


def listener(port: int) -> Tuple[str, int]:
    """Return the name and the pid of the program that listens on a TCP port, or ("", 0)."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        # A host may have no IPv6.
        with contextlib.suppress(OSError), open(table, encoding="utf-8") as stream:
            for row in list(stream)[1:]:
                field = row.split()
                if field[3] == "0A" and int(field[1].rsplit(":", 1)[1], 16) == port:
                    inodes.add("socket:[{0}]".format(field[9]))
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            for descriptor in os.listdir("/proc/{0}/fd".format(pid)):
                if os.readlink("/proc/{0}/fd/{1}".format(pid, descriptor)) in inodes:
                    with open("/proc/{0}/comm".format(pid), encoding="utf-8", errors="replace") as stream:
                        return stream.read().strip(), int(pid)
        except OSError:
            continue
    return "", 0


def check_exposure(asked: Asked) -> Optional[str]:
    """Only this host can reach the API, or a key is asked for."""
    address, port = _port(asked.service)
    if address.startswith("127.") or address == "::1" or "exposure" in asked.force:
        return None
    if (asked.service.get("environment") or {}).get("VLLM_API_KEY"):
        return None
    return (
        "The API would listen on {0}:{1} without a key. Set vllm_gpu_api_key (it guards /v1 only: {2} answer "
        "everybody), keep vllm_gpu_bind_address at 127.0.0.1, or say that you mean it with "
        '-e \'{{"vllm_gpu_force": ["exposure"]}}\'.'.format(address, port, UNGUARDED)
    )


def check_project(asked: Asked) -> Optional[str]:
    """Nobody else's containers are in the Compose project, which would be taken for the server's."""
    project = asked.wanted["env"]["COMPOSE_PROJECT_NAME"]
    mine = "label=com.docker.compose.project={0}".format(project)
    names = shell.run(["docker", "ps", "--all", "--filter", mine, "--format", "{{.Names}}"]).out.split()
    others = [name for name in names if not _OWN_NAME.match(name)]
    if not others:
        return None
    return (
        "The Compose project {0} on this host has containers that are not this role's: {1}. Move them to a project "
        "of another name (COMPOSE_PROJECT_NAME, or `name:` in their compose file), or remove them.".format(
            project, ", ".join(others)
        )
    )


def check_disk(asked: Asked) -> Optional[str]:
    """An image that has to be pulled will fit."""
    if asked.state["image_present"]:
        return None
    root = shell.run(["docker", "info", "--format", "{{.DockerRootDir}}"]).out.strip()
    if not os.path.isdir(root):
        return None
    free = shutil.disk_usage(root).free
    if free >= IMAGE_BYTES:
        return None
    return (
        "{0} has {1} GB free, and the image {2} that has to be pulled may take {3} GB. Make room, for example "
        "with `docker image prune`; or, if you know that it fits, `docker pull` it by hand.".format(
            root, free // 10**9, asked.state["image"], IMAGE_BYTES // 10**9
        )
    )


def check_image(asked: Asked) -> Optional[str]:
    """An image that has to be pulled is in its registry.

    Only a registry's clear no counts. Whatever else keeps this question from
    an answer may not keep the engine from pulling, which it tries before
    anything is changed.
    """
    if asked.state["image_present"]:
        return None
    image = asked.state["image"]
    answer = shell.run(["docker", "manifest", "inspect", image])
    if answer.code == 0 or not re.search("no such manifest|manifest unknown|denied|unauthorized", answer.err):
        return None
    return (
        "The image {0} is not on this host and can't be pulled: {1}. Mend vllm_gpu_image, or log in with "
        "`docker login`.".format(image, answer.err.splitlines()[-1])
    )


def check_caches(asked: Asked) -> Optional[str]:
    """A directory that is named for a cache or for models is there: Docker would make an empty one."""
    missing = [
        str(volume["source"])
        for volume in asked.service.get("volumes") or []
        if volume["type"] == "bind" and not os.path.isdir(volume["source"])
    ]
    if not missing:
        return None
    return (
        "There is no directory {0} on this host (vllm_gpu_hf_cache, vllm_gpu_compile_cache, vllm_gpu_models). Make "
        "it there, or mend the path.".format(" and no ".join(missing))
    )


def check_model(asked: Asked) -> Optional[str]:
    """A model that is named by its path is there."""
    model = str(asked.service["command"][0])
    for volume in asked.service.get("volumes") or []:
        inside = str(volume["target"]).rstrip("/") + "/"
        if volume["type"] == "bind" and os.path.isdir(volume["source"]) and model.startswith(inside):
            path = os.path.join(volume["source"], model[len(inside) :])
            if not os.path.exists(path):
                return "The model {0} is not on this host: there is no {1}. Copy it there, or mend vllm_gpu_model.".format(
                    model, path
                )
    return None


def check_wsl(_asked: Asked) -> Optional[str]:
    """This is no WSL2, whose driver gives a container every card whatever it asks for."""
    with open("/proc/sys/kernel/osrelease", encoding="utf-8") as stream:
        if "microsoft" in stream.read().lower():
            return "This host is WSL2, where the driver ignores the choice of a card. Use a host with Linux itself."
    return None


ALWAYS: List[Callable[[Asked], Optional[str]]] = [check_drift]
CHECKS: List[Callable[[Asked], Optional[str]]] = [
    check_wsl,
    check_engine,
    check_compose,
    check_project,
    check_drift,
    check_training,
    check_mig,
    check_memory,
    check_port,
    check_exposure,
    check_caches,
    check_model,
    check_disk,
    check_image,
]


def problems(checks: Sequence[Callable[[Asked], Optional[str]]], asked: Asked) -> Iterator[str]:
    """Yield what the checks find."""
    for check in checks:
        problem = check(asked)
        if problem:
            yield problem
