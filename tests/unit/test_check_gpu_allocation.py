"""The referee against fakes of nvidia-smi and docker that replay what the real ones said."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "check_gpu_allocation.sh"
PAGE = (ROOT / "docs" / "check_gpu_allocation.md").read_text(encoding="utf-8")
RECORDED = ROOT / "tests" / "recorded"

GPU0 = "GPU-896c7a6e-183b-73fc-e751-fe7a873f5819"  # the cards of the recorded host
GPU1 = "GPU-6fbb807e-f2ed-c36a-73e4-9321b04b778a"
MIG = "MIG-41b3359c-e721-56e5-8009-12e5797ed514"
CONTAINER = "bfc284fa500f31946e814ea11ec2be4519ab476d9d25d59d353062e9757262f0"
TENANT = 2**22 + 7  # no process can have this PID, so its name can't be read

KEYS = {
    "": "schema verdict cause code message cure expected gpus container processes other_processes"
    " processes_listed notes",
    "expected": "id index uuid",
    "gpus": "index uuid pci_bus_id name memory_total_mib memory_used_mib driver_version",
    "container": "name id status health exit_code started_at image requested requested_count pids",
    "processes": "pid name gpu_uuid gpu_index memory_mib",
    "other_processes": "pid name gpu_uuid gpu_index memory_mib",
}

# Answers from files beside it: <program>.<call>, .err, .rc, and .sh for what it does before.
# Whatever reaches its standard input is kept: nothing may.
FAKE = r"""#!/bin/bash
here=${0%/*} program=${0##*/}
case "$program $*" in
  "nvidia-smi --query-gpu="*) call=gpus ;;
  "nvidia-smi --query-compute-apps="*) call=apps ;;
  *) call=$1 ;;
esac
base=$here/$program.$call
printf -v line '%q ' "$program" "$@"
echo "$line" >>"$here/calls" # in one go: they run side by side
cat >>"$here/stdin"
if [[ -f $base.sh ]]; then . "$base.sh"; fi
[[ -f $base ]] && cat "$base"
[[ -f $base.err ]] && cat "$base.err" >&2
if [[ -f $base.rc ]]; then exit "$(<"$base.rc")"; fi
[[ -f $base ]]
"""


@dataclass
class Result:
    code: int
    out: bytes
    err: str

    @property
    def text(self) -> str:
        return self.out.decode()

    @property
    def flat(self) -> str:
        """The report without its line breaks."""
        return " ".join(self.text.split())

    @property
    def json(self) -> dict[str, Any]:
        """The JSON object, after checking that it has the documented form."""
        assert bool(self.err) == (self.code == 2)
        data: dict[str, Any] = json.loads(self.out.decode("utf-8"))
        assert " ".join(data) == KEYS[""]
        for key, names in KEYS.items():
            for part in [data[key]] if isinstance(data.get(key), dict) else data.get(key) or []:
                assert " ".join(part) == names
        assert data["code"] == self.code
        assert data["verdict"] == ("ok", "misplaced", "usage", "unknown")[self.code]
        assert (data["cause"] is None) == (data["cure"] is None) == (self.code == 0)
        return data


class Host:
    """A machine with two cards and one container, in a directory of fakes."""

    def __init__(self, path: Path) -> None:
        """Make the recorded host: vLLM was asked for GPU 1 and is on it."""
        self.path = path
        path.mkdir(exist_ok=True)
        for program in ("nvidia-smi", "docker"):
            (path / program).write_text(FAKE)
            (path / program).chmod(0o755)
        self.cards(used=(0, 7697))
        self.apps((GPU1, 16911, 7688))
        self.container()
        self.top(16052, 16910, (16911, "VLLM::EngineCor"))

    def says(self, call: str, out: str | bytes = "", err: str = "", rc: int = 0, before: str = "") -> None:
        """Set what for example `nvidia-smi.gpus` or `docker.top` answers."""
        (self.path / call).write_bytes(out.encode() if isinstance(out, str) else out)
        (self.path / f"{call}.err").write_text(err)
        (self.path / f"{call}.rc").write_text(str(rc))
        (self.path / f"{call}.sh").write_text(before)

    def smi(self, text: str, rc: int = 0, *, before: str = "") -> None:
        """Let both of nvidia-smi's calls answer the same."""
        self.says("nvidia-smi.gpus", text, rc=rc, before=before)
        self.says("nvidia-smi.apps", text, rc=rc, before=before)

    def cards(self, used: tuple[object, object] = (0, 0), name: str = "NVIDIA H200", end: str = "\n") -> None:
        self.says(
            "nvidia-smi.gpus",
            f"0, {GPU0}, 00000000:00:06.0, 143771, {used[0]}, 580.159.04, {name}{end}"
            f"1, {GPU1}, 00000000:00:07.0, 143771, {used[1]}, 580.159.04, {name}{end}",
        )

    def apps(self, *rows: tuple[str, int, object], end: str = "\n") -> None:
        self.says("nvidia-smi.apps", "".join(f"{u}, {p}, {m}{end}" for u, p, m in rows))

    def container(  # noqa: PLR0913 - all by name
        self,
        *ids: object,
        driver: str = "nvidia",
        count: int = 0,
        status: str = "running",
        code: int = 0,
        image: str | bytes = "vllm/vllm-openai:v0.24.0",
        started: str = "2026-11-22T13:16:31.123456789Z",
        directory: object = None,
        health: str = "",
    ) -> None:
        """Set what `docker inspect` says with the script's format; without ids GPU 1 was asked for."""
        devices = "".join(f"device {json.dumps(i)}\n" for i in ids or ("1",) if not count)
        request = f"driver {driver}\ncount {count}\n{devices}" if ids != (None,) else ""
        head = f"id {CONTAINER}\nname /vllm-server\nstatus {status}\nhealth {health}\nexit {code}\nstarted {started}\nimage "
        image = image.encode() if isinstance(image, str) else image
        label = f"\ndirectory {json.dumps(directory)}\n"
        self.says("docker.inspect", head.encode() + image + label.encode() + request.encode())

    def top(self, *processes: int | tuple[int, str | bytes]) -> None:
        rows = b"PID                 COMMAND\n"
        for process in processes:
            pid, name = process if isinstance(process, tuple) else (process, "python3")
            rows += b"%-20d%s\n" % (pid, name.encode() if isinstance(name, str) else name)
        self.says("docker.top", rows)

    def without(self, program: str) -> str:
        """Return a PATH that lacks one of the two programs."""
        for tool in ("bash", "timeout", "date", "cat", "sleep"):
            (self.path / tool).symlink_to(f"/usr/bin/{tool}")
        (self.path / program).unlink()
        return str(self.path)

    def run(
        self, *args: str | bytes, path: str = "", stdin: bytes = b"", env: dict[str, str] | None = None
    ) -> Result:
        """Run the script on this host."""
        done = subprocess.run(
            [SCRIPT, *args],
            env={"PATH": path or f"{self.path}:/usr/bin:/bin", "TERM": "xterm"} | (env or {}),
            input=stdin,
            capture_output=True,
            timeout=30,
            check=False,
        )
        return Result(done.returncode, done.stdout, done.stderr.decode(errors="replace"))

    def judge(self, *args: str) -> dict[str, Any]:
        return self.run("--json", *args).json

    @property
    def calls(self) -> list[str]:
        return (self.path / "calls").read_text().splitlines()


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path / "bin")


# --- An index that means another card than it did ----------------------------------------------------


def proven(host: Host, text: str) -> None:
    """Let the container's project say what was proven, as the role records it."""
    state = host.path / "project/.proven/current"
    state.mkdir(parents=True)
    (state / "gpu").write_text(text)
    host.container(directory=str(host.path / "project"))


@pytest.mark.parametrize("expect", [(), ("--expect", "1"), ("--expect", GPU1)])
def test_an_index_that_means_another_card_is_reported(host: Host, expect: tuple[str, ...]) -> None:
    proven(host, f"1 {GPU0}\n")
    data = host.judge(*expect)
    assert (data["verdict"], data["cause"], data["code"]) == ("misplaced", "gpu_drifted", 1)
    assert GPU0 in data["message"]
    assert "vllm_gpu_force" in data["cure"]
    assert host.judge("--no-drift", *expect)["verdict"] == "ok"


@pytest.mark.parametrize("text", [f"1 {GPU1}\n", f"0 {GPU0}\n", f"{GPU1} {GPU1}\n", "", "\n", "1", "x\0y"])
def test_what_was_proven_and_still_holds_is_fine(host: Host, text: str) -> None:
    proven(host, text if text != "1" else f"1 {GPU1}")
    assert host.judge()["verdict"] == "ok"


