# SPDX-License-Identifier: MIT
"""The filter mlops.vllm_gpu.visible."""

from __future__ import annotations

DOCUMENTATION = r"""
name: visible
short_description: Escape the control characters of a text
description:
  - Makes a text that another program wrote safe for a terminal. Line breaks and tabs stay.
author: vllm_gpu maintainers (@mlops)
version_added: 0.2.0
options:
  _input:
    description: The text.
    type: str
    required: true
"""

EXAMPLES = r"""
- name: Show what the registry answered
  ansible.builtin.debug:
    msg: "{{ pulled.stderr | mlops.vllm_gpu.visible }}"
"""

RETURN = r"""
_value:
  description: The same text, an escape character in it as C(\\x1b).
  type: str
"""

from collections.abc import Callable

from ansible_collections.mlops.vllm_gpu.plugins.module_utils import outgoing


class FilterModule:
    """Ansible's way to name a filter."""

    def filters(self) -> dict[str, Callable[[str], str]]:
        """Return the filter by its name."""
        return {"visible": lambda text: outgoing.visible(str(text))}
