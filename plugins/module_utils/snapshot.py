# SPDX-License-Identifier: MIT
"""Keep what a change may touch as it was found, and put it back when the change fails.

What is kept: the files of the service (bytes, mode, owner, group and time; absence; a
link as a link), the meaning of each image's name, and the container, by all that the
engine knows of it, so that it can be made again whoever made it. It holds secrets, as
`.env` does, so only root can read it. It outlives a reboot, which may come in the
middle of a change, but not the change: what exists here is of one that hasn't ended.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shutil
import stat
import time
import urllib.parse
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence

from ansible_collections.mlops.vllm_gpu.plugins.module_utils import engine, record, shell, trust
from ansible_collections.mlops.vllm_gpu.plugins.module_utils.container import CONTAINER, OWN_NAME, PROJECT
from ansible_collections.mlops.vllm_gpu.plugins.module_utils.shell import Problem

PATH = "/var/lib/vllm_gpu/before.json"
# Of PATH; bytes. Each file in it has a limit of its own.
_LARGEST = 16 << 20
# All that a change may write in the project's directory, besides `.proven`.
FILES = ("docker-compose.serving.yml", ".env", "server.env", "check_gpu_allocation.sh")
_PROJECT = "com.docker.compose.project"
_WORKING_DIR = "com.docker.compose.project.working_dir"
_LINKS = ("current", "previous")


class Outcome(NamedTuple):
    """What was done to be as before, in words for a person, and what could not be done."""

    restored: List[str]
    removed: List[str]
    failed: List[str]

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Go on with the next thing where this one can't be put back."""
        try:
            yield
        except engine.Unreachable:
            raise
        except Problem as problem:
            self.failed.append(str(problem))
        except OSError as error:
            self.failed.append("{0} can't be written: {1}.".format(error.filename, error.strerror))


# --- keeping ------------------------------------------------------------------


def load() -> Optional[Dict[str, Any]]:
    """Return what the change that hasn't ended has kept, or None."""
    found = trust.read(PATH, _LARGEST)
    if found is None:
        return None
    try:
        return dict(json.loads(found.content))
    except ValueError as error:
        raise Problem(
            "{0}, which says how this host was before a change that was interrupted, can't be read. Remove it with "
            "`rm {0}`; then the host counts as it is now.".format(PATH)
        ) from error


def drop() -> bool:
    """Forget what was kept; say whether there was anything."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(PATH)
        return True
    return False


def take(project_dir: str, images: Sequence[str], *, proven: bool) -> Dict[str, Any]:
    """Keep the files, what the `images` mean, and the container, and return it all; nothing is written yet.

    A play that was killed in the middle of its change has left what it had kept: that
    is how the host was, and stays; only what it didn't know of is added. `proven`
    says that the server that runs is good by itself.
    """
    found = dict(_as_found(project_dir, images), proven=proven)
    older = load()
    if older is not None and not _over(older, found, proven=proven):
        for kind in ("files", "links", "images"):
            found[kind].update(older[kind])
        missing = set(older["missing"] + found["missing"])
        merged = {kind: found[kind] for kind in ("files", "links", "images")}
        return dict(older, missing=sorted(missing), interrupted=older["taken_at"], **merged)
    return found


def save(kept: Mapping[str, Any]) -> None:
    """Write down what is kept, for root's eyes only."""
    os.makedirs(os.path.dirname(PATH), mode=0o700, exist_ok=True)
    trust.check(PATH)
    record.write_whole(PATH, json.dumps(kept).encode(), 0o600)


def _over(older: Mapping[str, Any], found: Mapping[str, Any], *, proven: bool) -> bool:
    """Say whether the change that kept `older` has come to its end all the same.

    It has where something was recorded since, and where another server than before
    it was proven: that one is what a failure must go back to.
    """
    if any(older["links"].get(path, target) != target for path, target in found["links"].items()):
        return True
    return proven and _id(older) != _id(found)


def _id(kept: Mapping[str, Any]) -> Optional[str]:
    return kept["container"]["Id"] if kept["container"] else None


