"""Light GPU hosts: hundreds on one machine, for rollouts, where molecule/simulated_host has a handful.

On a light host Ansible, the role, every module, the referee, the docker client and
Compose are the real ones; each host has its own /run (and lock, and docker.sock), /opt
(and compose file, .env, record), nvidia-smi, cards, port and API. Not real are:
  - the engine: one process answers the Docker Engine API of all hosts, in words
    recorded from a real one.
  - the container: it has no process, and no program runs in it but nvidia-smi. An image
    is pulled in no time; PIDs are none of this machine.
  - the card, the driver and the model: nvidia-smi shows which card the engine gave the
    container. The API knows /health and /v1/models only.
  - the network: a host is reached by a `local` connection, not by SSH, so that none can
    be unreachable, and there is no sudo.
  - the machine: hosts and controller share this one's processors, /etc, /tmp, /proc and
    Python. A clone in /opt or /run can't be used.

Hosts are mount namespaces: whoever isn't root needs a kernel that lets users make them.
`python3 -m tests.light_fleet --help` says what can be done with them.
"""

from __future__ import annotations

import sys
from pathlib import Path

# What is shared with the hosts that have an engine of their own.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "molecule/simulated_host"))
