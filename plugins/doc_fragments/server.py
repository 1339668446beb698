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
      project_dir:
        description: Directory of the Compose project on the host.
        type: path
        required: true
      compose:
        description: Content of the compose file.
        type: str
        required: true
      referee:
        description: Content of the referee script.
        type: str
        required: true
      env_example:
        description: Content of a new C(.env), before the role's keys are set.
        type: str
        required: true
      env:
        description: Keys and values of C(.env) that the role sets.
        type: dict
        required: true
      extra_args:
        description: More arguments of vLLM, as a list or one text.
        type: raw
        default: []
      server_env:
        description: More environment variables of the server.
        type: dict
        default: {}
      secrets:
        description: Keys and values of C(.env) that must never be shown.
        type: dict
        default: {}
      secret_env:
        description: The same for environment variables of the server.
        type: dict
        default: {}
"""

    PROJECT_DIR = r"""
options:
  project_dir:
    description: Directory of the Compose project on the host.
    type: path
    required: true
"""

    LOCK = r"""
options:
  lock:
    description: The play that holds the host's lock, which this renews; fails where another play has taken it.
    type: str
"""

    READ = r"""
options:
  gpu_device_id:
    description:
      - Index, UUID or PCI bus id of the GPU, or UUID of the MIG instance, that the server must be on.
        By default the one that the server's container requested.
    type: str
  as_installed:
    description: Judge the server by the installed files instead of O(wanted).
    type: bool
    default: false
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
