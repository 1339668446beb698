#!/usr/bin/python
# SPDX-License-Identifier: MIT
"""Ansible module: read a host's GPUs, files and vLLM server."""

from __future__ import annotations

DOCUMENTATION = r"""
module: server_info
short_description: Read a host's GPUs and vLLM server, and compare them with what is wanted
description:
  - Internal to the role P(mlops.vllm_gpu.vllm_gpu#role); any release may change it.
  - Reads the GPUs, the files of the service, its container and its API, compares them with what is wanted, and
    returns what would change. Writes nothing.
  - Runs the referee, C(check_gpu_allocation.sh), which alone judges which GPUs the server is on.
extends_documentation_fragment:
  - mlops.vllm_gpu.server.read
  - mlops.vllm_gpu.server.wanted
  - mlops.vllm_gpu.server.lock
author: vllm_gpu maintainers (@mlops)
version_added: 0.1.0
options:
  as_previous:
    description: Judge by the files of the previous proven state, which playbooks/rollback.yml restores.
    type: bool
    default: false
  preflight:
    description: Where the server is not proven, also check all that a change needs; RV(problems) has the result.
    type: bool
    default: false
  training_gpus: {type: list, elements: str, default: [], description: Ids of the GPUs that are set aside for training.}
  waiting:
    description: Whether the play only waits and reads the host every few seconds, so that a short lease is enough.
    type: bool
    default: false
  log_lines: {type: int, default: 0, description: How many of the last lines of the container's log to return.}
attributes:
  check_mode: {support: full, description: "Only reads, in every mode."}
"""

EXAMPLES = r"""
- name: Read the host, its GPUs and its server
  mlops.vllm_gpu.server_info:
    gpu_device_id: "1"
    wanted: "{{ __vllm_gpu_wanted }}"
  register: __vllm_gpu_state
"""

RETURN = r"""
problems: {returned: always, type: list, elements: str, description: "Reasons not to change anything, each with its fix."}
gpus: {returned: always, type: list, elements: dict, description: "The host's GPUs, as the referee reads them."}
gpu: {returned: always, type: dict, description: The GPU that C(gpu_device_id) names.}
gpu_device_id:
  description: Its index or UUID; null where C(gpu_device_id) was not given or is refused.
  returned: always
  type: str
changes: {returned: always, type: list, elements: str, description: "What would change, as short sentences."}
files_differ: {returned: always, type: bool, description: Whether a file of the service differs.}
recreate: {returned: always, type: bool, description: Whether the container differs.}
action:
  description: What brings the server up (create, recreate, move, replace, wait or nothing).
  returned: always
  type: str
image: {returned: always, type: str, description: The image that the server runs from.}
image_present: {returned: always, type: bool, description: Whether the Docker Engine has that image.}
container:
  description: The server's container, without its environment; null where there is none.
  returned: always
  type: dict
referee: {returned: always, type: dict, description: The referee's verdict.}
api: {returned: always, type: dict, description: "The API's address, its models, and what is wrong with it (C(error))."}
last_proven: {returned: always, type: dict, description: "The record of the last proven state, or null."}
recorded: {returned: always, type: bool, description: Whether that is what runs now.}
proof: {returned: always, type: dict, description: "What is proven now, for M(mlops.vllm_gpu.server_record)."}
doubts: {returned: always, type: list, elements: str, description: "Reasons why the server is not proven, the most basic first."}
notes: {returned: always, type: list, elements: str, description: What the operator should know besides.}
unanswered: {returned: always, type: bool, description: "Whether the Docker Engine did not answer, as during its restart."}
serving: {returned: always, type: bool, description: Whether the running server answers where its own settings say.}
project: {returned: always, type: str, description: The Compose project that the wanted server belongs to.}
proven:
  description: Whether the wanted server runs, on the wanted GPU and no other, and answers.
  returned: always
  type: bool
log: {returned: always, type: list, elements: str, description: The last lines of the container's log.}
"""

from typing import Any, Mapping

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.mlops.vllm_gpu.plugins.module_utils import (
    container,
    lock,
    outgoing,
    server,
    settings,
)
from ansible_collections.mlops.vllm_gpu.plugins.module_utils.module import WANTED_OPTIONS, invocation

# The longest line that is returned; characters.
_LINE = 2000
# What programs and people have written. The rest is ids and figures that the role uses.
_FOREIGN = ("problems", "doubts", "notes", "changes", "log", "api", "referee")


def shown(state: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state without secrets and control characters."""
    secrets = outgoing.known(wanted["project_dir"], settings.secrets(wanted)) | state["secrets"]
    result = {key: outgoing.clean(value) for key, value in state.items() if key != "secrets"}
    result.update({key: outgoing.clean(state[key], secrets) for key in _FOREIGN})
    # After hiding secrets: half of one could be left.
    result["log"] = [line[:_LINE] for line in result["log"]]
    result["api"]["error"] = result["api"]["error"] and result["api"]["error"][:_LINE]
    if result["container"]:
        texts = {key: outgoing.clean(state["container"][key], secrets) for key in ("error", "health_output")}
        result["container"] = dict(result["container"], **texts)
    return result


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "gpu_device_id": {"type": "str"},
            "as_installed": {"type": "bool", "default": False},
            "as_previous": {"type": "bool", "default": False},
            "as_running": {"type": "bool", "default": False},
            "preflight": {"type": "bool", "default": False},
            "force": {"type": "list", "elements": "str", "choices": [*settings.FORCE], "default": []},
            "training_gpus": {"type": "list", "elements": "str", "default": []},
            "lock": {"type": "str"},
            "waiting": {"type": "bool", "default": False},
            "log_lines": {"type": "int", "default": 0},
            "wanted": {"type": "dict", "required": True, "options": WANTED_OPTIONS},
        },
        mutually_exclusive=[("as_installed", "as_previous", "as_running")],
        supports_check_mode=True,
    )
    params = module.params
    options = {
        key: params[key]
        for key in ("as_installed", "as_previous", "as_running", "preflight", "force", "training_gpus")
    }
    state = server.read(params["gpu_device_id"], params["wanted"], **options)
    grace = (state["container"] or {}).get("stop_timeout", 0)
    lease = lock.WAITING_LEASE if params["waiting"] else lock.LEASE + grace
    if params["lock"] and not lock.renew(params["lock"], lease):
        module.fail_json(msg=lock.why_lost(params["lock"]))
    lines = params["log_lines"]
    state["log"] = container.log_tail(lines) if lines and state["container"] else []
    module.exit_json(changed=False, invocation=invocation(params), **shown(state, params["wanted"]))


if __name__ == "__main__":
    main()
