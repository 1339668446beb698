# SPDX-License-Identifier: MIT
"""What prevents a change: each check returns a text with its cure, or None.

Asked where something would change; of a server that is proven, only whether its
card is still the one that it was.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import itertools
import json
import os
import re
import shutil
import socket
import sys
from typing import Any, Callable, Iterator, Mapping, NamedTuple, Sequence

from ansible_collections.mlops.vllm_gpu.plugins.module_utils import container, shell

OLDEST_ENGINE = (20, 10)
OLDEST_COMPOSE = (2, 18)
# vLLM's image takes about 10 GB compressed and 25 GB unpacked.
IMAGE_BYTES = 25 * 10**9
# The paths that answer without the API key, so that nobody takes it for a wall.
UNGUARDED = "/health, /metrics, /ping, /tokenize and /invocations"
# What listens on a container's port, by whether the engine has its userland proxy.
_ENGINE = ("docker-proxy", "dockerd")


class Asked(NamedTuple):
    """What the checks look at."""

    state: Mapping[str, Any]
    service: Mapping[str, Any]
    wanted: Mapping[str, Any]
    force: Sequence[str]
    training_gpus: Sequence[str]


def version(text: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: `20.10.24+dfsg1` is (20, 10, 24)."""
    match = re.match(r"v?(\d+(?:\.\d+)*)", text)
    return tuple(int(part) for part in match.group(1).split(".")) if match else ()


def check_engine(_asked: Asked) -> str | None:
    """The engine is new enough, and knows how to give a container a GPU."""
    output = shell.run(["docker", "info", "--format", "{{json .}}"])
    try:
        info = dict(json.loads(output.out))
    except (ValueError, TypeError):
        info = {}
    found = info.get("ServerVersion")
    if not found:
        said = "; ".join(info.get("ServerErrors") or []) or output.err or "no message"
        return (
            f"`docker info` doesn't tell the engine's version: {said.rstrip('.')}. Check the Docker service "
            "(`systemctl status docker`), and run the play again."
        )
    if version(found) < OLDEST_ENGINE:
        return f"The Docker Engine is {found}; 20.10 or newer is needed. Upgrade it."
    if "nvidia" in (info.get("Runtimes") or {}) or shutil.which("nvidia-container-runtime-hook"):
        return None
    for directory in info.get("CDISpecDirs") or ["/etc/cdi", "/var/run/cdi"]:
        if os.path.isdir(directory) and any("nvidia" in name for name in os.listdir(directory)):
            return None
    return (
        "The Docker Engine doesn't know the NVIDIA driver (it would say: could not select device driver "
        '"nvidia"). Install the NVIDIA Container Toolkit, run `nvidia-ctk runtime configure --runtime=docker`, and '
        "restart the engine."
    )


def check_compose(_asked: Asked) -> str | None:
    """The Compose plugin is new enough."""
    output = shell.run(["docker", "compose", "version", "--short"])
    if output.code == 0 and version(output.out.strip()) < OLDEST_COMPOSE:
        return f"The Compose plugin is {output.out.strip()}; 2.18 or newer is needed. Upgrade it."
    return None


def option(command: Sequence[str], name: str) -> list[str]:
    """Return what an option of vLLM is given, the last time; its parser takes `_` for `-`, too."""
    values: list[str] = []
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


def container_of(pid: int | None) -> str:
    """Return the name of the container that a process runs in, as ` of container NAME`, or nothing."""
    try:
        with open(f"/proc/{pid}/cgroup", encoding="utf-8") as stream:
            match = re.search(r"[0-9a-f]{64}", stream.read())
    except OSError:
        return ""
    if not match:
        return ""
    name = (container.ask(["inspect", "--format", "{{.Name}}", match.group(0)]) or "").strip()
    return f" of container {name.lstrip('/')}" if name else ""


def check_memory(asked: Asked) -> str | None:
    """Enough of the card is free, not counting what our own server holds."""
    gpu, referee = asked.state["gpu"], asked.state["referee"]
    if not gpu or gpu["memory_total_mib"] is None or gpu["memory_used_mib"] is None:
        return None
    try:
        share = utilization(asked.service)
    except ValueError:  # of files that somebody has edited; vLLM itself will refuse it
        return None
    own = sum(one["memory_mib"] or 0 for one in referee["processes"] if one["gpu_uuid"] == gpu["uuid"])
    needed = int(share * gpu["memory_total_mib"])
    free = gpu["memory_total_mib"] - gpu["memory_used_mib"] + own
    if free >= needed or is_divided(gpu):  # an instance's memory is its own, and its size isn't known here
        return None
    holders = [
        f"{one['name'] or '?'} (pid {one['pid'] or '?'}{container_of(one['pid'])}, "
        f"{'?' if one['memory_mib'] is None else one['memory_mib']} MiB)"
        for one in referee["other_processes"]
        if one["gpu_uuid"] == gpu["uuid"]
    ]
    return (
        "GPU {} ({}) has {} MiB free, but {} of its {} MiB are {} MiB. The rest is held by {}. End what "
        "isn't needed there, take another card, or set a smaller vllm_gpu_memory_utilization.".format(
            gpu["index"], gpu["name"], free, share, gpu["memory_total_mib"], needed,
            ", ".join(holders) or "processes that nvidia-smi doesn't list",
        )
    )  # fmt: skip


