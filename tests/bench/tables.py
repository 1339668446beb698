"""The output of the benchmarks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path


def print_row(*cells: str) -> None:
    """Print a line of a Markdown table."""
    print("|", " | ".join(cells), "|", flush=True)


def machine() -> str:
    """Describe the machine and the programs of the measurement."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    total = re.search(r"MemTotal: +(\d+)", Path("/proc/meminfo").read_text(encoding="utf-8"))
    ansible = subprocess.run(
        [Path(sys.executable).parent / "ansible", "--version"], capture_output=True, text=True, check=True
    )
    return (
        f"{os.cpu_count()} processors ({model[1] if model else '?'}), {int(total[1]) >> 20 if total else '?'} GiB, "
        f"{ansible.stdout.splitlines()[0]}, Python {sys.version.split()[0]}"
    )