def test_a_container_asked_for_by_uuid_does_not_drift(host: Host) -> None:
    proven(host, f"1 {GPU0}\n")
    host.container(GPU1, directory=str(host.path / "project"))
    assert host.judge()["verdict"] == "ok"


@pytest.mark.parametrize("directory", ['/a"b', "relative", "", 7, "/no/such"])
def test_a_directory_that_is_none_is_passed_over(host: Host, directory: object) -> None:
    host.container(directory=directory)
    assert host.judge()["verdict"] == "ok"


# --- On the card, on a wrong one, on one too many ----------------------------------------------------


@pytest.mark.parametrize("index", [0, 1])
def test_the_recorded_runs_are_ok(host: Host, index: int) -> None:
    """The two real runs on two H200s, with the cards, processes and PIDs that they had."""
    run = (RECORDED / "vllm-0.24-2xh200.txt").read_text().split("=== GPU ")[index + 1]
    run = run.split("\n## ")[0]
    cards = re.findall(r"^(\d), (GPU-\S+), (\d+) MiB$", run, re.MULTILINE)
    apps = re.findall(r"^(GPU-\S+), (\d+), \S+, (\d+) MiB$", run, re.MULTILINE)
    table = run.split("COMMAND\n")[1].split("{")[0]
    processes = re.findall(r"^(\d+) +\d+ +(\S+) ", table, re.MULTILINE)
    asked = re.findall(r'"DeviceIDs":\["(\d)"\]', run)
    assert (len(cards), len(apps), len(processes), asked) == (2, 1, 3, [str(index)])
    buses = re.findall(
        r"^\d, GPU-\S+, (\S+), ", (RECORDED / "nvidia-smi-2xh200.txt").read_text(), re.MULTILINE
    )
    rows = (
        f"{i}, {u}, {b}, 143771, {m}, 580.159.04, NVIDIA H200\n"
        for (i, u, m), b in zip(cards, buses, strict=True)
    )
    host.says("nvidia-smi.gpus", "".join(rows))
    host.apps(*((u, int(p), m) for u, p, m in apps))
    host.top(*((int(p), n) for p, n in processes))
    host.container(*asked)

    data = host.judge()
    uuid = (GPU0, GPU1)[index]
    pid = (14918, 16911)[index]
    assert data["message"] == f"vllm-server runs on GPU {index} (NVIDIA H200, {uuid}) and on no other."
    assert data["expected"] == {"id": str(index), "index": index, "uuid": uuid}
    assert data["processes"] == [
        {"pid": pid, "name": "VLLM::EngineCor", "gpu_uuid": uuid, "gpu_index": index, "memory_mib": 7688}
    ]
    assert data["container"]["pids"] == [int(p) for p, _ in processes]
    assert [g["memory_used_mib"] for g in data["gpus"]] == [int(m) for _, _, m in cards]
    assert host.run("--expect", str(1 - index)).code == 1


def test_everything_that_was_read_is_in_the_json(host: Host) -> None:
    data = host.judge()
    assert data["gpus"][1] == {
        "index": 1,
        "uuid": GPU1,
        "pci_bus_id": "00000000:00:07.0",
        "name": "NVIDIA H200",
        "memory_total_mib": 143771,
        "memory_used_mib": 7697,
        "driver_version": "580.159.04",
    }
    assert data["container"] == {
        "name": "vllm-server",
        "id": CONTAINER,
        "status": "running",
        "health": None,
        "exit_code": None,
        "started_at": "2026-11-22T13:16:31.123456789Z",
        "image": "vllm/vllm-openai:v0.24.0",
        "requested": ["1"],
        "requested_count": None,
        "pids": [16052, 16910, 16911],
    }


def test_the_report_for_a_person(host: Host) -> None:
    host.apps((GPU1, 16911, 7688), (GPU1, TENANT, 518))
    result = host.run()
    assert result.code == 0
    assert re.findall(r"^(\d\. .*)$", result.text, re.MULTILINE) == [
        "1. GPUs of this machine (driver 580.159.04)",
        "2. What the container was given",
        "3. Its processes on the GPUs",
        "4. Verdict",
    ]
    for part in (
        "GPU 1 NVIDIA H200, 7697 of 143771 MiB used",
        f"{GPU1} 00000000:00:07.0",
        "vllm-server (bfc284fa500f): running since 2026-11-22T13:16:31",
        f"asked for: '1' = GPU 1 (NVIDIA H200, {GPU1})",
        "GPU 1 pid 16911 7688 MiB VLLM::EngineCor",
        f"GPU 1 pid {TENANT} 518 MiB ?",
        f"OK: vllm-server runs on GPU 1 (NVIDIA H200, {GPU1}) and on no other.",
    ):
        assert part in result.flat
    assert max(map(len, result.text.splitlines())) <= 80


def test_wrong_card_because_the_runtime_did_not_obey(host: Host) -> None:
    host.apps((GPU0, 16911, 7688))
    data = host.judge()
    assert (data["verdict"], data["cause"]) == ("misplaced", "wrong_gpu")
    assert (
        data["message"]
        == f"vllm-server runs on GPU 0 (NVIDIA H200, {GPU0}), not on GPU 1 (NVIDIA H200, {GPU1})."
    )
    assert "--force-recreate" in data["cure"]
    assert "MISPLACED: vllm-server runs on GPU 0" in host.run().flat


def test_wrong_card_because_another_was_asked_for(host: Host) -> None:
    data = host.judge("--expect", "0")
    assert (data["code"], data["cause"]) == (1, "wrong_gpu")
    assert "gpu_device_id=0" in data["cure"]
    assert "GPU_DEVICE_ID=0" in data["cure"]


@pytest.mark.parametrize("pid", [16911, 16910, 16052])
def test_an_additional_card(host: Host, pid: int) -> None:
    host.apps((GPU0, pid, 518), (GPU1, 16911, 7688))
    data = host.judge()
    assert (data["verdict"], data["cause"]) == ("misplaced", "additional_gpu")
    assert f"but holds GPU 0 (NVIDIA H200, {GPU0}) as well" in data["message"]
    assert len(data["processes"]) == 2


def test_a_second_card_that_was_asked_for_is_still_one_too_many(host: Host) -> None:
    host.container("0", "1")
    host.apps((GPU0, 16911, 7688), (GPU1, 16911, 7688))
    data = host.judge("--expect", "0")
    assert (data["cause"], "gpu_device_id=0" in data["cure"]) == ("additional_gpu", True)


def test_other_tenants_do_not_matter_but_are_listed(host: Host) -> None:
    host.apps((GPU0, TENANT, 100), (GPU1, TENANT, 518), (GPU1, 16911, 7688))
    data = host.judge()
    assert data["verdict"] == "ok"
    assert [(p["gpu_index"], p["pid"]) for p in data["other_processes"]] == [(0, TENANT), (1, TENANT)]
    assert [p["pid"] for p in data["processes"]] == [16911]


def test_a_tenant_alone_on_the_card_proves_nothing(host: Host) -> None:
    host.apps((GPU1, TENANT, 7688))
    assert host.judge()["cause"] == "no_process_yet"


def test_cards_are_compared_by_uuid(host: Host) -> None:
    """The list's order, and the numbers in it, are not the order of the cards."""
    host.says(
        "nvidia-smi.gpus",
        f"1, {GPU0}, 00000000:00:06.0, 143771, 0, 580.1, NVIDIA H200\n"
        f"0, {GPU1}, 00000000:00:07.0, 143771, 0, 580.1, NVIDIA H200\n",
    )
    data = host.judge()
    assert (data["cause"], data["expected"]["uuid"]) == ("wrong_gpu", GPU0)
    assert data["processes"][0]["gpu_index"] == 0


@pytest.mark.parametrize("card", ["1", GPU1, GPU1.upper(), "00000000:00:07.0", "0000:00:07.0", "00:07.0"])
def test_ways_to_name_the_card(host: Host, card: str) -> None:
    assert host.judge("--expect", card)["expected"] == {"id": card, "index": 1, "uuid": GPU1}
    assert host.judge(f"--expect={card}")["verdict"] == "ok"
    host.container(card)
    assert host.judge()["expected"]["uuid"] == GPU1
    host.container(f"nvidia.com/gpu={card}", driver="cdi")
    assert host.judge()["expected"]["uuid"] == GPU1


@pytest.mark.parametrize("start", ["GPU-6fbb807e", "gpu-6FBB807E-f2", f"nvidia.com/gpu={GPU1[:-1]}"])
def test_the_beginning_of_a_uuid_names_the_card(host: Host, start: str) -> None:
    host.container(start)
    assert host.judge()["expected"]["uuid"] == GPU1
    assert f"asked for: '{start}' = GPU 1 " in host.run().flat
    host.container("GPU-6fbb807f")
    assert host.judge()["cause"] == "requested_gpu_missing"


