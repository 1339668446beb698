#!/usr/bin/python3 -I
"""The simulated nvidia-smi; see simulated_gpu.py for what it reads.

Its texts, layouts and exit codes are those recorded from the real one
(driver 580); other reports than the table, -L and the queries are refused.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import NoReturn

sys.path.insert(0, "/usr/local/lib/simulated-gpu")

import simulated_gpu as gpu

# What a card answers unless its description has another value.
DEFAULTS = {
    "compute_mode": "Default",
    "display_active": "Disabled",
    "ecc.errors.uncorrected.volatile.total": "[N/A]",
    "fan.speed": "0",
    "mig.mode.current": "[N/A]",
    "persistence_mode": "Disabled",
    "power.draw": "20.00",
    "power.limit": "[N/A]",
    "pstate": "P8",
    "temperature.gpu": "35",
    "utilization.gpu": "0",
}
COMPUTED: dict[str, Callable[[gpu.Card], object]] = {
    "index": lambda card: card.index,
    "driver_version": lambda _: gpu.read_json("cards.json")["driver_version"],
    "memory.used": lambda card: card.used_mib,
    "memory.free": lambda card: card.usable_mib - card.used_mib,
}
GPU_ALIASES = {"gpu_name": "name", "gpu_uuid": "uuid", "gpu_bus_id": "pci.bus_id"}
APP_ALIASES = {"name": "process_name", "used_memory": "used_gpu_memory"}
SHORT = {"-i": "--id", "-L": "--list-gpus"}
WITH_VALUE = ("--id", "--query-gpu", "--query-compute-apps", "--format")
APP_FIELDS = ("gpu_name", "gpu_bus_id", "gpu_uuid", "pid", "process_name", "used_gpu_memory")


def fail(status: int, text: str) -> NoReturn:
    """End as the real one does, whose errors go to standard output."""
    print(text)
    sys.exit(status)


def unit(field: str) -> str:
    if field.startswith("memory.") or field == "used_gpu_memory":
        return "MiB"
    if field.startswith("utilization.") or field == "fan.speed":
        return "%"
    return "W" if field.startswith("power.") else ""


def gpu_value(card: gpu.Card, field: str) -> str:
    computed = COMPUTED.get(field)
    return str(computed(card) if computed else card.properties.get(field, DEFAULTS.get(field, 0)))


def app_value(card: gpu.Card, pid: int, mib: int, field: str) -> str:
    if field in GPU_ALIASES:
        return gpu_value(card, GPU_ALIASES[field])
    return {"pid": str(pid), "process_name": gpu.process_name(pid), "used_gpu_memory": str(mib)}[field]


def print_csv(rows: list[list[str]], fields: list[str], formats: list[str]) -> None:
    units = "nounits" not in formats
    if "noheader" not in formats:
        print(", ".join(f"{f} [{unit(f)}]" if units and unit(f) else f for f in fields))
    for row in rows:
        print(
            ", ".join(
                f"{value} {unit(field)}" if units and unit(field) and value != "[N/A]" else value
                for field, value in zip(fields, row, strict=True)
            )
        )


def listed(card: gpu.Card) -> dict[int, int]:
    """Return the MiB that each process holds, of those that it may list."""
    return {} if gpu.fault("processes") == "none" else gpu.processes(card)


def query(cards: list[gpu.Card], wanted: str, formats: list[str], *, apps: bool) -> None:
    aliases = APP_ALIASES if apps else GPU_ALIASES
    fields = [aliases.get(field.strip(), field.strip()) for field in wanted.split(",")]
    known = {*COMPUTED, *DEFAULTS, *(key for card in cards for key in card.properties)}
    for field in fields:
        if field not in (APP_FIELDS if apps else known):
            fail(2, f'Field "{field}" is not a valid field to query.\n')
    if apps:
        rows = [
            [app_value(card, pid, mib, field) for field in fields]
            for card in cards
            for pid, mib in listed(card).items()
        ]
    else:
        rows = [[gpu_value(card, field) for field in fields] for card in cards]
    print_csv(rows, fields, formats)


def short(text: str, width: int) -> str:
    """Keep the end of a name that is too long for its column."""
    return text if len(text) <= width else "..." + text[3 - width :]


def table(cards: list[gpu.Card]) -> None:
    """Print the report of nvidia-smi without arguments."""
    driver = gpu.read_json("cards.json")
    version, cuda = driver["driver_version"], driver["cuda_version"]
    columns = f"+{'-' * 41}+{'-' * 24}+{'-' * 22}+"
    line = f"+{'-' * 89}+"
    print(time.strftime("%a %b %d %H:%M:%S %Y       "))
    print(line)
    print(f"| NVIDIA-SMI {version:<22} Driver Version: {version:<14} CUDA Version: {cuda:<8} |")
    print(columns)
    print("| GPU  Name                 Persistence-M | Bus-Id          Disp.A | Volatile Uncorr. ECC |")
    print("| Fan  Temp   Perf          Pwr:Usage/Cap |           Memory-Usage | GPU-Util  Compute M. |")
    print(f"|{'':41}|{'':24}|{'MIG M.':>21} |")
    print(f"|{'=' * 41}+{'=' * 24}+{'=' * 22}|")
    for card in cards:
        value = {name: gpu_value(card, name).strip("[]") for name in DEFAULTS}
        on = {"Enabled": "On", "Disabled": "Off"}
        persistence, display = on[value["persistence_mode"]], on[value["display_active"]]
        ecc = value["ecc.errors.uncorrected.volatile.total"]
        fan = value["fan.speed"] if value["fan.speed"] == "N/A" else value["fan.speed"] + "%"
        power = " / ".join(
            f"{round(float(value[key])):>4}W" if value[key] != "N/A" else " N/A"
            for key in ("power.draw", "power.limit")
        )
        print(
            f"| {card.index:>3}  {short(str(card.properties['name']), 31):<31}{persistence:<3} "
            f"|{card.bus_id:>19} {display:<3} |{ecc:>21} |"
        )
        print(
            f"| {fan:>3} {value['temperature.gpu']:>4}C    {value['pstate']:<3}{power:>23} "
            f"|{card.used_mib:>8}MiB / {card.total_mib:>6}MiB "
            f"|{value['utilization.gpu']:>7}% {value['compute_mode']:>12} |"
        )
        print(f"|{'':41}|{'':24}|{value['mig.mode.current']:>21} |")
        print(columns)
    print()
    print(line)
    print(f"| {'Processes:':<88}|")
    print(f"| {' GPU   GI   CI              PID   Type   Process name':<77}GPU Memory |")
    print(f"| {'       ID   ID':<77}{'Usage':<10} |")
    print(f"|{'=' * 89}|")
    rows = [(card, pid, mib) for card in cards for pid, mib in listed(card).items()]
    for card, pid, mib in rows:
        name = short(gpu.process_name(pid), 38)
        print(f"|{card.index:>5}   N/A  N/A {pid:>15}      C   {name:<38}{mib:>5}MiB |")
    if not rows:
        print(f"|  {'No running processes found':<87}|")
    print(line)


def select(cards: list[gpu.Card], wanted: str | None) -> list[gpu.Card]:
    """Return the cards that -i names, of those that exist."""
    if wanted is not None:
        cards = [card for card in cards if any(map(card.is_called, wanted.split(",")))]
    if not cards:
        fail(6, "No devices were found")
    return cards


def read_driver() -> list[gpu.Card]:
    """Return the cards, or fail as a driver that doesn't work makes nvidia-smi fail."""
    if gpu.fault("nvidia_smi") == "hang":
        while True:
            time.sleep(3600)
    state = gpu.fault("driver")
    if state == "mismatch":
        fail(18, "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 580.159")
    if state == "gone" or not gpu.read_json("cards.json"):
        fail(
            9,
            "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. "
            "Make sure that the latest NVIDIA driver is installed and running.\n",
        )
    try:
        return gpu.visible_cards()
    except gpu.LostCardError:
        fail(255, "Failed to initialize NVML: Unknown Error")


