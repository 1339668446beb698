# SPDX-License-Identifier: MIT
"""Documentation of the action plugin of the same name, which does the work."""

from __future__ import annotations

DOCUMENTATION = r"""
module: wait_for_server
short_description: Follow a starting vLLM server until it is proven, dead, or out of time
description:
  - Internal to the role P(mlops.vllm_gpu.vllm_gpu#role); any release may change it.
  - Looks at the host again and again with M(mlops.vllm_gpu.server_info) until the wanted server
    runs on the wanted GPU and no other, and its API answers.
  - Goes on while a model loads, and shows what it is waiting for and for how long. A connection or a Docker Engine
    that is away for up to a minute, as during a restart, is waited for, too.
  - Ends at once, with the last lines of its log, when the container dies or is on another GPU. Only one that was
    there and well before may be brought back by its restart policy, once.
extends_documentation_fragment:
  - mlops.vllm_gpu.server.read
  - mlops.vllm_gpu.server.wanted
  - mlops.vllm_gpu.server.lock
author: vllm_gpu maintainers (@mlops)
version_added: 0.1.0
options:
  before:
    description: >-
      The container as M(mlops.vllm_gpu.server_info) returned it before the server was brought up; its old restarts
      don't count.
    type: dict
  timeout:
    description: How long a start may take, in seconds.
    type: int
    default: 1800
  interval:
    description: Seconds between two looks.
    type: int
    default: 2
attributes:
  action:
    description: Runs on the controller and calls M(mlops.vllm_gpu.server_info) on the host.
    support: full
  check_mode:
    description: Skipped, as nothing was started.
    support: none
"""

EXAMPLES = r"""
- name: Wait until the server is proven
  mlops.vllm_gpu.wait_for_server:
    gpu_device_id: "1"
    wanted: "{{ __vllm_gpu_wanted }}"
  register: __vllm_gpu_state
"""

RETURN = r"""
elapsed:
  description: Seconds waited.
  returned: always
  type: int
proven:
  description: True; all else that M(mlops.vllm_gpu.server_info) returns comes with it.
  returned: success
  type: bool
"""
