#!/usr/bin/env python3
"""Measure rollouts over light hosts (tests/light_fleet); print Markdown tables.

For each size, from servers that are proven on GPU 0, scripts/rollout moves every
server to GPU 1; a second run changes nothing. After each run the servers' cards are
read from the hosts. docs/benchmarks.md explains the columns.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "molecule/simulated_host"))


from images import DEFAULT_IMAGE
from machine import ROOT, HostError

from tests.bench.tables import machine, print_row
from tests.light_fleet.cards import read_json
from tests.light_fleet.fleet import Fleet
from tests.light_fleet.host import Host

HERE = ROOT / ".cache/bench-fleet"
BIN = ROOT / ".venv/bin"
DIRECTORY = "/opt/vllm-gpu"
TICKS = os.sysconf("SC_CLK_TCK")
COLUMNS = (
    "play", "wall", "s a host", "controller s a host", "hosts' s a host", "memory MiB", "its largest process",
    "events", "events a s", "others %",
)  # fmt: skip


@dataclass(frozen=True)
class Way:
    """One way to run a rollout, and how it differs from ansible.cfg."""

    name: str
    playbook: str = ""  # run by ansible-playbook; without one scripts/rollout runs
    environment: dict[str, str] = field(default_factory=dict)
    delay: int = 0  # seconds that a server loads


ROLLOUT, SERVE = "playbooks/rollout.yml", "playbooks/serve.yml"
FACTS = HERE / "facts.yml"
WAYS = (
    Way("scripts/rollout as it is"),
    Way("forks 5", environment={"ANSIBLE_FORKS": "5"}),
    Way("no pipelining", environment={"ANSIBLE_PIPELINING": "False"}),
    Way("ansible-playbook rollout.yml", ROLLOUT),
    Way("the same, facts gathered first", str(FACTS)),
    Way("serve.yml: all hosts in one batch", SERVE),
    Way("serve.yml, strategy free", SERVE, {"ANSIBLE_STRATEGY": "free"}),
    Way("serve.yml, servers load 15 s, forks 5", SERVE, {"ANSIBLE_FORKS": "5"}, 15),
    Way("serve.yml, servers load 15 s, forks 20", SERVE, {"ANSIBLE_FORKS": "20"}, 15),
)


class Figures(NamedTuple):
    """The cost of one run; seconds and MiB."""

    wall: float
    controller: float
    hosts: float
    memory: float
    largest: float
    events: float
    others: float

    def row(self, count: int, play: str) -> list[str]:
        """Return the cells of the table's row for so many hosts."""
        per = [f"{value / count:.2f}" for value in (self.wall, self.controller, self.hosts)]
        events = [f"{self.events:.0f}", f"{self.events / self.wall:.0f}"] if self.events else ["-", "-"]
        memory = [f"{value:.0f}" for value in (self.memory, self.largest)]
        return [play, f"{self.wall:.1f}", *per, *memory, *events, f"{self.others:.0f}"]


def play(way: Way, gpu: int) -> dict[str, Any]:
    """Run it in this process; return the number of events, and each host's outcome.

    A measurement runs this in a child process.
    """
    os.environ.update(way.environment)
    inventory = str(HERE / "hosts.yml")
    if way.playbook:
        words = ["ansible-playbook", "-i", inventory, "-e", f"gpu_device_id={gpu}", way.playbook]
        done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, check=False, text=True)
        line = r"(?m)^(\S+) +: ok=\d+ +changed=(\d+) +unreachable=(\d+) +failed=(\d+)"
        outcomes = {
            name: "failed" if int(lost) or int(failed) else "changed" if int(changed) else "already_right"
            for name, changed, lost, failed in re.findall(line, done.stdout)
        }
        return {"events": 0, "outcomes": outcomes}
    sys.path.insert(0, str(ROOT / "scripts"))
    script: Any = ModuleType("rollout")
    script.__file__ = str(ROOT / "scripts/rollout")
    SourceFileLoader("rollout", script.__file__).exec_module(script)
    sys.argv = ["rollout", "-i", inventory, "-e", f"gpu_device_id={gpu}", "--reports", str(HERE / "rollouts")]
    events = 0

    class Counted(script.Run):  # type: ignore[misc]
        def on_event(self, event: dict[str, Any]) -> bool:
            nonlocal events
            events += 1
            return bool(super().on_event(event))

    with contextlib.redirect_stdout(sys.stderr):
        Counted(script.options()).run()
    report = read_json(HERE / "rollouts/latest/report.json")
    return {"events": events, "outcomes": {host["name"]: host["outcome"] for host in report["hosts"]}}