def describe(gpus: Sequence[Mapping[str, Any]]) -> str:
    """Say which cards there are: `0 (NVIDIA GeForce RTX 5090, GPU-…) or 1 (…)`."""
    shown = ({key: "?" if value is None else value for key, value in gpu.items()} for gpu in gpus)
    return " or ".join("{index} ({name}, {uuid})".format(**gpu) for gpu in shown)


def is_called(gpu: Mapping[str, Any], name: str) -> bool:
    """Return whether `name` is an index, UUID or PCI bus id (with or without its domain) of a card or MIG instance."""
    bus = str(gpu["pci_bus_id"] or "").lower()  # nvidia-smi may show an odd one
    ids = [gpu["index"], gpu["uuid"], gpu.get("card_uuid")]
    names = {str(one).lower() for one in ids if one is not None} | {bus, bus[4:], bus.partition(":")[2]}
    return name.lower() in names - {""}


def check_training_ids(asked: Asked) -> str | None:
    """Each card that is set aside for training exists: a misspelt one would protect none."""
    # `-e vllm_gpu_training_gpus=` is a list with an empty text.
    names = filter(None, (str(one).strip() for one in asked.training_gpus))
    lost = [one for one in names if not any(is_called(gpu, one) for gpu in asked.state["gpus"])]
    lost = [one for one in lost if not one.startswith("MIG-") or f"(UUID: {one})" not in list_gpus()]
    if not lost:
        return None
    return (
        f"vllm_gpu_training_gpus names {', '.join(json.dumps(one) for one in lost)}, but this host has no such "
        "GPU, so that nothing would be protected. Use an index, a UUID or a PCI bus id (in YAML within quotes) of "
        f"{describe(asked.state['gpus'])}."
    )


def check_training(asked: Asked) -> str | None:
    """The card isn't set aside for training."""
    gpu = asked.state["gpu"]
    if not gpu or "training" in asked.force:
        return None
    if not any(is_called(gpu, str(one).strip()) for one in asked.training_gpus):
        return None
    return (
        f"GPU {gpu['index']} ({gpu['name']}) is set aside for training (vllm_gpu_training_gpus). Take another card, or say that "
        'you mean it with -e \'{"vllm_gpu_force": ["training"]}\'.'
    )


def list_gpus() -> str:
    """Return nvidia-smi's list of cards and MIG instances."""
    return shell.run(["nvidia-smi", "--list-gpus"]).out


def is_divided(gpu: Mapping[str, Any]) -> bool:
    """Say whether a whole card is in MIG mode; a driver that is too old for the question has none."""
    query = ["nvidia-smi", f"--id={gpu['uuid']}", "--query-gpu=mig.mode.current"]
    return "Enabled" in shell.run([*query, "--format=csv,noheader"]).out.splitlines()


def check_mig(asked: Asked) -> str | None:
    """The card isn't divided: a container on the whole of it would use one instance, whichever comes first."""
    gpu = asked.state["gpu"]
    if not gpu or gpu["uuid"].startswith("MIG-") or "mig" in asked.force or not is_divided(gpu):
        return None
    listed = list_gpus().partition(gpu["uuid"])[2].partition("\nGPU ")[0]
    instances = re.findall(r"MIG (\S+) .*UUID: (MIG-[^)]+)", listed)
    return (
        "GPU {} ({}, {}) is divided (MIG), and vLLM would not get the whole of it. Name an instance of it as "
        'gpu_device_id ({}), or say that you mean the whole card with -e \'{{"vllm_gpu_force": ["mig"]}}\'.'.format(
            gpu["index"],
            gpu["name"],
            gpu["uuid"],
            " or ".join("{1}, {0}".format(*one) for one in instances) or "`nvidia-smi -L` lists none yet",
        )
    )


