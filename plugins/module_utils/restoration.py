# SPDX-License-Identifier: MIT
"""Restore a host from its snapshot."""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
import time
from typing import Any, Iterator, Mapping, NamedTuple, Sequence

from . import atomic, container, docker, engine_api, gpus, paths, shell, snapshot
from .container import CONTAINER, PROJECT_LABEL
from .shell import Problem


class Outcome(NamedTuple):
    """What was restored, removed, and could not be restored."""

    restored: list[str]
    removed: list[str]
    failed: list[str]

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Note a failure, and continue with the next step."""
        try:
            yield
        except docker.Unanswered:
            raise
        except Problem as problem:
            self.failed.append(str(problem))
        except OSError as error:
            self.failed.append(f"{error.filename or 'A file'} could not be written: {error.strerror}.")


def restore_files(saved: Mapping[str, Any]) -> Outcome:
    """Restore the files, and the links to the proven states."""
    done = Outcome([], [], [])
    for path, before in saved["files"].items():
        with done.step():
            _restore_file(path, before, done)
    for path, target in saved["links"].items():
        with done.step():
            _restore_link(path, target)
    for directory in saved["missing"]:
        with done.step():
            _clear(directory)
    return done


def _restore_file(path: str, before: Mapping[str, Any], done: Outcome) -> None:
    now = snapshot.read_file(path)
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
    atomic.write(path, content, before["mode"], tuple(before["owner"]), before["modified"])
    done.restored.append(path)


def _replace_link(path: str, target: str | None) -> None:
    """Make `path` a link to `target`, or no link where there was none."""
    if target is not None:
        atomic.point(os.path.dirname(path), os.path.basename(path), target)
    elif os.path.islink(path):
        os.unlink(path)


def _restore_link(path: str, target: str | None) -> None:
    """Restore a link to a proven state, as long as that exists."""
    directory, name = os.path.split(path)
    if atomic.target(directory, name) == target:
        return
    if target is None:
        os.unlink(path)
    elif os.path.isdir(os.path.join(directory, target)):
        atomic.point(directory, name, target)


def _clear(directory: str) -> None:
    """Remove half-written files from a directory that the change has created."""
    for name in os.listdir(directory) if os.path.isdir(directory) else []:
        path = os.path.join(directory, name)
        if name.startswith(atomic.TEMPORARY):
            os.unlink(path)
        elif os.path.basename(directory) == paths.PROVEN and name != paths.BEFORE:
            shutil.rmtree(path, ignore_errors=True)


def restore_engine(saved: Mapping[str, Any], done: Outcome) -> Outcome:
    """Restore the images' names, the container and its networks; start nothing."""
    for image, wanted in saved["images"].items():
        with done.step():
            _restore_image(image, wanted, done)
    used: list[str] = []
    with done.step():
        _remove_others(saved, used, done)
    # First, as these may hold the addresses of the old ones.
    with done.step():
        _remove_networks(saved, used, done)
    with done.step():
        _make_networks(saved, done)
        _restore_container(saved, done)
    return done


def _restore_image(image: str, wanted: str | None, done: Outcome) -> None:
    """Restore an image's name; an image that was pulled for the change stays."""
    if wanted is None or container.image_id(image) == wanted:
        return
    docker.do("image", "tag", wanted, image)
    done.restored.append(f"the image {image}")


def _stop(found: Mapping[str, Any]) -> None:
    docker.do("stop", found["id"], timeout=found["stop_timeout"] + shell.TIMEOUT)


def _remove_others(saved: Mapping[str, Any], networks: list[str], done: Outcome) -> None:
    """Remove the containers that the change has created; add their networks to `networks`."""
    here = os.path.realpath(saved["project_dir"])
    for found in container.find():
        if (
            found["id"] == snapshot.container_id(saved)
            or os.path.realpath(found["project_dir"] or "/") != here
        ):
            continue
        networks.extend(found["networks"])
        _stop(found)
        docker.do("rm", "--force", found["id"])
        done.removed.append("the container that failed")


def _make_networks(saved: Mapping[str, Any], done: Outcome) -> None:
    """Create the networks again that the change has removed."""
    names = {
        network["Name"] for network in snapshot.networks([network["Name"] for network in saved["networks"]])
    }
    for network in saved["networks"]:
        if network["Name"] not in names:
            engine_api.create_network(network)
            done.restored.append(f"the network {network['Name']}")


def _remove_networks(saved: Mapping[str, Any], used: Sequence[str], done: Outcome) -> None:
    """Remove the networks that the change has created."""
    before = {network["Name"] for network in saved["networks"]}
    for network in snapshot.networks(used):
        if (
            network["Name"] not in before
            and PROJECT_LABEL in (network["Labels"] or {})
            and not network["Containers"]
        ):
            with done.step():
                docker.do("network", "rm", network["Id"])
                done.removed.append(f"the network {network['Name']}")


def _restore_container(saved: Mapping[str, Any], done: Outcome) -> None:
    """Restore the container under its name; create it again where it is gone."""
    before = saved["container"]
    if before is None:
        return
    now = container.inspect(before["Id"])
    if now is None:
        # By its name, which `docker ps` shows, if that still means the same image.
        name = before["Config"]["Image"]
        image = name if container.image_id(name) == before["Image"] else before["Image"]
        engine_api.create(before, CONTAINER, image)
        done.restored.append(f"the container {CONTAINER}, with the settings that it had")
        return
    if now["Name"] != before["Name"]:
        docker.do("rename", before["Id"], CONTAINER)
        done.restored.append(f"the name of the container {CONTAINER}")
    if now["State"]["Running"] and not before["State"]["Running"]:
        _stop(container.describe(now))
        done.restored.append(f"the container {CONTAINER}, stopped as before")


def wait_for_engine(seconds: float) -> None:
    """Wait for the Docker Engine, for example during its restart; raise Unanswered where that takes longer."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            container.inspect()
        except docker.Unanswered:  # noqa: PERF203 - one try a second
            if time.monotonic() >= deadline:
                raise
            time.sleep(1)
        else:
            return


def must_start(saved: Mapping[str, Any]) -> bool:
    """Return whether the container ran before and doesn't now."""
    if not saved["container"] or not saved["container"]["State"]["Running"]:
        return False
    now = container.inspect()
    return now is not None and not now["State"]["Running"]


def wait_for_memory(seconds: float = 30) -> None:
    """Wait until the memory in use stops falling: a server that was just removed may still hold some."""
    deadline, before = time.monotonic() + seconds, None
    while time.monotonic() < deadline:
        now = gpus.memory_in_use()
        if before is not None and now >= before:
            return
        before = now
        time.sleep(1)


def start() -> None:
    """Start the container."""
    # NVIDIA's hook may be slow.
    docker.do("start", CONTAINER, timeout=6 * shell.TIMEOUT)


def new_volumes(saved: Mapping[str, Any]) -> list[str]:
    """Return the volumes that the change has created. They stay: they may hold hours of downloads."""
    return [name for name in snapshot.volumes() if name not in saved["volumes"]]
