#!/usr/bin/env python3
"""Measure what a person waits for, beside what they would use instead; print a Markdown table.

On two simulated GPU hosts, reached by SSH: `bench` is served by the role with its
defaults, `bench-plain` by tests/bench/plain.yml. The things that are compared take
turns, so that whatever else the machine does meets all of them; the figures are
medians of the rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.bench.tables import machine, print_row
from tests.gpu_host import DIRECTORY, ROOT, GpuHost, started

BIN = Path(sys.executable).parent

# Says when /health began or ceased to answer, in seconds of the host's clock.
WATCH = """
import time, urllib.request
was = None
while True:
    try:
        now = urllib.request.urlopen("http://127.0.0.1:8000/health", timeout=1).status == 200
    except OSError:
        now = False
    if now != was:
        print(int(now), time.time(), flush=True)
        was = now
    time.sleep(0.01)
"""
# Each in turn, ROUNDS times; prints the seconds of both. The time that a program
# takes is the host's own: no SSH is in it.
REFEREE = r"""
took() { local from=$EPOCHREALTIME; "$@" >/dev/null; printf '%s ' $((${EPOCHREALTIME/./} - ${from/./})); }
floor() { nvidia-smi --query-gpu=index,uuid --format=csv,noheader; docker inspect vllm-server; }
for ((n = 0; n < $1; n++)); do took floor; took "$2/check_gpu_allocation.sh"; echo; done
"""


def seconds(words: Sequence[str | Path], host: GpuHost | None = None, cwd: Path = ROOT) -> float:
    """Run a command, which must succeed, and return its wall time in seconds."""
    environment = host.environment if host else {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}
    begun = time.monotonic()
    done = subprocess.run(
        list(words), cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )  # fmt: skip
    took = time.monotonic() - begun
    if done.returncode:
        sys.exit(f"{' '.join(map(str, words))} failed:\n{done.stdout}")
    return took


def row(what: str, ours: Sequence[float], against: str, theirs: Sequence[float], goal: str) -> None:
    """Print a line of the table: medians, and the median of the rounds' ratios."""
    ratio = statistics.median(one / other for one, other in zip(ours, theirs, strict=True))
    print_row(
        what, f"{statistics.median(ours):.2f} s", against, f"{statistics.median(theirs):.2f} s", f"{ratio:.2f}", goal
    )  # fmt: skip


def nothing_to_change(ours: GpuHost, plain: GpuHost, rounds: int) -> None:
    """A serve that changes nothing, beside a ping and a plain role."""
    times: dict[str, list[float]] = {"ping": [], "serve": [], "plain": []}
    for _ in range(rounds + 1):
        times["ping"].append(seconds(["ansible", "vllm_gpu", "-m", "ping"], ours))
        times["serve"].append(seconds(["ansible-playbook", "serve.yml", "-e", "gpu_device_id=0"], ours))
        times["plain"].append(seconds(["ansible-playbook", "tests/bench/plain.yml"], plain))
    # The first round finds cold caches.
    ping, serve, role = (values[1:] for values in times.values())
    row("serve that changes nothing", serve, "ansible -m ping", ping, "≤ 2")
    row("serve that changes nothing", serve, "plain role of five tasks", role, "< 1")
    row("plain role of five tasks", role, "ansible -m ping", ping, "")


@contextlib.contextmanager
def watched(host: GpuHost) -> Iterator[list[tuple[bool, float]]]:
    """Note when the host's API answers and when not, for the time of a `with`."""
    seen: list[tuple[bool, float]] = []
    words = ["ssh", "-F", host.ssh_config, host.alias, "python3", "-u", "-"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write(WATCH)
        process.stdin.close()
        try:
            # Only once it watches does anything begin.
            lines = [process.stdout.readline()]
            yield seen
            # A change by hand doesn't wait for the server.
            while lines[-1][0] == "0" or len(lines) == 1:
                lines.append(process.stdout.readline())
        finally:
            process.terminate()
        lines += process.stdout.readlines()
    seen += [(line[0] == "1", float(line[2:])) for line in lines if line.strip()]


def without_api(host: GpuHost, words: Sequence[str | Path]) -> tuple[float, float]:
    """Run a change of cards; return the seconds without a healthy API, and those from the container's start on."""
    with watched(host) as seen:
        seconds(words, host)
    gone = next(at for up, at in seen if not up)
    back = seen[-1][1]
    form = "docker inspect --format '{{.State.StartedAt}}' vllm-server | xargs -I@ date -d @ +%s.%N"
    begun = float(host.look.check_output(form))
    return back - gone, back - begun


def changing_the_card(ours: GpuHost, plain: GpuHost, rounds: int) -> None:
    """The time without a healthy API, beside `docker compose down && up -d` by hand."""
    down, start, by_hand = [], [], []
    for number in range(rounds):
        card = str(1 - number % 2)
        one, its_start = without_api(ours, ["ansible-playbook", "serve.yml", "-e", f"gpu_device_id={card}"])
        down.append(one)
        start.append(its_start)
        compose = f"cd {DIRECTORY} && docker compose down && GPU_DEVICE_ID={card} docker compose up -d"
        by_hand.append(without_api(plain, ["ssh", "-F", str(plain.ssh_config), plain.alias, compose])[0])
    row("card change: without API", down, "down && up -d", by_hand, "")
    row("card change: without API", down, "the server's own start", start, "start + 1 s")


def referee(host: GpuHost, rounds: int) -> None:
    """The referee, beside one nvidia-smi and one docker inspect."""
    words = ["ssh", "-F", str(host.ssh_config), host.alias, "bash", "-s", str(rounds), DIRECTORY]
    said = subprocess.run(words, input=REFEREE, capture_output=True, text=True, check=True).stdout
    pairs = [tuple(int(value) / 1e6 for value in line.split()) for line in said.splitlines()]
    floor, ours = zip(*pairs, strict=True)
    row("check_gpu_allocation.sh", ours, "one nvidia-smi + one docker inspect", floor, "≤ 2")


def demo(rounds: int) -> None:
    """`make demo` from a fresh clone and again, beside its downloads."""
    fresh, again, downloads = [], [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            clone = Path(folder) / "clone"
            seconds(["git", "clone", "--quiet", ROOT, clone])
            pip = f"{BIN}/pip download --quiet --no-cache-dir --require-hashes --dest {folder}".split()
            downloads.append(seconds([*pip, "-r", ROOT / "requirements/runtime.txt"]))
            try:
                fresh.append(seconds(["make", "demo"], cwd=clone))
                again.append(seconds(["make", "demo"], cwd=clone))
            finally:
                seconds(["make", "clean"], cwd=clone)
    row("make demo, fresh clone", fresh, "its downloads from PyPI", downloads, "")
    row("make demo, again", again, "its downloads from PyPI", downloads, "< 30 s")


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7, help="default 7")
    parser.add_argument("--no-demo", action="store_true", help="leave out make demo, which takes minutes")
    options = parser.parse_args()
    print(f"{machine()}; medians of {options.rounds} rounds\n")
    print_row("what", "takes", "compared with", "takes", "ratio", "target")
    print_row("---", "--:", "---", "--:", "--:", "---")
    with started("bench") as ours, started("bench-plain") as plain:
        ours.serve(gpu_device_id=0)
        seconds(["ansible-playbook", "tests/bench/plain.yml"], plain)
        nothing_to_change(ours, plain, options.rounds)
        changing_the_card(ours, plain, options.rounds)
        referee(ours, options.rounds)
    if not options.no_demo:
        demo(options.rounds)


if __name__ == "__main__":
    main()
