#!/usr/bin/python
# SPDX-License-Identifier: MIT
"""Ansible module: bring the server up with Docker Compose."""

from __future__ import annotations

DOCUMENTATION = r"""
module: server_up
short_description: Bring the vLLM server up with Docker Compose
description:
  - Internal to the role P(mlops.vllm_gpu.vllm_gpu#role); any release may change it.
  - Runs C(docker compose up --detach) with the compose file and C(.env) of the service. C(.env) alone decides what
    they hold, whatever the host's environment exports. Pulls nothing.
  - Holds the host's lock for as long as that takes, so that no other play changes the server meanwhile.
  - A server that was started from the same directory in another of O(projects) is removed first, as both have one name.
extends_documentation_fragment:
  - mlops.vllm_gpu.server.project_dir
  - mlops.vllm_gpu.server.projects
  - mlops.vllm_gpu.server.lock
author: vllm_gpu maintainers (@mlops)
version_added: 0.1.0
options:
  recreate:
    description: Whether to recreate a container that Compose takes for the right one, too.
    type: str
    choices: [auto, always]
    default: auto
  timeout:
    description: How long Compose may take, in seconds, besides the grace period of the container that it replaces.
    type: int
    default: 300
attributes:
  check_mode:
    description: Does nothing.
    support: full
"""

EXAMPLES = r"""
- name: Start the server
  mlops.vllm_gpu.server_up:
    project_dir: /opt/vllm-gpu
    projects: [vllm-gpu]
"""

RETURN = r"""
container:
  description: The id of the server's container.
  returned: success
  type: str
"""

import os
from typing import List, Tuple

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.mlops.vllm_gpu.plugins.module_utils import (
    compose,
    dotenv,
    lock,
    removal,
    server,
    shell,
)
from ansible_collections.mlops.vllm_gpu.plugins.module_utils.shell import Problem

_PROJECT = "COMPOSE_PROJECT_NAME"
# How long Compose may take to end once it was told to; seconds.
_ENDING = 15


def command(directory: str, project: str, *, always: bool) -> List[str]:
    """Return the call of Compose, in options that 2.18 has."""
    argv = [
        "docker",
        "compose",
        "--ansi",
        "never",
        "--project-name",
        project,
        "--project-directory",
        directory,
    ]
    argv += ["--file", os.path.join(directory, compose.COMPOSE_FILE)]
    argv += ["--env-file", os.path.join(directory, compose.ENV_FILE)]
    argv += ["up", "--detach", "--no-color", "--quiet-pull", "--pull", "never"]
    return [*argv, "--force-recreate"] if always else argv


def compose_up(directory: str, project: str, *, always: bool, timeout: int) -> None:
    """Run Compose; Problem, with its own message, where it fails."""
    # timeout(1) also ends the plugin that docker starts, which would go on without the lock.
    argv = ["timeout", "--kill-after={0}".format(_ENDING), str(timeout)]
    argv += command(directory, project, always=always)
    output = shell.run(argv, env=compose.environment(), timeout=timeout + 2 * _ENDING)
    if output.code in (None, 124, 137):
        raise Problem(
            "Docker Compose did not bring the server of {0} up within {1} s, and was stopped. Check the Docker service "
            "(`systemctl status docker`, `journalctl -u docker`), and run the play again. Its output: {2}".format(
                directory, timeout, output.err or "none"
            )
        )
    if output.code != 0:
        raise Problem(
            "Docker Compose could not bring the server of {0} up. It reported: {1}".format(
                directory,
                output.err or output.out.strip() or "nothing, with exit code {0}".format(output.code),
            )
        )


def state(containers: List[removal.Container]) -> List[Tuple[str, str]]:
    """Return what tells one start of the server from another."""
    return [(one.id, one.started_at) for one in containers]


def bring_up(module: AnsibleModule) -> Tuple[bool, str]:
    """Bring the server up; return whether anything changed, and the container's id."""
    params = module.params
    directory, projects = params["project_dir"], params["projects"]
    before = removal.find()
    removal.check_owner(before, projects, directory)
    env = server.installed_files(directory)[1].after
    project = dotenv.values(env).get(_PROJECT) or projects[0]
    earlier = [one for one in before if one.project != project or not one.composed]
    if module.check_mode:
        return False, ""
    if earlier:
        removal.remove(earlier)
    grace = max([one.stop_timeout for one in before] or [0])
    compose_up(directory, project, always=params["recreate"] == "always", timeout=params["timeout"] + grace)
    after = removal.find()
    if not after:
        raise Problem(
            "Docker Compose reported success, but there is no container vllm-server: another program has removed it. "
            "Run the play again."
        )
    return state(after) != state(before), after[0].id


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "project_dir": {"type": "path", "required": True},
            "projects": {"type": "list", "elements": "str", "required": True},
            "recreate": {"type": "str", "choices": ["auto", "always"], "default": "auto"},
            "timeout": {"type": "int", "default": 300},
            "lock": {"type": "str"},
        },
        supports_check_mode=True,
    )
    try:
        with lock.holding(None if module.check_mode else module.params["lock"]):
            changed, container = bring_up(module)
    except Problem as problem:
        # Compose quotes what it can't use, and a program in the container may print anything.
        module.fail_json(msg=server.message(problem, module.params["project_dir"]))
    module.exit_json(changed=changed, container=container)


if __name__ == "__main__":
    main()
