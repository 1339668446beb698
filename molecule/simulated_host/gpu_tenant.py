#!/usr/bin/python3 -I
"""Another user's program on a card, which holds memory of it until it is stopped."""

from __future__ import annotations

import argparse
import signal
import sys

sys.path.insert(0, "/usr/local/lib/simulated-gpu")

import simulated_gpu as gpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--card", required=True, help="index, UUID or PCI bus id")
    parser.add_argument("--mib", required=True, type=int)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        gpu.allocate(gpu.find_card(options.card), options.mib)
    except gpu.UnknownCardError:
        sys.exit(f"this host has no card {options.card}")
    except gpu.OutOfMemoryError:
        sys.exit(f"card {options.card} has less than {options.mib} MiB free")
    print("holding", flush=True)
    while True:
        signal.pause()


if __name__ == "__main__":
    main()
