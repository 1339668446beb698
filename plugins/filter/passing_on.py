# SPDX-License-Identifier: MIT
"""The filter mlops.vllm_gpu.passing_on."""

from __future__ import annotations

DOCUMENTATION = r"""
name: passing_on
short_description: Let a compose file pass more variables on to the server
description: Adds a line for each name that the file doesn't pass on yet. Internal to the role.
author: vllm_gpu maintainers (@mlops)
version_added: 0.2.0
options:
  _input: {description: The compose file., type: str, required: true}
  names: {description: Names of variables; their values are in C(.env)., type: list, elements: str, required: true}
"""

import re
from collections.abc import Callable, Iterable


def passing_on(compose_file: str, names: Iterable[str]) -> str:
    """Return the compose file with a line for each variable that it doesn't pass on yet."""
    line = "    environment:\n"
    block = re.split(r"^ {4}\w", compose_file.partition(line)[2], maxsplit=1, flags=re.MULTILINE)[0]
    known = re.findall(r"^ {6}(\w+):", block, re.MULTILINE)
    added = [f"      {name}:\n" for name in dict.fromkeys(names) if name not in known]
    return compose_file.replace(line, "".join([line, *added]), 1)


class FilterModule:
    """Ansible's way to name a filter."""

    def filters(self) -> dict[str, Callable[..., str]]:
        """Return the filter by its name."""
        return {"passing_on": passing_on}
