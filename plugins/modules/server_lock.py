#!/usr/bin/python
# SPDX-License-Identifier: MIT
"""Ansible module: let one play at a time change the service of a host."""

from __future__ import annotations

DOCUMENTATION = r"""
module: server_lock
short_description: Let one play at a time change the vLLM service of a host
description:
  - Takes or gives back the host's lock. A play that holds it renews it with every look at the host.
  - Where another play holds it and is alive, fails at once. Where that play was killed, its lock runs out
    within minutes (90 s and the container's grace period at most), and this one waits for that.
author: vllm_gpu maintainers (@mlops)
version_added: 0.1.0
options:
  state:
    description: Whether to take the lock or to give it back.
    type: str
    choices: [held, released]
    required: true
  run:
    description: The play that gives the lock back, as it was named when it took it.
    type: str
  who:
    description: Whom to name to others who want the lock.
    type: str
    default: another play
attributes:
  check_mode:
    description: Takes nothing.
    support: full
"""

EXAMPLES = r"""
- name: Let no other play change this server meanwhile
  mlops.vllm_gpu.server_lock:
    state: held
  register: __vllm_gpu_lock
"""

RETURN = r"""
run:
  description: What names the play that holds the lock.
  returned: always
  type: str
held_by:
  description: Who holds the lock.
  returned: when another play does, and goes on
  type: str
waited:
  description: Seconds waited for the lock of a play that was killed.
  returned: always
  type: int
"""

import time
import uuid
from typing import Set, Tuple

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.mlops.vllm_gpu.plugins.module_utils import container, lock
from ansible_collections.mlops.vllm_gpu.plugins.module_utils.shell import Problem

# After how many renewals the holder counts as alive.
_ALIVE = 2


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["held", "released"], "required": True},
            "run": {"type": "str"},
            "who": {"type": "str", "default": "another play"},
        },
        required_if=[("state", "released", ["run"])],
        supports_check_mode=True,
    )
    params = module.params
    run = params["run"] or uuid.uuid4().hex
    if module.check_mode:
        module.exit_json(changed=False, run=run, waited=0)
    if params["state"] == "released":
        lock.release(run)
        module.exit_json(changed=False, run=run, waited=0)
    try:
        found = container.inspect()
        grace = container.describe(found)["stop_timeout"] if found else 0
    except Problem as problem:
        module.fail_json(msg=str(problem), run=run)
    started = time.monotonic()
    # One more renewal may still come from a play that was killed: its last
    # step on the host runs to its end.
    seen: Set[Tuple[str, float]] = set()
    while True:
        try:
            lease = lock.take(run, params["who"], grace)
        except OSError as error:
            cure = "Mend that, and run the play again."
            if isinstance(error, PermissionError):
                cure = "The play must be root on this host: add -K for sudo's password, or log in as root."
            module.fail_json(
                run=run, msg="{0} can't be written: {1}. {2}".format(lock.PATH, error.strerror, cure)
            )
        if lease is None:
            break
        seen.add((str(lease["run"]), float(lease["renewed"])))
        if len(seen) > _ALIVE:
            module.fail_json(
                run=run,
                held_by=lease["who"],
                msg="{0} is changing this server right now. Run this play again when that one has "
                "ended.".format(lease["who"]),
            )
        time.sleep(0.5)
    module.exit_json(changed=False, run=run, waited=round(time.monotonic() - started))


if __name__ == "__main__":
    main()
