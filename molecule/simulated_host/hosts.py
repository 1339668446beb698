"""Simulated GPU hosts: each is a container on this machine, with a Docker Engine and an SSH server of its own."""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import shlex
import shutil
import subprocess
import time
from typing import Any

from archive import Archive
from images import CLONE, DEFAULT_IMAGE, LABEL, host_image, stand_in_image
from machine import CACHE, HERE, PLUGIN, HostError, docker, step

HOSTS = CACHE / "simulated-hosts"
CLIENT_KEY = HOSTS / "id_ed25519"
NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,40}")


def withheld_capability() -> list[str]:
    """Return the options that keep CAP_SYS_RESOURCE out of ALL: some machines can't give it, and no host needs it.

    From Engine 23 on ALL is what the machine has, and dropping another capability is an error.
    """
    older = re.match(r"(1?\d|2[0-2])\.", docker("version", "--format", "{{.Server.Version}}"))
    return ["--cap-drop", "SYS_RESOURCE"] if older else []


class Host:
    """One simulated host."""

    def __init__(self, name: str) -> None:
        if not NAME.fullmatch(name):
            raise HostError(f"not a host name: {name!r} (small letters, digits and dashes)")
        self.name = name
        self.container = f"{LABEL}-{CLONE}-{name}"
        self.folder = HOSTS / name
        self.ssh_config = self.folder / "ssh_config"
        # Ansible shares connections by this name, which two clones must not.
        self.alias = f"{name}.{CLONE}"

    def inspect(self, template: str) -> str:
        """Return what `docker inspect` reports of the container; empty if it doesn't exist."""
        return docker("container", "inspect", "--format", template, self.container, check=False)

    def run(self, *command: str, data: bytes | None = None, check: bool = True) -> str:
        """Run a command on the host as root, not by SSH."""
        options = [] if data is None else ["--interactive"]
        return docker("exec", *options, self.container, *command, data=data, check=check)

    def script(self, text: str, *arguments: str, data: bytes | None = None) -> str:
        """Run a shell script on the host as root."""
        return self.run("/usr/local/sbin/login-shell", "-euc", text, "sh", *arguments, data=data)

    def write_ssh_config(self, key: str) -> None:
        """Write how to reach the host, and the only key that it may answer with."""
        port = self.inspect('{{(index (index .NetworkSettings.Ports "22/tcp") 0).HostPort}}')
        known_hosts = self.folder / "known_hosts"
        known_hosts.write_text(f"[127.0.0.1]:{port} {key}\n")
        self.ssh_config.write_text(
            f"Host {self.name} {self.alias}\n"
            "  HostName 127.0.0.1\n"
            f"  Port {port}\n"
            "  User root\n"
            f'  IdentityFile "{CLIENT_KEY}"\n'
            "  IdentitiesOnly yes\n"
            f'  UserKnownHostsFile "{known_hosts}"\n'
            "  GlobalKnownHostsFile /dev/null\n"
            "  StrictHostKeyChecking yes\n"
        )

    def ssh_command(self) -> list[str]:
        return ["ssh", "-F", str(self.ssh_config), self.name]

    def answers(self) -> bool:
        """Whether it answers by SSH, and its Docker Engine too, unless that was stopped on purpose."""
        if not self.ssh_config.exists() or self.inspect("{{.State.Running}}") != "true":
            return False
        command = "test -e /run/engine-stopped || docker info >/dev/null"
        try:
            done = subprocess.run(
                [*self.ssh_command(), command], capture_output=True, timeout=30, check=False
            )
        except subprocess.TimeoutExpired:
            return False
        return done.returncode == 0

    def wait_ready(self, since: str = "") -> None:
        """Wait until the host's first process reports that it has booted; save its SSH key."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            log = docker("logs", *(["--since", since] if since else []), self.container)
            for line in log.splitlines():
                if line.startswith("failed"):
                    raise HostError(f"{self.name} doesn't boot:\n{log}")
                if line.startswith("ready "):
                    key = " ".join(line.split()[1:3])
                    self.write_ssh_config(key)
                    return
            if self.inspect("{{.State.Running}}") != "true":
                raise HostError(f"{self.name} ended:\n{log}")
            time.sleep(0.05)
        raise HostError(f"{self.name} isn't ready after 60 s:\n{docker('logs', self.container)}")

    def container_options(self) -> list[str]:
        """Return the options of the host's container, in which a Docker Engine can run."""
        options = f"""
            --name {self.container} --hostname {self.name}
            --label {LABEL}={CLONE} --label {LABEL}.name={self.name}
            --cap-add ALL --security-opt seccomp=unconfined --security-opt apparmor=unconfined
            --security-opt systempaths=unconfined
            --volume /usr:/usr:ro --volume /usr/local --volume /var/lib/docker
            --tmpfs /run:exec,mode=755 --publish 127.0.0.1::22
        """.split()
        plugin = f"{PLUGIN}:/usr/local/libexec/docker/cli-plugins/docker-compose:ro"
        rule = ("--device-cgroup-rule", "a *:* rwm")
        return [*options, *rule, *withheld_capability(), "--volume", plugin]

    def up(self, cards: dict[str, Any]) -> None:
        """Start the host if it doesn't run yet, with these cards, and load the role's default image."""
        if not self.answers():
            self.down()
            image = host_image(CLIENT_KEY.with_suffix(".pub").read_bytes())
            self.folder.mkdir(parents=True, exist_ok=True)
            with step(f"starting {self.name}"):
                docker("create", *self.container_options(), image)
                files = Archive()
                files.text("etc/simulated-gpu/cards.json", json.dumps(cards))
                docker("cp", "-", f"{self.container}:/", data=files.bytes())
                docker("start", self.container)
                self.wait_ready()
        self.load()

    def load(self) -> None:
        """Load the stand-in for vLLM's image."""
        if self.run("find", "/run/engine-stopped", check=False):
            return
        if not self.run("docker", "image", "ls", "-q", DEFAULT_IMAGE):
            with step(f"loading {DEFAULT_IMAGE} into {self.name}"):
                self.run("docker", "load", "-q", data=stand_in_image())

    def down(self) -> None:
        docker("rm", "--force", "--volumes", self.container, check=False)
        shutil.rmtree(self.folder, ignore_errors=True)

    def put(self, path: str, data: bytes) -> None:
        """Write a file on the host, in one step."""
        self.script('mkdir -p "${1%/*}"; cat >"$1.new"; mv "$1.new" "$1"', path, data=data)

    def fault(self, settings: dict[str, str]) -> dict[str, str]:
        """Set faults of the host; an empty value ends one."""
        faults: dict[str, str] = json.loads(
            self.script("cat /run/simulated-gpu/faults.json 2>/dev/null || echo {}")
        )
        container = settings.pop("lost_card", "")
        if container:
            pid = 'docker inspect --format "{{.State.Pid}}" "$1"'
            self.script(f'simulated-driver take-away "$({pid})"', container)
        faults = {key: value for key, value in {**faults, **settings}.items() if value}
        self.put("/run/simulated-gpu/faults.json", json.dumps(faults).encode())
        install = 'rm -f "$1"' if faults.get("nvidia_smi") == "missing" else 'ln -sf "$2" "$1"'
        self.script(install, "/usr/local/bin/nvidia-smi", "../lib/simulated-gpu/nvidia_smi.py")
        return faults

    def reboot(self) -> None:
        """Cut the host's power and boot it again."""
        since = str(time.time())
        docker("kill", "--signal", "HUP", self.container)
        self.wait_ready(since)


