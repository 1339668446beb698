"""A simulated GPU host, and the plays that run against it as a user runs them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import testinfra
from testinfra.host import Host

ROOT = Path(__file__).resolve().parents[1]
GPUHOST = ROOT / "molecule/simulated_host/gpuhost.py"
CARDS = ROOT / "molecule/simulated_host/cards.json"
DIRECTORY = "/opt/vllm-gpu"
HEALTHY = "for i in $(seq 300); do curl -sf 127.0.0.1:8000/health && exit; sleep 0.2; done; exit 1"
# A copy of what a play has proven once, restored in a tenth of the time of a play.
SAVE = f"rm -rf /root/proven && cp -a {DIRECTORY} /root/proven"
RESTORE = (
    f"docker rm -f vllm-server; rm -rf /run/vllm_gpu.lock {DIRECTORY} && cp -a /root/proven {DIRECTORY} && "
    f"cd {DIRECTORY} && docker compose -f docker-compose.serving.yml up -d && {HEALTHY}"
)


def gpuhost(*arguments: str) -> str:
    done = subprocess.run([GPUHOST, *arguments], check=False, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


class Result(NamedTuple):
    code: int
    output: str

    @property
    def changed(self) -> int:
        match = re.search(r"changed=(\d+)", self.output)
        assert match, self.output
        return int(match[1])


class GpuHost:
    """One simulated GPU host: `play` on it, read it over `ssh`, make it misbehave."""

    def __init__(self, name: str, inventory: Path) -> None:
        self.name = name
        self.inventory = inventory
        self.ssh_config = ROOT / f".cache/simulated-hosts/{name}/ssh_config"
        (self.alias,) = re.findall(r'ansible_host: "(\S+)"', inventory.read_text(encoding="utf-8"))
        self.ssh: Host = testinfra.get_host(f"ssh://{self.alias}", ssh_config=str(self.ssh_config))
        self._proven: tuple[str, str] | None = None
        self._faulty = True  # as another run may have left it

    @property
    def environment(self) -> dict[str, str]:
        """The environment of a play against this host, without the Ansible settings of this shell."""
        others = {key: value for key, value in os.environ.items() if not key.startswith("ANSIBLE_")}
        return {
            **others,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "ANSIBLE_INVENTORY": str(self.inventory),
            "ANSIBLE_NOCOLOR": "1",
            "PYTHONUNBUFFERED": "1",  # so that a test can act on a line
        }

    def play(self, playbook: str, *arguments: str, **variables: object) -> Result:
        """Run a playbook from the root of the clone, with the variables as -e."""
        words = [word for key, value in variables.items() for word in ("-e", f"{key}={value}")]
        done = subprocess.run(
            ["ansible-playbook", playbook, *words, *arguments],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
            check=False,
        )
        return Result(done.returncode, done.stdout)

    def serve(self, *arguments: str, **variables: object) -> Result:
        result = self.play("serve.yml", *arguments, **variables)
        assert result.code == 0, result.output
        return result

    def fail_to_serve(self, *arguments: str, **variables: object) -> str:
        result = self.play("serve.yml", *arguments, **variables)
        assert result.code != 0, result.output
        return result.output

    def fault(self, *arguments: str) -> None:
        gpuhost("fault", self.name, *arguments)
        self._faulty = arguments != ("--clear",)

    def cure(self) -> None:
        """End the faults, if there are any."""
        if self._faulty:
            self.fault("--clear")

    def restore(self) -> None:
        """A proven server on GPU 0, set up by the role's defaults, whatever ran before."""
        self.cure()
        if self._proven and self._proven == (self.container(), self.files()):
            return
        if self._proven:
            self.ssh.check_output(RESTORE)
        else:
            self.ssh.run(f"docker rm -f vllm-server; rm -rf {DIRECTORY}")
            self.serve(gpu_device_id=0)
            self.ssh.check_output(SAVE)
        self._proven = (self.container(), self.files())

    def wait_healthy(self) -> None:
        self.ssh.check_output(HEALTHY)

    def container(self) -> str:
        """The container's id, start and status; '' without one."""
        form = "{{.Id}} {{.State.StartedAt}} {{.State.Status}}"
        done = self.ssh.run(f"docker inspect --format '{form}' vllm-server")
        return str(done.stdout.strip()) if done.rc == 0 else ""

    def made_from(self) -> str:
        """All that the container was made from; '' without one."""
        done = self.ssh.run("docker inspect vllm-server")
        if done.rc:
            return ""
        raw = json.loads(done.stdout)[0]
        raw["Config"].pop("Hostname")
        networks = sorted(raw["NetworkSettings"]["Networks"])
        mounts = sorted(f"{mount['Type']} {mount['Name']} {mount['Destination']}" for mount in raw["Mounts"])
        made = [raw["Config"], raw["HostConfig"], raw["Image"], networks, mounts]
        # A restarted Docker Engine has empty lists for what is not set.
        return json.dumps(made, indent=1, sort_keys=True).replace(": null", ": []")

    def files(self) -> str:
        """Every file of the service with its inode, times and checksum; a directory's times change with temporary files."""
        listing = (
            "find . -type d -printf '%p %i %m\\n' -o -printf '%p %i %m %C@ %l\\n' | sort && "
            "find . -type f -exec md5sum {} +"
        )
        return str(self.ssh.run(f"cd {DIRECTORY} 2>/dev/null && {listing}").stdout)

    def served_gpu(self) -> str:
        """The index of the card that the server's own process holds, by nvidia-smi; '' without one."""
        pids = self.ssh.run("docker top vllm-server -eo pid").stdout.split()
        rows = self.ssh.check_output("nvidia-smi --query-compute-apps=gpu_uuid,pid --format=csv,noheader")
        cards = self.ssh.check_output("nvidia-smi --query-gpu=uuid,index --format=csv,noheader")
        index = dict(line.split(", ") for line in cards.splitlines())
        on = {index[row.split(", ")[0]] for row in rows.splitlines() if row.split(", ")[1] in pids}
        return ",".join(sorted(on))


def running(name: str) -> GpuHost:
    """The simulated GPU host of that name, which is running."""
    inventory = ROOT / ".cache" / f"{name}.yml"
    inventory.write_text(gpuhost("inventory", name), encoding="utf-8")
    return GpuHost(name, inventory)


@contextlib.contextmanager
def started(name: str) -> Iterator[GpuHost]:
    """A fresh simulated GPU host of that name, removed at the end of the `with`."""
    gpuhost("down", name)
    gpuhost("up", name)
    try:
        yield running(name)
    finally:
        gpuhost("down", name)
