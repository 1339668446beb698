# SPDX-License-Identifier: MIT
"""What a reading of the host amounts to: is the server proven, and what would bring it up?"""

from __future__ import annotations

from typing import Any, Mapping, NamedTuple

from . import record
from .container import CONTAINER


def doubts(state: Mapping[str, Any]) -> list[str]:
    """Say what keeps the server from being proven, the most basic reason first."""
    found = state["container"]
    if found is None:
        return [f"There is no container named {CONTAINER}."]
    if found["status"] != "running":
        return [f"The container is {found['status']}, not running."]
    reasons = []
    if len(found["requested"]) != 1 or state["gpu"] is None:
        reasons.append("The container was not asked for one certain GPU.")
    if state["recreate"]:
        reasons.append("The container was made from other settings or another image than these.")
    if state["referee"]["code"] != 0:
        reasons.append(state["referee"]["message"])
    if state["api"]["error"] is not None:
        reasons.append(f"API: {state['api']['error']}.")
    return reasons


def action(state: Mapping[str, Any]) -> str:
    """Return what brings the wanted server up: create, recreate, move, replace, wait or nothing.

    `move` is for one of the earlier Compose project, which has to go before its successor can have its name.

    `replace` is for a container that matches its files and yet is no good, so
    that Compose must be told; one that is only still loading is left to load.
    """
    found = state["container"]
    if found is None:
        return "create"
    if state["recreate"]:
        return "recreate" if found["project"] == state["project"] else "move"
    if (
        found["status"] != "running"
        # Where the API answers all the same, it is the health check that is ill.
        or (found["health"] == "unhealthy" and not state["api"]["healthy"])
        or state["referee"]["cause"] in ("wrong_gpu", "additional_gpu", "gpu_view_lost")
    ):
        return "replace"
    return "wait" if state["doubts"] else "nothing"


def to_record(state: Mapping[str, Any], config_hash: str) -> dict[str, Any]:
    """Return what a proven server proves, to be recorded; no secret is in it."""
    return {
        "requested": state["container"]["requested"][0],
        "gpu": {key: state["gpu"][key] for key in ("index", "uuid", "pci_bus_id", "name")},
        "image": state["image"],
        "image_id": state["container"]["image_id"],
        "config_hash": config_hash,
        "models": state["api"]["models"],
    }


class Judged(NamedTuple):
    """What the container is held against: the service of the files, its config hash, and the record of the same files."""

    service: Mapping[str, Any]
    config_hash: str
    same: record.Proven | None


def is_recorded(state: Mapping[str, Any], judged: Judged) -> bool:
    """Return whether what runs is what was proven last, from the same files."""
    if state["files_differ"] or judged.same is None:
        return False
    return all(judged.same.record.get(key) == value for key, value in state["proof"].items())
