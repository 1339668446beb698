# SPDX-License-Identifier: MIT
"""The filter mlops.vllm_gpu.twins."""

from __future__ import annotations

DOCUMENTATION = r"""
name: twins
short_description: Find the hosts of an inventory that are one machine
description:
  - Compares the UUID of each host's first GPU.
author: vllm_gpu maintainers (@mlops)
version_added: 0.3.0
options:
  _input:
    description: Names of hosts.
    type: list
    elements: str
    required: true
  hostvars:
    description: The variables of all hosts, with what M(mlops.vllm_gpu.server_info) read as C(__vllm_gpu_state).
    type: dict
    required: true
"""

EXAMPLES = r"""
- name: Show the hosts that are one machine
  ansible.builtin.debug:
    msg: "{{ ansible_play_hosts | mlops.vllm_gpu.twins(hostvars) }}"
"""

RETURN = r"""
_value:
  description: The hosts that are not the only one of their machine.
  type: list
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def twins(hosts: Sequence[str], hostvars: Mapping[str, Any]) -> list[str]:
    """Return the hosts whose first GPU is also another one's."""
    machines = {host: hostvars[host]["__vllm_gpu_state"]["gpus"][0]["uuid"] for host in hosts}
    counted = Counter(machines.values())
    return [host for host in hosts if counted[machines[host]] > 1]


class FilterModule:
    """Ansible's way to name a filter."""

    def filters(self) -> dict[str, Callable[..., list[str]]]:
        """Return the filter by its name."""
        return {"twins": twins}
