# SPDX-License-Identifier: MIT
"""Keep what a change may touch as it was found, and put it back when the change fails.

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
import re
import shutil
import stat
import time
from typing import Any, Iterator, Mapping, NamedTuple, Sequence

from ansible_collections.mlops.vllm_gpu.plugins.module_utils import container, engine, record, shell, trust
from ansible_collections.mlops.vllm_gpu.plugins.module_utils.container import CONTAINER, OWN_NAME, PROJECT
from ansible_collections.mlops.vllm_gpu.plugins.module_utils.shell import Problem

# Of what is kept; bytes. Each file in it has a limit of its own.
_LARGEST = 16 << 20
# All that a change may write in the project's directory, besides `.proven`.
FILES = ("docker-compose.serving.yml", ".env", "check_gpu_allocation.sh")
_PROJECT = "com.docker.compose.project"
_WORKING_DIR = "com.docker.compose.project.working_dir"
_LINKS = ("current", "previous")
# All that is kept, by its name.
_KEPT = {
    *("project_dir", "taken_at", "interrupted", "missing", "files", "links", "images", "container"),
    *("networks", "volumes", "proven"),
}


class Outcome(NamedTuple):
    """What was done to be as before, in words for a person, and what could not be done."""

    restored: list[str]
    removed: list[str]
    failed: list[str]

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Go on with the next thing where this one can't be put back."""
        try:
            yield
        except container.Unanswered:
            raise
        except Problem as problem:
            self.failed.append(str(problem))
        except OSError as error:
            self.failed.append(f"{error.filename or 'A file'} could not be written: {error.strerror}.")


# --- keeping ------------------------------------------------------------------


def path_in(project_dir: str) -> str:
    """Return where it is kept."""
    return os.path.join(project_dir, record.KEEP, record.BEFORE)


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
    record.write_whole(path, json.dumps(kept).encode(), 0o600)


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
    return proven and _id(older) != _id(found)


def _id(kept: Mapping[str, Any]) -> str | None:
    return kept["container"]["Id"] if kept["container"] else None


def _as_found(project_dir: str, images: Sequence[str]) -> dict[str, Any]:
    found = container.inspect()
    proven = os.path.join(project_dir, record.KEEP)
    states = [record.load(project_dir, which) for which in _LINKS]
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
        "files": {path: _file(path) for path in (os.path.join(project_dir, name) for name in FILES)},
        "links": {os.path.join(proven, which): record.target(proven, which) for which in _LINKS},
        "images": {image: container.image_id(image) for image in images},
        "container": found,
        "networks": _networks(attached),
        "volumes": _volumes(),
    }


def _missing(directory: str) -> list[str]:
    """Return the directories on the way to `directory`, itself included, that don't exist."""
    if os.path.lexists(directory):
        return []
    return [*_missing(os.path.dirname(directory)), directory]


def _file(path: str) -> dict[str, Any]:
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


