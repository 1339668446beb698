# SPDX-License-Identifier: MIT
"""The lookup mlops.vllm_gpu.serving_hosts."""

from __future__ import annotations

DOCUMENTATION = r"""
name: serving_hosts
short_description: Return the hosts of a play, and fail where there are none
description:
  - To Ansible, a play over no host is a success, so a cron job with a wrong inventory would never fail.
  - Also warns about settings that are exported on the controller, where they have no effect.
author: vllm_gpu maintainers (@mlops)
version_added: 0.2.0
options:
  _terms:
    description: The pattern of the play.
    type: str
    required: true
"""

EXAMPLES = r"""
- name: Serve
  hosts: "{{ lookup('mlops.vllm_gpu.serving_hosts', vllm_gpu_hosts | default('vllm_gpu')) }}"
"""

RETURN = r"""
_raw:
  description: The pattern, as it was given.
  type: list
  elements: str
"""

import os
import re
from pathlib import Path
from typing import Any

from ansible import context
from ansible.errors import AnsibleError
from ansible.inventory.manager import InventoryManager
from ansible.parsing.dataloader import DataLoader
from ansible.plugins.lookup import LookupBase
from ansible.utils.display import Display

display = Display()

# Settings for Compose without Ansible; on the controller they have no effect.
_SETTINGS = re.compile(r"(GPU_DEVICE_ID|VLLM_\w+|HF_CACHE)\Z")


class LookupModule(LookupBase):  # type: ignore[misc]
    """Ansible's way to name a lookup."""

    def run(self, terms: list[str], variables: dict[str, Any] | None = None, **_options: object) -> list[str]:
        """Return the pattern, if a host of the inventory matches it within --limit."""
        (pattern,) = terms
        variables = variables or {}
        manager = InventoryManager(loader=DataLoader(), sources=[], parse=False)
        for group, hosts in (variables.get("groups") or {}).items():
            manager.add_group(group)
            for host in hosts:
                manager.add_host(host, group=group)
        sources = ", ".join(map(_shown, variables.get("ansible_inventory_sources") or [])) or "none"
        limit = variables.get("ansible_limit")
        if context.CLIARGS.get("syntax"):  # also by ansible-lint, without an inventory
            return terms
        if not manager.get_hosts(pattern):
            raise AnsibleError(
                f"No host is in the group {pattern} of the inventory that was read ({sources}), so nothing was "
                f"done. Name the right inventory with -i, or add the hosts to the group {pattern}."
            )
        if limit:
            manager.subset(limit)
            if not manager.get_hosts(pattern):
                raise AnsibleError(
                    f"--limit {limit} leaves no host of the group {pattern} (inventory: {sources}), so nothing was done."
                )
        exported = without_effect()
        if exported:
            display.warning(exported)
        return terms


def without_effect() -> str:
    """Return a warning about exported settings, or an empty text."""
    exported = sorted(filter(_SETTINGS.match, os.environ))
    if not exported:
        return ""
    return (
        f"{', '.join(exported)} is exported here and has no effect: a play takes its settings from the "
        "inventory and from -e, such as -e gpu_device_id=1."
    )


def _shown(source: object) -> str:
    """Return an inventory relative to the current directory."""
    text = str(source)
    here = f"{Path.cwd()}/"
    return text.removeprefix(here)
