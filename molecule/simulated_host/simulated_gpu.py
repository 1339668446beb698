#!/usr/bin/python3 -I
"""The simulated cards, in place of a GPU host's driver.

A card is a file, and a process holds N MiB of its memory by POSIX locks on N MiB
of that file. So the kernel keeps the accounts: a lock ends with its process,
``/proc/locks`` lists the holders by the PIDs of the reader's own namespace, and a
card that is bind-mounted into a container is still the same card.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import re
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STATE = Path("/run/simulated-gpu")
DEVICES = Path("/dev")
LOCKS = Path("/proc/locks")
MIB = 1 << 20
# What the driver itself uses of a card that has any work, and what one process
# costs before it allocates anything (both as recorded on real cards).
DRIVER_MIB = 9
CONTEXT_MIB = 518
# struct flock: type, whence, start, length, pid; native alignment.
FLOCK = "hhqqi"


class OutOfMemoryError(Exception):
    """The card has less free memory than requested."""


class UnknownCardError(Exception):
    """No such card here."""


class LostCardError(Exception):
    """A device node that is no card, or no longer one."""


@dataclass(frozen=True)
class Card:
    """One card, as this process sees it."""

    index: int
    minor: int
    properties: dict[str, Any]
    path: Path

    @property
    def uuid(self) -> str:
        """The card's UUID, the same on the host and in a container."""
        return str(self.properties["uuid"])

    @property
    def bus_id(self) -> str:
        return str(self.properties["pci.bus_id"])

    @property
    def total_mib(self) -> int:
        return int(self.properties["memory.total"])

    @property
    def usable_mib(self) -> int:
        """What programs can have of it (CUDA's notion of the total)."""
        return self.total_mib - int(self.properties.get("memory.reserved", 0))

    @property
    def used_mib(self) -> int:
        """What all processes hold, in other containers too.

        Not for a process that holds memory of this card itself: closing the
        file would drop its locks.
        """
        with open_card(self.path) as fd:
            held = sum(end - start for start, end in locked(fd, 0, self.usable_mib * MIB))
        return held // MIB + DRIVER_MIB if held else 0

    def is_called(self, name: str) -> bool:
        return name in (str(self.index), self.uuid) or name.lower() == self.bus_id.lower()


@contextmanager
def open_card(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def locked(fd: int, start: int, end: int) -> list[tuple[int, int]]:
    """Return the ranges of start..end that other processes hold, in order."""
    if start >= end:
        return []
    query = struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, start, end - start, 0)
    kind, _, begin, length, _ = struct.unpack(FLOCK, fcntl.fcntl(fd, fcntl.F_GETLK, query))
    if kind == fcntl.F_UNLCK:
        return []
    # The kernel names any one holder: there may be others on both sides of it.
    begin, stop = max(begin, start), min(begin + length, end)
    return [*locked(fd, start, begin), (begin, stop), *locked(fd, stop, end)]


def allocate(card: Card, mib: int) -> int:
    """Take `mib` MiB of the card, until the returned file is closed or the process ends."""
    fd = os.open(card.path, os.O_RDWR | os.O_CLOEXEC)
    for _ in range(100):
        missing, at = mib * MIB, 0
        end = card.usable_mib * MIB
        try:
            for begin, stop in [*locked(fd, 0, end), (end, end)]:
                size = min(begin - at, missing)
                if size > 0:
                    fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, size, at)
                    missing -= size
                at = stop
        except BlockingIOError:
            # Another process was quicker.
            fcntl.lockf(fd, fcntl.LOCK_UN)
            time.sleep(0.005)
            continue
        if missing == 0:
            return fd
        break
    os.close(fd)
    raise OutOfMemoryError(card.uuid)


def processes(card: Card) -> dict[int, int]:
    """Return the MiB that each process holds, by PID, of those that this process can see."""
    status = card.path.stat()
    where = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    held: dict[int, int] = {}
    for line in LOCKS.read_text().splitlines():
        match = re.fullmatch(rf"\d+: POSIX +\S+ +WRITE +(\d+) {where} (\d+) (\d+)", line)
        if match:
            pid, start, end = map(int, match.groups())
            held[pid] = held.get(pid, 0) + end - start + 1
    return {pid: size // MIB for pid, size in sorted(held.items())}


def process_name(pid: int) -> str:
    """Return the process's name as nvidia-smi shows it."""
    try:
        title = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]
    except OSError:
        return "[Not Found]"
    return os.fsdecode(title)


def read_json(name: str) -> dict[str, Any]:
    """Read a file of the simulated driver; empty if it doesn't exist."""
    try:
        value: dict[str, Any] = json.loads((STATE / name).read_text())
    except FileNotFoundError:
        return {}
    return value


def fault(name: str) -> str:
    """Return how this part misbehaves just now; empty for not at all."""
    return str(read_json("faults.json").get(name, ""))


def visible_cards() -> list[Card]:
    """Return the cards whose device nodes this process has, in PCI order.

    NVIDIA's tools number them from 0 in every container.
    """
    known = {}
    for properties in read_json("cards.json").get("cards", []):
        status = (STATE / "cards" / properties["uuid"]).stat()
        known[status.st_dev, status.st_ino] = properties
    found = []
    for node in DEVICES.glob("nvidia[0-9]*"):
        status = node.stat()
        try:
            found.append((known[status.st_dev, status.st_ino], node))
        except KeyError:
            raise LostCardError(str(node)) from None
    found.sort(key=lambda item: str(item[0]["pci.bus_id"]))
    return [
        Card(index, int(node.name.removeprefix("nvidia")), properties, node)
        for index, (properties, node) in enumerate(found)
    ]


def find_card(name: str) -> Card:
    for card in visible_cards():
        if card.is_called(name):
            return card
    raise UnknownCardError(name)


def load_driver(cards_file: Path) -> None:
    """Make the host's device nodes the cards that the file describes.

    Cards that remain keep their file, and so their processes.
    """
    description = json.loads(cards_file.read_text())
    cards = sorted(description["cards"], key=lambda card: str(card["pci.bus_id"]))
    description["cards"] = cards
    (STATE / "cards").mkdir(parents=True, exist_ok=True)
    for card in cards:
        path = STATE / "cards" / card["uuid"]
        path.touch()
        # Like /dev/nvidia*: a container's user need not be root.
        path.chmod(0o666)
    temporary = STATE / "cards.json.new"
    temporary.write_text(json.dumps(description))
    for node in DEVICES.glob("nvidia[0-9]*"):
        node.unlink()
    temporary.replace(STATE / "cards.json")
    for index, card in enumerate(cards):
        (DEVICES / f"nvidia{index}").symlink_to(STATE / "cards" / card["uuid"])
    kept = {card["uuid"] for card in cards}
    for path in (STATE / "cards").iterdir():
        if path.name not in kept:
            path.unlink()


def take_away(pid: int) -> None:
    """Take the device nodes out of a running container, as a reload of systemd can.

    Files that it has open still work; a restart cures it.
    """
    clone_newns, mnt_detach = 0x20000, 2
    libc = ctypes.CDLL(None, use_errno=True)
    with Path(f"/proc/{pid}/ns/mnt").open("rb") as namespace:
        if libc.setns(namespace.fileno(), clone_newns):
            raise OSError(ctypes.get_errno(), "setns")
    for node in DEVICES.glob("nvidia[0-9]*"):
        libc.umount2(os.fsencode(node), mnt_detach)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["load", file]:
            load_driver(Path(file))
        case ["take-away", container]:
            take_away(int(container))
        case _:
            sys.exit("usage: simulated-driver load FILE | take-away PID")
