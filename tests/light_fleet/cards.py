"""The cards of a light host, and its nvidia-smi: molecule/simulated_host's, over files that the engine writes."""

from __future__ import annotations

import contextlib
import io
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nvidia_smi
import simulated_gpu


class Card(simulated_gpu.Card):
    """A card of a light host; what is held of it stands among its properties."""

    @property
    def held(self) -> int:
        """MiB that the container's server holds."""
        return int(self.properties["held"])

    @property
    def used_mib(self) -> int:
        """What is in use of it."""
        return self.held + simulated_gpu.DRIVER_MIB if self.held else 0


class Driver:
    """What nvidia_smi.py asks in the place of simulated_gpu.py: one host's cards."""

    LostCardError = simulated_gpu.LostCardError

    def __init__(self, directory: Path, inside: Sequence[str] | None) -> None:
        """Show the cards of that host; `inside` a container only those of these UUIDs."""
        self.description = read_json(directory / "cards.json")
        server = read_json(directory / "held.json")
        # A process shows up on its card some time after its start.
        given = server["cards"] if server and time.time() >= server["since"] else []
        self.pid = int(server.get("pid", 0))
        self.cards: list[Card] = []
        for minor, properties in enumerate(self.description["cards"]):
            if inside is not None and properties["uuid"] not in inside:
                continue
            card = Card(len(self.cards), minor, {**properties, "held": 0}, Path("/nonexistent"))
            if card.uuid in given:
                # The first one is worked on; every other one gets a context.
                share = int(card.usable_mib * server["share"])
                card.properties["held"] = share if card.uuid == given[0] else simulated_gpu.CONTEXT_MIB
            self.cards.append(card)

    def visible_cards(self) -> list[Card]:
        """Return the cards."""
        return self.cards

    def read_json(self, _name: str) -> dict[str, Any]:
        """Return the description of the driver."""
        return self.description

    def fault(self, _name: str) -> str:
        """Say that this driver works: light hosts have no fault there."""
        return ""

    def processes(self, card: Card) -> dict[int, int]:
        """Return the MiB that each process holds, by PID."""
        return {self.pid: card.held} if card.held else {}

    def is_tenant(self, _pid: int) -> bool:
        """Say that nobody else uses the cards."""
        return False

    def process_name(self, _pid: int) -> str:
        """Return what the only process there can be calls itself."""
        return "VLLM::EngineCore"


def smi(directory: Path, arguments: Sequence[str], inside: Sequence[str] | None = None) -> tuple[str, int]:
    """Return what nvidia-smi prints, on the host or inside a container that has these cards, and its exit code."""
    vars(nvidia_smi)["gpu"] = Driver(directory, inside)
    said, code = io.StringIO(), 0
    with contextlib.redirect_stdout(said):
        try:
            nvidia_smi.main(list(arguments))
        except SystemExit as end:
            code = int(end.code or 0)
    return said.getvalue(), code


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that may not be there (yet)."""
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return value


def write_json(path: Path, value: object) -> None:
    """Write a file that is never seen half-written; only its owner may read it."""
    temporary = path.with_suffix(".new")
    temporary.touch(mode=0o600)
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
