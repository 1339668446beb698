"""The simulated cards and their nvidia-smi, without a host: real locks, recorded texts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nvidia_smi
import pytest
import simulated_gpu as gpu

ROOT = Path(__file__).resolve().parents[2]
SIMULATED_HOST = ROOT / "molecule" / "simulated_host"
RECORDED = ROOT / "tests" / "recorded" / "nvidia-smi-2xh200.txt"

# The machine that the recording was made on.
H200 = {
    "name": "NVIDIA H200", "memory.total": 143771, "memory.reserved": 614, "persistence_mode": "Enabled",
    "mig.mode.current": "Disabled", "ecc.errors.uncorrected.volatile.total": "0", "fan.speed": "[N/A]",
    "temperature.gpu": "37", "pstate": "P0", "power.limit": "700.00",
}  # fmt: skip
FIRST, SECOND = "GPU-70d65b9f-b550-8580-0e78-0e37d2079d44", "GPU-458ac4d5-4aa7-2acf-60ae-dff50aab0b88"
CARDS = [
    {**H200, "uuid": FIRST, "pci.bus_id": "00000000:00:06.0", "power.draw": "118"},
    {**H200, "uuid": SECOND, "pci.bus_id": "00000000:00:07.0", "power.draw": "117"},
]
QUERY = ("--format=csv,noheader,nounits",)
HOLDER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import simulated_gpu as gpu
gpu.STATE, gpu.DEVICES = Path(sys.argv[2]), Path(sys.argv[3])
try:
    held = [gpu.allocate(card, int(mib)) for card, mib in zip(gpu.visible_cards(), sys.argv[4:]) if int(mib)]
except gpu.OutOfMemoryError:
    sys.exit("out of memory")
print("holding", flush=True)
sys.stdin.read()
"""


class Machine:
    """Two cards in a folder, and processes that hold memory of them."""

    def __init__(self, capture: pytest.CaptureFixture[str]) -> None:
        self.capture = capture
        self.processes: list[subprocess.Popen[str]] = []

    def load(self, cards: list[dict[str, object]]) -> None:
        file = gpu.STATE.parent / "cards.json"
        file.write_text(json.dumps({"driver_version": "580.159.04", "cuda_version": "13.0", "cards": cards}))
        gpu.load_driver(file)

    def hold(self, *mib: int) -> subprocess.Popen[str]:
        """Start a process that holds so much of each card."""
        words = [SIMULATED_HOST, gpu.STATE, gpu.DEVICES, *mib]
        process = subprocess.Popen(
            ["python3", "-c", HOLDER, *map(str, words)],
            executable=sys.executable,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.processes.append(process)
        assert process.stdout
        assert process.stdout.readline() == "holding\n", process.communicate()
        return process

    def nvidia_smi(self, *arguments: str) -> tuple[str, int]:
        """Return its output and exit status."""
        status = 0
        try:
            nvidia_smi.main(list(arguments))
        except SystemExit as end:
            status = int(end.code or 0)
        return self.capture.readouterr().out, status


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Machine]:
    """Two cards like those of the recording."""
    # On a file system whose device numbers /proc/locks shows, too.
    folder = Path("/dev/shm") / f"test-simulated-host-{os.getpid()}"  # noqa: S108
    state, devices = folder / "state", folder / "dev"
    devices.mkdir(parents=True)
    monkeypatch.setattr(nvidia_smi, "gpu", gpu)
    monkeypatch.setattr(gpu, "STATE", state)
    monkeypatch.setattr(gpu, "DEVICES", devices)
    made = Machine(capsys)
    made.load(CARDS)
    yield made
    for process in made.processes:
        process.kill()
        process.communicate()
    subprocess.run(["rm", "-rf", str(folder)], check=True)


def recorded_calls() -> list[tuple[list[str], str, int]]:
    """Return arguments, output and status of each recorded call that is simulated."""
    calls = []
    for block in RECORDED.read_text().split("$ nvidia-smi")[1:]:
        arguments, _, rest = block.partition("\n")
        output, _, status = rest.partition("rc=")
        if not arguments.split() or arguments.split()[0] not in ("topo", "pmon", "-q"):
            calls.append((arguments.split(), output.split("\n$ ")[0], int(status.split()[0])))
    return calls


