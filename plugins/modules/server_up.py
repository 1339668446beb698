#!/usr/bin/python
# SPDX-License-Identifier: MIT
"""Ansible module: bring the server up with Docker Compose."""

from __future__ import annotations

DOCUMENTATION = r"""
module: server_up
short_description: Bring the vLLM server up with Docker Compose
description:
  - Internal to the role P(mlops.vllm_gpu.vllm_gpu#role); any release may change it.
  - Runs C(docker compose up --detach) with the compose file and C(.env) of the service, whatever the host's
    environment exports. Pulls nothing.
  - Holds the host's lock meanwhile, so that no other play changes the server.
  - First removes a server that was started from the same directory in the role's earlier Compose project, as both
    have the same name.
extends_documentation_fragment:
  - mlops.vllm_gpu.server.project_dir
  - mlops.vllm_gpu.server.lock
author: vllm_gpu maintainers (@mlops)
version_added: 0.1.0
options:
  recreate:
    description: Whether to recreate also a container that Compose finds up to date.
    type: str
    choices: [auto, always]
    default: auto
  timeout:
    description: How long Compose may take, in seconds, without the grace period of the old container.
    type: int
    default: 300
attributes:
  check_mode: {support: full, description: Does nothing.}
"""

EXAMPLES = r"""
- name: Start the server
  mlops.vllm_gpu.server_up:
    project_dir: /opt/vllm-gpu
"""

RETURN = r"""
container: {returned: success, type: str, description: The id of the server's container.}
"""

from typing import Any, Sequence

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.mlops.vllm_gpu.plugins.module_utils import (
    compose,
    container,
    dotenv,
    files,
    lock,
    removal,
)
from ansible_collections.mlops.vllm_gpu.plugins.module_utils.module import failing
from ansible_collections.mlops.vllm_gpu.plugins.module_utils.shell import Problem


def starts(containers: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return what differs between two starts of the server."""
    return [(found["id"], found["started_at"]) for found in containers]


def bring_up(module: AnsibleModule) -> tuple[bool, str]:
    """Bring the server up; return whether anything changed, and the container's id."""
    params, directory = module.params, module.params["project_dir"]
    before = container.find()
    container.check_owner(before, directory)
    env = files.installed(directory)[1].after
    project = dotenv.values(env).get("COMPOSE_PROJECT_NAME") or container.PROJECT
    earlier = [found for found in before if found["project"] != project or not found["composed"]]
    if module.check_mode:
        return False, ""
    if earlier:
        removal.remove(earlier)
    grace = max([found["stop_timeout"] for found in before] or [0])
    compose.up(project, directory, always=params["recreate"] == "always", timeout=params["timeout"] + grace)
    after = container.find()
    if not after:
        raise Problem(
            f"Docker Compose reported success, but there is no container {container.CONTAINER}: another program has "
            "removed it. Run the play again."
        )
    return starts(after) != starts(before), after[0]["id"]


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "project_dir": {"type": "path", "required": True},
            "recreate": {"type": "str", "choices": ["auto", "always"], "default": "auto"},
            "timeout": {"type": "int", "default": 300},
            "lock": {"type": "str"},
        },
        supports_check_mode=True,
    )
    directory = module.params["project_dir"]
    with failing(module, directory), lock.holding(None if module.check_mode else module.params["lock"]):
        changed, server = bring_up(module)
    module.exit_json(changed=changed, container=server)


if __name__ == "__main__":
    main()
