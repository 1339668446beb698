"""Install pip for ansible-test: the one that Python itself brings, not a script from the network."""

from __future__ import annotations

import ensurepip
import os
import runpy
import sys

ensurepip.bootstrap()
del os.environ["PIP_CONFIG_FILE"]  # ensurepip's, which would hide a proxy or a mirror
sys.argv = [
    "pip",
    "install",
    *(word for word in sys.argv[1:] if word not in ("--no-setuptools", "--no-wheel")),
]
runpy.run_module("pip", run_name="__main__", alter_sys=True)
