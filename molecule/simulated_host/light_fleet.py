#!/usr/bin/env python3
"""Light GPU hosts: hundreds on one machine, for roll-outs, where gpuhost.py's are a handful.

  up        make light-0001 to light-N, and start what plays their engines
  down      stop it, and remove all hosts
  inventory an Ansible inventory of the hosts, as YAML
  fault     make hosts misbehave
  state     what a host's engine knows, and what nvidia-smi shows there

On a light host Ansible, the role, every module and the referee are the real
ones; each host has its own /run (and lock), /opt (and compose file, .env,
record), docker, nvidia-smi, cards, port and API. Not real are:
  - the engine: one process answers the docker commands of all hosts, in words
    recorded from a real one. What a compose file means says the real Compose
    plugin, once for each different question.
  - the container: it has no process, and no program runs in it. `up` and `down`
    take no time; an image is pulled in no time; PIDs are none of this machine.
  - the card, the driver and the model: nvidia-smi tells which card `up` gave
    the container. The API knows /health and /v1/models only.
  - the network: a host is reached by a `local` connection, not by SSH, so that
    none can be unreachable, and there is no sudo.
  - the machine: hosts and controller share this one's processors, /etc, /tmp,
    /proc and Python. A clone in /opt or /run can't be used.

Needs root (for mount namespaces); `setup` beside this file must have run once.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gpuhost import fault_settings
from light_host import FAULTS, Host, read_json, write_json
from machine import HERE, PLUGIN, ROOT, HostError

FLEET = ROOT / ".cache/light-fleet"
FIRST_PORT = 20000
PROGRAMS = ("docker", "nvidia-smi")


class Fleet:
    """The light hosts in a directory."""

    def __init__(self, directory: Path) -> None:
        """Name a directory, which need not exist yet."""
        self.directory = directory.resolve()

    @property
    def names(self) -> list[str]:
        """The hosts that there are."""
        return sorted(path.name for path in self.directory.glob("light-*"))

    def path(self, name: str) -> Path:
        """Return a host's directory."""
        path = self.directory / Path(name).name
        if not (path / "host.json").exists():
            raise HostError(f"there is no host {name} in {self.directory}")
        return path

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Let no other run of this tool change the fleet meanwhile."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with (self.directory / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    # --- what plays the engines ---------------------------------------------

    def engine(self) -> int | None:
        """Return the PID of the process that plays the engines, if it lives."""
        pid = read_json(self.directory / "engine.json").get("pid")
        try:
            words = Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8").split("\0")
        except OSError:
            return None
        return pid if str(self.directory) in words else None

    def start_engine(self) -> None:
        """Start it where it doesn't live, and wait until it answers."""
        if self.engine():
            return
        (self.directory / "engine.json").unlink(missing_ok=True)
        with (self.directory / "engine.log").open("w") as log:
            # A session of its own, so that it outlives this tool and its terminal.
            process = subprocess.Popen(
                [sys.executable, HERE / "light_engine.py", str(self.directory)],
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + 30
        while not self.engine():
            if process.poll() is not None or time.monotonic() > deadline:
                said = (self.directory / "engine.log").read_text(encoding="utf-8").strip()
                raise HostError(f"light_engine.py doesn't start: {said}")
            time.sleep(0.02)

    def stop_engine(self) -> None:
        """Stop it, and wait for its end."""
        pid = self.engine()
        if pid is None:
            return
        os.kill(pid, signal.SIGTERM)
        while self.engine():
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
            time.sleep(0.02)

    def introduce(self, name: str) -> None:
        """Tell a host's programs where they are answered."""
        engine = read_json(self.directory / "engine.json")
        file = self.directory / name / "run/light-host/engine"
        file.touch(mode=0o600)
        file.write_text(f"{name} {engine['port']} {engine['token']}\n", encoding="utf-8")

    # --- the hosts ----------------------------------------------------------

    def up(self, count: int, cards: Path, first_port: int) -> None:
        """Make the hosts that aren't there yet, and let all of them be answered."""
        self.check()
        description = json.loads(cards.read_bytes())
        for number in range(1, count + 1):
            directory = self.directory / f"light-{number:04}"
            if not directory.exists():
                make(directory, description, first_port + number - 1)
        self.start_engine()
        for name in self.names:
            self.introduce(name)

    def check(self) -> None:
        """Refuse where light hosts can't be."""
        if os.geteuid() != 0:
            raise HostError("light hosts are mount namespaces: run this as root")
        if not PLUGIN.exists():
            raise HostError(f"run {HERE / 'setup'} first")
        if {"opt", "run"} & {path.parts[1] for path in (ROOT, self.directory) if len(path.parts) > 1}:
            raise HostError(
                f"{ROOT} and {self.directory} must not be in /opt or /run, which hosts have their own of"
            )

    def down(self) -> None:
        """Remove all of it."""
        self.stop_engine()
        shutil.rmtree(self.directory, ignore_errors=True)

    def inventory(self, names: list[str]) -> str:
        """Return an inventory in YAML."""
        lines = [
            "vllm_gpu:",
            "  vars:",
            "    ansible_connection: local",
            "    ansible_become: false",
            "  hosts:",
        ]
        for name in names:
            host = read_json(self.path(name) / "host.json")
            lines += [
                f"    {name}:",
                f"      ansible_python_interpreter: {json.dumps(str(self.path(name) / 'python3'))}",
                f"      vllm_gpu_port: {host['port']}",
            ]
        return "\n".join(lines) + "\n"

    def fault(self, name: str, settings: dict[str, str], *, clear: bool) -> dict[str, str]:
        """Add to how the host misbehaves; an empty value ends a fault."""
        directory = self.path(name)
        faults = {} if clear else read_json(directory / "faults.json")
        faults = {key: value for key, value in {**faults, **settings}.items() if value}
        write_json(directory / "faults.json", faults)
        install(directory, faults)
        return faults

    def state(self, name: str) -> dict[str, Any]:
        """Return what a host's engine knows, and what its nvidia-smi shows."""
        host = Host(self.path(name))
        return {
            "images": host.images,
            "container": host.container and host.document(host.container),
            "faults": read_json(host.directory / "faults.json"),
            "cards": [
                {"index": card.index, "uuid": card.uuid, "used_mib": card.used_mib} for card in host.cards()
            ],
        }


def make(directory: Path, description: dict[str, Any], port: int) -> None:
    """Make one host; whole, or not at all."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise HostError(
                f"port {port} of {directory.name} is taken: choose another --first-port"
            ) from error
    fresh = directory.with_name(f"new-{directory.name}")
    shutil.rmtree(fresh, ignore_errors=True)
    (fresh / "run/light-host/bin").mkdir(parents=True)
    (fresh / "opt").mkdir()
    # Two hosts never have the same card.
    cards = [{**card, "uuid": own_uuid(card["uuid"], directory.name)} for card in description["cards"]]
    cards.sort(key=lambda card: str(card["pci.bus_id"]))
    write_json(fresh / "cards.json", {**description, "cards": cards})
    write_json(fresh / "host.json", {"port": port})
    (fresh / "cpu").touch()
    shutil.copy(HERE / "light_python", fresh / "python3")
    install(fresh, {})
    fresh.rename(directory)


def own_uuid(uuid: str, name: str) -> str:
    """Return a card's UUID with its end made the host's own."""
    return f"{uuid[:-12]}{hashlib.sha256(f'{uuid} {name}'.encode()).hexdigest()[:12]}"


def install(directory: Path, faults: dict[str, str]) -> None:
    """Give the host its programs, but for those that a fault takes away."""
    for program in PROGRAMS:
        file = directory / "run/light-host/bin" / program
        if faults.get(program.replace("-", "_")) == "missing":
            file.unlink(missing_ok=True)
        elif not file.exists():
            shutil.copy(HERE / "light_cli", file)


def command_up(options: argparse.Namespace) -> None:
    """Make hosts, and start what plays their engines."""
    with options.fleet.locked():
        options.fleet.up(options.count, options.cards, options.first_port)


def command_down(options: argparse.Namespace) -> None:
    """Remove all hosts."""
    with options.fleet.locked():
        options.fleet.down()


def command_inventory(options: argparse.Namespace) -> None:
    """Print an inventory."""
    print(options.fleet.inventory(options.names or options.fleet.names), end="")


def command_fault(options: argparse.Namespace) -> None:
    """Set, end or show faults."""
    settings = fault_settings(options.settings, FAULTS)
    for name in options.fleet.names if options.name == "all" else [options.name]:
        print(name, json.dumps(options.fleet.fault(name, settings, clear=options.clear)))


def command_state(options: argparse.Namespace) -> None:
    """Print a host's state as JSON."""
    print(json.dumps(options.fleet.state(options.name), indent=2))


def parser() -> argparse.ArgumentParser:
    """Return the command line's description."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument(
        "--fleet", type=lambda text: Fleet(Path(text)), default=Fleet(FLEET), metavar="DIRECTORY"
    )
    commands = top.add_subparsers(dest="verb", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, formatter_class=argparse.RawDescriptionHelpFormatter, description=run.__doc__
        )
        sub.set_defaults(run=run)
        return sub

    up = add("up", command_up)
    up.add_argument("count", type=int, metavar="N")
    up.add_argument("--cards", type=Path, default=HERE / "cards.json", metavar="FILE")
    up.add_argument("--first-port", type=int, default=FIRST_PORT, metavar="PORT", help="that of light-0001")
    add("down", command_down)
    add("inventory", command_inventory).add_argument("names", nargs="*", metavar="NAME", help="default: all")
    fault = add("fault", command_fault)
    fault.epilog = "keys:\n" + "\n".join(f"  {key:<12} {text}" for key, text in FAULTS.items())
    fault.add_argument("name", metavar="NAME", help="or all")
    fault.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="an empty value ends the fault")
    fault.add_argument("--clear", action="store_true", help="end all other faults")
    add("state", command_state).add_argument("name", metavar="NAME")
    return top


def main() -> None:
    """Run one command."""
    options = parser().parse_args()
    try:
        options.run(options)
    except HostError as error:
        sys.exit(f"light_fleet: {error}")


if __name__ == "__main__":
    main()
