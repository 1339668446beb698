# SPDX-License-Identifier: MIT
"""The lookup mlops.vllm_gpu.unknown_variables."""

from __future__ import annotations

DOCUMENTATION = r"""
name: unknown_variables
short_description: Find what looks like a setting of the role and is none
description: Ansible ignores a misspelt variable, and the server would go where nobody wants it. Internal to the role.
author: vllm_gpu maintainers (@mlops)
version_added: 0.2.0
options: {}
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from ansible.plugins.lookup import LookupBase

_SPECS = Path(__file__).resolve().parents[2] / "roles/vllm_gpu/meta/argument_specs.yml"
_OF_PLAYBOOKS = {
    *("vllm_gpu_waves", "vllm_gpu_stop_file", "vllm_gpu_rollout", "vllm_gpu_hosts"),
    *("vllm_gpu_acceptance_gpus", "vllm_gpu_acceptance_file", "vllm_gpu_acceptance_replace"),
}
# Also the names that env.example has.
_LIKE_OURS = re.compile(r"vllm_gpu_|(?i:gpu_?(id|device|device_?ids?)\Z)|(VLLM_[A-Z_]+|HF_CACHE|HF_TOKEN)\Z")


def unknown(variables: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is none of the role's variables, and what -e "KEY=a --b 1" leaves over: -e splits at each blank."""
    specs = yaml.safe_load(_SPECS.read_text(encoding="utf-8"))["argument_specs"]
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
                f"{given} was given with -e, but belongs to no variable: -e splits its text at each blank. Write a value "
                """with blanks as JSON: -e '{"vllm_gpu_extra_args": ["--seed", "3"]}'"""
            )


class LookupModule(LookupBase):  # type: ignore[misc]
    """Ansible's way to name a lookup."""

    def run(
        self, _terms: list[str], variables: dict[str, Any] | None = None, **_options: object
    ) -> list[str]:
        """Return what is unknown among the variables of a host."""
        return list(unknown(variables or {}))
