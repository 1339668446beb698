# SPDX-License-Identifier: MIT
"""Keep what a change may touch, so that it can be restored (restoration.py) when the change fails.

That is the service's files (content, mode, owner and time, absence, links), the ids of the images'
names, and all that `docker inspect` shows of the container, so that it can be created again. It holds
secrets, so only root can read it. The file exists until the end of a change, also across a reboot.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import stat
import time
from typing import Any, Mapping, Sequence

from . import atomic, container, docker, engine_api, paths, record, trust
from .container import PROJECT, PROJECT_LABEL
from .shell import Problem

# Of a snapshot; bytes.
_LARGEST = 16 << 20
# The files that a change may write, besides `.proven`.
FILES = (paths.COMPOSE_FILE, paths.ENV_FILE, paths.REFEREE)
# The keys of a snapshot.
_KEYS = {
    *("project_dir", "taken_at", "interrupted", "missing", "files", "links", "images", "container"),
    *("networks", "volumes", "proven"),
}


def path_in(project_dir: str) -> str:
    """Return the path of the snapshot."""
    return os.path.join(project_dir, paths.PROVEN, paths.BEFORE)


def load(project_dir: str) -> dict[str, Any] | None:
    """Return the snapshot of the change that hasn't ended, or None."""
    path = path_in(project_dir)
    found = trust.read(path, _LARGEST)
    if found is None:
        return None
    try:
        saved = dict(json.loads(found.content))
        if not saved.keys() >= _KEYS:
            raise ValueError
    except (ValueError, TypeError) as error:
        raise Problem(
            f"{path}, the snapshot of this host before an interrupted change, can't be read. Remove it with `rm {path}`; "
            "the next change then starts from the host as it is now."
        ) from error
    return saved


def save(saved: Mapping[str, Any]) -> None:
    """Write the snapshot, which only root can read."""
    path = path_in(saved["project_dir"])
    os.makedirs(os.path.dirname(saved["project_dir"]), mode=0o755, exist_ok=True)
    os.makedirs(saved["project_dir"], mode=0o755, exist_ok=True)
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    trust.check(path)
    atomic.write(path, json.dumps(saved).encode(), 0o600)


def drop(project_dir: str) -> list[str]:
    """Remove the snapshot; return the directories that existed only for it, and are removed as well."""
    saved = load(project_dir)
    if saved is None:
        return []
    os.unlink(path_in(project_dir))
    removed = []
    for directory in sorted(saved["missing"], key=len, reverse=True):
        with contextlib.suppress(OSError):
            os.rmdir(directory)
            removed.append(directory)
    return removed


def take(project_dir: str, images: Sequence[str], *, proven: bool) -> dict[str, Any]:
    """Return a snapshot of the files, the `images` and the container; nothing is written yet.

    The snapshot of a killed play stays, with only what it lacks added, as the host was complete then.
    `proven` means that the running server is good as it is.
    """
    found = dict(_as_found(project_dir, images), proven=proven)
    older = load(project_dir)
    if older is not None and not _over(older, found, proven=proven):
        edited = _edited(older, found)
        found["files"].update({path: file for path, file in older["files"].items() if path not in edited})
        for kind in ("links", "images"):
            found[kind].update(older[kind])
        missing = set(older["missing"] + found["missing"])
        merged = {kind: found[kind] for kind in ("files", "links", "images")}
        return dict(older, missing=sorted(missing), interrupted=older["taken_at"], **merged)
    return found


def note_written(project_dir: str, contents: Mapping[str, bytes]) -> None:
    """Note what a change is about to write, to tell it from what people write after the change was killed."""
    saved = load(project_dir)
    if saved is None:
        return
    for path, content in contents.items():
        saved.setdefault("written", {}).setdefault(path, []).append(_digest(content))
    save(saved)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _edited(older: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Return the files that somebody has edited since the interrupted change took the snapshot `older`."""
    return [
        path
        for path, before in older["files"].items()
        for now in [found["files"][path]["content"]]
        if now not in (None, before["content"])
        and _digest(base64.b64decode(now)) not in older.get("written", {}).get(path, [])
    ]


def _over(older: Mapping[str, Any], found: Mapping[str, Any], *, proven: bool) -> bool:
    """Return whether the change of the snapshot `older` was completed all the same.

    It was where something was recorded since, or where another server than before is proven: a
    failure must restore that one.
    """
    if any(older["links"].get(path, target) != target for path, target in found["links"].items()):
        return True
    return proven and container_id(older) != container_id(found)


def container_id(saved: Mapping[str, Any]) -> str | None:
    """Return the id of the container in a snapshot."""
    return saved["container"]["Id"] if saved["container"] else None


def _as_found(project_dir: str, images: Sequence[str]) -> dict[str, Any]:
    found = container.inspect()
    proven = os.path.join(project_dir, paths.PROVEN)
    states = [record.load(project_dir, which) for which in paths.LINKS]
    images = [*images, *(state.record["image"] for state in states if state)]
    attached: list[str] = []
    if found:
        images.append(found["Config"]["Image"])
        attached = list(engine_api.networks_of(found))
    return {
        "project_dir": project_dir,
        "taken_at": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "interrupted": "",
        "missing": _missing(proven),
        "files": {path: read_file(path) for path in (os.path.join(project_dir, name) for name in FILES)},
        "links": {os.path.join(proven, which): atomic.target(proven, which) for which in paths.LINKS},
        "images": {image: container.image_id(image) for image in images},
        "container": found,
        "networks": networks(attached),
        "volumes": volumes(),
    }


def _missing(directory: str) -> list[str]:
    """Return which of `directory` and its parents don't exist."""
    if os.path.lexists(directory):
        return []
    return [*_missing(os.path.dirname(directory)), directory]


def read_file(path: str) -> dict[str, Any]:
    """Return a file's content and attributes."""
    link = os.readlink(path) if os.path.islink(path) else None
    found = trust.read(path)
    if found is None:
        return {"link": link, "content": None}
    status = found.status
    return {
        "link": link,
        "content": base64.b64encode(found.content).decode(),
        "mode": stat.S_IMODE(status.st_mode),
        "owner": [status.st_uid, status.st_gid],
        "modified": status.st_mtime_ns,
    }


def networks(names: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return the networks of the service, and those of these names that exist."""
    form = '{{.ID}} {{.Name}} {{.Label "' + PROJECT_LABEL + '"}}'
    rows = [
        row.split()
        for row in (docker.ask(["network", "ls", "--no-trunc", "--format", form]) or "").splitlines()
    ]
    ids = [row[0] for row in rows if row[1] in names or row[2:] == [PROJECT]]
    answers = (docker.ask(["network", "inspect", network]) for network in ids)
    return [network for answer in answers if answer for network in json.loads(answer)]


def volumes() -> list[str]:
    """Return the volumes of the service."""
    label = f"label={PROJECT_LABEL}={PROJECT}"
    return sorted((docker.ask(["volume", "ls", "--quiet", "--filter", label]) or "").split())


def obstacles(saved: Mapping[str, Any]) -> list[str]:
    """Return why the container in a snapshot could not be created again."""
    before = saved["container"]
    if before is None:
        return []
    host, found = before["HostConfig"], []
    if container.image_id(before["Image"]) is None:
        found.append(f"its image ({before['Config']['Image']}) is no longer on this host")
    if host.get("AutoRemove"):
        found.append("it was started with --rm, so the Docker Engine deletes it when it stops")
    found.extend(
        f"its {key} is another container's ({host[key]})"
        for key in ("NetworkMode", "IpcMode", "PidMode")
        if str(host.get(key)).startswith("container:")
    )
    return found
