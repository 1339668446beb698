# SPDX-License-Identifier: MIT
"""Compare the container with the service that the files describe, or with what it was created from."""

from __future__ import annotations

import os
from typing import Any, Mapping, Sequence

from . import api, compose, container, files, leftovers, outgoing, proof, record, settings


def read_container(state: dict[str, Any]) -> dict[str, Any] | None:
    """Fill in `container`; return what `docker inspect` shows, secrets included."""
    raw = container.inspect()
    state["container"] = container.describe(raw) if raw else None
    state["secrets"].update(outgoing.secret_values(container.environment(raw)))
    container.check_judged(state["container"], state["referee"].get("container_id"))
    return raw


def read_running(state: dict[str, Any]) -> None:
    """Judge the server by what its own container was created from."""
    raw = read_container(state)
    found = state["container"]
    if raw is None or found is None:
        return
    state.update(image=found["image"], image_present=True, recreate=False)
    if found["status"] == "running" and found["bindings"]:
        state["api"] = api.probe(container.made_from(raw), placed=state["referee"]["code"] == 0)


def resolve(
    contents: Mapping[str, bytes], wanted: Mapping[str, Any], state: dict[str, Any], *, as_installed: bool
) -> dict[str, Any]:
    """Return the service that the files describe; add to `problems` where it isn't the wanted one."""
    service = compose.resolve(contents, wanted["project_dir"], state["project"])
    compose.check_service(service)
    if not as_installed:
        state["problems"].extend(compose.contradictions(service, wanted))
    return service


def read_service(
    contents: Mapping[str, bytes],
    wanted: Mapping[str, Any],
    state: dict[str, Any],
    known_hash: str | None,
    *,
    as_installed: bool,
) -> tuple[dict[str, Any], str]:
    """Compare the container with the service of the files; return that, and its config hash.

    `known_hash` is the hash of the very same files when they were proven. A proven server that was
    created from them needs no call of Compose: its own container gives the service.
    """
    raw = read_container(state)
    if raw is not None and known_hash is not None and state["container"]["config_hash"] == known_hash:
        service = container.made_from(raw)
        compare_container(raw, service, known_hash, wanted, state)
        if state["problems"] or proof.doubts(state):
            service = resolve(contents, wanted, state, as_installed=as_installed)
        return service, known_hash
    service = resolve(contents, wanted, state, as_installed=as_installed)
    config_hash = compose.config_hash(contents, wanted["project_dir"], state["project"])
    compare_container(raw, service, config_hash, wanted, state)
    return service, config_hash


def compare_container(
    raw: Mapping[str, Any] | None,
    service: Mapping[str, Any],
    config_hash: str,
    wanted: Mapping[str, Any],
    state: dict[str, Any],
) -> None:
    """Fill in whether the container is the wanted one, and the state of its API."""
    found = state["container"]
    state["image"] = service["image"]
    wanted_image = container.image_id(service["image"])
    state["image_present"] = wanted_image is not None
    if raw is None:
        return
    container.check_owner([found], wanted["project_dir"])
    state["recreate"] = (
        found["config_hash"] != config_hash
        or found["image_id"] != wanted_image
        or found["project"] != state["project"]
    )
    proven_at = (state["last_proven"] or {}).get("proven_at", "")
    found["was_ready"] = found["health"] == "healthy" or (
        # Docker runs the health check only every ten seconds.
        not state["recreate"] and proven_at[:19] >= found["started_at"][:19]
    )
    if found["status"] != "running":
        return
    # A container that will be replaced listens where its own settings say.
    if not state["recreate"]:
        state["api"] = api.probe(service, placed=state["referee"]["code"] == 0)
        state["serving"] = state["api"]["healthy"]
    elif found["bindings"] and not state["referee"]["processes"]:
        state["serving"] = api.probe(container.made_from(raw), placed=False)["healthy"]


def read_files(
    wanted: Mapping[str, Any],
    state: dict[str, Any],
    last: record.Proven | None,
    wanted_files: Sequence[files.FileChange],
    *,
    as_installed: bool,
) -> proof.Judged:
    """Compare the container with what is wanted, or with the installed files."""
    changes = [change for change in wanted_files if change.differs]
    left = [] if as_installed else leftovers.interrupted(wanted["project_dir"])
    state["files_differ"] = bool(changes or left)
    state["changes"] = files.describe(changes, wanted)
    state["changes"].extend(f"{path}, left by an interrupted play, is removed" for path in left)
    state["project"] = files.project_of(wanted_files, wanted, as_installed=as_installed)
    contents = {os.path.basename(change.path): change.after for change in wanted_files[:2]}
    same = last if last and contents.items() <= last.files.items() else None
    known_hash = same.record.get("config_hash") if same else None
    service, config_hash = read_service(contents, wanted, state, known_hash, as_installed=as_installed)
    state["secrets"].update(
        outgoing.secret_values(service.get("environment") or {}, settings.secrets(wanted))
    )
    state["notes"].extend(files.without_effect(wanted_files))
    return proof.Judged(service, config_hash, same)