def check_drift(asked: Asked) -> str | None:
    """The index that was proven means the same physical card as then."""
    gpu, last = asked.state["gpu"], asked.state["last_proven"]
    if not gpu or not last or "drift" in asked.force:
        return None
    then = last["gpu"]
    requested = asked.state["gpu_device_id"] or last["requested"]
    if not requested.isdigit() or then["index"] != gpu["index"] or then["uuid"] == gpu["uuid"]:
        return None
    return (
        f"GPU {gpu['index']} is another card than it was: {then['name']} ({then['uuid']}) when the server was proven at {last['proven_at']}, now {gpu['name']} ({gpu['uuid']}). Name the "
        'card by its UUID, or accept the new numbering with -e \'{"vllm_gpu_force": ["drift"]}\'.'
    )


def _port(service: Mapping[str, Any]) -> tuple[str, int]:
    port = service["ports"][0]
    return str(port.get("host_ip") or "0.0.0.0"), int(port["published"])  # noqa: S104 - Compose's own default


def check_port(asked: Asked) -> str | None:
    """This host has the address, and nobody else listens there on the port."""
    address, port = _port(asked.service)
    error = try_to_listen(address, 0)
    if error:
        return (
            f"This host can't listen on {address} (vllm_gpu_bind_address): {error.strerror}. Use an address that "
            "it has."
        )
    found = asked.state["container"] or {"bindings": [], "status": ""}
    mine = [one["address"] for one in found["bindings"] if one["port"] == port]
    running = bool(mine) and found["status"] in ("running", "restarting")
    # One that runs couldn't without its port; between two starts another container may have taken it.
    lost = found["status"] == "restarting" and bool(publishers(port))
    others = [
        one
        for one in listeners(port)
        if overlap(one.address, address)
        and not (
            running
            and one.address in mine
            and (found["status"] == "running" or (one.program in ("", *_ENGINE) and not lost))
        )
    ]
    # While it runs, or its restart policy brings it back, listening there for a moment could end that for good.
    error = None if running else try_to_listen(address, port)
    if error and error.errno != errno.EADDRINUSE:
        return f"This host can't listen on port {port} of {address} (vllm_gpu_port): {error.strerror}."
    if not others and error is None:
        return None
    names = publishers(port) if all(one.program in ("", *_ENGINE) for one in others) else []
    who, cure = "another program", "End it"
    if names:
        who, cure = f"container {', '.join(names)}", "Stop that container"
    elif others and others[0].program:
        who, cure = f"{others[0].program} (pid {others[0].pid})", "End that program"
    return f"Port {port} on {address} is already in use by {who}. {cure}, or choose another vllm_gpu_port."


def overlap(one: str, other: str) -> bool:
    """Return whether two addresses can't be listened on at once on the same port."""
    first, second = ipaddress.ip_address(one), ipaddress.ip_address(other)
    if first == second:
        return True
    # Linux's :: takes IPv4 as well.
    return any(
        any_address.is_unspecified and any_address.version in (6, specific.version)
        for any_address, specific in ((first, second), (second, first))
    )


def try_to_listen(address: str, port: int) -> OSError | None:
    """Listen on a TCP port (0: any free one) for a moment; return why that can't be done, or None."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
            probe.listen(1)
            if port == 0:  # nobody can connect to a broadcast address
                with socket.create_connection(probe.getsockname()[:2], timeout=2):
                    pass
        except OSError as error:
            return error
    return None


def publishers(port: int) -> list[str]:
    """Return the names of the containers, other than the server's, that publish a TCP port."""
    found = container.names(f"publish={port}/tcp", "status=running")
    return [name for name in found if not container.OWN_NAME.match(name)]


class Listener(NamedTuple):
    """A program that listens on a TCP port; its name is empty where that can't be read."""

    address: str
    program: str
    pid: int


def listeners(port: int) -> list[Listener]:
    """Return who listens on a TCP port, and on which addresses."""
    sockets = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        # A host may have no IPv6.
        with contextlib.suppress(OSError), open(table, encoding="utf-8") as stream:
            for row in list(stream)[1:]:
                field = row.split()
                address, _colon, number = field[1].rpartition(":")
                if field[3] == "0A" and int(number, 16) == port:
                    sockets[f"socket:[{field[9]}]"] = _address(address)
    owners = dict(_owners(set(sockets)))
    return [Listener(address, *owners.get(inode, ("", 0))) for inode, address in sockets.items()]


def _address(text: str) -> str:
    """Return an address of /proc/net/tcp, whose 32-bit words have this machine's byte order, as people write it."""
    words = [bytes.fromhex(text[at : at + 8]) for at in range(0, len(text), 8)]
    packed = b"".join(word[::-1] if sys.byteorder == "little" else word for word in words)
    address = ipaddress.ip_address(packed)
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)


def _owners(inodes: set[str]) -> Iterator[tuple[str, tuple[str, int]]]:
    """Yield the name and the pid of the program that has each of the sockets open."""
    for pid in filter(str.isdigit, os.listdir("/proc") if inodes else []):
        try:
            for descriptor in os.listdir(f"/proc/{pid}/fd"):
                inode = os.readlink(f"/proc/{pid}/fd/{descriptor}")
                if inode in inodes:
                    with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as stream:
                        yield inode, (stream.read().strip(), int(pid))
        except OSError:
            continue