def test_the_beginning_of_two_uuids_names_no_card(host: Host) -> None:
    card = "00000000:00:0{0}.0, 1, 0, 580.1, H200\n"
    host.says("nvidia-smi.gpus", f"0, {GPU1[:-1]}0, {card.format(6)}1, {GPU1}, {card.format(7)}")
    host.container(GPU1[:-1])
    data = host.judge()
    assert data["cause"] == "requested_gpu_unclear"
    assert "whole UUID" in data["cure"]
    assert f"'{GPU1[:-1]}' = not known" in host.run().flat
    host.container(GPU1)
    assert host.judge()["verdict"] == "ok"


def test_the_same_card_asked_for_twice_is_one_card(host: Host) -> None:
    host.container("1", GPU1)
    assert host.judge()["verdict"] == "ok"


def test_a_mig_instance_can_be_expected(host: Host) -> None:
    listing = (
        f"GPU 0: A (UUID: {GPU0})\nGPU 1: A (UUID: {GPU1})\n  MIG 1g.18gb     Device  0: (UUID: {MIG})\n"
    )
    host.says("nvidia-smi.-L", listing)
    host.apps((MIG, 16911, 7688))
    data = host.judge("--expect", MIG)
    assert (data["verdict"], data["expected"]) == ("ok", {"id": MIG, "index": 1, "uuid": MIG})
    assert host.judge()["verdict"] == "ok"  # GPU 1: the instance is a part of it
    assert host.judge("--expect", "0")["cause"] == "wrong_gpu"
    host.apps((GPU1, 16911, 7688))
    assert host.judge("--expect", MIG)["cause"] == "mig_instance_unclear"
    assert host.judge("--expect", MIG[:-1] + "5")["cause"] == "no_such_gpu"


UNLISTED = [
    ("nvidia_smi_timeout", "", 124),
    ("nvidia_smi_failed", "", 255),
    ("nvidia_smi_failed", f"GPU 1: A (UUID: {GPU1})\n", 255),
    (
        "gpu_lost",
        f"GPU 1: A (UUID: {GPU1})\nUnable to determine the device handle for GPU0: GPU is lost\n",
        0,
    ),
    ("nvidia_smi_unparsable", f"GPU 1: A (UUID: {GPU1})\n  MIG 1g.18gb  Device  0: (UUID: N/A)\n", 0),
]


@pytest.mark.parametrize(("cause", "listing", "rc"), UNLISTED)
def test_an_instance_that_may_be_unlisted_is_not_called_missing(
    host: Host, cause: str, listing: str, rc: int
) -> None:
    host.says("nvidia-smi.-L", listing, rc=rc)
    host.apps((MIG, 16911, 7688))
    for ids, expect in (((MIG,), ()), ((f"nvidia.com/gpu={MIG}",), ()), ((), ()), ((), ("--expect", MIG))):
        host.container(*ids)
        (host.path / "calls").unlink(missing_ok=True)
        data = host.judge(*expect)
        assert (data["code"], data["cause"]) == (3, cause)
        assert "Also:" not in data["message"]
        assert len([call for call in host.calls if call.startswith("nvidia-smi -L")]) == 1
    host.container(MIG)
    assert f"'{MIG}' = not known" in host.run().flat
    host.says("nvidia-smi.apps", listing, rc=rc)
    if rc:  # both calls fail in the same way: told once
        assert "Also:" not in host.judge("--expect", MIG)["message"]
    host.apps((MIG, 16911, 7688))
    host.container("7")
    assert host.judge()["cause"] == "requested_gpu_missing"
    assert "'7' = no GPU of this machine" in host.run().flat


def test_a_damaged_inforom_hides_no_instance(host: Host) -> None:
    listing = f"GPU 1: A (UUID: {GPU1})\n  MIG 1g.18gb     Device  0: (UUID: {MIG})\n"
    host.says("nvidia-smi.-L", f"{listing}WARNING: infoROM is corrupted at gpu 0000:00:07.0\n", rc=14)
    host.apps((MIG, 16911, 7688))
    assert host.judge("--expect", MIG)["verdict"] == "ok"
    assert host.judge("--expect", MIG[:-1] + "5")["cause"] == "no_such_gpu"


# --- Can't tell: each cause with its own sentence ----------------------------------------------------

NO_DRIVER = (
    "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. "
    "Make sure that the latest NVIDIA driver is installed and running.\n"
)
LOST = (
    "Unable to determine the device handle for GPU0000:06:00.0: GPU is lost.  "
    "Reboot the system to recover this GPU\n"
)
ROW = f"0, {GPU0}, 00000000:00:06.0, 143771, 527, 580.159.04, NVIDIA H200\n"


@pytest.mark.parametrize(
    ("cause", "text", "rc"),
    [
        ("driver_not_loaded", NO_DRIVER, 9),
        (
            "driver_library_mismatch",
            "Failed to initialize NVML: Driver/library version mismatch\nNVML: 580.1\n",
            18,
        ),
        ("no_devices", "No devices were found\n", 6),
        ("no_devices", "No devices were found\n", 0),
        ("no_devices", "", 0),
        ("no_devices", "\r\n\n", 0),
        ("gpu_lost", LOST, 255),
        ("gpu_lost", "GPU is lost\n", 255),
        ("gpu_lost", "", 15),
        ("gpu_lost", ROW + LOST, 255),
        ("nvidia_smi_failed", "Failed to initialize NVML: Unknown Error\n", 255),
        ("nvidia_smi_failed", 'Field "nosuchfield" is not a valid field to query.\n\n', 2),
        ("nvidia_smi_failed", "", 1),
        ("nvidia_smi_unparsable", ROW + "something else\n", 0),
        ("nvidia_smi_unparsable", ROW + ROW, 0),
        ("nvidia_smi_unparsable", ROW.replace("0, ", "x, ", 1), 0),
        ("nvidia_smi_unparsable", "something else\n", 0),
        ("nvidia_smi_unparsable", "index, uuid\n" + ROW, 0),
    ],
)
def test_causes_on_the_side_of_the_cards(host: Host, cause: str, text: str, rc: int) -> None:
    host.says("nvidia-smi.gpus", text, rc=rc)
    data = host.judge()
    assert (data["verdict"], data["cause"]) == ("unknown", cause)
    assert data["container"]["pids"] == [16052, 16910, 16911]
    assert "Also:" not in data["message"]
    assert "CAN'T TELL: " in host.run().text


def test_the_process_list_alone_fails(host: Host) -> None:
    for rc, text in ((0, f"{GPU1[:-1]}0, 16911, 7688\n"), (1, "x")):
        host.says("nvidia-smi.apps", text, rc=rc)
        data = host.judge()
        assert data["cause"] == ("nvidia_smi_failed" if rc else "nvidia_smi_unparsable")
        assert len(data["gpus"]) == 2
        assert data["processes_listed"] is (rc == 0)  # an empty list is an answer, too
    host.says("nvidia-smi.apps", NO_DRIVER, rc=9)
    assert host.judge()["cause"] == "driver_not_loaded"


# --- Odd rows ----------------------------------------------------------------------------------------

OURS = f"{GPU1}, 16911, 7688\n"
SEES_ONE = f"GPU 0: NVIDIA H200 (UUID: {GPU1})\n"
SEES_TWO = f"GPU 0: NVIDIA H200 (UUID: {GPU0})\nGPU 1: NVIDIA H200 (UUID: {GPU1})\n"


@pytest.mark.parametrize(
    "row",
    [
        f"{GPU0}, {TENANT}, ERR!",
        f"{GPU0}, {TENANT}, [Unknown Error]",
        f"{GPU0}, {TENANT}, 17592186044",
        f"{GPU0}, {TENANT}",
        f"{GPU0}, {TENANT}, 7,688 MiB",
        f"[N/A], {TENANT}, 5",
        f"GPU-\x1b[31m, {TENANT}, 5",
        f"  {GPU0} ,  {TENANT} , \t",
        f"{GPU1}, [N/A], 7688",  # on the expected card it may be whose it wants
        f"{GPU1}, 12345678901, [N/A]",
    ],
)
def test_a_row_that_is_provably_another_ones_spoils_nothing(host: Host, row: str) -> None:
    for text in (OURS + row + "\n", row + "\n" + OURS):
        host.says("nvidia-smi.apps", text)
        data = host.judge()
        assert data["verdict"] == "ok"
        assert [p["pid"] for p in data["processes"]] == [16911]
        assert len(data["other_processes"]) == 1
    assert not any("exec" in call for call in host.calls)
    assert "OK: " in host.run().text


