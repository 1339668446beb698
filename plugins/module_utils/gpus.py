# SPDX-License-Identifier: MIT
"""What names a GPU, and what nvidia-smi tells of it."""

from __future__ import annotations

import json
import re
from typing import Any, Mapping, Sequence

from . import shell
from .shell import Problem

# How people name a GPU: its index, its UUID (or that of a MIG instance), or its PCI bus id.
_ID = re.compile(
    r"(0|[1-9][0-9]{0,2})|(GPU|MIG)-[0-9A-Z/-]{1,80}|((?P<domain>[0-9A-F]{4,8}):)?(?P<bus>[0-9A-F]{2}:[0-9A-F]{2}\.[0-7])",
    re.ASCII | re.IGNORECASE,
)


def canonical(name: str) -> str | None:
    """Return the one spelling in which names of GPUs compare, or None for what is no name of one GPU."""
    match = _ID.fullmatch(name)
    if match and match["bus"]:
        name = f"{(match['domain'] or '').zfill(8)}:{match['bus']}"
    return name.lower() if match else None


def describe(gpus: Sequence[Mapping[str, Any]]) -> str:
    """Say which cards there are: `0 (NVIDIA GeForce RTX 5090, GPU-…) or 1 (…)`."""
    shown = ({key: "?" if value is None else value for key, value in gpu.items()} for gpu in gpus)
    return " or ".join("{index} ({name}, {uuid})".format(**gpu) for gpu in shown)


def is_called(gpu: Mapping[str, Any], name: str) -> bool:
    """Return whether `name` is one of a card, or of a MIG instance or the card that it is on."""
    names = {canonical(str(gpu.get(key))) for key in ("index", "uuid", "card_uuid", "pci_bus_id")}
    return canonical(name) in names - {None}


def find(requested: str, verdict: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the card, or MIG instance, that the referee took `requested` for.

    Raises Problem, naming the cards that it could be, for anything else.
    """
    gpus = verdict.get("gpus") or []
    choice = f"It could be {describe(gpus)}." if gpus else "This host shows no GPU."
    if not canonical(requested):
        raise Problem(
            f"gpu_device_id is {json.dumps(requested)}, which is not the id of one GPU: it must be an index such "
            "as 0, a UUID such as GPU-0a1b2c3d-…, or a PCI bus id such as 00000000:01:00.0 (in YAML within "
            f"quotes: it is a number without). {choice}"
        )
    gpu = expected(verdict)
    if gpu is None:
        raise Problem(f"gpu_device_id is {requested}, but this host has no such GPU. {choice}")
    return gpu


def expected(verdict: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the card that the referee's verdict is about, or None."""
    named = verdict.get("expected")
    for gpu in verdict.get("gpus") or []:
        if named and gpu["uuid"] == named["uuid"]:
            return dict(gpu)
        # Where nvidia-smi's row is odd, an index is None.
        if named and gpu["index"] is not None and gpu["index"] == named["index"] and is_instance(named):
            # nvidia-smi gives the memory of the whole card only.
            unknown = dict.fromkeys(("memory_total_mib", "memory_used_mib"))
            return {**gpu, **unknown, "uuid": named["uuid"], "card_uuid": gpu["uuid"]}
    return None


def is_instance(gpu: Mapping[str, Any]) -> bool:
    """Return whether it is a MIG instance, and not a whole card."""
    return str(gpu["uuid"]).startswith("MIG-")


def instances() -> list[tuple[str, str, str]]:
    """Return the MIG instances of this host: the UUID of the card, the profile and the UUID of each."""
    listed = shell.run(["nvidia-smi", "--list-gpus"]).out
    found, card = [], ""
    for whole, profile, uuid in re.findall(r"^ *(?:(GPU)|MIG) (\S+).*UUID: ([^)]+)\)", listed, re.MULTILINE):
        if whole:
            card = uuid
        else:
            found.append((card, profile, uuid))
    return found


def memory_in_use() -> int:
    """Return how much memory of all cards is in use, in MiB."""
    used = shell.run(["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]).out
    return sum(map(int, re.findall(r"^[0-9]{1,9}$", used, re.MULTILINE)))


def is_divided(gpu: Mapping[str, Any]) -> bool:
    """Say whether a whole card is in MIG mode; a driver that is too old for the question has none."""
    query = ["nvidia-smi", f"--id={gpu['uuid']}", "--query-gpu=mig.mode.current"]
    return "Enabled" in shell.run([*query, "--format=csv,noheader"]).out.splitlines()