def all_hosts() -> list[Host]:
    """Return the existing hosts of this clone of the project."""
    names = docker(
        "ps", "--all", "--filter", f"label={LABEL}={CLONE}", "--format", f'{{{{.Label "{LABEL}.name"}}}}'
    )
    return [Host(name) for name in sorted(names.split())]


def inventory(hosts: list[Host]) -> str:
    lines = ["vllm_gpu:", "  hosts:"]
    for host in hosts:
        variables = {
            "ansible_host": host.alias,
            "ansible_ssh_common_args": f"-F {shlex.quote(str(host.ssh_config))}",
            "ansible_user": "root",
            "ansible_python_interpreter": "/usr/bin/python3",
        }
        lines += [
            f"    {host.name}:",
            *(f"      {key}: {json.dumps(value)}" for key, value in variables.items()),
        ]
    return "\n".join(lines)


def start(names: list[str], *, own_cards: bool) -> None:
    """Start hosts, one after the other: two runs at once would make the key and the images twice."""
    HOSTS.mkdir(parents=True, exist_ok=True)
    with (HOSTS / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not CLIENT_KEY.exists():
            key = ["-q", "-t", "ed25519", "-N", "", "-C", LABEL, "-f", str(CLIENT_KEY)]
            subprocess.run(["ssh-keygen", *key], check=True)
        cards = json.loads((HERE / "cards.json").read_bytes())
        for name in names:
            Host(name).up(own(cards, name) if own_cards else cards)


def own(description: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the cards with UUIDs of this host alone, like real ones: the last digits follow from its name."""
    end = hashlib.sha256(name.encode()).hexdigest()[:8]
    return {
        **description,
        "cards": [{**card, "uuid": card["uuid"][:-8] + end} for card in description["cards"]],
    }