@pytest.mark.parametrize(
    "row",
    [
        f"{GPU0}, [N/A], 7688",
        f"{GPU0}, 12345678901, 7688",
        f"{GPU0}, 0, 7688",
        f"{GPU0}, -1, 5",
        f"{GPU0}",
        f"{GPU0}, , 5",
        "[N/A], [N/A], [N/A]",
        "ERR!",
        f"{MIG}, [N/A], 5",
        "[N/A], 16910, 5",  # its own, and who knows where
    ],
)
def test_a_row_that_may_be_its_own_on_a_wrong_card_needs_a_proof(host: Host, row: str) -> None:
    host.says("nvidia-smi.apps", OURS + row + "\n")
    for text, rc in (
        (SEES_TWO, 0),
        ("", 0),
        (SEES_ONE, 1),
        ("OCI runtime exec failed", 127),
        (SEES_ONE + "GPU 1: ERR!", 0),
        (f"GPU 0: NVIDIA H200 (UUID: {GPU0})\n", 0),
    ):
        host.says("docker.exec", text, rc=rc)
        data = host.judge()
        assert (data["code"], data["cause"]) == (3, "process_unclear")
        assert f"'{row.strip()}'" in data["message"]
    host.says("docker.exec", SEES_ONE)
    assert host.judge()["verdict"] == "ok"
    host.says("nvidia-smi.apps", row + f"\n{GPU0}, 16911, 5\n")  # a wrong one stays wrong
    assert host.judge()["cause"] == "wrong_gpu"


def test_an_odd_row_while_it_loads(host: Host) -> None:
    host.says("docker.exec", SEES_ONE)
    host.says("nvidia-smi.apps", f"{GPU0}, [N/A], 7688\n")
    assert host.judge()["cause"] == "no_process_yet"
    host.says("nvidia-smi.apps", f"{GPU1}, [N/A], 7688\n")  # its own, or a tenant's
    assert host.judge()["cause"] == "process_unclear"


def test_an_instance_of_its_card_may_hold_its_own_process(host: Host) -> None:
    card = f"GPU 0: A (UUID: {GPU1})\n"
    mine, other = (f"  MIG 1g.18gb     Device  {n}: (UUID: {MIG[:-1]}{n})\n" for n in (4, 5))
    host.says("nvidia-smi.-L", card + mine + other)
    host.says("nvidia-smi.apps", f"{MIG}, 16911, 7688\n{GPU1}, [N/A], 5\n")
    host.says("docker.exec", card + mine + other)
    assert host.judge("--expect", MIG)["cause"] == "process_unclear"
    assert host.judge("--expect", "1")["verdict"] == "ok"
    host.says("docker.exec", card + mine)
    assert host.judge("--expect", MIG)["verdict"] == "ok"


@pytest.mark.parametrize(
    "row",
    [
        f"0, {GPU0}, 00000000:00:06.0, ERR!, [Unknown Error], 580.159.04, NVIDIA H200",
        f"0, {GPU0}, 00000000:00:06.0, 12345678901, , [N/A], NVIDIA, Inc., H200",
        f"0, {GPU0}, [N/A], 143771, 0, 580.159.04, NVIDIA H200",
        f"[N/A], {GPU0}, 00000000:00:06.0, 143771, 0, 580.159.04, NVIDIA H200",
        "0, [N/A], 00000000:00:06.0, 143771, 0, 580.159.04, NVIDIA H200",
        f"0, {GPU0}",
        f"0, {GPU0}, 00000000:00:06.0, 143771, 0, 5\x1b[31m80, NVIDIA \xc2\x9b31m",
        "0",
        "Unable to read the name of a GPU",
    ],
)
def test_an_odd_card_beside_the_expected_one(host: Host, row: str) -> None:
    good = f"1, {GPU1}, 00000000:00:07.0, 143771, 7697, 580.159.04, NVIDIA H200"
    for text in (f"{row}\n{good}\n", f"{good}\n{row}\n"):
        host.says("nvidia-smi.gpus", text.encode("latin-1"))
        for expect in ((), ("--expect", GPU1), ("--expect", "1"), ("--expect", "00:07.0")):
            data = host.judge(*expect)
            assert (data["verdict"], data["expected"]["uuid"]) == ("ok", GPU1)
        assert data["gpus"][text.startswith(row)]["memory_used_mib"] == 7697
        report = host.run().out
        assert b"OK: " in report
        assert not re.search(rb"[\x00-\x09\x0b-\x1f\x7f]|\xc2[\x80-\x9f]", report)


@pytest.mark.parametrize("expect", ["0", "7", GPU0, "00:06.0"])
@pytest.mark.parametrize(
    "row", ["[N/A], [N/A], [N/A], 1, 0, 5, H200", "something", "0, [N/A], 00000000:00:06.0"]
)
def test_an_odd_card_may_be_the_one_that_is_meant(host: Host, row: str, expect: str) -> None:
    host.says("nvidia-smi.gpus", f"{row}\n1, {GPU1}, 00000000:00:07.0, 143771, 7697, 580.1, NVIDIA H200\n")
    assert host.judge("--expect", expect)["cause"] == "nvidia_smi_unparsable"
    host.container(expect)
    assert host.judge()["cause"] == "nvidia_smi_unparsable"
    assert f"asked for: '{expect}' = not known" in host.run().flat


def test_two_cards_of_one_name_are_no_card(host: Host) -> None:
    host.says(
        "nvidia-smi.gpus",
        f"1, {GPU0}, 00000000:00:07.0, 1, 0, 580.1, H200\n1, {GPU1}, 00000000:00:07.0, 1, 0, 580.1, H200\n",
    )
    for expect in ("1", "00:07.0"):
        assert host.judge("--expect", expect)["code"] != 0
    assert host.judge("--expect", GPU1)["verdict"] == "ok"


# --- Notes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("health", "told"), [("unhealthy", True), ("healthy", False), ("", False), ("none", False)]
)
def test_what_docker_thinks_of_its_health(host: Host, health: str, told: bool) -> None:  # noqa: FBT001
    host.container(health=health)
    data = host.judge()
    assert data["verdict"] == "ok"
    assert data["container"]["health"] == (health if health not in ("", "none") else None)
    assert ["docker inspect --format '{{json .State.Health}}' vllm-server" in n for n in data["notes"]] == [
        True
    ] * told
    assert ("Note: " in host.run().text) == told


def test_a_container_that_sees_more_is_told_so(host: Host) -> None:
    host.says("docker.exec", SEES_TWO)
    assert host.judge()["notes"] == []  # not asked
    data = host.judge("--deep")
    assert data["code"] == 0
    assert len(data["notes"]) == 1
    assert f"also sees GPU 0 (NVIDIA H200, {GPU0}) and can use it" in data["notes"][0]
    assert "Note: vllm-server also sees GPU 0" in host.run("--deep").flat
    host.apps((GPU0, 16911, 5))
    assert [n.split(" (")[0] for n in host.judge("--deep")["notes"]] == ["vllm-server also sees GPU 0"]
    host.says("docker.exec", SEES_ONE)
    assert host.judge("--deep")["notes"] == []
    host.says("docker.exec", "", "OCI runtime exec failed: nvidia-smi not found", rc=127)
    assert "exit code 127: OCI runtime exec failed" in host.judge("--deep")["notes"][0]


def test_instances_that_the_container_sees(host: Host) -> None:
    card = f"GPU 0: A (UUID: {GPU1})\n"
    mine, other = (f"  MIG 1g.18gb     Device  {n}: (UUID: {MIG[:-1]}{n})\n" for n in (4, 5))
    host.says("nvidia-smi.-L", card + mine + other)
    host.apps((MIG, 16911, 7688))
    host.says("docker.exec", card + mine)
    assert host.judge("--deep", "--expect", MIG)["notes"] == []
    host.says("docker.exec", card + mine + other)
    assert f"{MIG[:-1]}5" in host.judge("--deep", "--expect", MIG)["notes"][0]
    assert host.judge("--deep", "--expect", "1")["notes"] == []  # both are on that card


def test_where_no_processes_are_listed(host: Host) -> None:
    host.apps()
    data = host.judge()
    assert (data["cause"], data["processes_listed"]) == ("no_process_yet", True)
    assert "although 7697 MiB of GPU 1 are in use" in data["notes"][0]
    host.apps((GPU0, TENANT, 5))
    assert host.judge()["notes"] == []
    host.cards()
    host.apps()
    assert host.judge()["notes"] == []


# --- Who could have written what was proven ----------------------------------------------------------


