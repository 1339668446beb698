# SPDX-License-Identifier: MIT
"""Names of the files in the service's directory."""

from __future__ import annotations

COMPOSE_FILE = "docker-compose.serving.yml"
ENV_FILE = ".env"
REFEREE = "check_gpu_allocation.sh"
# The directory of the proven states (record.py); in it, the snapshot of a change that hasn't ended (snapshot.py).
PROVEN = ".proven"
BEFORE = "before.json"
# Links to the proven states in that directory.
LINKS = ("current", "previous")
