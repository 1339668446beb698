# SPDX-License-Identifier: MIT
"""Run the referee, check_gpu_allocation.sh, which alone judges which GPUs the server is on."""

from __future__ import annotations

import json
from typing import Any, Mapping

from . import docker, gpus, paths, shell
from .container import CONTAINER
from .shell import Problem

# Causes that prevent any server on this host.
_HOST_CAUSES = {
    *("nvidia_smi_missing", "nvidia_smi_timeout", "nvidia_smi_failed", "nvidia_smi_unparsable"),
    *("driver_not_loaded", "driver_library_mismatch", "gpu_lost", "no_devices"),
    *("docker_missing", "docker_timeout", "docker_failed", "docker_unparsable"),
    *("engine_not_running", "engine_permission"),
}
# Of these, the Docker Engine may only be restarting.
_ENGINE_AWAY = ("docker_timeout", "engine_not_running")
# What module results show of a verdict.
VERDICT = (
    *("verdict", "code", "cause", "message", "cure", "notes"),
    *("processes", "other_processes", "processes_listed"),
)


def ask(script: str, expect: str | None) -> dict[str, Any]:
    """Return the referee's JSON verdict (see docs/check_gpu_allocation.md).

    The script comes over stdin: its version is this collection's, whatever is installed on the host.
    """
    argv = ["bash", "-s", "--", "--json", "--deep", "--no-drift", "--container", CONTAINER]
    argv += ["--expect", expect] if expect is not None else []
    # It makes several calls with a limit each.
    output = shell.run(argv, script.encode(), timeout=3 * shell.TIMEOUT)
    try:
        verdict = json.loads(output.out)
    except ValueError:
        raise Problem(
            f"The referee ({paths.REFEREE}) gave no verdict: {output.err or f'exit code {output.code}'}"
        ) from None
    return dict(verdict)


def read_cards(gpu_device_id: str | None, wanted: Mapping[str, Any], state: dict[str, Any]) -> None:
    """Run the referee; fill in `referee`, `gpus`, `gpu` and `gpu_device_id`."""
    # Only the id of one GPU reaches a command.
    plain = gpu_device_id is not None and gpus.canonical(gpu_device_id)
    verdict = ask(wanted["referee"], gpus.as_listed(str(gpu_device_id)) if plain else None)
    state["referee"] = {key: verdict.get(key) for key in VERDICT}
    state["gpus"] = verdict.get("gpus") or []
    state["referee"]["container_id"] = (verdict.get("container") or {}).get("id")
    state["notes"] = list(verdict.get("notes") or [])
    if verdict.get("cause") in _HOST_CAUSES:
        away = verdict["cause"] in _ENGINE_AWAY
        raise (docker.Unanswered if away else Problem)(f"{verdict['message']} {verdict['cure']}")
    if gpu_device_id is None:
        state["gpu"] = gpus.expected(verdict)
        return
    state["gpu"] = gpus.find(gpu_device_id, verdict)
    # Other ids become the UUID, which Docker understands and a reboot doesn't change.
    state["gpu_device_id"] = gpu_device_id if gpus.is_index(gpu_device_id) else state["gpu"]["uuid"]
