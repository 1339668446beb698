# SPDX-License-Identifier: MIT
"""The filter mlops.vllm_gpu.status_table."""

from __future__ import annotations

DOCUMENTATION = r"""
name: status_table
short_description: Show what serves where, as a table
description:
  - A line for each host, with its GPU, and below it why its server isn't proven.
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
- name: Show what serves where
  ansible.builtin.debug:
    msg: "{{ ansible_play_hosts_all | mlops.vllm_gpu.status_table(hostvars) }}"
  run_once: true
"""

RETURN = r"""
_value:
  description: The table.
  type: str
"""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple


class Row(NamedTuple):
    """A host, and below it a sentence that explains its state."""

    host: str
    gpu: str
    state: str
    serves: str
    why: str = ""


def row(host: str, state: Mapping[str, Any]) -> Row:
    """Return what the table shows of a host."""
    if state.get("unreachable"):
        return Row(host, "-", "unreachable", "see the error above")
    if "problems" not in state:
        return Row(host, "-", "NOT READ", "see the error above")
    if state["container"] is None and all("no server was set up" in problem for problem in state["problems"]):
        return Row(host, "-", "no server", "")
    gpu = "-"
    if state["gpu"]:
        gpu = f"{state['gpu']['index']} {shortened(str(state['gpu']['name']).replace('NVIDIA ', ''), 26)}"
    if state["proven"]:
        return Row(
            host, gpu, "proven", shortened(", ".join(state["api"]["models"]), 60), " ".join(state["notes"])
        )
    return Row(host, gpu, "NOT PROVEN", "", [*state["problems"], *state["doubts"]][0])


def shortened(text: str, width: int) -> str:
    """Return a text in at most so many characters."""
    return text if len(text) <= width else text[: width - 1] + "…"


def status_table(hosts: Sequence[str], hostvars: Mapping[str, Any]) -> str:
    """Return a table with a row for each host."""
    rows = [row(host, hostvars[host].get("__vllm_gpu_state", {})) for host in hosts]
    table = [Row("HOST", "GPU", "STATE", "SERVES"), *rows]
    host_width, gpu_width = (max(len(shown[column]) for shown in table) for column in (0, 1))
    lines = []
    for shown in table:
        line = f"{shown.host:{host_width}}  {shown.gpu:{gpu_width}}  {shown.state:11}  {shown.serves}"
        lines.append(line.rstrip())
        lines += textwrap.wrap(
            shown.why,
            70,
            initial_indent="    ",
            subsequent_indent="    ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    proven = sum(shown.state == "proven" for shown in rows)
    lines.append(f"{proven} of {len(rows)} hosts {'has' if proven == 1 else 'have'} a proven server.")
    if any(shown.why for shown in rows):
        lines.append("ansible-playbook -i INVENTORY playbooks/verify.yml -l HOST   says more.")
    return "\n".join(lines)


class FilterModule:
    """Ansible's way to name a filter."""

    def filters(self) -> dict[str, Callable[..., str]]:
        """Return the filter by its name."""
        return {"status_table": status_table}