def check_exposure(asked: Asked) -> str | None:
    """Only this host can reach the API, or a key is asked for."""
    address, port = _port(asked.service)
    if ipaddress.ip_address(address).is_loopback or "exposure" in asked.force:
        return None
    if (asked.service.get("environment") or {}).get("VLLM_API_KEY"):
        return None
    return (
        f"The API would listen on {address}:{port} without a key. Set vllm_gpu_api_key (it guards /v1 only: {UNGUARDED} answer "
        "everybody), keep vllm_gpu_bind_address at 127.0.0.1, or say that you mean it with "
        '-e \'{"vllm_gpu_force": ["exposure"]}\'.'
    )


def check_project(asked: Asked) -> str | None:
    """Nobody else's containers are in the Compose project, which would be taken for the server's."""
    project = asked.state["project"]
    found = container.names(f"label=com.docker.compose.project={project}")
    others = [name for name in found if not container.OWN_NAME.match(name)]
    if not others:
        return None
    return (
        f"The Compose project {project} on this host has containers that are not this role's: {', '.join(others)}. "
        "Move them to a project of another name (COMPOSE_PROJECT_NAME, or `name:` in their compose file), or "
        "remove them."
    )


def check_disk(asked: Asked) -> str | None:
    """An image that has to be pulled will fit."""
    if asked.state["image_present"]:
        return None
    root = (container.ask(["info", "--format", "{{.DockerRootDir}}"]) or "").strip()
    if not os.path.isdir(root):
        return None
    free = shutil.disk_usage(root).free
    if free >= IMAGE_BYTES:
        return None
    return (
        f"{root} has {free // 10**9} GB free, and the image {asked.state['image']} that has to be pulled may take "
        f"{IMAGE_BYTES // 10**9} GB. Make room, for example with `docker image prune`; or, if you know that it "
        "fits, `docker pull` it by hand."
    )


def check_caches(asked: Asked) -> str | None:
    """A directory that is named for a cache or for models is there: Docker would make an empty one."""
    missing = [
        str(volume["source"])
        for volume in asked.service.get("volumes") or []
        if volume["type"] == "bind" and not os.path.isdir(volume["source"])
    ]
    if not missing:
        return None
    return (
        f"There is no directory {' and no '.join(missing)} on this host (vllm_gpu_hf_cache, "
        "vllm_gpu_compile_cache, vllm_gpu_models). Create it, or correct the path."
    )


def check_model(asked: Asked) -> str | None:
    """A model that is named by its path is there."""
    model = str(asked.service["command"][0])
    for volume in asked.service.get("volumes") or []:
        inside = str(volume["target"]).rstrip("/") + "/"
        if volume["type"] == "bind" and os.path.isdir(volume["source"]) and model.startswith(inside):
            path = os.path.join(volume["source"], model[len(inside) :])
            if not os.path.exists(path):
                return (
                    f"The model {model} is not on this host: there is no {path}. Copy it there, or correct "
                    "vllm_gpu_model."
                )
    return None


def check_listing(asked: Asked) -> str | None:
    """The driver shows who is on the cards: without that no server can be proven, and the one that works would be lost."""
    state = asked.state
    found, verdict = state["container"], state["referee"]
    seen = verdict["processes"] or verdict["other_processes"]
    if seen or not verdict["processes_listed"] or not found or not state["serving"]:
        return None
    return (
        f"nvidia-smi lists no process on any GPU of this host, although {container.CONTAINER} is at work and "
        "answers: whichever card a server is on, that couldn't be proven, so the one that runs was left alone. "
        "This happens in an LXC guest, for example, whose driver knows other process ids than the guest: there, "
        "run the play on the host itself."
    )


def check_wsl(_asked: Asked) -> str | None:
    """This is no WSL2, whose driver gives a container every card whatever it asks for."""
    with open("/proc/sys/kernel/osrelease", encoding="utf-8") as stream:
        if "microsoft" in stream.read().lower():
            return "This host is WSL2, where the driver ignores the choice of a card. Use a host with Linux itself."
    return None


ALWAYS: list[Callable[[Asked], str | None]] = [check_drift, check_training_ids]
CHECKS: list[Callable[[Asked], str | None]] = [
    check_wsl,
    check_engine,
    check_compose,
    check_project,
    check_drift,
    check_training_ids,
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


def problems(checks: Sequence[Callable[[Asked], str | None]], asked: Asked) -> Iterator[str]:
    """Yield what the checks find."""
    for check in checks:
        problem = check(asked)
        if problem:
            yield problem