def tree(root: int) -> Iterator[int]:
    """Yield the controller's processes: those below `root`, without those of light hosts."""
    mine = Path("/proc/self/ns/mnt").readlink()
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    waiting = [root]
    while waiting:
        pid = waiting.pop()
        with contextlib.suppress(OSError):
            # A light host has a mount namespace of its own.
            if Path(f"/proc/{pid}/ns/mnt").readlink() == mine:
                yield pid
                waiting += children.get(pid, [])


def memory(root: int) -> tuple[float, float]:
    """Return the MiB of the controller and of its largest process; shared pages count once."""
    kib, largest = 0, 0
    for pid in tree(root):
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
            used = {key: int(value) for key, value in re.findall(r"^(Pss|Rss): +(\d+)", text, re.MULTILINE)}
            kib += used.get("Pss", 0)
            largest = max(largest, used.get("Rss", 0))
    return kib / 1024, largest / 1024


def busy() -> float:
    """Return the processor time of this whole machine; seconds."""
    user, nice, system, _idle, _wait, *rest = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    return sum(map(int, (user, nice, system, *rest))) / TICKS


class Bench:
    """The light hosts, and measurements on them."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.gpu = 0

    def hosts_seconds(self) -> tuple[float, float]:
        """Return the processor time of the hosts, in plays and in their engine."""
        hosts = 0.0
        for name in self.fleet.names:
            used = (self.fleet.path(name) / "cpu").read_text()
            hosts += sum(60 * int(m) + float(s) for m, s in re.findall(r"(\d+)m([\d.]+)s", used))
        fields = Path(f"/proc/{self.fleet.engine()}/stat").read_text().rpartition(")")[2].split()
        return hosts, sum(map(int, fields[11:15])) / TICKS

    def measure(self, way: Way, gpu: int) -> Figures:
        """Run the play, and check its result."""
        hosts, engine = self.hosts_seconds()
        changes = gpu != self.gpu
        for name in self.fleet.names:
            self.fleet.fault(name, {"start_delay": str(way.delay or "")})
        started, before, peak = time.monotonic(), busy(), (0.0, 0.0)
        order = json.dumps([vars(way), gpu])
        with (HERE / "result.json").open("w+") as result, (HERE / "log").open("w") as log:
            words = [sys.executable, __file__, "--play", order]
            # In its own session: two signals at once, from a terminal and from here, block the runner.
            process = subprocess.Popen(words, cwd=ROOT, stdout=result, stderr=log, start_new_session=True)
            try:
                while (ended := os.wait4(process.pid, os.WNOHANG))[0] == 0:
                    sampled = time.monotonic()
                    now = memory(process.pid)
                    peak = max(peak[0], now[0]), max(peak[1], now[1])
                    # Reading may take up to a twentieth of a processor.
                    time.sleep(max(0.2, 20 * (time.monotonic() - sampled)))
            except BaseException:
                # The runner ends ansible-playbook, too.
                process.terminate()
                process.wait()
                raise
            wall, spent = time.monotonic() - started, busy() - before
            result.seek(0)
            outcome = json.loads(result.read() or '{"events": 0, "outcomes": {}}')
        used: resource.struct_rusage = ended[2]
        self.gpu = gpu
        self.check(outcome["outcomes"], changes=changes)
        hosts_now, engine_now = self.hosts_seconds()
        hosts, engine = hosts_now - hosts, engine_now - engine
        controller = used.ru_utime + used.ru_stime - hosts
        others = max(0, spent - controller - hosts - engine) / wall / (os.cpu_count() or 1)
        return Figures(wall, controller, hosts + engine, *peak, outcome["events"], 100 * others)

    def check(self, outcomes: dict[str, str], *, changes: bool) -> None:
        """Stop if the run didn't do what is measured."""
        names = self.fleet.names
        if outcomes != dict.fromkeys(names, "changed" if changes else "already_right"):
            counted = dict(Counter(outcomes.values()))
            sys.exit(f"these are not the expected outcomes: {counted}\n{(HERE / 'log').read_text()}")
        for name in names:
            used = [bool(card.used_mib) for card in self.fleet.cards(name)]
            if used.index(True) != self.gpu or used.count(True) != 1:
                sys.exit(f"{name} isn't on GPU {self.gpu} only: {used}")

    def prepare(self, count: int) -> None:
        """Make so many hosts, each with a server that is proven on GPU 0.

        The role sets up the first one. The others get a copy of its files, with
        their own port and card, and start the server by Compose.
        """
        self.fleet.down()
        with self.fleet.locked():
            self.fleet.up(count)
        first, *others = self.fleet.names
        (HERE / "hosts.yml").write_text(self.fleet.inventory([first]))
        done = play(Way("", SERVE), 0)
        if done["outcomes"] != {first: "changed"}:
            sys.exit("the first host could not be set up")
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda name: self.copy(first, name), others))
        (HERE / "hosts.yml").write_text(self.fleet.inventory(self.fleet.names))
        self.gpu = 0

    def copy(self, first: str, name: str) -> None:
        """Copy one host's server to another."""
        source, target = self.fleet.path(first), self.fleet.path(name)
        shutil.copytree(source / "opt", target / "opt", symlinks=True, dirs_exist_ok=True)
        kept = target / f"opt/vllm-gpu/.proven/{(target / 'opt/vllm-gpu/.proven/current').readlink()}"
        cards = [read_json(path / "cards.json")["cards"][0]["uuid"] for path in (source, target)]
        for path in (target / "opt/vllm-gpu/.env", kept / ".env"):
            port = read_json(target / "host.json")["port"]
            path.write_text(re.sub(r"(?m)^VLLM_PORT=.*", f"VLLM_PORT={port}", path.read_text()))
        project = f"--project-directory {DIRECTORY} --project-name vllm-gpu"
        words = f"compose {project} --file docker-compose.serving.yml --env-file .env up --detach"
        program = f"import os; os.chdir('{DIRECTORY}'); os.execvp('docker', 'docker {words}'.split())"
        subprocess.run([target / "python3", "-I", "-S", "-c", program], check=True, capture_output=True)
        boxes = [box for path in (source, target) for box in Host(path).containers]
        hashes = [box.body["Labels"]["com.docker.compose.config-hash"] for box in boxes]
        for path in (kept / "record.json", kept / "gpu"):
            text = path.read_text()
            for before, after in ((hashes[0], hashes[1]), (cards[0], cards[1])):
                text = text.replace(before, after)
            path.write_text(text)

    def sizes(self, sizes: list[int]) -> None:
        """Measure each size once."""
        print_row("hosts", *COLUMNS)
        print_row(*["--:"] * (len(COLUMNS) + 1))
        for count in sizes:
            self.prepare(count)
            for what in ("changes everything", "changes nothing"):
                figures = self.measure(WAYS[0], 1)
                print_row(str(count), *figures.row(count, what))

    def ways(self, count: int, repeats: int) -> None:
        """Measure each way at one size, in turn; print medians."""
        self.prepare(count)
        found: dict[tuple[str, str], list[Figures]] = {}
        for _ in range(repeats):
            for way in WAYS:
                target = 1 - self.gpu
                found.setdefault((way.name, "everything"), []).append(self.measure(way, target))
                if not way.delay:
                    found.setdefault((way.name, "nothing"), []).append(self.measure(way, target))
        print_row("way", *COLUMNS)
        print_row("---", *["--:"] * len(COLUMNS))
        for (name, what), runs in found.items():
            median = Figures._make(statistics.median(column) for column in zip(*runs, strict=True))
            print_row(name, *median.row(count, what))


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--sizes", default="1 10 100 1000", help="numbers of hosts")
    parser.add_argument("--middle", type=int, default=12, help="hosts for the choices; 0 leaves them out")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each choice")
    parser.add_argument("--play", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.play:
        way, gpu = json.loads(options.play)
        print(json.dumps(play(Way(**way), gpu)))
        return
    # Without the Ansible settings of this shell.
    for key in [key for key in os.environ if key.startswith("ANSIBLE_")]:
        del os.environ[key]
    os.environ["PATH"] = f"{BIN}:{os.environ['PATH']}"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    HERE.mkdir(parents=True, exist_ok=True)
    first = {"hosts": "vllm_gpu", "gather_facts": True}
    FACTS.write_text(json.dumps([first, {"ansible.builtin.import_playbook": str(ROOT / ROLLOUT)}]))
    # Its own fleet: others stay as they are.
    fleet = Fleet(HERE / "fleet")
    bench = Bench(fleet)
    try:
        print(f"{machine()}, image {DEFAULT_IMAGE}\n", flush=True)
        bench.sizes([int(size) for size in options.sizes.split()])
        if options.middle:
            print(f"\n{options.middle} hosts, medians of {options.repeats}:\n")
            bench.ways(options.middle, options.repeats)
    except HostError as error:
        sys.exit(f"bench-fleet: {error}")
    finally:
        fleet.down()
        shutil.rmtree(HERE)


if __name__ == "__main__":
    main()
