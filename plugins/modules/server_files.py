#!/usr/bin/python
# SPDX-License-Identifier: MIT
"""Ansible module: write the compose file, `.env` and the referee of the service."""

from __future__ import annotations

DOCUMENTATION = r"""
module: server_files
short_description: Write the compose file, .env and the referee of the vLLM service
description:
  - Internal to the role P(mlops.vllm_gpu.vllm_gpu#role); any release may change it.
  - Writes the three files of the service where they differ, each one completely or not at all.
  - Removes what killed plays left in the directory.
  - An existing C(.env) keeps every byte but the keys that the role sets.
  - No secret shows in the result or in the diff.
extends_documentation_fragment:
  - mlops.vllm_gpu.server.wanted
  - mlops.vllm_gpu.server.lock
author: vllm_gpu maintainers (@mlops)
version_added: 0.1.0
attributes:
  check_mode: {support: full, description: Writes nothing and returns what it would write.}
  diff_mode: {support: full, description: "Shows the changes; of C(.env) only the keys that the role sets, with secrets hidden."}
"""

EXAMPLES = r"""
- name: Write the compose file, .env and the referee
  mlops.vllm_gpu.server_files:
    wanted: "{{ __vllm_gpu_wanted }}"
"""

RETURN = r"""
written: {returned: always, type: list, elements: str, description: "Files that were written, or would be in check mode."}
removed:
  description: Leftovers of killed plays that were removed, or would be in check mode.
  returned: always
  type: list
  elements: str
"""

import contextlib
import os
import re
from typing import Any, Mapping, Sequence

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.mlops.vllm_gpu.plugins.module_utils import (
    atomic,
    container,
    dotenv,
    files,
    leftovers,
    lock,
    outgoing,
    paths,
    settings,
    snapshot,
)
from ansible_collections.mlops.vllm_gpu.plugins.module_utils.module import WANTED_OPTIONS, failing, invocation
from ansible_collections.mlops.vllm_gpu.plugins.module_utils.shell import Problem


def shown(change: files.FileChange, content: bytes, wanted: Mapping[str, Any]) -> str:
    """Return what a diff may show of `content`: of `.env` all keys, but only the values that the role sets."""
    if change.path.endswith("/" + paths.REFEREE):
        return f"(the referee, {len(content.splitlines())} lines)\n"
    if not change.path.endswith("/" + paths.ENV_FILE):
        return content.decode("utf-8", "replace")
    text = ""
    for line in dotenv.lines(content):
        if line.key in wanted["env"] or line.key in wanted["server_env"]:
            text += line.text.decode("utf-8", "replace") + "\n"
        elif line.key:
            text += line.key + "=(hidden)\n"
    return text


def secrets_of(changes: Sequence[files.FileChange], wanted: Mapping[str, Any]) -> set[str]:
    """Return what no diff may show, which may also be in the compose file itself."""
    found = outgoing.known(wanted["project_dir"], settings.secrets(wanted))
    found.update(outgoing.secret_values(wanted["server_env"]))
    with contextlib.suppress(Problem):
        found.update(outgoing.secret_values(container.environment(container.inspect())))
    for change in changes:
        if not change.path.endswith(paths.COMPOSE_FILE):
            continue
        text = (change.before or b"").decode("utf-8", "replace")
        pairs = re.findall(r"^[ \t-]*(\w+)[:=][ \t]*(.*?)[ \t\r]*$", text, re.MULTILINE)
        found.update(
            outgoing.secret_values({key: value.strip("'\"") for key, value in pairs if "${" not in value})
        )
    return found


def diff(change: files.FileChange, wanted: Mapping[str, Any], secrets: set[str]) -> dict[str, str]:
    """Return Ansible's diff structure for one file."""
    return {
        "before_header": change.path,
        "after_header": change.path,
        "before": ""
        if change.before is None
        else outgoing.clean(shown(change, change.before, wanted), secrets),
        "after": outgoing.clean(shown(change, change.after, wanted), secrets),
    }


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "wanted": {"type": "dict", "required": True, "options": WANTED_OPTIONS},
            "lock": {"type": "str"},
        },
        supports_check_mode=True,
    )
    wanted = module.params["wanted"]
    directory = wanted["project_dir"]
    with failing(module, directory), lock.holding(None if module.check_mode else module.params["lock"]):
        changes = [change for change in files.compare(wanted) if change.differs]
        found = leftovers.leftovers(directory)
        if not module.check_mode:
            os.makedirs(directory, mode=0o755, exist_ok=True)
            leftovers.remove(found)
            snapshot.note_written(directory, {change.path: change.after for change in changes})
            # The referee first: it marks the directory as the role's.
            for change in reversed(changes):
                atomic.write(change.path, change.after, change.mode)
    module.exit_json(
        changed=bool(changes or found),
        written=[change.path for change in changes],
        removed=found,
        diff=[diff(change, wanted, secrets_of(changes, wanted)) for change in changes],
        invocation=invocation(module.params),
    )


if __name__ == "__main__":
    main()
