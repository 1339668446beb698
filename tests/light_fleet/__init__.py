"""Light GPU hosts: hundreds on one machine, where molecule/simulated_host has a handful.

On a light host Ansible, the role, every module, the referee, the Docker client and
Compose are the real ones; each host has its own /run (with lock and docker.sock), /opt
(with compose file, .env and record), nvidia-smi, cards, port and API. Simulated are:
  - Docker Engine: one process answers its API for all hosts, with texts recorded from
    a real one.
  - the container: it has no process, and nothing but nvidia-smi can be run in it. An
    image is pulled in no time; PIDs are none of this machine's.
  - the card, the driver and the model: nvidia-smi shows the card that the container
    was given. The API knows /health and /v1/models only.
  - the network: a host is reached by a `local` connection, not by SSH, so none can be
    unreachable, and there is no sudo.
  - the machine: hosts and controller share its processors, /etc, /tmp, /proc and
    Python. A clone in /opt or /run can't be used.

Hosts are mount namespaces; without root they need a kernel that lets users create them.
`python3 -m tests.light_fleet --help` lists the commands.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Shared with the hosts that have a real Docker Engine.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "molecule/simulated_host"))
