#!/usr/bin/python
# SPDX-License-Identifier: MIT
"""Ansible module: take a snapshot of a host before a change, and restore it."""

from __future__ import annotations

DOCUMENTATION = r"""
module: server_snapshot
short_description: Take a snapshot of a host before a change, and restore it when the change fails
description:
  - Internal to the role P(mlops.vllm_gpu.vllm_gpu#role); any release may change it.
  - With O(state=taken), saves the files of the service, the ids of its images, and all that C(docker inspect) shows of
    its container in C(.proven), which only root can read. Refuses where the container could not be created again.
    The snapshot of an interrupted change stays, as the host was complete then.
  - With O(state=restored), restores everything, and waits for a Docker Engine that is restarting. Starts nothing.
  - With O(state=started), starts the container where it ran before and doesn't now.
  - With O(state=dropped), removes the snapshot.
extends_documentation_fragment:
  - mlops.vllm_gpu.server.project_dir
  - mlops.vllm_gpu.server.lock
author: vllm_gpu maintainers (@mlops)
version_added: 0.2.0
options:
  state: {type: str, choices: [taken, restored, started, dropped], required: true, description: What to do.}
  images: {type: list, elements: str, default: [], description: Names of more images whose ids to save.}
  proven: {type: bool, default: false, description: Whether the running server is proven; for O(state=taken).}
  force:
    description: V(irreversible) allows replacing a container that could not be created again.
    type: list
    elements: str
    default: []
attributes:
  check_mode: {support: full, description: Does nothing.}
"""

EXAMPLES = r"""
- name: Take a snapshot of the host
  mlops.vllm_gpu.server_snapshot:
    state: taken
    project_dir: /opt/vllm-gpu
    lock: "{{ __vllm_gpu_lock.run }}"
"""

RETURN = r"""
interrupted:
  description: When the interrupted change was started whose snapshot this is; or empty.
  returned: for O(state=taken) and O(state=restored)
  type: str
restored: {returned: for O(state=restored), type: list, elements: str, description: What was restored.}
removed:
  description: What the change had created, and was removed.
  returned: for O(state=restored) and O(state=dropped)
  type: list
  elements: str
volumes:
  description: Volumes that the change has created, and that stay.
  returned: for O(state=restored)
  type: list
  elements: str
existed: {returned: for O(state=restored), type: bool, description: Whether there was a container.}
was_proven: {returned: for O(state=restored), type: bool, description: Whether the server was proven.}
start: {returned: for O(state=restored), type: bool, description: "Whether the container ran, and is to be started."}
"""

import contextlib
from typing import Any, Mapping

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.mlops.vllm_gpu.plugins.module_utils import docker, lock, restoration, snapshot
from ansible_collections.mlops.vllm_gpu.plugins.module_utils.module import failing, hidden
from ansible_collections.mlops.vllm_gpu.plugins.module_utils.shell import Problem

# How long to wait for a Docker Engine that restarts; seconds.
_AWAY = 60


def take(params: Mapping[str, Any]) -> dict[str, Any]:
    """Take a snapshot, unless it could not be restored."""
    saved = snapshot.take(params["project_dir"], params["images"], proven=params["proven"])
    reasons = [] if "irreversible" in params["force"] else snapshot.obstacles(saved)
    if reasons:
        raise Problem(
            f"The current server could not be restored if the change failed: {', and '.join(reasons)}. To "
            "replace it anyway, set vllm_gpu_force: [irreversible]."
        )
    with lock.holding(params["lock"]):
        snapshot.save(saved)
    return {"changed": False, "interrupted": saved["interrupted"]}


def restore(params: Mapping[str, Any]) -> dict[str, Any]:
    """Restore everything; failures are reported together at the end."""
    saved = snapshot.load(params["project_dir"])
    if saved is None:
        raise Problem(
            f"There is no snapshot to restore: {snapshot.path_in(params['project_dir'])} does not exist."
        )
    # Files first: they don't need the Docker Engine.
    with lock.holding(params["lock"], lock.LEASE + _AWAY):
        files = restoration.restore_files(saved)
    failed = list(files.failed)
    outcome, start = restoration.Outcome([], [], []), False
    # The Docker Engine may restart once more in between; finished steps stay done.
    for last in (False, True):
        try:
            restoration.wait_for_engine(_AWAY)
            with lock.holding(params["lock"]):
                restoration.restore_engine(saved, outcome)
            start = restoration.must_start(saved)
            break
        except docker.Unanswered as problem:
            if last:
                failed.append(str(problem))
    result = {
        "restored": files.restored + outcome.restored,
        "removed": files.removed + outcome.removed,
        "existed": saved["container"] is not None,
        "was_proven": saved["proven"],
        "interrupted": saved["interrupted"],
        "start": start,
    }
    failed += outcome.failed
    if failed:
        # Other failures must not keep the server from running.
        if start:
            with contextlib.suppress(Problem), lock.holding(params["lock"]):
                restoration.wait_for_memory()
                restoration.start()
                failed.append(
                    "The previous server was started again; the play did not wait until it was ready."
                )
        return dict(result, failed=True, msg=hidden(" ".join(failed), params["project_dir"]))
    return dict(
        result, changed=bool(result["restored"] or result["removed"]), volumes=restoration.new_volumes(saved)
    )


def start(params: Mapping[str, Any]) -> dict[str, Any]:
    """Start the container where it ran before."""
    saved = snapshot.load(params["project_dir"])
    for last in (False, True):
        try:
            restoration.wait_for_engine(_AWAY)
            if saved is None or not restoration.must_start(saved):
                return {"changed": False}
            restoration.wait_for_memory()
            with lock.holding(params["lock"]):
                restoration.start()
            break
        except docker.Unanswered:
            if last:
                raise
    return {"changed": True}


def drop(params: Mapping[str, Any]) -> dict[str, Any]:
    """Remove the snapshot."""
    with lock.holding(params["lock"]):
        return {"changed": False, "removed": snapshot.drop(params["project_dir"])}


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "state": {
                "type": "str",
                "choices": ["taken", "restored", "started", "dropped"],
                "required": True,
            },
            "project_dir": {"type": "path", "required": True},
            "images": {"type": "list", "elements": "str", "default": []},
            "proven": {"type": "bool", "default": False},
            "force": {"type": "list", "elements": "str", "default": []},
            "lock": {"type": "str"},
        },
        supports_check_mode=True,
    )
    if module.check_mode:
        module.exit_json(changed=False)
    do = {"taken": take, "restored": restore, "started": start, "dropped": drop}[module.params["state"]]
    with failing(module, module.params["project_dir"]):
        result = do(module.params)
    if result.get("failed"):
        module.fail_json(**result)
    module.exit_json(**result)


if __name__ == "__main__":
    main()
