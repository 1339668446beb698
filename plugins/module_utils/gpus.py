# SPDX-License-Identifier: MIT
"""Ids of GPUs, and what nvidia-smi reports about them."""

from __future__ import annotations

import json
import re
from typing import Any, Mapping, Sequence

from . import shell
from .shell import Problem

# An index, the UUID of a card or a MIG instance, or a PCI bus id.
_ID = re.compile(
    r"(?P<index>0|[1-9][0-9]{0,2})|(GPU|MIG)-[0-9A-Z/-]{1,80}|((?P<domain>[0-9A-F]{4,8}):)?(?P<bus>[0-9A-F]{2}:[0-9A-F]{2}\.[0-7])",
    re.ASCII | re.IGNORECASE,
)


def canonical(name: str) -> str | None:
    """Return the spelling in which ids of GPUs compare, or None for what is not the id of one GPU."""
    match = _ID.fullmatch(name)
    if match and match["bus"]:
        name = f"{(match['domain'] or '').zfill(8)}:{match['bus']}"
    return name.lower() if match else None


def as_listed(name: str) -> str:
    """Return an id with its prefix spelled as nvidia-smi spells it."""
    return name[:4].upper() + name[4:] if name[:4].lower() in ("gpu-", "mig-") else name


def is_index(name: str) -> bool:
    """Return whether an id is an index, which may mean another card after a reboot."""
    match = _ID.fullmatch(name)
    return bool(match and match["index"])


def describe(gpus: Sequence[Mapping[str, Any]]) -> str:
    """Return the cards as a choice: `0 (NVIDIA GeForce RTX 5090, GPU-…) or 1 (…)`."""
    shown = ({key: "?" if value is None else value for key, value in gpu.items()} for gpu in gpus)
    return " or ".join("{index} ({name}, {uuid})".format(**gpu) for gpu in shown)


def is_called(gpu: Mapping[str, Any], name: str) -> bool:
    """Return whether `name` is an id of this card, or of this MIG instance or its card."""
    names = {canonical(str(gpu.get(key))) for key in ("index", "uuid", "card_uuid", "pci_bus_id")}
    return canonical(name) in names - {None}


def find(requested: str, verdict: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the card, or MIG instance, that the referee found for `requested`.

    Raises Problem, naming the cards of the host, where there is none.
    """
    gpus = verdict.get("gpus") or []
    choice = f"Choose {describe(gpus)}." if gpus else "No GPU was found on this host."
    if not canonical(requested):
        raise Problem(
            f"gpu_device_id is {json.dumps(requested)}, which is not the id of one GPU: it must be an index such "
            "as 0, a UUID such as GPU-0a1b2c3d-…, or a PCI bus id such as 00000000:01:00.0 (quoted "
            f"in YAML, which would read it as a number). {choice}"
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
        # The index is None where nvidia-smi's row could not be parsed.
        if named and gpu["index"] is not None and gpu["index"] == named["index"] and is_instance(named):
            # nvidia-smi only reports the memory of the whole card.
            unknown = dict.fromkeys(("memory_total_mib", "memory_used_mib"))
            return {**gpu, **unknown, "uuid": named["uuid"], "card_uuid": gpu["uuid"]}
    return None


def is_instance(gpu: Mapping[str, Any]) -> bool:
    """Return whether it is a MIG instance, and not a whole card."""
    return str(gpu["uuid"]).startswith("MIG-")


def instances() -> list[tuple[str, str, str]]:
    """Return the MIG instances of this host, each as its card's UUID, its profile and its own UUID."""
    listed = shell.run(["nvidia-smi", "--list-gpus"]).out
    found, card = [], ""
    for whole, profile, uuid in re.findall(r"^ *(?:(GPU)|MIG) (\S+).*UUID: ([^)]+)\)", listed, re.MULTILINE):
        if whole:
            card = uuid
        else:
            found.append((card, profile, uuid))
    return found


def memory_in_use() -> int:
    """Return the memory in use on all cards together, in MiB."""
    used = shell.run(["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]).out
    return sum(map(int, re.findall(r"^[0-9]{1,9}$", used, re.MULTILINE)))


def is_divided(gpu: Mapping[str, Any]) -> bool:
    """Return whether a card is in MIG mode; drivers too old to answer have none."""
    query = ["nvidia-smi", f"--id={gpu['uuid']}", "--query-gpu=mig.mode.current"]
    return "Enabled" in shell.run([*query, "--format=csv,noheader"]).out.splitlines()
