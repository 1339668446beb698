# SPDX-License-Identifier: MIT
"""The filter mlops.vllm_gpu.waves."""

from __future__ import annotations

DOCUMENTATION = r"""
name: waves
short_description: Check the sizes of the waves of a rollout
description:
  - Fails for a size that Ansible would take for all hosts at once.
author: vllm_gpu maintainers (@mlops)
version_added: 0.3.0
options:
  _input:
    description: Whole numbers and percentages.
    type: list
    required: true
"""

EXAMPLES = r"""
- name: Roll out
  hosts: vllm_gpu
  serial: "{{ [1, '10%', '100%'] | mlops.vllm_gpu.waves }}"
"""

RETURN = r"""
_value:
  description: The same list.
  type: list
"""

import json
import re
from collections.abc import Callable, Sequence

from ansible.errors import AnsibleFilterError

# Ansible takes 0, and what is below it, for all hosts at once.
_WAVE = re.compile(r"[1-9][0-9]{0,5}|([1-9][0-9]?|100)%")


def is_wave(size: object) -> bool:
    """Return whether Ansible takes it for the size of a wave as it is meant."""
    return bool(_WAVE.fullmatch(str(size)))


def waves(sizes: object) -> Sequence[object]:
    """Return the sizes as they are, if each is one."""
    if not isinstance(sizes, str) and isinstance(sizes, Sequence) and sizes and all(map(is_wave, sizes)):
        return sizes
    raise AnsibleFilterError(
        f"vllm_gpu_waves is {json.dumps(sizes)}, but has to be a list of whole numbers from 1 to 999999 and of "
        "percentages from 1% to 100%, such as [1, '10%', '50%']. No host was touched."
    )


class FilterModule:
    """Ansible's way to name a filter."""

    def filters(self) -> dict[str, Callable[..., Sequence[object]]]:
        """Return the filter by its name."""
        return {"waves": waves}
