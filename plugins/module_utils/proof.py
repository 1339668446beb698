# SPDX-License-Identifier: MIT
"""Decide from a reading of the host whether the server is proven, and what would bring it up."""

from __future__ import annotations

from typing import Any, Mapping, NamedTuple

from . import record
from .container import CONTAINER


def doubts(state: Mapping[str, Any]) -> list[str]:
    """Return the reasons why the server is not proven, the most basic first."""
    found = state["container"]
    if found is None:
        return [f"There is no container named {CONTAINER}."]
    if found["status"] != "running":
        return [f"The container is {found['status']}, not running."]
    reasons = []
    if len(found["requested"]) != 1 or state["gpu"] is None:
        reasons.append("The container did not request exactly one GPU of this host.")
    if state["recreate"]:
        reasons.append("The container was created from other settings or another image.")
    if state["referee"]["code"] != 0:
        reasons.append(state["referee"]["message"])
    if state["api"]["error"] is not None:
        reasons.append(f"API: {state['api']['error']}.")
    return reasons


def action(state: Mapping[str, Any]) -> str:
    """Return what brings the wanted server up: create, recreate, move, replace, wait or nothing.

    `move` is for a container of the earlier Compose project, which must be removed first, as both have
    one name. `replace` is for one that matches its files but does not work.
    """
    found = state["container"]
    if found is None:
        return "create"
    if state["recreate"]:
        return "recreate" if found["project"] == state["project"] else "move"
    if (
        found["status"] != "running"
        # Where the API answers all the same, the health check itself is broken.
        or (found["health"] == "unhealthy" and not state["api"]["healthy"])
        or state["referee"]["cause"] in ("wrong_gpu", "additional_gpu", "gpu_view_lost")
    ):
        return "replace"
    return "wait" if state["doubts"] else "nothing"


def to_record(state: Mapping[str, Any], config_hash: str) -> dict[str, Any]:
    """Return the proof to record; it holds no secret."""
    return {
        "requested": state["container"]["requested"][0],
        "gpu": {key: state["gpu"][key] for key in ("index", "uuid", "pci_bus_id", "name")},
        "image": state["image"],
        "image_id": state["container"]["image_id"],
        "config_hash": config_hash,
        "models": state["api"]["models"],
    }


class Judged(NamedTuple):
    """What the container is compared with: the files' service, its config hash, and the record of the same files."""

    service: Mapping[str, Any]
    config_hash: str
    same: record.Proven | None


def is_recorded(state: Mapping[str, Any], judged: Judged) -> bool:
    """Return whether what runs is what was proven last, from the same files."""
    if state["files_differ"] or judged.same is None:
        return False
    return all(judged.same.record.get(key) == value for key, value in state["proof"].items())
