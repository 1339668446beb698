"""The command line of the light hosts."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from machine import ROOT, HostError

import tests.light_fleet
from tests.light_fleet.fleet import FIRST_PORT, Fleet


def run(options: argparse.Namespace) -> None:
    fleet = Fleet(options.fleet)
    match options.verb:
        case "up":
            with fleet.locked():
                fleet.up(options.count, options.first_port)
        case "down":
            with fleet.locked():
                fleet.down()
        case "inventory":
            print(fleet.inventory(options.names or fleet.names), end="")


def parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    text = tests.light_fleet.__doc__
    top = argparse.ArgumentParser(prog="python3 -m tests.light_fleet", description=text, formatter_class=raw)
    top.add_argument("--fleet", type=Path, default=ROOT / ".cache/light-fleet", metavar="DIRECTORY")
    commands = top.add_subparsers(dest="verb", required=True, metavar="COMMAND")
    up = commands.add_parser("up", help="make light-0001 to light-N, and start what simulates Docker Engine")
    up.add_argument("count", type=int, metavar="N")
    up.add_argument("--first-port", type=int, default=FIRST_PORT, metavar="PORT", help="that of light-0001")
    commands.add_parser("down", help="stop it, and remove all hosts")
    listing = commands.add_parser("inventory", help="print an Ansible inventory of the hosts in YAML")
    listing.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    return top


if __name__ == "__main__":
    try:
        run(parser().parse_args())
    except HostError as error:
        sys.exit(f"light_fleet: {error}")
