# SPDX-License-Identifier: MIT
"""The lookup mlops.vllm_gpu.unknown_variables."""

from __future__ import annotations

DOCUMENTATION = r"""
name: unknown_variables
short_description: Find variables that look like the role's and are not
description: Ansible ignores misspelt variables, so the server could go to the wrong GPU. Internal to the role.
author: vllm_gpu maintainers (@mlops)
version_added: 0.2.0
options: {}
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ansible.module_utils.common.yaml import yaml_load
from ansible.plugins.lookup import LookupBase

_SPECS = Path(__file__).resolve().parents[2] / "roles/vllm_gpu/meta/argument_specs.yml"
_OF_PLAYBOOKS = {
    *("vllm_gpu_waves", "vllm_gpu_stop_file", "vllm_gpu_rollout", "vllm_gpu_hosts"),
    *("vllm_gpu_acceptance_gpus", "vllm_gpu_acceptance_file", "vllm_gpu_acceptance_replace"),
}
# Besides vllm_gpu_*: spellings of gpu_device_id, and keys of .env.
_LIKE_OURS = re.compile(r"vllm_gpu_|(?i:gpu_?(id|device|device_?ids?)\Z)|(VLLM_[A-Z_]+|HF_CACHE|HF_TOKEN)\Z")


def unknown(variables: Mapping[str, Any]) -> Iterator[str]:
    """Yield a problem for each unknown variable, and for what is left of -e "KEY=a --b 1", split at each space."""
    specs = yaml_load(_SPECS.read_text(encoding="utf-8"))["argument_specs"]
    known = _OF_PLAYBOOKS | specs["main"]["options"].keys()
    for name in variables:
        if _LIKE_OURS.match(name) and name not in known:
            yield (
                f"{name} is not a variable of this role. Correct or remove it; `ansible-doc --type role "
                "mlops.vllm_gpu.vllm_gpu` lists them all."
            )
    for name in variables:
        if name == "_raw_params" or re.match("[^A-Za-z_]", name):
            given = f'"{variables[name]}"' if name == "_raw_params" else name
            yield (
                f"{given} was given with -e, but belongs to no variable: -e splits its text at each space. Write a value "
                """with spaces as JSON: -e '{"vllm_gpu_extra_args": ["--seed", "3"]}'"""
            )


class LookupModule(LookupBase):  # type: ignore[misc]
    """Ansible's way to name a lookup."""

    def run(
        self, _terms: list[str], variables: dict[str, Any] | None = None, **_options: object
    ) -> list[str]:
        """Return the problems of a host's variables."""
        return list(unknown(variables or {}))