def _as_found(project_dir: str, images: Sequence[str]) -> Dict[str, Any]:
    container = engine.call("GET", "/containers/{0}/json".format(CONTAINER))
    proven = os.path.join(project_dir, record.KEEP)
    states = [record.load(project_dir, which) for which in _LINKS]
    images = [*images, *(state.record["image"] for state in states if state)]
    attached: List[str] = []
    if container:
        images.append(container["Config"]["Image"])
        attached = list(engine.networks_of(container))
    networks = [one for one in engine.call("GET", "/networks") if _is_ours(one) or one["Name"] in attached]
    return {
        "project_dir": project_dir,
        "taken_at": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "interrupted": "",
        "missing": _missing(proven),
        "files": {path: _file(path) for path in (os.path.join(project_dir, name) for name in FILES)},
        "links": {os.path.join(proven, which): record.target(proven, which) for which in _LINKS},
        "images": {image: _image_id(image) for image in images},
        "container": container,
        "networks": networks,
        "volumes": _volumes(),
    }


def _missing(directory: str) -> List[str]:
    """Return the directories on the way to `directory`, itself included, that don't exist."""
    if os.path.lexists(directory):
        return []
    return [*_missing(os.path.dirname(directory)), directory]


def _file(path: str) -> Dict[str, Any]:
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


def _image_id(image: str) -> Optional[str]:
    answer = engine.call("GET", "/images/{0}/json".format(urllib.parse.quote(image, safe="/:@")))
    return answer["Id"] if answer else None


def _is_ours(network: Mapping[str, Any]) -> bool:
    return (network.get("Labels") or {}).get(_PROJECT) == PROJECT


def _volumes() -> List[str]:
    listed = engine.call("GET", "/volumes", filters=engine.filters(label=_PROJECT + "=" + PROJECT))
    return sorted(one["Name"] for one in listed["Volumes"] or [])


