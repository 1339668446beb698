# SPDX-License-Identifier: MIT
"""Read one host's GPUs, files and vLLM server, and compare them with what is wanted.

This only reads: before a change, in check mode, and afterwards as the proof.
"""

from __future__ import annotations

from typing import Any, Iterator, Mapping

from . import compare, docker, files, identity, proof, record, referee, settings
from .shell import Problem


def begin(gpu_device_id: str | None, wanted: Mapping[str, Any]) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """Read the cards; return the state so far, and what is wanted with the card's id in Docker's form."""
    problems: list[str] = []
    state: dict[str, Any] = {
        "problems": problems,
        "gpus": [],
        "gpu": None,
        "gpu_device_id": None,
        "changes": [],
        "files_differ": False,
        "recreate": True,
        "action": "create",
        "image": "",
        "image_present": False,
        "container": None,
        "referee": dict.fromkeys(referee.VERDICT),
        "api": {"url": "", "healthy": False, "models": [], "error": "it was not checked"},
        "doubts": [],
        "notes": [],
        "unanswered": False,
        "serving": False,
        "secrets": set(),
        "project": str(wanted["env"]["COMPOSE_PROJECT_NAME"]),
        "proven": False,
        "proof": {},
        "recorded": False,
        "last_proven": None,
    }
    try:
        referee.read_cards(gpu_device_id, wanted, state)
        if state["gpu_device_id"] is not None:
            wanted = dict(wanted, env=dict(wanted["env"], GPU_DEVICE_ID=state["gpu_device_id"]))
    except Problem as problem:
        problems.append(str(problem))
        state["unanswered"] = isinstance(problem, docker.Unanswered)
    return state, wanted


def read(gpu_device_id: str | None, wanted: Mapping[str, Any], **options: Any) -> dict[str, Any]:
    """Read the host, compare it with what is wanted, and return what the module server_info documents.

    `options` are that module's. `again` marks the second of two readings: only problems that both find
    count, as a server that dies or restarts between two calls looks like a problem of the host.
    """
    state, resolved = begin(gpu_device_id, wanted)
    problems = state["problems"]
    as_running = options.get("as_running", False)
    as_installed = options.get("as_installed", False) or options.get("as_previous", False)
    invalid = [] if as_installed or as_running else list(settings.check(resolved))
    problems.extend(invalid)
    judged = proof.Judged({}, "", None)
    try:
        last = record.load(wanted["project_dir"], "current")
        state["last_proven"] = last.record if last else None
        if as_running:
            compare.read_running(state)
        elif not invalid:
            found_files = files.sources(resolved, options)
            judged = compare.read_files(resolved, state, last, found_files, as_installed=as_installed)
    except Problem as problem:
        if not problems and not options.get("again"):
            return read(gpu_device_id, wanted, again=True, **options)
        problems.append(str(problem))
        state["unanswered"] = state["unanswered"] or isinstance(problem, docker.Unanswered)
        return state
    state["doubts"] = proof.doubts(state)
    state["action"] = proof.action(state)
    if judged.service:
        found = list(find_problems(state, judged.service, options))
        if found and not options.get("again"):
            return read(gpu_device_id, wanted, again=True, **options)
        problems.extend(found)
    state["proven"] = not problems and not state["doubts"]
    if state["proven"] and judged.service:
        state["proof"] = proof.to_record(state, judged.config_hash)
        state["recorded"] = proof.is_recorded(state, judged)
    return state


def find_problems(
    state: Mapping[str, Any], service: Mapping[str, Any], options: Mapping[str, Any]
) -> Iterator[str]:
    """Yield what prevents a change where one is needed, and in any case whether the card is still the same."""
    changes = options.get("preflight") and (
        state["problems"] or state["doubts"] or options.get("as_previous")
    )
    checks = identity.CHECKS
    if changes:
        from . import preflight  # noqa: PLC0415

        checks = preflight.CHECKS
    context = identity.Context(state, service, options.get("force", []), options.get("training_gpus", []))
    return identity.problems(checks, context)
