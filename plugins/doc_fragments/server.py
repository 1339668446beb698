# SPDX-License-Identifier: MIT
"""The options that modules share."""

from __future__ import annotations


class ModuleDocFragment:
    """Ansible's way to name documentation that is used by several plugins."""

    WANTED = r"""
options:
  wanted:
    description: What the host should have; C(roles/vllm_gpu/vars/main/wanted.yml) puts it together.
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
        description: Content that a C(.env) starts from where the host has none.
        type: str
        required: true
      env:
        description: Keys and values of C(.env) that the role decides.
        type: dict
        required: true
      extra_args:
        description: More arguments of vLLM, as a list of words or one text.
        type: raw
        default: []
      server_env:
        description: More environment variables of the server.
        type: dict
        default: {}
      secrets:
        description: Keys and values of C(.env) that may never be shown.
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
    description:
      - The play that holds the host's lock, as M(mlops.vllm_gpu.server_lock) named it.
      - A step renews the lock, and fails where another play has taken it.
    type: str
"""

    READ = r"""
options:
  gpu_device_id:
    description:
      - Index, UUID or PCI bus id of the GPU, or UUID of the MIG instance, that the server must be on.
      - When left out, the one that the server's container itself requested.
    type: str
  as_installed:
    description:
      - Judge the server by the files that the host has, instead of comparing them with O(wanted).
    type: bool
    default: false
  as_running:
    description:
      - Judge the server by what its own container was made from, whatever the files say.
    type: bool
    default: false
  force:
    description: Checks to leave out.
    type: list
    elements: str
    choices: [drift, exposure, irreversible, mig, training]
    default: []
"""