@pytest.mark.parametrize(
    "path", [".", "..", ".proven", ".proven/current", ".proven/7", ".proven/7/gpu", "the/gpu"]
)
@pytest.mark.parametrize("how", ["group", "others", "owner"])
def test_a_record_that_others_can_change_is_ignored(host: Host, path: str, how: str) -> None:
    project = host.path / "top/project"
    for folder in (project / ".proven/7", project / "the"):
        folder.mkdir(parents=True)
    (project / "the/gpu").write_text(f"1 {GPU0}\n")
    (project / ".proven/7/gpu").symlink_to("../../the/gpu")
    (project / ".proven/current").symlink_to(project / ".proven/7")
    host.container(directory=str(project))
    assert host.judge()["cause"] == "gpu_drifted"
    if how == "owner":
        if os.getuid():
            pytest.skip("only root can give a file away")
        os.chown(project / path, 12345, -1, follow_symlinks=False)
    elif (project / path).is_symlink():
        pytest.skip("a link has no mode")
    else:
        (project / path).chmod((project / path).stat().st_mode | (0o020 if how == "group" else 0o002))
    data = host.judge()
    assert data["verdict"] == "ok"
    assert len(data["notes"]) == 1
    assert f"{project}/.proven/current/gpu is ignored" in data["notes"][0]


@pytest.mark.parametrize("kind", ["a pipe", "a folder", "a link to itself", "a link to /dev/zero"])
def test_a_record_that_never_ends_or_is_none(host: Host, kind: str) -> None:
    gpu = host.path / "project/.proven/current/gpu"
    proven(host, f"1 {GPU0}\n")
    gpu.unlink()
    if kind == "a pipe":
        os.mkfifo(gpu)
    elif kind == "a folder":
        gpu.mkdir()
    else:
        gpu.symlink_to("gpu" if kind == "a link to itself" else "/dev/zero")
    data = host.judge()
    assert (data["verdict"], data["notes"]) == ("ok", [])


@pytest.mark.parametrize("closed", [".proven", "7", ".proven/current/gpu"])
def test_a_record_that_may_not_be_read_is_not_taken_for_none(host: Host, closed: str) -> None:
    """A user of the group docker, who may read neither root's .proven nor what is in it."""
    proven(host, f"1 {GPU0}\n")
    project = host.path / "project"
    (project / ".proven/current").rename(project / "7")
    (project / ".proven/current").symlink_to("../7")
    if not os.getuid():  # root may read everything, but for this
        drop = "exec setpriv --bounding-set=-dac_override,-dac_read_search /bin/bash"
        (host.path / "bash").write_text(f'#!/bin/sh\n{drop} "$@"\n')
        (host.path / "bash").chmod(0o755)
    assert host.judge()["cause"] == "gpu_drifted"
    mode = (project / closed).stat().st_mode
    (project / closed).chmod(0)
    data = host.judge()
    (project / closed).chmod(mode)
    gpu = project / ".proven/current/gpu"
    assert data["notes"] == [f"Which GPU was proven is not known: {gpu} can't be read. Run this as root."]
    gpu.unlink()
    assert host.judge()["notes"] == []


# --- Another machine's engine --------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["ssh://gpu-b", "tcp://127.0.0.1:2375", "gpu-b:2375"])
def test_the_engine_of_another_machine_proves_nothing(host: Host, address: str) -> None:
    data = host.run("--json", env={"DOCKER_HOST": address, "DOCKER_CONTEXT": "default"}).json
    assert (data["code"], data["cause"], data["container"]) == (3, "remote_engine", None)
    assert address in data["message"]
    assert len(data["gpus"]) == 2
    host.says("docker.context", f"{address}\n")
    config = host.path / "config.json"
    config.write_text('{"auths": {},\n\t"currentContext": "gpu-b"}\n')
    for env in ({"DOCKER_CONTEXT": "gpu-b"}, {"DOCKER_CONFIG": str(host.path)}):
        assert host.run("--json", env=env).json["cause"] == "remote_engine"
    host.says("docker.context", err='context "gpu-b": context not found', rc=1)
    assert "context not found" in host.run("--json", env={"DOCKER_CONTEXT": "gpu-b"}).json["message"]


def test_another_socket_of_this_machine_is_fine(host: Host) -> None:
    (host.path / "config.json").write_text('{"currentContext": "gpu-b"}')
    here, config = {"DOCKER_HOST": "unix:///run/user/7/docker.sock"}, {"DOCKER_CONFIG": str(host.path)}
    for env in (
        {},
        here,
        here | config | {"DOCKER_CONTEXT": "gpu-b"},
        config | {"DOCKER_CONTEXT": "default"},
    ):
        assert host.run("--json", env=env).json["verdict"] == "ok"
    assert not [call for call in host.calls if call.startswith("docker context")]
    host.says("docker.context", "unix:///run/user/7/docker.sock\n")
    assert host.run("--json", env={"DOCKER_CONTEXT": "rootless"}).json["verdict"] == "ok"


SOCKET = "unix:///var/run/docker.sock"


@pytest.mark.parametrize(
    ("cause", "text"),
    [
        (
            "engine_not_running",
            f"Cannot connect to the Docker daemon at {SOCKET}. Is the docker daemon running?",
        ),
        (
            "engine_not_running",
            f"failed to connect to the docker API at {SOCKET}; check if the path is correct",
        ),
        (
            "engine_not_running",
            "error during connect: Get http://h:2375/: dial tcp: connect: connection refused",
        ),
        (
            "engine_permission",
            "permission denied while trying to connect to the Docker daemon socket at " + SOCKET,
        ),
        (
            "engine_permission",
            "Got permission denied while trying to connect to the Docker daemon socket at " + SOCKET,
        ),
        ("no_such_container", "Error: No such container: vllm-server"),
        ("no_such_container", "Error response from daemon: No such container: vllm-server"),
        ("no_such_container", "Error: No such object: vllm-server"),
        ("docker_failed", "template parsing error"),
    ],
)
def test_causes_on_the_side_of_the_engine(host: Host, cause: str, text: str) -> None:
    host.says("docker.inspect", "\n", text + "\n", rc=1)
    host.says("docker.ps", "web-1\ndb-1\n")
    host.apps((GPU1, TENANT, 518))
    data = host.judge()
    assert (data["verdict"], data["cause"], data["container"]) == ("unknown", cause, None)
    assert ("web-1 db-1" in data["message"]) == (cause == "no_such_container")
    assert len(data["gpus"]) == 2
    assert data["other_processes"][0]["pid"] == TENANT
    expected = host.judge("--expect", "0")["expected"]
    assert expected["uuid"] == GPU0


def test_without_a_card_no_container_is_no_news(host: Host) -> None:
    host.smi(NO_DRIVER, 9)
    host.says("docker.inspect", "", "Error: No such container: vllm-server", rc=1)
    data = host.judge()
    assert (data["cause"], "container" in data["message"] + data["cure"]) == ("driver_not_loaded", False)


@pytest.mark.parametrize(
    ("program", "cause"), [("nvidia-smi", "nvidia_smi_missing"), ("docker", "docker_missing")]
)
def test_a_program_is_missing(host: Host, program: str, cause: str) -> None:
    data = host.run("--json", path=host.without(program)).json
    assert (data["verdict"], data["cause"]) == ("unknown", cause)
    assert bool(data["gpus"]) == (program == "docker")
    assert bool(data["container"]) == (program == "nvidia-smi")


def test_both_sides_fail(host: Host) -> None:
    host.smi(NO_DRIVER, 9)
    host.says("docker.inspect", "", "Cannot connect to the Docker daemon", rc=1)
    data = host.judge()
    assert data["cause"] == "driver_not_loaded"
    assert "driver is not loaded. Also: The Docker engine" in data["message"]
    assert "modprobe" in data["cure"]
    assert "systemctl start docker" in data["cure"]


@pytest.mark.parametrize(
    ("status", "code", "said", "cure"),
    [
        ("created", 0, "it is created.", "docker start"),
        ("exited", 1, "it is exited with exit code 1.", "docker logs"),
        ("exited", 0, "it is exited with exit code 0.", "docker logs"),
        ("restarting", 137, "it is restarting with exit code 137.", "again and again"),
        ("paused", 0, "it is paused.", "docker unpause"),
        ("dead", 255, "it is dead with exit code 255.", "docker logs"),
        ("removing", 0, "it is removing.", "docker logs"),
    ],
)
def test_not_running(host: Host, status: str, code: int, said: str, cure: str) -> None:
    host.container(status=status, code=code)
    data = host.judge()
    assert (data["cause"], data["container"]["status"]) == ("container_not_running", status)
    assert said in data["message"]
    assert cure in data["cure"]
    assert data["container"]["exit_code"] == (code if "exit code" in said else None)
    assert data["expected"]["index"] == 1
    assert not any("top" in call for call in host.calls)


def test_never_started(host: Host) -> None:
    host.container(status="created", started="0001-01-01T00:00:00Z")
    assert host.judge()["container"]["started_at"] is None