def timeless(text: str) -> str:
    """Leave out the time of day."""
    return re.sub(r"\w{3} \w{3} [ \d]\d \d\d:\d\d:\d\d 20\d\d", "TIME", text)


@pytest.mark.parametrize("call", recorded_calls(), ids=lambda call: " ".join(call[0]) or "table")
def test_nvidia_smi_prints_what_the_real_one_printed(
    machine: Machine, call: tuple[list[str], str, int]
) -> None:
    pid = machine.hold(518, 2658).pid
    arguments, output, status = call
    printed, ended = machine.nvidia_smi(*arguments)
    # A longer PID is in the same columns.
    output = re.sub(rf"(?<= ) {{{len(str(pid)) - 3}}}548(?=\D)", str(pid), output)
    output = re.sub(r"(?<= )548(?=\D)", str(pid), output)
    assert timeless(printed) == timeless(output)
    assert ended == status


def test_a_list_of_one_card_is_refused_as_by_the_real_one(machine: Machine) -> None:
    printed, status = machine.nvidia_smi("-L", "-i", "1")
    assert printed.startswith("ERROR: Option -i is not valid for this command.")
    assert status != 0


def test_memory_is_free_again_when_its_process_is_gone(machine: Machine) -> None:
    query = ("--query-gpu=memory.used", *QUERY)
    process = machine.hold(1000, 0)
    assert machine.nvidia_smi(*query) == ("1009\n0\n", 0)
    process.kill()
    process.wait()
    assert machine.nvidia_smi(*query) == ("0\n0\n", 0)


def test_a_full_card_gives_no_more(machine: Machine) -> None:
    machine.hold(100_000, 0)
    second = machine.hold(40_000, 0)
    with pytest.raises(AssertionError, match="out of memory"):
        machine.hold(4000, 0)
    # Memory in two pieces can be allocated as a whole.
    machine.processes[0].kill()
    machine.processes[0].wait()
    machine.hold(103_000, 0)
    card = gpu.visible_cards()[0]
    assert gpu.processes(card)[second.pid] == 40_000
    assert card.used_mib == 143_009


def test_cards_are_numbered_by_their_slot_and_known_by_their_uuid(machine: Machine) -> None:
    machine.hold(0, 700)
    machine.load([{**card, "pci.bus_id": f"00000000:00:0{7 - n}.0"} for n, card in enumerate(CARDS)])
    printed, _ = machine.nvidia_smi("--query-gpu=index,uuid,memory.used", *QUERY)
    assert printed == f"0, {SECOND}, 709\n1, {FIRST}, 0\n"


@pytest.mark.parametrize(
    ("state", "message", "status"),
    [
        ("gone", "couldn't communicate with the NVIDIA driver", 9),
        ("mismatch", "Driver/library version mismatch", 18),
    ],
)
def test_a_broken_driver(machine: Machine, state: str, message: str, status: int) -> None:
    (gpu.STATE / "faults.json").write_text(json.dumps({"driver": state}))
    printed, ended = machine.nvidia_smi()
    assert message in printed
    assert ended == status


def test_a_container_that_lost_its_card(machine: Machine) -> None:
    node = gpu.DEVICES / "nvidia0"
    node.unlink()
    node.touch()
    assert machine.nvidia_smi("-L") == ("Failed to initialize NVML: Unknown Error\n", 255)


def test_no_processes_are_listed_but_their_memory_is_used(machine: Machine) -> None:
    pid = str(machine.hold(1000, 0).pid)
    query = ("--query-compute-apps=pid", "--format=csv,noheader")
    assert all(pid in machine.nvidia_smi(*call)[0] for call in (query, ()))
    (gpu.STATE / "faults.json").write_text('{"processes": "none"}')
    assert machine.nvidia_smi(*query) == ("", 0)
    assert "No running processes found" in machine.nvidia_smi()[0]
    assert machine.nvidia_smi("--query-gpu=memory.used", *QUERY)[0] == "1009\n0\n"
