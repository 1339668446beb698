# SPDX-License-Identifier: MIT
"""The names of the files in the service's directory."""

from __future__ import annotations

COMPOSE_FILE = "docker-compose.serving.yml"
ENV_FILE = ".env"
REFEREE = "check_gpu_allocation.sh"
# The directory of what was proven (record.py), and in it, of a change that hasn't ended, how the host was before
# (snapshot.py).
PROVEN = ".proven"
BEFORE = "before.json"
# What is proven, as links in that directory.
LINKS = ("current", "previous")
