"""The cards of a light host, and its nvidia-smi: molecule/simulated_host's, on files that the engine writes."""

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
    """A card of a light host; its properties say how much memory is held."""

    @property
    def held(self) -> int:
        return int(self.properties["held"])

    @property
    def used_mib(self) -> int:
        return self.held + simulated_gpu.DRIVER_MIB if self.held else 0


class Driver:
    """One host's cards, with the functions of simulated_gpu.py that nvidia_smi.py calls."""

    LostCardError = simulated_gpu.LostCardError

    def __init__(self, directory: Path, inside: Sequence[str] | None = None) -> None:
        """Read the host's cards; `inside` a container only those with these UUIDs."""
        self.description = read_json(directory / "cards.json")
        server = read_json(directory / "held.json")
        # A process appears on its card some time after its start.
        given = server["cards"] if server and time.time() >= server["since"] else []
        self.pid = int(server.get("pid", 0))
        self.cards: list[Card] = []
        for minor, properties in enumerate(self.description["cards"]):
            if inside is not None and properties["uuid"] not in inside:
                continue
            card = Card(len(self.cards), minor, {**properties, "held": 0}, Path("/nonexistent"))
            if card.uuid in given:
                # The server works on the first one; each other one gets a context.
                share = int(card.usable_mib * server["share"])
                card.properties["held"] = share if card.uuid == given[0] else simulated_gpu.CONTEXT_MIB
            self.cards.append(card)

    def visible_cards(self) -> list[Card]:
        return self.cards

    def read_json(self, _name: str) -> dict[str, Any]:
        return self.description

    def fault(self, _name: str) -> str:
        return ""

    def processes(self, card: Card) -> dict[int, int]:
        return {self.pid: card.held} if card.held else {}

    def process_name(self, _pid: int) -> str:
        return "VLLM::EngineCore"


def smi(directory: Path, arguments: Sequence[str], inside: Sequence[str] | None = None) -> tuple[str, int]:
    """Return the output and exit code of nvidia-smi, on the host or inside a container with these cards."""
    vars(nvidia_smi)["gpu"] = Driver(directory, inside)
    code = 0
    with contextlib.redirect_stdout(io.StringIO()) as output:
        try:
            nvidia_smi.main(list(arguments))
        except SystemExit as end:
            code = int(end.code or 0)
    return output.getvalue(), code


def read_json(path: Path) -> dict[str, Any]:
    """Return the file's content; empty if it doesn't exist (yet)."""
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return value


def write_json(path: Path, value: object) -> None:
    """Write a file in one step; only its owner may read it."""
    temporary = path.with_suffix(".new")
    temporary.touch(mode=0o600)
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
