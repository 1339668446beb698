# SPDX-License-Identifier: MIT
"""Documentation of the options that modules share."""

from __future__ import annotations


class ModuleDocFragment:
    """Ansible's way to name documentation that is used by several plugins."""

    WANTED = r"""
options:
  wanted:
    description: What the host should have, from C(roles/vllm_gpu/vars/main/wanted.yml).
    type: dict
    required: true
    suboptions:
      project_dir: {type: path, required: true, description: Directory of the Compose project on the host.}
      compose: {type: str, required: true, description: Content of the compose file.}
      referee: {type: str, required: true, description: Content of the referee script.}
      env_example: {type: str, required: true, description: "Content of a new C(.env), before the role's keys are set."}
      env: {type: dict, required: true, description: Keys and values of C(.env) that the role sets.}
      extra_args: {type: raw, default: [], description: "More arguments of vLLM, as a list or one text."}
      server_env: {type: dict, default: {}, description: More environment variables of the server.}
      secrets: {type: dict, default: {}, description: Keys and values of C(.env) that must never be shown.}
      secret_env: {type: dict, default: {}, description: The same for environment variables of the server.}
"""

    PROJECT_DIR = r"""
options:
  project_dir: {type: path, required: true, description: Directory of the Compose project on the host.}
"""

    LOCK = r"""
options:
  lock: {type: str, description: "The play that holds the host's lock, which this renews; fails where another play has taken it."}
"""

    READ = r"""
options:
  gpu_device_id:
    description:
      - Index, UUID or PCI bus id of the GPU, or UUID of the MIG instance, that the server must be on.
        By default the one that the server's container requested.
    type: str
  as_installed: {type: bool, default: false, description: Judge the server by the installed files instead of O(wanted).}
  as_running:
    description: Judge the server by what its own container was created from, whatever the files contain.
    type: bool
    default: false
  force:
    description: Checks to skip.
    type: list
    elements: str
    choices: [drift, exposure, irreversible, mig, training]
    default: []
"""
