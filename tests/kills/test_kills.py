"""Plays killed at random moments: the next play repairs the host, with no step by hand.

Each round starts on a host with a proven server and asks for the other card.
The controller, the SSH connection or the host itself goes away at a random
moment. Then either the same play is run again, which must bring the asked
server up, or one that has to fail, which must bring the old one back.
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
    # The sessions, not the server that accepts new ones (the oldest). What runs in them goes on.
    # Detached, as the session that asks for it goes away, too.
    cut = "sleep 0.2; pkill -9 -P $(pgrep -o -x dropbear)"
    host.ssh.run(f"(setsid sh -c '{cut}' </dev/null >/dev/null 2>&1 &)")
    time.sleep(0.3)


def whole_host(host: GpuHost, play: subprocess.Popen[str]) -> None:
    kill_tree(play.pid)
    gpuhost("reboot", host.name)


KILLERS: list[Callable[[GpuHost, subprocess.Popen[str]], None]] = [controller, connection, whole_host]


@pytest.fixture(scope="module")
def host() -> Iterator[GpuHost]:
    with start("kills") as one:
        yield one


@pytest.fixture(scope="module")
def lasts(host: GpuHost) -> float:
    """How long a play that changes the card takes; seconds."""
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
    """Start a play that asks for `card`, kill it, and return the task that it was in; '' if it had ended."""
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
    return f"{tasks[-1][:48]}" if tasks else "before the first"


def whole(host: GpuHost) -> bool:
    """Are the files complete: does Compose read them, does the referee end as it should?"""
    host.ssh.check_output(
        f"cd {DIRECTORY} && docker compose --file docker-compose.serving.yml config --quiet"
    )
    keys = host.ssh.check_output(f"grep -cE '^[A-Z_]+=' {DIRECTORY}/.env")
    return int(keys) > 10 and host.ssh.run(f"bash -n {DIRECTORY}/check_gpu_allocation.sh").rc == 0


def answering(host: GpuHost) -> str:
    if host.ssh.run("curl -sf http://127.0.0.1:8000/health").rc:
        return ""
    return host.served_gpu()


def settled(host: GpuHost) -> str:
    """The card of the server that answers, once what the killed play has begun has come to its end."""
    for _ in range(60):
        busy = host.ssh.run("pgrep -f 'AnsiballZ|^docker .*compose|^/usr/bin/python3$'").stdout
        if not busy and ((card := answering(host)) or " running" not in host.container()):
            return card
        time.sleep(0.5)
    return ""


@pytest.mark.parametrize("number", range(ROUNDS))
def test_the_next_play_repairs_the_host(host: GpuHost, lasts: float, table: list[str], number: int) -> None:
    dice = random.Random(f"{SEED}-{number}")  # noqa: S311 - no secret
    old, new = ("0", "1") if number % 2 == 0 else ("1", "0")
    killer, after, task = KILLERS[number % len(KILLERS)], dice.uniform(0.8, lasts), ""
    while not task:
        host.serve(gpu_device_id=old)
        task = kill_a_play(host, new, after, killer)
        after *= 0.8
    assert whole(host)
    left = settled(host)
    # From here on the recorded state says which server was proven last.
    record = host.ssh.check_output(f"cat {DIRECTORY}/.proven/current/record.json")
    proven = "1" if '"requested": "1"' in record else "0"

    started = time.monotonic()
    if number % 2 == 0:
        host.serve(gpu_device_id=new)
        expected, outcome = new, "repaired it"
    else:
        output = host.fail_to_serve(gpu_device_id=new, vllm_gpu_model="acme/does-not-exist")
        said = re.search(r"serves as before: Qwen/Qwen3-0.6B on GPU (\d)", output)
        assert said, output
        # What serves when a play begins is what it puts back, recorded or not; otherwise, what was recorded.
        assert said[1] == (left or proven)
        expected, outcome = said[1], "failed, and put it back"
    seconds = time.monotonic() - started
    serves = answering(host)
    table.append(
        f"| {killer.__name__.replace('_', ' ')} | {after:.1f} s | {task} | "
        f"{'GPU ' + left if left else 'not answering'} | {outcome} in {seconds:.0f} s | GPU {serves} |\n"
    )
    assert serves == expected
    # The files are those of the server that runs, and no litter lies beside them.
    assert host.play("playbooks/verify.yml").code == 0
    listing = host.ssh.check_output(f"ls -A {DIRECTORY}").split()
    assert sorted(listing) == [".env", ".proven", "check_gpu_allocation.sh", "docker-compose.serving.yml"]
