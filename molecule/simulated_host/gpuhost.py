#!/usr/bin/env python3
"""Simulated GPU hosts: a real Docker Engine each, reached by SSH; only the cards are not real.

Run `setup` beside this file once, before.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from hosts import Host, all_hosts, inventory, start
from machine import HostError, step

FAULTS = {
    "runtime": "gives these cards, whatever is requested: two (another one, too) | all | none | ids, e.g. 0,1",
    "nvidia_smi": "hang | missing",
    "processes": "nvidia-smi lists no processes, as in an LXC guest: none",
    "driver": "gone | mismatch",
    "lost_card": "a running container (name or id) loses its card, until it is started again",
    "start_delay": "seconds that the server takes longer to start",
    "crash": "the server crashes while it starts: oom | traceback",
    "crash_after": "the server crashes so many seconds after it is ready",
    "worker_dies_after": "the engine process dies so many seconds after it is ready",
    "health": "never healthy: 503 | closed (the port never opens)",
    "serve_as": "the server serves this model name instead",
    "api": "what it answers below /v1: drip (a byte every 3 s, without end)",
    "log_secret": "the server's log has its API key: 1",
    "log_escape": "the server's log has control characters: 1",
}


def command_up(options: argparse.Namespace) -> None:
    """Start hosts, of those that don't run yet."""
    start(options.names, own_cards=options.own_cards)


def command_down(options: argparse.Namespace) -> None:
    """Remove hosts."""
    for host in all_hosts() if options.all else map(Host, options.names):
        with step(f"removing {host.name}"):
            host.down()


def command_inventory(options: argparse.Namespace) -> None:
    """Print an Ansible inventory of hosts in YAML."""
    print(inventory([Host(name) for name in options.names]))


def command_ssh(options: argparse.Namespace) -> None:
    """Run a shell or a command on a host, as root."""
    command = Host(options.name).ssh_command()
    os.execvp(command[0], [*command, *options.command])  # noqa: S606


def command_fault(options: argparse.Namespace) -> None:
    """Make a host misbehave, end that, or print its faults."""
    settings = {}
    for word in options.settings:
        key, equals, value = word.partition("=")
        if not equals or key not in FAULTS:
            raise HostError(f"{word}: not KEY=VALUE with one of the keys {', '.join(FAULTS)}")
        settings[key] = value
    if options.clear:
        settings = dict.fromkeys(set(FAULTS) - {"lost_card"}, "") | settings
    print(json.dumps(Host(options.name).fault(settings)))


TENANT = """
log=$(mktemp)
setsid python3 "$1" --card "$2" --mib "$3" >"$log" 2>&1 </dev/null & pid=$!
while kill -0 $pid 2>/dev/null && ! grep -q holding "$log"; do sleep 0.05; done
kill -0 $pid 2>/dev/null || { cat "$log" >&2; exit 1; }
echo $pid
"""


def command_tenant(options: argparse.Namespace) -> None:
    """Start another user's process on a card, or stop all of them."""
    host = Host(options.name)
    program = "/usr/local/lib/simulated-gpu/gpu_tenant.py"
    if options.stop:
        host.script('pkill -f "^python3 $1" || true', program)
    elif options.card is None or options.mib is None:
        raise HostError("tenant: needs --card and --mib, or --stop")
    else:
        print(host.script(TENANT, program, options.card, str(options.mib)))


def command_cards(options: argparse.Namespace) -> None:
    """Change the cards of a running host."""
    description = options.file.read_bytes()
    json.loads(description)
    host = Host(options.name)
    host.put("/etc/simulated-gpu/cards.json", description)
    host.run("simulated-driver", "load", "/etc/simulated-gpu/cards.json")


def command_engine(options: argparse.Namespace) -> None:
    """Start, stop or restart a host's Docker Engine."""
    host = Host(options.name)
    if options.action in ("stop", "restart"):
        host.script("touch /run/engine-stopped; simulated-engine stop")
    if options.action in ("start", "restart"):
        nvidia = ["--no-nvidia"] if options.no_nvidia else []
        host.script('simulated-engine start "$@"; rm -f /run/engine-stopped', *nvidia)


def command_reboot(options: argparse.Namespace) -> None:
    """Boot a host again, as after a power cut."""
    host = Host(options.name)
    with step(f"rebooting {host.name}"):
        host.reboot()


def parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = top.add_subparsers(dest="verb", required=True, metavar="COMMAND")

    def add(run: Callable[[argparse.Namespace], None], *names: str) -> argparse.ArgumentParser:
        text = str(run.__doc__)
        name = run.__name__.removeprefix("command_")
        sub = commands.add_parser(name, formatter_class=raw, description=text, help=text)
        sub.set_defaults(run=run)
        for argument in names:
            sub.add_argument(argument, metavar="NAME", nargs="+" if argument == "names" else None)
        return sub

    up = add(command_up, "names")
    up.add_argument("--own-cards", action="store_true", help="with UUIDs that no other host's cards have")
    which = add(command_down).add_mutually_exclusive_group(required=True)
    which.add_argument("names", nargs="*", default=[], metavar="NAME")
    which.add_argument("--all", action="store_true")
    add(command_inventory, "names")
    add(command_ssh, "name").add_argument("command", nargs=argparse.REMAINDER)
    fault = add(command_fault, "name")
    fault.epilog = "keys:\n" + "\n".join(f"  {key:<18} {text}" for key, text in FAULTS.items())
    fault.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="an empty value ends the fault")
    fault.add_argument("--clear", action="store_true", help="end all other faults (give it last)")
    tenant = add(command_tenant, "name")
    tenant.add_argument("--card", metavar="ID")
    tenant.add_argument("--mib", type=int)
    tenant.add_argument("--stop", action="store_true", help="stop all of them")
    add(command_cards, "name").add_argument("file", type=Path, metavar="FILE")
    engine = add(command_engine, "name")
    engine.add_argument("action", choices=("start", "stop", "restart"))
    engine.add_argument("--no-nvidia", action="store_true", help="without NVIDIA's hook")
    add(command_reboot, "name")
    return top


def main() -> None:
    options = parser().parse_args()
    try:
        options.run(options)
    except HostError as error:
        sys.exit(f"gpuhost: {error}")


if __name__ == "__main__":
    main()