@pytest.mark.parametrize(
    ("text", "status"),
    [
        (f"container {CONTAINER} is not running", "exited"),
        (f"No such container: {CONTAINER}", "exited"),
        (f"Container {CONTAINER} is restarting, wait until the container is running", "restarting"),
    ],
)
def test_stopped_or_replaced_while_being_looked_at(host: Host, text: str, status: str) -> None:
    host.says("docker.top", "", f"Error response from daemon: {text}", rc=1)
    data = host.judge()
    assert (data["cause"], data["container"]["status"]) == ("container_not_running", status)


def test_a_vanished_process_changes_nothing(host: Host) -> None:
    host.top(16052, 16911, 16999)  # one that is on no card and is gone by the time it is looked up
    assert host.judge()["verdict"] == "ok"
    host.apps((GPU0, TENANT, 518), (GPU1, 16911, 7688))  # one that docker no longer names
    assert host.judge()["verdict"] == "ok"


def test_a_process_without_a_name_counts(host: Host) -> None:
    host.top(16052, (16910, "   "), (16911, ""))
    host.apps((GPU1, 16911, 7688), (GPU0, 16910, 518))
    assert host.judge()["cause"] == "additional_gpu"


@pytest.mark.parametrize("out", ["", "no table\n", "16911\n", "PID COMMAND\n16911 python3\nx y\n"])
def test_docker_top_is_not_understood(host: Host, out: str) -> None:
    host.says("docker.top", out)
    assert host.judge()["cause"] == "docker_unparsable"


@pytest.mark.parametrize("out", ["", "id zz\nstatus running\n", "something\n"])
def test_docker_inspect_is_not_understood(host: Host, out: str) -> None:
    host.says("docker.inspect", out)
    data = host.judge()
    assert (data["cause"], data["container"]) == ("docker_unparsable", None)


@pytest.mark.parametrize("warning", ["", "WARNING: infoROM is corrupted at gpu 0000:B3:00.0\n"])
def test_a_card_whose_inforom_is_damaged_works_all_the_same(host: Host, warning: str) -> None:
    for call in ("nvidia-smi.gpus", "nvidia-smi.apps"):
        host.says(call, (host.path / call).read_text() + warning, rc=14)
    assert host.judge()["verdict"] == "ok"
    host.says("nvidia-smi.gpus", "something else\n", rc=14)
    assert host.judge()["cause"] == "nvidia_smi_unparsable"


def test_still_loading(host: Host) -> None:
    host.apps()
    started = time.strftime("%Y-%m-%dT%H:%M:%S.123456789Z", time.gmtime(time.time() - 40))
    host.container(started=started)
    data = host.judge()
    assert data["cause"] == "no_process_yet"
    assert re.search(r"vllm-server, up for 4\d s, has no process on any GPU yet", data["message"])
    host.says("nvidia-smi.apps", "No running processes found\n")
    assert host.judge()["cause"] == "no_process_yet"
    host.container(started="yesterday; really")
    assert host.judge()["cause"] == "no_process_yet"


def test_the_container_lost_its_view(host: Host) -> None:
    host.says("docker.exec", "Failed to initialize NVML: Unknown Error\n", rc=255)
    assert host.judge()["verdict"] == "ok"  # not asked: it costs as much as all the rest
    assert not any("exec" in call for call in host.calls)
    assert host.judge("--deep")["cause"] == "gpu_view_lost"
    host.apps()
    assert host.judge()["cause"] == "gpu_view_lost"
    host.says("docker.exec", f"GPU 0: NVIDIA H200 (UUID: {GPU1})\n")
    assert host.judge()["cause"] == "no_process_yet"
    host.apps((GPU1, 16911, 7688))
    assert host.judge("--deep")["verdict"] == "ok"


@pytest.mark.parametrize(
    ("ids", "options", "cause", "said"),
    [
        ((None,), {}, "asked_for_no_gpu", "no GPU at all"),
        (("",), {}, "asked_for_no_gpu", "no GPU at all"),
        (("vendor.com/net=0",), {"driver": "cdi"}, "asked_for_no_gpu", "no GPU at all"),
        (("0",), {"driver": "amd"}, "asked_for_no_gpu", "no GPU at all"),
        ((), {"count": 1}, "asked_for_count", "a number of GPUs (1)"),
        ((), {"count": -1, "driver": ""}, "asked_for_count", "a number of GPUs (all)"),
        (("all",), {}, "asked_for_count", "a number of GPUs (all)"),
        (("nvidia.com/gpu=all",), {"driver": "cdi"}, "asked_for_count", "a number of GPUs (all)"),
        (("0", "1"), {}, "asked_for_several", "several GPUs (0 1)"),
        (("0,1",), {}, "asked_for_several", "several GPUs (0 1)"),
        (("7",), {}, "requested_gpu_missing", "asked for GPU '7'"),
        (("1", "7"), {}, "requested_gpu_missing", "asked for GPU '7'"),
        (("GPU-00000000",), {}, "requested_gpu_missing", "asked for GPU 'GPU-00000000'"),
        (("none",), {}, "requested_gpu_unclear", "asked for GPU 'none'"),
        (("1:0",), {}, "requested_gpu_unclear", "asked for GPU '1:0', a spelling that"),
        (("nvidia.com/gpu=1:0",), {"driver": "cdi"}, "requested_gpu_unclear", "a spelling that"),
        (("GPU-6fbb",), {}, "requested_gpu_unclear", "asked for GPU 'GPU-6fbb', a spelling that"),
        (('x"\n1',), {}, "requested_gpu_unclear", "asked for GPU 'x"),
    ],
)
def test_no_expectation(
    host: Host, ids: tuple[object, ...], options: dict[str, Any], cause: str, said: str
) -> None:
    host.container(*ids, **options)
    data = host.judge()
    assert (data["cause"], data["expected"]) == (cause, None)
    assert said in data["message"]
    assert "--expect" in data["cure"]
    assert host.judge("--expect", "1")["verdict"] == "ok"
    assert host.judge("--expect", "0")["verdict"] == "misplaced"
    assert "asked for: " in host.run().text


def test_a_count_is_in_the_json(host: Host) -> None:
    host.container(count=2)
    assert host.judge()["container"]["requested_count"] == 2
    host.container(count=-1)
    assert host.judge()["container"]["requested_count"] == -1


# --- Time ------------------------------------------------------------------------------------------

ESCAPES = "setsid sleep 120 & sleep 120\n"  # keeps the pipes open out of the reach of timeout's signals
IGNORES = "trap '' TERM; while :; do sleep 1; done\n"


@pytest.mark.parametrize("side", ["nvidia_smi", "docker"])
def test_a_call_hangs(tmp_path: Path, side: str) -> None:
    """Each call in each way, side by side to save time: no verdict, long before it ends, and nothing left behind."""

    def hang(call: str, how: str) -> None:
        host = Host(tmp_path / f"{call}-{len(how)}")
        pid = host.path / "pid"
        host.says(call, before=f"echo $$ >{pid}\n{how}")
        start = time.monotonic()
        data = host.judge("--timeout", "3")
        assert data["cause"] == f"{side}_timeout"
        assert bool(data["container"]) == (call != "docker.inspect")
        assert bool(data["gpus"]) == (call != "nvidia-smi.gpus")
        assert time.monotonic() - start < 60
        while Path("/proc", pid.read_text().strip()).exists():
            assert time.monotonic() - start < 90
            time.sleep(0.05)

    calls = [
        f"{side.replace('_', '-')}.{call}"
        for call in (("inspect", "top") if side == "docker" else ("gpus", "apps"))
    ]
    with ThreadPoolExecutor() as pool:
        for done in [pool.submit(hang, c, h) for c in calls for h in ("sleep 120", IGNORES, ESCAPES)]:
            done.result()


def test_calls_are_few_and_run_side_by_side(host: Host) -> None:
    first = ("nvidia-smi.gpus", "nvidia-smi.apps", "docker.inspect")
    for call in first:
        # Each waits until the others have been asked: one after the other, none of them would ever answer.
        there = " && ".join(f"[[ -e {host.path}/{other}.asked ]]" for other in first)
        (host.path / f"{call}.sh").write_text(
            f": >{host.path}/{call}.asked\nuntil {there}; do sleep 0.02; done\n"
        )
    assert host.judge("--timeout", "30")["verdict"] == "ok"
    assert len(host.calls) == 4


FLOOD = "while :; do printf '%065536d'; done"
FLOODS = (
    (FLOOD, 60),
    (FLOOD + " >&2", 60),
    (f"trap '' PIPE TERM; {FLOOD}", 2),
    ("printf 'a\\0b\\0c\\0' >&2; false", 60),
)


