# SPDX-License-Identifier: MIT
"""Keep what a change may touch as it was found, to be put back (restoration.py) when the change fails.

What is kept: the files of the service (bytes, mode, owner, group and time; absence; a
link as a link), the meaning of each image's name, and the container, by all that the
engine knows of it, so that it can be made again whoever made it. It holds secrets, as
`.proven` does, where it is kept, so only root can read it. It outlives a reboot, which
may come in the middle of a change, but not the change: what exists is of one that
hasn't ended.
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

from . import atomic, container, docker, engine, paths, record, trust
from .container import (
    PROJECT,
    PROJECT_LABEL,
)
from .shell import Problem

# Of what is kept; bytes. Each file in it has a limit of its own.
_LARGEST = 16 << 20
# All that a change may write in the project's directory, besides `.proven`.
FILES = (paths.COMPOSE_FILE, paths.ENV_FILE, paths.REFEREE)
# All that is kept, by its name.
_KEPT = {
    *("project_dir", "taken_at", "interrupted", "missing", "files", "links", "images", "container"),
    *("networks", "volumes", "proven"),
}


def path_in(project_dir: str) -> str:
    """Return where it is kept."""
    return os.path.join(project_dir, paths.PROVEN, paths.BEFORE)


def load(project_dir: str) -> dict[str, Any] | None:
    """Return what the change that hasn't ended has kept, or None."""
    path = path_in(project_dir)
    found = trust.read(path, _LARGEST)
    if found is None:
        return None
    try:
        kept = dict(json.loads(found.content))
        if not kept.keys() >= _KEPT:
            raise ValueError
    except (ValueError, TypeError) as error:
        raise Problem(
            f"{path}, which says how this host was before a change that was interrupted, can't be read. Remove it with "
            f"`rm {path}`; then the host counts as it is now."
        ) from error
    return kept


def save(kept: Mapping[str, Any]) -> None:
    """Write down what is kept, for root's eyes only."""
    path = path_in(kept["project_dir"])
    os.makedirs(os.path.dirname(kept["project_dir"]), mode=0o755, exist_ok=True)
    os.makedirs(kept["project_dir"], mode=0o755, exist_ok=True)
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    trust.check(path)
    atomic.write(path, json.dumps(kept).encode(), 0o600)


def drop(project_dir: str) -> list[str]:
    """Forget what was kept; return the directories that it was kept in and that are empty without it."""
    kept = load(project_dir)
    if kept is None:
        return []
    os.unlink(path_in(project_dir))
    removed = []
    for directory in sorted(kept["missing"], key=len, reverse=True):
        with contextlib.suppress(OSError):
            os.rmdir(directory)
            removed.append(directory)
    return removed


def take(project_dir: str, images: Sequence[str], *, proven: bool) -> dict[str, Any]:
    """Keep the files, what the `images` mean, and the container, and return it all; nothing is written yet.

    A play that was killed in the middle of its change has left what it had kept: that
    is how the host was, and stays; only what it didn't know of is added. `proven`
    says that the server that runs is good by itself.
    """
    found = dict(_as_found(project_dir, images), proven=proven)
    older = load(project_dir)
    if older is not None and not _over(older, found, proven=proven):
        edited = _edited(older, found)
        found["files"].update({path: one for path, one in older["files"].items() if path not in edited})
        for kind in ("links", "images"):
            found[kind].update(older[kind])
        missing = set(older["missing"] + found["missing"])
        merged = {kind: found[kind] for kind in ("files", "links", "images")}
        return dict(older, missing=sorted(missing), interrupted=older["taken_at"], **merged)
    return found


def note_written(project_dir: str, contents: Mapping[str, bytes]) -> None:
    """Keep what a change is about to write, so that it can be told from what people write after it was killed."""
    kept = load(project_dir)
    if kept is None:
        return
    for path, content in contents.items():
        kept.setdefault("written", {}).setdefault(path, []).append(_digest(content))
    save(kept)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _edited(older: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Return the files that somebody has edited since the change that kept `older` was interrupted."""
    return [
        path
        for path, before in older["files"].items()
        for now in [found["files"][path]["content"]]
        if now not in (None, before["content"])
        and _digest(base64.b64decode(now)) not in older.get("written", {}).get(path, [])
    ]


def _over(older: Mapping[str, Any], found: Mapping[str, Any], *, proven: bool) -> bool:
    """Say whether the change that kept `older` has come to its end all the same.

    It has where something was recorded since, and where another server than before
    it was proven: that one is what a failure must go back to.
    """
    if any(older["links"].get(path, target) != target for path, target in found["links"].items()):
        return True
    return proven and container_id(older) != container_id(found)


def container_id(kept: Mapping[str, Any]) -> str | None:
    """Return the id of the container that is kept."""
    return kept["container"]["Id"] if kept["container"] else None


def _as_found(project_dir: str, images: Sequence[str]) -> dict[str, Any]:
    found = container.inspect()
    proven = os.path.join(project_dir, paths.PROVEN)
    states = [record.load(project_dir, which) for which in paths.LINKS]
    images = [*images, *(state.record["image"] for state in states if state)]
    attached: list[str] = []
    if found:
        images.append(found["Config"]["Image"])
        attached = list(engine.networks_of(found))
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
    """Return the directories on the way to `directory`, itself included, that don't exist."""
    if os.path.lexists(directory):
        return []
    return [*_missing(os.path.dirname(directory)), directory]


def read_file(path: str) -> dict[str, Any]:
    """Return a file as it is."""
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


def obstacles(kept: Mapping[str, Any]) -> list[str]:
    """Say why the container that is kept could not be made again."""
    before = kept["container"]
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