def obstacles(kept: Mapping[str, Any]) -> List[str]:
    """Say why the container that is kept could not be made again."""
    container = kept["container"]
    if container is None:
        return []
    host, found = container["HostConfig"], []
    if _image_id(container["Image"]) is None:
        found.append("its image ({0}) is no longer on this host".format(container["Config"]["Image"]))
    if host.get("AutoRemove"):
        found.append("it was started with --rm, so the Docker Engine deletes it when it stops")
    found.extend(
        "its {0} is another container's ({1})".format(key, host[key])
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
    for directory in sorted(kept["missing"], key=len, reverse=True):
        with done.step():
            _remove_directory(directory, done)
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


def _replace_link(path: str, target: Optional[str]) -> None:
    """Make `path` a link to `target`, or no link where there was none."""
    if target is not None:
        record.point(os.path.dirname(path), os.path.basename(path), target)
    elif os.path.islink(path):
        os.unlink(path)


def _restore_link(path: str, target: Optional[str]) -> None:
    """Let what counts as proven be what it was, as long as it's there."""
    keep, name = os.path.split(path)
    if record.target(keep, name) == target:
        return
    if target is None:
        os.unlink(path)
    elif os.path.isdir(os.path.join(keep, target)):
        record.point(keep, name, target)


def _remove_directory(directory: str, done: Outcome) -> None:
    """Remove a directory that the change has made; what others have put there stays."""
    if not os.path.isdir(directory):
        return
    if os.path.basename(directory) == record.KEEP:
        shutil.rmtree(directory)
        return
    for name in os.listdir(directory):
        if name.startswith(record.TEMPORARY):
            os.unlink(os.path.join(directory, name))
    with contextlib.suppress(OSError):
        os.rmdir(directory)
        done.removed.append(directory)


def restore_engine(kept: Mapping[str, Any]) -> Outcome:
    """Put the images' names, the container and its networks back as they were found; start nothing."""
    done = Outcome([], [], [])
    for image, wanted in kept["images"].items():
        with done.step():
            _restore_image(image, wanted, done)
    with done.step():
        used = _remove_others(kept, done)
        _restore_networks(kept, used, done)
        _restore_container(kept, done)
    return done


def _restore_image(image: str, wanted: Optional[str], done: Outcome) -> None:
    """Give an image its name back; one that was pulled for the change stays."""
    if wanted is None or _image_id(image) == wanted:
        return
    tagged = shell.run(["docker", "image", "tag", wanted, image])
    if tagged.code != 0:
        raise Problem(
            "The name {0} can't be given back to its image {1}: {2}".format(image, wanted, tagged.err)
        )
    done.restored.append("the image {0}".format(image))


def _own_containers(kept: Mapping[str, Any]) -> List[Dict[str, Any]]:
    """Return the containers that a change of this very service has to do with."""
    listed = engine.call("GET", "/containers/json", all="true", filters=engine.filters(name=CONTAINER))
    return [
        one
        for one in listed
        if any(OWN_NAME.match(name.lstrip("/")) for name in one["Names"])
        and (
            one["Id"] == _id(kept)
            or os.path.realpath(one["Labels"].get(_WORKING_DIR, "/")) == os.path.realpath(kept["project_dir"])
        )
    ]


def _remove_others(kept: Mapping[str, Any], done: Outcome) -> List[str]:
    """Remove what the change has made in the container's place; return the networks that it was on."""
    networks: List[str] = []
    for one in _own_containers(kept):
        if one["Id"] == _id(kept):
            continue
        raw = engine.call("GET", "/containers/{0}/json".format(one["Id"]))
        networks.extend(engine.networks_of(raw))
        engine.stop(one["Id"], stop_timeout(raw))
        engine.call("DELETE", "/containers/{0}".format(one["Id"]), force="true")
        done.removed.append("the container that failed")
    return networks


def stop_timeout(container: Optional[Mapping[str, Any]]) -> int:
    """Return how long a container may take to stop, in seconds."""
    return int((container or {}).get("Config", {}).get("StopTimeout") or 10)


def _restore_networks(kept: Mapping[str, Any], used: Sequence[str], done: Outcome) -> None:
    """Remove the networks that the change has made for itself, and make those again that it has removed."""
    before = {one["Id"] for one in kept["networks"]}
    for one in engine.call("GET", "/networks"):
        if one["Id"] in before or not (
            _is_ours(one) or (one["Name"] in used and _PROJECT in (one["Labels"] or {}))
        ):
            continue
        if not engine.call("GET", "/networks/{0}".format(one["Id"])).get("Containers"):
            engine.call("DELETE", "/networks/{0}".format(one["Id"]))
            done.removed.append("the network {0}".format(one["Name"]))
    names = {one["Name"] for one in engine.call("GET", "/networks")}
    for one in kept["networks"]:
        if one["Name"] not in names:
            engine.create_network(one)
            done.restored.append("the network {0}".format(one["Name"]))


def _restore_container(kept: Mapping[str, Any], done: Outcome) -> None:
    """Have the container that was there under its name, made again where it is gone."""
    before = kept["container"]
    if before is None:
        return
    now = engine.call("GET", "/containers/{0}/json".format(before["Id"]))
    if now is None:
        # By its name, if that still means its image: `docker ps` shows it.
        name = before["Config"]["Image"]
        image = name if _image_id(name) == before["Image"] else before["Image"]
        engine.create(before, CONTAINER, image)
        done.restored.append("the container {0}, with the settings that it had".format(CONTAINER))
        return
    if now["Name"] != before["Name"]:
        engine.call("POST", "/containers/{0}/rename".format(before["Id"]), name=before["Name"].lstrip("/"))
        done.restored.append("the name of the container {0}".format(CONTAINER))
    if now["State"]["Running"] and not before["State"]["Running"]:
        engine.stop(before["Id"], stop_timeout(now))
        done.restored.append("the container {0}, stopped as before".format(CONTAINER))


def must_start(kept: Mapping[str, Any]) -> bool:
    """Say whether the container ran and doesn't now."""
    if not kept["container"] or not kept["container"]["State"]["Running"]:
        return False
    now = engine.call("GET", "/containers/{0}/json".format(CONTAINER))
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
    engine.call("POST", "/containers/{0}/start".format(CONTAINER), timeout=6 * shell.TIMEOUT)


def new_volumes(kept: Mapping[str, Any]) -> List[str]:
    """Return the volumes that the change has made: they stay, as they may hold hours of downloads."""
    return [name for name in _volumes() if name not in kept["volumes"]]
