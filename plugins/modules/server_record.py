#!/usr/bin/python
# SPDX-License-Identifier: MIT
"""Ansible module: save the proven state of a host, or restore one."""

from __future__ import annotations

DOCUMENTATION = r"""
module: server_record
short_description: Save the proven state of the vLLM service, or restore one
description:
  - Internal to the role P(mlops.vllm_gpu.vllm_gpu#role); any release may change it.
  - With O(state=saved), saves the compose file, C(.env) and the record of what was proven as the current proven
    state; the one before becomes the previous one. Files that were edited after the server was created from them
    prove nothing, and are not saved.
  - With O(state=restored), restores the files of the previous proven state, and the name of its image. Starts nothing.
  - The record holds no secret.
extends_documentation_fragment:
  - mlops.vllm_gpu.server.project_dir
  - mlops.vllm_gpu.server.lock
author: vllm_gpu maintainers (@mlops)
version_added: 0.1.0
options:
  state: {type: str, choices: [saved, restored], required: true, description: Whether to save or to restore.}
  proof: {type: dict, description: "What was proven, as M(mlops.vllm_gpu.server_info) returns it; for O(state=saved)."}
attributes:
  check_mode: {support: full, description: Writes nothing and returns what it would do.}
"""

EXAMPLES = r"""
- name: Record what was proven
  mlops.vllm_gpu.server_record:
    state: saved
    project_dir: /opt/vllm-gpu
    proof: "{{ __vllm_gpu_state.proof }}"
"""

RETURN = r"""
found: {returned: always, type: bool, description: "Whether a proven state was saved, or existed."}
record: {returned: always, type: dict, description: The record of the saved or restored state.}
restored: {returned: always, type: list, elements: str, description: Paths of the restored files.}
"""

import os
import time
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.mlops.vllm_gpu.plugins.module_utils import (
    atomic,
    compose,
    container,
    docker,
    dotenv,
    files,
    lock,
    paths,
    record,
    snapshot,
)
from ansible_collections.mlops.vllm_gpu.plugins.module_utils.module import failing
from ansible_collections.mlops.vllm_gpu.plugins.module_utils.shell import Problem


def image_digests(image: str) -> list[str]:
    """Return the registry's digests of an image; none for one that was built or loaded."""
    output = docker.run(["image", "inspect", "--format", '{{join .RepoDigests " "}}', image])
    return output.out.split() if output.code == 0 else []


def save(module: AnsibleModule, directory: str, proof: dict[str, Any]) -> dict[str, Any]:
    """Save the installed files with the record."""
    contents = {os.path.basename(file.path): file.after for file in files.installed(directory)}
    saved = dict(proof, image_digests=image_digests(proof["image_id"]))
    # Later reads rely on the hash being that of these very files.
    project = dotenv.values(contents[paths.ENV_FILE]).get("COMPOSE_PROJECT_NAME") or ""
    if compose.config_hash(contents, directory, project) != proof["config_hash"]:
        return {"changed": False, "found": False, "record": {}, "restored": []}
    saved["proven_at"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    if not module.check_mode:
        last = record.load(directory, "current")
        again = last is not None and all(last.record.get(key) == value for key, value in proof.items())
        record.save(directory, contents, saved, again=again)
    return {"changed": True, "found": True, "record": saved, "restored": []}


def restore_image(module: AnsibleModule, proven: record.Proven) -> bool:
    """Restore the name of the proven image; return whether another image had it."""
    image, wanted = proven.record["image"], proven.record["image_id"]
    if container.image_id(image) == wanted:
        return False
    if not module.check_mode:
        tagged = docker.run(["image", "tag", wanted, image])
        if tagged.code != 0:
            raise Problem(
                f"The name {image} can't be restored to the image that was proven, {wanted}: {tagged.err}"
            )
    return True


def restore_files(module: AnsibleModule, directory: str, proven: record.Proven) -> list[str]:
    """Restore the compose file and `.env`; return which ones had changed."""
    restored = []
    if not module.check_mode:
        contents = {os.path.join(directory, name): content for name, content in proven.files.items()}
        snapshot.note_written(directory, contents)
    for name, mode in ((paths.COMPOSE_FILE, 0o644), (paths.ENV_FILE, 0o600)):
        path = os.path.join(directory, name)
        if files.read(path)[:2] == (proven.files[name], mode):
            continue
        restored.append(path)
        if not module.check_mode:
            atomic.write(path, proven.files[name], mode)
    return restored


def restore(module: AnsibleModule, directory: str) -> dict[str, Any]:
    """Restore the previous files and the name of their image."""
    proven = record.load(directory, "previous")
    if proven is None or not {paths.COMPOSE_FILE, paths.ENV_FILE} <= set(proven.files):
        return {"changed": False, "found": False, "record": {}, "restored": []}
    # First, as it may fail: without the image, the files are of no use.
    moved = restore_image(module, proven)
    restored = restore_files(module, directory, proven)
    return {"changed": bool(restored) or moved, "found": True, "record": proven.record, "restored": restored}


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["saved", "restored"], "required": True},
            "project_dir": {"type": "path", "required": True},
            "proof": {"type": "dict"},
            "lock": {"type": "str"},
        },
        required_if=[("state", "saved", ["proof"])],
        supports_check_mode=True,
    )
    params = module.params
    with failing(module, params["project_dir"]), lock.holding(params["lock"]):
        if params["state"] == "saved":
            result = save(module, params["project_dir"], params["proof"])
        else:
            result = restore(module, params["project_dir"])
    module.exit_json(**result)


if __name__ == "__main__":
    main()
