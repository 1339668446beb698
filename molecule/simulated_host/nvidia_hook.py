#!/usr/bin/python3 -I
"""The simulated nvidia-container-runtime-hook.

Docker runs it before a container's first process, with the container's OCI
state on standard input. Like NVIDIA's it reads NVIDIA_VISIBLE_DEVICES, which
Docker sets from the device request, mounts those cards and the driver's files
into the container, and refuses cards that don't exist.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

LIBRARY = "/usr/local/lib/simulated-gpu"
sys.path.insert(0, LIBRARY)

import simulated_gpu as gpu  # noqa: E402

# Runs in the container's mount namespace, before its root is changed.
MOUNT = """
root=$1
put() { # put SOURCE TARGET OPTIONS
  if [ -d "$1" ]; then mkdir -p "$root$2"; else mkdir -p "$root${2%/*}"; : >>"$root$2"; fi
  mount --bind "$1" "$root$2"
  [ "$3" = rw ] || mount -o "remount,bind,$3" "$root$2"
}
put "$2" "$2" ro
put "$3" "$3" ro
put "$3/nvidia_smi.py" /usr/bin/nvidia-smi ro
shift 3
while [ $# -gt 0 ]; do
  put "$1" "$2" rw
  shift 2
done
"""


def refuse(reason: str) -> NoReturn:
    """End as NVIDIA's legacy hook does; Docker shows this text."""
    print("Auto-detected mode as 'legacy'", file=sys.stderr)
    print(f"nvidia-container-cli: {reason}", file=sys.stderr)
    sys.exit(1)


def requested_cards(devices: str, cards: list[gpu.Card]) -> list[gpu.Card]:
    """Return the cards that NVIDIA_VISIBLE_DEVICES names."""
    if devices == "all":
        return cards
    requested: list[gpu.Card] = []
    for name in [] if devices == "none" else devices.split(","):
        match = [card for card in cards if name in (str(card.index), card.uuid)]
        if not match:
            refuse(f"device error: {name}: unknown device")
        requested += [card for card in match if card not in requested]
    return requested


def given_cards(requested: list[gpu.Card], cards: list[gpu.Card]) -> list[gpu.Card]:
    """Return the cards that the container gets: those requested, unless a fault decides otherwise."""
    fault = gpu.fault("runtime")
    if not fault or not requested:
        return requested
    if fault == "two":
        return [*requested, *[card for card in cards if card not in requested][:1]]
    return requested_cards(fault, cards)


def main() -> None:
    state = json.load(sys.stdin)
    config = json.loads((Path(state["bundle"]) / "config.json").read_text())
    environment = dict(entry.partition("=")[::2] for entry in config["process"].get("env", []))
    devices = environment.get("NVIDIA_VISIBLE_DEVICES", "")
    if devices in ("", "void"):
        return  # like NVIDIA's: no card, and no message
    if gpu.fault("driver") == "gone":
        refuse("initialization error: nvml error: driver not loaded")
    if gpu.fault("driver") == "mismatch":
        refuse("initialization error: nvml error: driver/library version mismatch")
    cards = gpu.visible_cards()
    given = given_cards(requested_cards(devices, cards), cards)
    nodes = [str(path) for card in given for path in (card.path.resolve(), f"/dev/nvidia{card.minor}")]
    enter = ["/usr/bin/nsenter", f"--mount=/proc/{state['pid']}/ns/mnt", "--", "/bin/sh", "-euc", MOUNT, "sh"]
    subprocess.run([*enter, config["root"]["path"], str(gpu.STATE), LIBRARY, *nodes], check=True)


if __name__ == "__main__":
    main()
