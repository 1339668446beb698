#!/usr/bin/python
# SPDX-License-Identifier: MIT
"""Ansible module: let one play at a time change the service of a host."""

from __future__ import annotations

DOCUMENTATION = r"""
module: server_lock
short_description: Let one play at a time change the vLLM service of a host
description:
  - Internal to the role P(mlops.vllm_gpu.vllm_gpu#role); any release may change it.
  - Takes or releases the host's lock. A play that holds it renews it with every read of the host.
  - Fails where another play holds it and renews it. Waits where that play was killed; its lock expires 90 s after
    its last step on the host at the latest.
author: vllm_gpu maintainers (@mlops)
version_added: 0.1.0
options:
  state: {type: str, choices: [held, released], required: true, description: Whether to take or to release the lock.}
  run: {type: str, description: "The play that releases the lock, or takes it again, as RV(run) named it."}
  again:
    description: Take it only if no other play has had it since O(run), as restoring would overwrite that play's server.
    type: bool
    default: false
  who: {type: str, default: another play, description: The name that other plays see.}
attributes:
  check_mode: {support: full, description: Takes nothing.}
"""

EXAMPLES = r"""
- name: Take the host's lock
  mlops.vllm_gpu.server_lock:
    state: held
  register: __vllm_gpu_lock
"""

RETURN = r"""
run: {returned: always, type: str, description: The name of the play that holds the lock.}
held_by: {returned: "when another play does, or has had it since", type: str, description: Who holds the lock.}
waited: {returned: always, type: int, description: Seconds waited for the lock of a play that was killed.}
"""

import time
import uuid

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.mlops.vllm_gpu.plugins.module_utils import lock

# After more renewals than this, the holder counts as alive: the last step of a killed play may end in one.
_ALIVE = 2
# How long a single step of another play may take, with its container's grace period; seconds.
_LONGEST_STEP = 1200


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["held", "released"], "required": True},
            "run": {"type": "str"},
            "who": {"type": "str", "default": "another play"},
            "again": {"type": "bool", "default": False},
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
    started = time.monotonic()
    seen: set[tuple[str, float]] = set()
    while True:
        try:
            lease = lock.take(run, params["who"], again=params["again"])
        except OSError as error:
            cure = "Correct that, and run the play again."
            if isinstance(error, PermissionError):
                cure = "The play must be root on this host: add -K for sudo's password, or log in as root."
            module.fail_json(run=run, msg=f"{lock.PATH} can't be written: {error.strerror}. {cure}")
        if lease is None:
            break
        who = lease.get("who", "another play")
        if params["again"] and lease.get("run") != run:
            module.fail_json(
                run=run, held_by=who, msg=f"{who} has taken this host's lock, because this play had stalled."
            )
        seen.add((str(lease.get("run")), float(lease.get("renewed", 0))))
        if len(seen) > _ALIVE:
            module.fail_json(
                run=run,
                held_by=who,
                msg=f"{who} is changing this server right now. Run this play again when that one has ended.",
            )
        if time.monotonic() - started > _LONGEST_STEP:
            module.fail_json(
                run=run,
                held_by=who,
                msg=(
                    f"{who} has held this host's lock for {_LONGEST_STEP} s in one step. `fuser -v {lock.PATH}` on "
                    "the host shows its process: end it if it is stuck, and run this play again."
                ),
            )
        time.sleep(0.5)
    module.exit_json(changed=False, run=run, waited=round(time.monotonic() - started))


if __name__ == "__main__":
    main()