@pytest.mark.parametrize(("how", "limit"), FLOODS)
def test_a_call_prints_without_end(tmp_path: Path, how: str, limit: int) -> None:
    """As much as it likes, on either stream: the memory stays small, and the end doesn't wait for the deadline."""
    for side, call in (
        ("docker", "inspect"),
        ("docker", "top"),
        ("nvidia-smi", "gpus"),
        ("nvidia-smi", "apps"),
    ):
        host = Host(tmp_path / call)
        host.says(f"{side}.{call}", before=how, rc=1)
        done = subprocess.run(
            ["/bin/bash", "-c", 'ulimit -v 200000; exec "$0" --json --timeout "$1"', SCRIPT, str(limit)],
            env={"PATH": f"{host.path}:/usr/bin:/bin"},
            capture_output=True,
            timeout=45,
            check=False,
        )
        cause = Result(done.returncode, done.stdout, done.stderr.decode()).json["cause"]
        assert cause.removeprefix(side.replace("-", "_")) in (
            ["_unparsable"] if limit == 60 else ["_unparsable", "_timeout"]
        )


def test_a_long_text_is_cut(host: Host) -> None:
    host.says("nvidia-smi.gpus", "", '\\"' * 99_000, rc=1)
    assert len(host.judge()["message"]) < 1000
    assert len(host.run("--expect", "é" * 40_000).err) < 5000
    host.cards()
    host.container('\\"' * 20_000, image="é" * 50_000)
    start = time.monotonic()
    assert len(host.run().out) < 20_000
    assert host.judge()["cause"] == "requested_gpu_missing"
    assert len(host.run("--json").out) < 20_000
    assert time.monotonic() - start < 20


# --- What others may be called -----------------------------------------------------------------------

# C0 (but the report's own line breaks), and C1: as UTF-8, or as a byte that is part of no character.
CONTROL = rb"[\x00-\x09\x0b-\x1f\x7f]|\xc2[\x80-\x9f]|(?<![\x80-\xff])[\x80-\x9f]"
HOSTILE = [
    "\x9b31mred\x9d0;owned\x9c\u0085",
    b"\x9b31mred \xc3\x9b \x9d0;owned\x07",
    "tab\there",
    'a"b\\c',
    "a, b, 99",
    f"x\n{GPU0}, 16911, 5",
    "\x1b[31mred\x07\x7f",
    "héllo €🙂",
    b"\xff\xc3(\xe2\x82\xf0\x9f\x98",
    b"\xf0\x80\x80\x80\xed\xa0\x80\xc0\xaf\xf5\x80\x80\x80\xf4\x90\x80\x80\xe0\x80\xaf",
    "$(touch /tmp/x) `id` * ~ %s %n",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names(host: Host, name: str | bytes) -> None:
    raw = name.encode() if isinstance(name, str) else name
    host.top(16052, (16911, raw.replace(b"\n", b"?")))  # as ps writes it
    host.container(image=raw.replace(b"\n", b"?"))
    result = host.run("--json")
    data = result.json
    assert data["verdict"] == "ok"
    if isinstance(name, str):
        assert data["processes"][0]["name"] == name.replace("\n", "?")
    else:
        assert "\ufffd" in data["processes"][0]["name"]
    assert not re.search(CONTROL, host.run().out)


@pytest.mark.parametrize("rc", [0, 1])
def test_control_characters_are_shown_wherever_they_come_from(host: Host, rc: int) -> None:
    bad = "\x1b]0;owned\x07\t\x7f \x9b31m"
    assert not re.search(CONTROL, host.run("--expect", bad).err.encode().replace(b"\n", b""))
    host.container(f"9{bad}", image=f"i{bad}", directory=f"/d{bad}")
    host.cards(name=f"H200 {bad}")
    host.says("docker.exec", "", f"exec {bad}", rc=1)
    for call in ("docker.inspect", "docker.top", "nvidia-smi.gpus", "nvidia-smi.apps", ""):
        kept = (host.path / call).read_bytes() if call else b""
        if call:
            host.says(call, f"out {bad}\n", f"err {bad}\n", rc=rc)
        for args in (("--deep",), ("--deep", "--json", "--expect", "1")):
            result = host.run(*args)
            assert not re.search(CONTROL, result.out + result.err.encode())
        if call:
            host.says(call, kept)
    host.cards(name="H200 \x1b[31m")
    assert "H200 \\u001b[31m" in host.run().text
    assert host.judge()["gpus"][0]["name"] == "H200 \x1b[31m"


def test_valid_utf8_is_kept_and_only_the_rest_replaced(host: Host) -> None:
    text = "\u0080é\u07ff\u0800\ud7ff\ue000\uffff\U00010000\U0010ffff€"
    host.top((16911, text))
    assert host.judge()["processes"][0]["name"] == text
    host.top((16911, b"a\xe2\x82b\xffc"))
    assert host.judge()["processes"][0]["name"] == "a\ufffd\ufffdb\ufffdc"


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.binary(min_size=1, max_size=40), rows=st.binary(max_size=60))
def test_no_bytes_break_the_json_or_the_verdict(host: Host, name: bytes, rows: bytes) -> None:
    host.cards()
    host.apps((GPU1, 16911, 7688))
    host.top(16052, (16911, name.replace(b"\n", b"?")))
    host.container(image=name.replace(b"\n", b""))
    assert host.run("--json").json["code"] == 0
    host.says("nvidia-smi.apps", rows)
    assert host.run("--json").json["code"] == 3
    host.apps((GPU1, 16911, 7688))
    host.says("nvidia-smi.gpus", rows)
    assert host.run("--json").json["code"] == 3


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(st.text().map(lambda t: t.encode("utf-8", "ignore")), st.binary()).map(
        lambda b: b.replace(b"\0", b"")
    )
)
def test_no_expectation_is_guessed(host: Host, value: bytes) -> None:
    assume(value not in (b"0", b"1"))
    result = host.run("--json", "--expect", value)
    assert result.json["verdict"] == "usage"
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", result.err)


def test_the_name_of_another_process_is_read_from_the_kernel(host: Host) -> None:
    own = Path("/proc/self/comm")
    before = own.read_bytes()
    try:
        own.write_bytes(b'x\n", 1\xff')
        host.apps((GPU1, 16911, 7688), (GPU1, os.getpid(), 1))
        data = host.judge()
    finally:
        own.write_bytes(before)
    assert data["verdict"] == "ok"
    assert data["other_processes"][0]["name"] == 'x\n", 1\ufffd'


@pytest.mark.parametrize("word", ["[N/A]", "[Not Supported]", "[Insufficient Permissions]", "N/A"])
def test_memory_that_is_not_known(host: Host, word: str) -> None:
    host.cards(used=(word, word))
    host.apps((GPU1, 16911, word))
    data = host.judge()
    assert data["verdict"] == "ok"
    assert data["gpus"][0]["memory_used_mib"] is None
    assert data["processes"][0]["memory_mib"] is None


@pytest.mark.parametrize(
    ("driver", "domain", "word"),
    [
        ("331.62", "0000", "[Not Supported]"),
        ("410.72", "00000000", "[Not Supported]"),
        ("595.71.05", "00000000", "[N/A]"),
    ],
)
def test_what_other_drivers_write_otherwise(host: Host, driver: str, domain: str, word: str) -> None:
    """As told in public bug reports: the domain of a bus id, and a number that a card doesn't tell."""
    host.says(
        "nvidia-smi.gpus",
        f"0, {GPU0}, {domain}:00:06.0, 6144, {word}, {driver}, NVIDIA GeForce RTX 2060\n"
        f"1, {GPU1}, {domain}:00:07.0, 6144, {word}, {driver}, NVIDIA GeForce RTX 2060\n",
    )
    host.apps((GPU1, 16911, word))
    for bus in ("0000:00:07.0", "00000000:00:07.0"):
        data = host.judge("--expect", bus)
        assert (data["verdict"], data["expected"]["index"]) == ("ok", 1)


def test_carriage_returns_and_commas(host: Host) -> None:
    host.cards(name='NVIDIA, Inc. "Card"', end="\r\n")
    host.apps((GPU1, 16911, "7688 MiB"), end="\r\n")
    data = host.judge()
    assert (data["verdict"], data["gpus"][0]["name"]) == ("ok", 'NVIDIA, Inc. "Card"')
    assert data["processes"][0]["memory_mib"] == 7688


def test_warnings_of_a_program_do_not_matter(host: Host) -> None:
    for call in ("nvidia-smi.gpus", "nvidia-smi.apps", "docker.inspect", "docker.top"):
        (host.path / f"{call}.err").write_text("WARNING: Error loading config file: permission denied\n")
    assert host.judge()["verdict"] == "ok"


# --- How it is called --------------------------------------------------------------------------------


