"""Plays killed at random moments: the next play repairs the host, with no manual step.

Each round starts on a host with a proven server and requests the other card. At a
random moment the controller, the SSH connection or the whole host is killed. Then the
same play runs again and must bring the requested server up; or, in every other round,
a play that has to fail must restore the old server.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import time
from collections.abc import Callable, Iterator

import pytest
from fleet.processes import kill_tree

from tests.gpu_host import DIRECTORY, ROOT, GpuHost, gpuhost
from tests.gpu_host import started as start

ROUNDS = int(os.environ.get("KILLS") or 30)
TABLE = ROOT / ".cache/kills.md"
HEAD = "| killed | after | in the task | right afterwards | the next play | serves |\n|---|---|---|---|---|---|\n"
SEED = os.environ.get("KILLS_SEED") or str(random.randrange(10**6))  # noqa: S311 - no secret


def controller(_host: GpuHost, play: subprocess.Popen[str]) -> None:
    kill_tree(play.pid)


def connection(host: GpuHost, _play: subprocess.Popen[str]) -> None:
    # The sessions, not the server that accepts new ones (the oldest). Their commands go on.
    # Detached, as this session is killed, too.
    cut = "sleep 0.2; pkill -9 -P $(pgrep -o -x dropbear)"
    host.ssh.run(f"(setsid sh -c '{cut}' </dev/null >/dev/null 2>&1 &)")
    time.sleep(0.3)


def whole_host(host: GpuHost, play: subprocess.Popen[str]) -> None:
    kill_tree(play.pid)
    gpuhost("reboot", host.name)


KILLERS: list[Callable[[GpuHost, subprocess.Popen[str]], None]] = [controller, connection, whole_host]


@pytest.fixture(scope="module")
def host() -> Iterator[GpuHost]:
    with start("kills") as started:
        yield started


@pytest.fixture(scope="module")
def duration(host: GpuHost) -> float:
    """The seconds that a play takes which changes the card."""
    host.fault("start_delay=2")
    host.serve(gpu_device_id=0)
    started = time.monotonic()
    host.serve(gpu_device_id=1)
    return time.monotonic() - started


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    rows: list[str] = []
    yield rows
    TABLE.write_text(f"Seed {SEED}.\n\n{HEAD}{''.join(rows)}", encoding="utf-8")


def kill_a_play(host: GpuHost, card: str, after: float, killer: Callable[..., None]) -> str:
    """Start a play that requests `card`, kill it, and return its task at that time; '' if it had ended."""
    with subprocess.Popen(
        ["ansible-playbook", "serve.yml", "-e", f"gpu_device_id={card}"],
        cwd=ROOT, env=host.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    ) as play:  # fmt: skip
        time.sleep(after)
        ended = play.poll() is not None
        if not ended:
            killer(host, play)
        output, _ = play.communicate(timeout=200)
    if ended:
        return ""
    tasks = re.findall(r"TASK \[(?:\S+ : )?(.*?)\]", output)
    return str(tasks[-1])[:48] if tasks else "before the first"


def files_are_complete(host: GpuHost) -> bool:
    """Compose can read them, .env has its keys, and the referee is a whole script."""
    host.ssh.check_output(
        f"cd {DIRECTORY} && docker compose --file docker-compose.serving.yml config --quiet"
    )
    keys = host.ssh.check_output(f"grep -cE '^[A-Z_]+=' {DIRECTORY}/.env")
    return int(keys) > 10 and host.ssh.run(f"bash -n {DIRECTORY}/check_gpu_allocation.sh").rc == 0


def answering_gpu(host: GpuHost) -> str:
    if host.ssh.run("curl -sf http://127.0.0.1:8000/health").rc:
        return ""
    return host.served_gpu()


def settled(host: GpuHost) -> str:
    """The card of the server that answers, once the killed play's last command has ended."""
    for _ in range(60):
        busy = host.ssh.run("pgrep -f 'AnsiballZ|^docker .*compose|^/usr/bin/python3$'").stdout
        if not busy and ((card := answering_gpu(host)) or " running" not in host.container()):
            return card
        time.sleep(0.5)
    return ""


@pytest.mark.parametrize("number", range(ROUNDS))
def test_the_next_play_repairs_the_host(
    host: GpuHost, duration: float, table: list[str], number: int
) -> None:
    dice = random.Random(f"{SEED}-{number}")  # noqa: S311 - no secret
    old, new = ("0", "1") if number % 2 == 0 else ("1", "0")
    killer, after, task = KILLERS[number % len(KILLERS)], dice.uniform(0.8, duration), ""
    while not task:
        host.serve(gpu_device_id=old)
        task = kill_a_play(host, new, after, killer)
        after *= 0.8
    assert files_are_complete(host)
    # Every other time the next play overlaps with what the killed one left running.
    left = settled(host) if number % 2 else answering_gpu(host)
    # The record names the server that was proven last.
    record = host.ssh.check_output(f"cat {DIRECTORY}/.proven/current/record.json")
    proven = "1" if '"requested": "1"' in record else "0"

    started = time.monotonic()
    if number % 2 == 0:
        host.serve(gpu_device_id=new)
        expected, outcome = new, "repaired it"
    else:
        output = host.fail_to_serve(gpu_device_id=new, vllm_gpu_model="acme/does-not-exist")
        restored = re.search(r"serves as before: Qwen/Qwen3-0.6B on GPU (\d)", output)
        assert restored, output
        # A play restores the server that ran when it started, else the recorded one.
        assert restored[1] == (left or proven)
        expected, outcome = restored[1], "failed, and restored it"
    seconds = time.monotonic() - started
    serves = answering_gpu(host)
    table.append(
        f"| {killer.__name__.replace('_', ' ')} | {after:.1f} s | {task} | "
        f"{'GPU ' + left if left else 'not answering'} | {outcome} in {seconds:.0f} s | GPU {serves} |\n"
    )
    assert serves == expected
    # The files are the running server's, and no temporary file is left.
    assert host.play("playbooks/verify.yml").code == 0
    listing = host.ssh.check_output(f"ls -A {DIRECTORY}").split()
    assert sorted(listing) == [".env", ".proven", "check_gpu_allocation.sh", "docker-compose.serving.yml"]