def parse(argv: list[str]) -> dict[str, str]:
    """Read the command line, as leniently as the real one does."""
    options: dict[str, str] = {}
    arguments = list(argv)
    while arguments:
        name, equals, value = arguments.pop(0).partition("=")
        name = SHORT.get(name, name)
        if name in WITH_VALUE:
            if not equals and not arguments:
                fail(255, f"ERROR: Option {name} is missing its value. Please run 'nvidia-smi -h'.\n")
            options[name] = value if equals else arguments.pop(0)
        elif name == "--list-gpus":
            options[name] = ""
        else:
            fail(255, f"ERROR: Option {name} is not recognized. Please run 'nvidia-smi -h'.\n")
    return options


def main(argv: list[str]) -> None:
    options = parse(argv)
    if {"--list-gpus", "--id"} <= options.keys():
        fail(255, "ERROR: Option -i is not valid for this command. Please run 'nvidia-smi -h' for help.\n")
    cards = select(read_driver(), options.get("--id"))
    queries = [name for name in ("--query-gpu", "--query-compute-apps") if name in options]
    if queries:
        formats = options.get("--format", "").split(",")
        if "csv" not in formats:
            fail(2, '"--format=csv" is required with a query.\n')
        query(cards, options[queries[0]], formats, apps=queries[0] == "--query-compute-apps")
    elif "--list-gpus" in options:
        for card in cards:
            print(f"GPU {card.index}: {card.properties['name']} (UUID: {card.uuid})")
    else:
        table(cards)


if __name__ == "__main__":
    main(sys.argv[1:])