def test_read_from_standard_input(host: Host) -> None:
    """As `ssh host bash -s -- --json --expect 1 < check_gpu_allocation.sh` does."""
    done = subprocess.run(
        ["bash", "-s", "--", "--json", "--expect", "1"],
        input=SCRIPT.read_bytes() + b"\necho never reached\n",
        env={"PATH": f"{host.path}:/usr/bin:/bin"},
        cwd="/",
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert done.stderr == b""
    assert Result(done.returncode, done.stdout, "").json["verdict"] == "ok"


def test_nothing_reads_standard_input(host: Host) -> None:
    host.apps()
    host.says("docker.inspect", "", "No such container", rc=1)
    host.run("--deep", stdin=b"the script's own text")
    host.container()
    host.run("--deep", stdin=b"the script's own text")
    host.run("--project", "vllm", stdin=b"the script's own text")
    assert (host.path / "stdin").read_bytes() == b""
    assert {call.split()[1] for call in host.calls if call.startswith("docker")} == {
        "inspect",
        "top",
        "ps",
        "exec",
    }


@pytest.mark.parametrize(
    "args",
    [
        ["--nonsense"],
        ["stray"],
        ["--expect"],
        ["--expect", ""],
        ["--expect="],
        *(
            ["--expect", bad]
            for bad in ("-1", "01", "0,1", "all", " 1", "1 ", "1.0", "1\n", "\x1b[31m1", "\u0661", "true")
        ),
        *(
            ["--expect", bad]
            for bad in ("GPU-", "GPU-x y", "99999999999", "00:07", "--json", "nvidia.com/gpu=1")
        ),
        ["--container", ""],
        ["--container", "-f"],
        ["--container", "a b"],
        ["--project", "../x"],
        ["--container", "a", "--project", "b"],
        ["--json", "--quiet"],
        *(["--timeout", bad] for bad in ("0", "-1", "1.5", "ten", "10000", "08")),
    ],
)
def test_wrong_usage(host: Host, args: list[str]) -> None:
    result = host.run(*args)
    assert (result.code, result.out if "--json" not in args else b"") == (2, b"")
    assert result.err.count("\n") == 1
    assert result.err.endswith("See --help.\n")
    assert "\x1b" not in result.err
    assert not (host.path / "calls").exists()
    if "--quiet" not in args:
        assert host.run("--json", *args).json["cause"] == "usage"


@pytest.mark.parametrize("card", ["7", "GPU-00000000-0000-0000-0000-000000000000", "00:08.0", MIG])
def test_no_such_card(host: Host, card: str) -> None:
    host.says("nvidia-smi.-L", f"GPU 0: NVIDIA H200 (UUID: {GPU0})\n")
    result = host.run("--expect", card)
    assert (result.code, result.out) == (2, b"")
    assert f"no GPU '{card}'. It has: GPU 0 (NVIDIA H200, {GPU0}), GPU 1 (" in result.err
    assert host.judge("--expect", card)["cause"] == "no_such_gpu"
    host.says("docker.inspect", "", "Cannot connect to the Docker daemon", rc=1)
    assert host.judge("--expect", card)["cause"] == "no_such_gpu"
    host.smi(NO_DRIVER, 9)  # without a list of cards nobody can say that it isn't there
    assert host.judge("--expect", card)["cause"] == "driver_not_loaded"


def test_quiet(host: Host) -> None:
    assert host.run("--quiet") == Result(0, b"", "")
    assert host.run("--quiet", "--expect", "0") == Result(1, b"", "")
    host.apps()
    assert host.run("--quiet") == Result(3, b"", "")
    assert host.run("--quiet", "--expect", "7").code == 2


def test_help(host: Host) -> None:
    result = host.run("--help")
    assert (result.code, result.err) == (0, "")
    for option in (
        "--expect",
        "--container",
        "--project",
        "--deep",
        "--timeout",
        "--json",
        "--quiet",
        "--help",
    ):
        assert f"\n  {option} " in result.text
        assert f"`{option}" in PAGE
    assert max(map(len, result.text.splitlines())) <= 80


def test_another_container(host: Host) -> None:
    host.judge("--container", "other-1")
    assert any(call.startswith("docker inspect") and call.endswith(" other-1 ") for call in host.calls)


def test_the_container_of_a_project(host: Host) -> None:
    host.says("docker.ps", f"{CONTAINER}\n")
    assert host.judge("--project", "team")["verdict"] == "ok"
    listing = next(call for call in host.calls if call.startswith("docker ps"))
    assert "label=com.docker.compose.project=team " in listing
    assert "label=com.docker.compose.service=vllm " in listing
    assert any(call.startswith("docker inspect") and call.endswith(f" {CONTAINER} ") for call in host.calls)
    host.says("docker.ps", f"{CONTAINER}\n{CONTAINER[::-1]}\n")
    assert host.judge("--project", "team")["cause"] == "several_containers"
    host.says("docker.ps", "")
    data = host.judge("--project", "team")
    assert data["cause"] == "no_such_container"
    assert "service vllm in Compose project team" in data["message"]
    host.says("docker.ps", "", "Cannot connect to the Docker daemon", rc=1)
    assert host.judge("--project", "team")["cause"] == "engine_not_running"


def test_secrets_are_never_asked_for(host: Host) -> None:
    """Neither the environment nor arguments: what isn't read can't be printed."""
    host.run("--deep")
    assert re.findall(r"{{[^}]*}}", (host.path / "calls").read_text().replace("\\", "")) == [
        "{{.Id}}",
        "{{.Name}}",
        "{{.State.Status}}",
        '{{with index .State "Health"}}',
        "{{.Status}}",
        "{{end}}",
        "{{.State.ExitCode}}",
        "{{.State.StartedAt}}",
        "{{.Config.Image}}",
        '{{json (index .Config.Labels "com.docker.compose.project.working_dir")}}',
        "{{range .HostConfig.DeviceRequests}}",
        "{{.Driver}}",
        "{{.Count}}",
        "{{range .DeviceIDs}}",
        "{{json .}}",
        "{{end}}",
        "{{end}}",
    ]
    assert f"docker top {CONTAINER} -eo pid\\,comm " in host.calls


def on_a_terminal(host: Host, **env: str) -> bytes:
    """Run the script with its output on a terminal."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [SCRIPT],
        stdout=theirs,
        stdin=subprocess.DEVNULL,
        env={"PATH": f"{host.path}:/usr/bin:/bin", "TERM": "xterm"} | env,
    ):
        os.close(theirs)
        out = b""
        try:
            while more := os.read(ours, 4096):
                out += more
        except OSError:  # the terminal's end of file
            pass
    os.close(ours)
    return out


def test_colour_only_on_a_terminal(host: Host) -> None:
    assert b"\x1b[32m  OK: " in on_a_terminal(host)
    assert b"\x1b[32m  OK: " in on_a_terminal(host, NO_COLOR="")
    for out in (on_a_terminal(host, NO_COLOR="1"), on_a_terminal(host, TERM="dumb"), host.run().out):
        assert b"  OK: " in out
        assert b"\x1b" not in out
    host.apps((GPU0, 16911, 7688))
    assert b"\x1b[31m  MISPLACED: " in on_a_terminal(host)
    host.apps()
    assert b"\x1b[33m  CAN'T TELL: " in on_a_terminal(host)


# --- The page says what the script does ----------------------------------------------------------------


def test_a_stumble_of_the_script_is_no_verdict(host: Host) -> None:
    """Bash ends with 1 after an unbound variable; 1 would say "on a wrong card"."""
    script = SCRIPT.read_text().replace("judge() {\n", 'judge() {\n: "$no_such_variable"\n', 1)
    done = subprocess.run(
        ["bash", "-s"],
        input=script.encode(),
        env={"PATH": f"{host.path}:/usr/bin:/bin"},
        capture_output=True,
        check=False,
    )
    assert b"no_such_variable: unbound" in done.stderr
    assert done.returncode == 3


def test_the_page_lists_exactly_the_causes_that_there_are() -> None:
    script = SCRIPT.read_text()
    used = set(re.findall(r"(?:problem |cause=|why=(?:\${why:-)?)([a-z]+(?:_[a-z]+)+)", script)) | {"usage"}
    used |= set(re.findall(r"usage_error .* (no_such_gpu) ", script))
    section = PAGE.split("## Causes")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == used
    assert len(used) > 25


def test_the_page_lists_exactly_the_fields_that_there_are() -> None:
    section = PAGE.split("## JSON")[1].split("\n## ")[0]
    names = {
        f"{part}[]" if part in {"gpus", "processes", "other_processes"} else part for part in KEYS if part
    }
    fields = {f"{key}.{name}" if key else name for key, all_ in KEYS.items() for name in all_.split()}
    fields = {re.sub(r"^(gpus|processes|other_processes)\.", r"\1[].", field) for field in fields}
    fields -= {field for field in fields if field.startswith("other_processes[]")}  # same as processes[]
    assert names
    assert set(re.findall(r"`([\w.\[\]]+)`(?=[^|\n]*\|[^|\n]*\|[^|\n]*\|$)", section, re.MULTILINE)) >= fields
