# SPDX-License-Identifier: MIT
"""Documentation of the action plugin of the same name, which does the work."""

from __future__ import annotations

DOCUMENTATION = r"""
module: wait_for_server
short_description: Wait until a starting vLLM server is proven, has died, or takes too long
description:
  - Internal to the role P(mlops.vllm_gpu.vllm_gpu#role); any release may change it.
  - Reads the host repeatedly with M(mlops.vllm_gpu.server_info) until the wanted server runs on the wanted GPU and no
    other, and its API answers.
  - Waits while a model loads, and shows what it is waiting for and for how long. Also waits up to a minute for a
    connection or a Docker Engine that is lost, as during a restart.
  - Fails at once, with the last lines of the log, when the container dies or is on another GPU. Only a container that
    worked before may be restarted by its restart policy, once.
extends_documentation_fragment:
  - mlops.vllm_gpu.server.read
  - mlops.vllm_gpu.server.wanted
  - mlops.vllm_gpu.server.lock
author: vllm_gpu maintainers (@mlops)
version_added: 0.1.0
options:
  before: {type: dict, description: The container before the server was brought up; its old restarts don't count.}
  timeout: {type: int, default: 1800, description: "How long a start may take, in seconds."}
  interval: {type: int, default: 2, description: Seconds between two reads.}
attributes:
  action: {support: full, description: Runs on the controller and calls M(mlops.vllm_gpu.server_info) on the host.}
  check_mode: {support: none, description: "Skipped, as nothing was started."}
"""

EXAMPLES = r"""
- name: Wait until the server is proven
  mlops.vllm_gpu.wait_for_server:
    gpu_device_id: "1"
    wanted: "{{ __vllm_gpu_wanted }}"
  register: __vllm_gpu_state
"""

RETURN = r"""
elapsed: {returned: always, type: int, description: Seconds waited.}
proven: {returned: success, type: bool, description: "True, with all else that M(mlops.vllm_gpu.server_info) returns."}
"""
