# SPDX-License-Identifier: MIT
"""Filters for plays over several hosts; internal to this collection's playbooks and role."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

# Ansible reads 0 and negative numbers as all hosts at once.
_WAVE = re.compile(r"[1-9][0-9]{0,5}|([1-9][0-9]?|100)%")


def is_wave(size: object) -> bool:
    """Return whether Ansible reads it as the size of a wave."""
    return bool(_WAVE.fullmatch(str(size)))


def are_waves(sizes: object) -> bool:
    """Return whether it is a list of sizes of waves."""
    return (
        not isinstance(sizes, str)
        and isinstance(sizes, Sequence)
        and bool(sizes)
        and all(map(is_wave, sizes))
    )


def twins(hosts: Sequence[str], hostvars: Mapping[str, Any]) -> list[str]:
    """Return the hosts whose first GPU is also that of another host."""
    uuids = {host: hostvars[host]["__vllm_gpu_state"]["gpus"][0]["uuid"] for host in hosts}
    count = Counter(uuids.values())
    return [host for host in hosts if count[uuids[host]] > 1]


class Row(NamedTuple):
    """A host, and a sentence below it that explains its state."""

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
    """Return a text of at most `width` characters."""
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
        lines.append("ansible-playbook -i INVENTORY playbooks/verify.yml -l HOST   shows more.")
    return "\n".join(lines)


class FilterModule:
    """Ansible's way to name filters."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return the filters by their names."""
        return {"are_waves": are_waves, "twins": twins, "status_table": status_table}
