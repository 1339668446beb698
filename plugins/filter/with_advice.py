# SPDX-License-Identifier: MIT
"""The filter mlops.vllm_gpu.with_advice."""

from __future__ import annotations

DOCUMENTATION = r"""
name: with_advice
short_description: Add what to do to the Docker Engine's message about a GPU
description:
  - Leaves a message alone that quotes none of the engine's known ones.
author: vllm_gpu maintainers (@mlops)
version_added: 0.3.0
options:
  _input:
    description: A message.
    type: str
    required: true
"""

EXAMPLES = r"""
- name: Report why the server could not be started
  ansible.builtin.debug:
    msg: "{{ ansible_failed_result.msg | mlops.vllm_gpu.with_advice }}"
"""

RETURN = r"""
_value:
  description: The message, and below it what to do.
  type: str
"""

from collections.abc import Callable

from ansible_collections.mlops.vllm_gpu.plugins.module_utils import advice


class FilterModule:
    """Ansible's way to name a filter."""

    def filters(self) -> dict[str, Callable[..., str]]:
        """Return the filter by its name."""
        return {"with_advice": advice.with_advice}
