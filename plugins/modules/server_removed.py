#!/usr/bin/python
# SPDX-License-Identifier: MIT
"""Ansible module: stop and remove the server, and if requested, its files."""

from __future__ import annotations

DOCUMENTATION = r"""
module: server_removed
short_description: Stop and remove the vLLM server, and if requested, its files
description:
  - Internal to the role P(mlops.vllm_gpu.vllm_gpu#role); any release may change it.
  - Stops and removes the container C(vllm-server), and the default network of its Compose project where nothing else
    uses it. Volumes and the image stay.
  - Fails, with nothing stopped or removed, where the container was started from another directory or belongs to
    another Compose project.
  - With O(files), also removes the files of the service and every copy of its secrets. Keys of C(.env) that are not
    the role's stay, and so does every other file in the directory.
extends_documentation_fragment:
  - mlops.vllm_gpu.server.project_dir
  - mlops.vllm_gpu.server.lock
author: vllm_gpu maintainers (@mlops)
version_added: 0.1.0
options:
  files: {type: bool, default: false, description: Whether to remove the files of the service as well.}
  keys:
    description: The keys of C(.env) that are the role's, to be removed with O(files).
    type: list
    elements: str
    default: []
attributes:
  check_mode: {support: full, description: Removes nothing and returns what it would remove.}
"""

EXAMPLES = r"""
- name: Stop and remove the server
  mlops.vllm_gpu.server_removed:
    project_dir: /opt/vllm-gpu
"""

RETURN = r"""
removed:
  description: The container and the paths that were removed, or would be in check mode.
  returned: always
  type: list
  elements: str
kept:
  description: What stays, such as volumes, the image, and the user's keys in C(.env).
  returned: always
  type: list
  elements: str
msg: {returned: always, type: str, description: "Both, as one text."}
"""

import contextlib
import os
from typing import Iterable, Sequence

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.mlops.vllm_gpu.plugins.module_utils import (
    atomic,
    compose,
    container,
    dotenv,
    files,
    leftovers,
    lock,
    paths,
    removal,
)
from ansible_collections.mlops.vllm_gpu.plugins.module_utils.module import failing


def users_lines(content: bytes, keys: Iterable[str]) -> tuple[bytes, list[str]]:
    """Return the lines of a `.env` whose keys are not of `keys`, and those keys."""
    users = [line for line in dotenv.lines(content) if line.key and line.key not in keys]
    text = b"".join(line.text + (line.ending or b"\n") for line in users)
    return text, list(dict.fromkeys(line.key or "" for line in users))


def used_keys(directory: str) -> set[str]:
    """Return the keys of `.env` that the installed and the proven compose file use."""
    places = (directory, os.path.join(directory, paths.PROVEN, "current"))
    contents = (files.read(os.path.join(place, paths.COMPOSE_FILE))[0] or b"" for place in places)
    return set().union(*map(compose.named, contents))


def remove_env(directory: str, keys: Iterable[str], *, check_mode: bool) -> tuple[list[str], list[str]]:
    """Remove `.env` except for the user's keys; return what was removed and what was kept."""
    path = os.path.join(directory, paths.ENV_FILE)
    content = files.read(path)[0]
    if content is None:
        return [], []
    text, users = users_lines(content, keys)
    if not users:
        # Also the target of a link, which holds the secrets.
        gone = sorted({path, os.path.realpath(path)})
        if not check_mode:
            leftovers.remove(gone)
        return gone, []
    if not check_mode and text != content:
        atomic.write(os.path.realpath(path), text, 0o600)
    removed = ["the role's keys and the comments in " + path] if text != content else []
    return removed, [f"{', '.join(users)} in {path}"]


def service_files(directory: str) -> list[str]:
    """Return the paths of all files of the service but `.env`, and of every copy of it."""
    names = (paths.COMPOSE_FILE, paths.REFEREE, paths.PROVEN)
    own = [*(os.path.join(directory, name) for name in names), *leftovers.leftovers(directory)]
    return [path for path in own if os.path.lexists(path)]


def is_ours(directory: str) -> bool:
    """Return whether the role has written to the directory; `.env` and a compose file alone may be anybody's."""
    marks = [os.path.join(directory, name) for name in (paths.REFEREE, paths.PROVEN)]
    return any(map(os.path.lexists, marks)) or bool(leftovers.leftovers(directory))


def remove(module: AnsibleModule) -> tuple[list[str], list[str]]:
    """Remove what was requested; return what was removed and what was kept."""
    directory, check_mode = module.params["project_dir"], module.check_mode
    found = container.find()
    container.check_owner(found, directory)
    removed = ["the container " + server["name"] for server in found]
    kept = [name for server in found for name in (*server["storage"], "the image " + server["image"])]
    ours = bool(found) or is_ours(directory)
    if found and not check_mode:
        removal.remove(found)
    if not module.params["files"] or not ours:
        return removed, kept
    own = service_files(directory)
    keys = {*module.params["keys"], *used_keys(directory)}
    gone, users = remove_env(directory, keys, check_mode=check_mode)
    if not check_mode:
        leftovers.remove(own)
    ours_by_name = {paths.ENV_FILE, *map(os.path.basename, own)}
    others = sorted(set(os.listdir(directory)) - ours_by_name) if os.path.isdir(directory) else []
    kept += users + [os.path.join(directory, name) for name in others]
    if not check_mode:
        with contextlib.suppress(OSError):
            os.rmdir(directory)  # where it is empty
    return [*removed, *own, *gone], kept


def message(module: AnsibleModule, removed: Sequence[str], kept: Sequence[str]) -> str:
    """Describe what was, or would be, removed and kept."""
    if not removed:
        return (
            "There was nothing to remove: no vLLM server is on this host, and no files of this role are in "
            f"{module.params['project_dir']}."
        )
    would = "would be " if module.check_mode else ""
    text = "" if would else "There is no vLLM server on this host any more. "
    text += f"{(would + 'removed').capitalize()}: {', '.join(removed)}."
    if kept:
        text += f" {(would + 'kept').capitalize()}: {', '.join(dict.fromkeys(kept))}."
    if any(name.startswith("volume ") for name in kept) and not would:
        text += " To remove a volume as well: docker volume rm NAME"
    return text


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "project_dir": {"type": "path", "required": True},
            "files": {"type": "bool", "default": False},
            "keys": {"type": "list", "elements": "str", "default": [], "no_log": False},
            "lock": {"type": "str"},
        },
        supports_check_mode=True,
    )
    directory = module.params["project_dir"]
    run = None if module.check_mode else module.params["lock"]
    with failing(module, directory, done="removed or written"), lock.holding(run):
        removed, kept = remove(module)
    module.exit_json(changed=bool(removed), removed=removed, kept=kept, msg=message(module, removed, kept))


if __name__ == "__main__":
    main()