def _networks(names: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return the networks of the service, and those of these names that exist."""
    form = '{{.ID}} {{.Name}} {{.Label "' + _PROJECT + '"}}'
    rows = [
        row.split()
        for row in (container.ask(["network", "ls", "--no-trunc", "--format", form]) or "").splitlines()
    ]
    ids = [row[0] for row in rows if row[1] in names or row[2:] == [PROJECT]]
    answers = (container.ask(["network", "inspect", one]) for one in ids)
    return [network for answer in answers if answer for network in json.loads(answer)]


def _volumes() -> list[str]:
    label = f"label={_PROJECT}={PROJECT}"
    return sorted((container.ask(["volume", "ls", "--quiet", "--filter", label]) or "").split())


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


# --- putting back -------------------------------------------------------------


def restore_files(kept: Mapping[str, Any]) -> Outcome:
    """Put the files, and the links to what was proven, back as they were found."""
    done = Outcome([], [], [])
    for path, before in kept["files"].items():
        with done.step():
            _restore_file(path, before, done)
    for path, target in kept["links"].items():
        with done.step():
            _restore_link(path, target)
    for directory in kept["missing"]:
        with done.step():
            _clear(directory)
    return done


def _restore_file(path: str, before: Mapping[str, Any], done: Outcome) -> None:
    now = _file(path)
    if now == before:
        return
    if now["link"] != before["link"]:
        _replace_link(path, before["link"])
    if before["content"] is None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.realpath(path))
            done.removed.append(path)
        return
    content = base64.b64decode(before["content"])
    record.write_whole(path, content, before["mode"], tuple(before["owner"]), before["modified"])
    done.restored.append(path)


def _replace_link(path: str, target: str | None) -> None:
    """Make `path` a link to `target`, or no link where there was none."""
    if target is not None:
        record.point(os.path.dirname(path), os.path.basename(path), target)
    elif os.path.islink(path):
        os.unlink(path)


def _restore_link(path: str, target: str | None) -> None:
    """Let what counts as proven be what it was, as long as it's there."""
    keep, name = os.path.split(path)
    if record.target(keep, name) == target:
        return
    if target is None:
        os.unlink(path)
    elif os.path.isdir(os.path.join(keep, target)):
        record.point(keep, name, target)


def _clear(directory: str) -> None:
    """Remove what the change has left half-written in a directory that it has made."""
    for name in os.listdir(directory) if os.path.isdir(directory) else []:
        path = os.path.join(directory, name)
        if name.startswith(record.TEMPORARY):
            os.unlink(path)
        elif os.path.basename(directory) == record.KEEP and name != record.BEFORE:
            shutil.rmtree(path, ignore_errors=True)


def restore_engine(kept: Mapping[str, Any], done: Outcome) -> Outcome:
    """Put the images' names, the container and its networks back as they were found; start nothing."""
    for image, wanted in kept["images"].items():
        with done.step():
            _restore_image(image, wanted, done)
    used: list[str] = []
    with done.step():
        _remove_others(kept, used, done)
    # Before the others are made, as their addresses may be taken; one that can't be removed must not cost the server.
    with done.step():
        _remove_networks(kept, used, done)
    with done.step():
        _make_networks(kept, done)
        _restore_container(kept, done)
    return done


def _restore_image(image: str, wanted: str | None, done: Outcome) -> None:
    """Give an image its name back; one that was pulled for the change stays."""
    if wanted is None or container.image_id(image) == wanted:
        return
    _do("image", "tag", wanted, image)
    done.restored.append(f"the image {image}")


def _do(*argv: str, timeout: float = shell.TIMEOUT) -> None:
    """Run a docker command that must succeed; raise as container.ask does."""
    if container.ask(argv, timeout) is None:
        raise Problem(f"`docker {' '.join(argv)}` failed: there is no such thing.")


def _stop(found: Mapping[str, Any]) -> None:
    grace = stop_timeout(found)
    _do("stop", found["Id"], timeout=grace + shell.TIMEOUT)


def _own_containers(kept: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the containers that a change of this very service has to do with."""
    ids = container.ask(["ps", "--all", "--no-trunc", "--quiet", "--filter", "name=" + CONTAINER]) or ""
    found = [one for one in map(container.inspect, ids.split()) if one]
    here = os.path.realpath(kept["project_dir"])
    return [
        one
        for one in found
        if OWN_NAME.match(one["Name"].lstrip("/"))
        and os.path.realpath((one["Config"].get("Labels") or {}).get(_WORKING_DIR, "/")) == here
    ]


def _remove_others(kept: Mapping[str, Any], networks: list[str], done: Outcome) -> None:
    """Remove what the change has made in the container's place; add the networks that it was on to `networks`."""
    for one in _own_containers(kept):
        if one["Id"] == _id(kept):
            continue
        networks.extend(engine.networks_of(one))
        _stop(one)
        _do("rm", "--force", one["Id"])
        done.removed.append("the container that failed")


def stop_timeout(found: Mapping[str, Any] | None) -> int:
    """Return how long a container may take to stop, in seconds."""
    return int((found or {}).get("Config", {}).get("StopTimeout") or 10)


def _make_networks(kept: Mapping[str, Any], done: Outcome) -> None:
    """Make the networks again that the change has removed."""
    names = {one["Name"] for one in _networks([one["Name"] for one in kept["networks"]])}
    for one in kept["networks"]:
        if one["Name"] not in names:
            engine.create_network(one)
            done.restored.append(f"the network {one['Name']}")


def _remove_networks(kept: Mapping[str, Any], used: Sequence[str], done: Outcome) -> None:
    """Remove the networks that the change has made for itself."""
    before = {one["Name"] for one in kept["networks"]}
    for one in _networks(used):
        if one["Name"] not in before and _PROJECT in (one["Labels"] or {}) and not one["Containers"]:
            with done.step():
                _do("network", "rm", one["Id"])
                done.removed.append(f"the network {one['Name']}")


def _restore_container(kept: Mapping[str, Any], done: Outcome) -> None:
    """Have the container that was there under its name, made again where it is gone."""
    before = kept["container"]
    if before is None:
        return
    now = container.inspect(before["Id"])
    if now is None:
        # By its name, if that still means its image: `docker ps` shows it.
        name = before["Config"]["Image"]
        image = name if container.image_id(name) == before["Image"] else before["Image"]
        engine.create(before, CONTAINER, image)
        done.restored.append(f"the container {CONTAINER}, with the settings that it had")
        return
    if now["Name"] != before["Name"]:
        _do("rename", before["Id"], CONTAINER)
        done.restored.append(f"the name of the container {CONTAINER}")
    if now["State"]["Running"] and not before["State"]["Running"]:
        _stop(now)
        done.restored.append(f"the container {CONTAINER}, stopped as before")


def wait_for_engine(seconds: float) -> None:
    """Wait while the engine is away, as during a restart; Unanswered where that takes longer."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            container.inspect()
        except container.Unanswered:
            if time.monotonic() >= deadline:
                raise
            time.sleep(1)
        else:
            return


def must_start(kept: Mapping[str, Any]) -> bool:
    """Say whether the container ran and doesn't now."""
    if not kept["container"] or not kept["container"]["State"]["Running"]:
        return False
    now = container.inspect()
    return now is not None and not now["State"]["Running"]


def wait_for_memory(seconds: float = 30) -> None:
    """Wait until the driver gives no more memory back: a server that was just removed may still hold some."""
    deadline, before = time.monotonic() + seconds, None
    while time.monotonic() < deadline:
        used = shell.run(["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]).out
        now = sum(int(one) for one in re.findall(r"^[0-9]{1,9}$", used, re.MULTILINE))
        if before is not None and now >= before:
            return
        before = now
        time.sleep(1)


def start() -> None:
    """Start the container."""
    # NVIDIA's hook may take its time.
    _do("start", CONTAINER, timeout=6 * shell.TIMEOUT)


def new_volumes(kept: Mapping[str, Any]) -> list[str]:
    """Return the volumes that the change has made: they stay, as they may hold hours of downloads."""
    return [name for name in _volumes() if name not in kept["volumes"]]
