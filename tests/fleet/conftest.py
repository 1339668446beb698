"""A fleet of simulated GPU hosts reached by SSH, and scripts/rollout over it."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from fleet.processes import kill_tree

from tests.gpu_host import ROOT, GpuHost, gpuhost

NAMES = [f"fleet{number}" for number in range(1, 6)]
Act = Callable[[subprocess.Popen[str]], object]


class Ended(NamedTuple):
    """A rollout that has ended."""

    code: int
    events: list[dict[str, Any]]
    errors: str
    report: dict[str, Any]

    @property
    def outcomes(self) -> dict[str, str]:
        return {host["name"]: host["outcome"] for host in self.report["hosts"]}


class Fleet:
    """Five hosts with a server each, and their inventory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.listing = yaml.safe_load(gpuhost("inventory", *NAMES))
        self.hosts = {name: self._host(name) for name in NAMES}

    def _host(self, name: str) -> GpuHost:
        path = self.folder / f"{name}.yml"
        path.write_text(gpuhost("inventory", name), encoding="utf-8")
        return GpuHost(name, path)

    def inventory(self, **variables: dict[str, Any] | None) -> Path:
        """Write the inventory, with more variables for some hosts; None leaves a host out."""
        listing = json.loads(json.dumps(self.listing))
        hosts = listing["vllm_gpu"]["hosts"]
        for name, more in variables.items():
            if more is None:
                del hosts[name]
            else:
                hosts[name] = {**hosts.get(name, {}), **more}
        path = self.folder / "the hosts.yml"
        path.write_text(yaml.safe_dump(listing), encoding="utf-8")
        return path

    @property
    def environment(self) -> dict[str, str]:
        return next(iter(self.hosts.values())).environment

    def rollout(
        self, *words: str, gpu: int | None = 1, inventory: Path | None = None, reports: str = "rollouts",
        at: tuple[str, str] | None = None, act: Act | None = None,
    ) -> Ended:  # fmt: skip
        """Run scripts/rollout; call `act` once when the host `at[0]` enters the phase `at[1]`."""
        command = [str(ROOT / "scripts/rollout"), "--json", "--reports", str(self.folder / reports), *words]
        if "--resume" not in words:
            command += ["-i", str(inventory or self.inventory())]
        if gpu is not None:
            command += ["-e", f"gpu_device_id={gpu}"]
        events = []
        with (self.folder / "stderr").open("w+", encoding="utf-8") as stderr:
            with subprocess.Popen(
                command, cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, stderr=stderr, text=True,
                start_new_session=True,
            ) as process:  # fmt: skip
                assert process.stdout
                for event in map(json.loads, process.stdout):
                    events.append(event)
                    if act and event["event"] == "phase" and at == (event["host"], event["phase"]):
                        act(process)
                        act = None
            stderr.seek(0)
            errors = stderr.read()
        path = self.folder / reports / "latest/report.json"
        report = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        assert "Traceback" not in errors, errors
        return Ended(process.returncode, events, errors, report)

    def serving(self) -> str:
        """Return the card that each server is really on, in the order of the hosts: `01111`."""
        return "".join(host.served_gpu() or "-" for host in self.hosts.values())

    def containers(self) -> list[str]:
        return [host.container() for host in self.hosts.values()]


@pytest.fixture(scope="session")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    gpuhost("down", *NAMES)
    gpuhost("up", "--own-cards", *NAMES)
    yield Fleet(tmp_path_factory.mktemp("fleet"))
    gpuhost("down", *NAMES)


@pytest.fixture
def fleet(started: Fleet) -> Fleet:
    """The fleet with a proven server on GPU 0 everywhere, and no earlier rollout."""
    for host in started.hosts.values():
        host.put_back()
    subprocess.run(["rm", "-rf", started.folder / "rollouts", started.folder / "other"], check=True)
    return started


def interrupt(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGINT)


def kill(process: subprocess.Popen[str]) -> None:
    kill_tree(process.pid)
