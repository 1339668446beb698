"""A fleet of light hosts: a directory each, and the process that simulates Docker Engine for all."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from hosts import own
from machine import HERE, PLUGIN, ROOT, HostError

from tests.light_fleet.cards import Card, Driver, read_json, write_json

FIRST_PORT = 20000
NVIDIA_SMI = f"""#!{sys.executable} -I
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from tests.light_fleet.cards import smi
text, code = smi(Path(DIRECTORY), sys.argv[1:])
print(text, end="")
sys.exit(code)
"""


class Fleet:
    """The light hosts in a directory."""

    def __init__(self, directory: Path) -> None:
        """Name a directory, which may not exist yet."""
        self.directory = directory.resolve()

    @property
    def names(self) -> list[str]:
        return sorted(path.name for path in self.directory.glob("light-*"))

    def path(self, name: str) -> Path:
        path = self.directory / Path(name).name
        if not (path / "host.json").exists():
            raise HostError(f"there is no host {name} in {self.directory}")
        return path

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the fleet against other runs of this program."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with (self.directory / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def engine(self) -> int | None:
        """Return the PID of the engine process, if it runs."""
        pid = read_json(self.directory / "engine.json").get("pid")
        try:
            words = Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8").split("\0")
        except OSError:
            return None
        return pid if str(self.directory) in words else None

    def start_engine(self) -> None:
        """Start it if it doesn't run, and wait until it answers for all hosts."""
        log = self.directory / "engine.log"
        if not self.engine():
            (self.directory / "engine.json").unlink(missing_ok=True)
            with log.open("w") as output:
                # In its own session, so that it outlives this program and its terminal.
                subprocess.Popen(
                    [sys.executable, "-m", "tests.light_fleet.engine", str(self.directory)],
                    cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
                )  # fmt: skip
        deadline = time.monotonic() + 30
        while not (
            self.engine() and all((self.path(name) / "run/docker.sock").exists() for name in self.names)
        ):
            if time.monotonic() > deadline:
                raise HostError(f"the engines don't start: {log.read_text(encoding='utf-8').strip()}")
            time.sleep(0.02)

    def stop_engine(self) -> None:
        pid = self.engine()
        if pid is None:
            return
        os.kill(pid, signal.SIGTERM)
        while self.engine():
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
            time.sleep(0.02)

    def up(self, count: int, first_port: int = FIRST_PORT) -> None:
        """Make the hosts that don't exist yet, and start the engine."""
        self.check()
        for number in range(1, count + 1):
            directory = self.directory / f"light-{number:04}"
            if not directory.exists():
                make(directory, first_port + number - 1)
        self.start_engine()

    def check(self) -> None:
        """Refuse a machine or a directory where light hosts can't work."""
        user = [] if os.geteuid() == 0 else ["--map-root-user"]
        if subprocess.run(["unshare", *user, "--mount", "true"], capture_output=True, check=False).returncode:
            raise HostError(
                "light hosts are mount namespaces, which this kernel lets only root create: run this as root"
            )
        if not PLUGIN.exists() or not shutil.which("docker", path="/usr/local/bin:/usr/bin"):
            raise HostError(f"run {HERE / 'setup'} first")
        if {"opt", "run"} & {path.parts[1] for path in (ROOT, self.directory) if len(path.parts) > 1}:
            raise HostError(
                f"{ROOT} and {self.directory} must not be in /opt or /run, which hosts have themselves"
            )

    def down(self) -> None:
        self.stop_engine()
        shutil.rmtree(self.directory, ignore_errors=True)

    def inventory(self, names: list[str]) -> str:
        lines = ["vllm_gpu:", "  vars: {ansible_connection: local, ansible_become: false}", "  hosts:"]
        for name in names:
            python = json.dumps(str(self.path(name) / "python3"))
            port = read_json(self.path(name) / "host.json")["port"]
            lines.append(f"    {name}: {{ansible_python_interpreter: {python}, vllm_gpu_port: {port}}}")
        return "\n".join(lines) + "\n"

    def fault(self, name: str, settings: dict[str, str]) -> None:
        """Set `crash` (a card's index, or any) or `start_delay` (seconds); an empty value ends it."""
        file = self.path(name) / "faults.json"
        write_json(file, {key: value for key, value in {**read_json(file), **settings}.items() if value})

    def cards(self, name: str) -> list[Card]:
        return Driver(self.path(name)).cards


def make(directory: Path, port: int) -> None:
    """Make one host, in one step."""
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
    for folder in ("run/light-host/bin", "run/light-host/cli-plugins", "opt"):
        (fresh / folder).mkdir(parents=True)
    (fresh / "run/light-host/cli-plugins/docker-compose").symlink_to(PLUGIN)
    nvidia_smi = fresh / "run/light-host/bin/nvidia-smi"
    nvidia_smi.write_text(NVIDIA_SMI.replace("DIRECTORY", repr(str(directory))), encoding="utf-8")
    nvidia_smi.chmod(0o755)
    # Two hosts never have the same card.
    description = own(json.loads((HERE / "cards.json").read_bytes()), directory.name)
    description["cards"].sort(key=lambda card: str(card["pci.bus_id"]))
    write_json(fresh / "cards.json", description)
    write_json(fresh / "host.json", {"port": port})
    (fresh / "cpu").touch()
    shutil.copy(Path(__file__).with_name("python3"), fresh / "python3")
    fresh.rename(directory)
