# SPDX-License-Identifier: MIT
"""Read one host's GPUs, files and vLLM server, and compare them with what is wanted.

Everything here only reads. `read()` is the one reading that the role takes: before
it changes anything, in check mode, and afterwards as the proof.
"""

from __future__ import annotations

from typing import Any, Iterator, Mapping

from . import compare, docker, files, identity, proof, record, referee, settings
from .shell import Problem


def begin(gpu_device_id: str | None, wanted: Mapping[str, Any]) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """Read the cards; return the state so far, and what is wanted with the card's id as the engine takes it."""
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
        "api": {"url": "", "healthy": False, "models": [], "error": "it was not asked"},
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
    """Read the host once: what is there, what is wanted, and what would change.

    Args:
        gpu_device_id: index, UUID or PCI bus id of the card; None means the one that the
            container asked for.
        wanted: WANTED_OPTIONS, filled in.
        options: `as_installed` judges the server by the files that the host
            has, not by `wanted`, and `as_running` by what its container was made from; `preflight` asks for every check that a
            change needs, `force` leaves some out, `training_gpus` are ids; `again` takes what
            is found for granted, where else only what two readings find counts.

    Returns:
        `problems` (texts with their cures; nothing may be changed while there
        are any), `gpus`, `gpu` (the requested card), `gpu_device_id` (its id as the engine
            takes it), `changes` (sentences),
        `files_differ`, `recreate` (the container isn't the wanted one),
        `action` (what brings the wanted server up),
        `image_present`, `container`, `referee` (its verdict), `api`,
        `last_proven` (its record), `recorded` (it is what runs now), `proof`
        (what to record), `doubts` (what keeps the server from being proven), `notes`
        (what a person should know besides), `unanswered` (the engine gave no answer),
        and `proven`: the wanted container runs, on that card and no other, and
        its API answers.
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
            # A server that dies, or is brought back, between two of these reads looks like a problem of the host.
            return read(gpu_device_id, wanted, again=True, **options)
        problems.extend(found)
    state["proven"] = not problems and not state["doubts"]
    if state["proven"] and judged.service:
        state["proof"] = proof.to_record(state, judged.config_hash)
        state["recorded"] = proof.is_recorded(state, judged)
    return state


def find_problems(
    state: Mapping[str, Any],
    service: Mapping[str, Any],
    options: Mapping[str, Any],
) -> Iterator[str]:
    """Yield what prevents a change, where one is needed; of a proven server, whether its card is still the same."""
    changes = options.get("preflight") and (
        state["problems"] or state["doubts"] or options.get("as_previous")
    )
    checks = identity.CHECKS
    if changes:
        from . import preflight  # noqa: PLC0415

        checks = preflight.CHECKS
    context = identity.Context(state, service, options.get("force", []), options.get("training_gpus", []))
    return identity.problems(checks, context)
