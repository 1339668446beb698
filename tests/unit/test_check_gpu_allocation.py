"""The referee with stand-ins for nvidia-smi and docker that replay recorded output."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "check_gpu_allocation.sh"
PAGE = (ROOT / "docs" / "check_gpu_allocation.md").read_text(encoding="utf-8")
CAUSES = PAGE.split("## Causes")[1].split("\n## ")[0]
CODES = {None: 0} | {c: int(n) for c, n in re.findall(r"^\| `(\w+)` \| (\d) \|", CAUSES, re.MULTILINE)}
RECORDED = ROOT / "tests" / "recorded"

GPU0 = "GPU-896c7a6e-183b-73fc-e751-fe7a873f5819"  # the cards of the recorded host
GPU1 = "GPU-6fbb807e-f2ed-c36a-73e4-9321b04b778a"
MIG = "MIG-41b3359c-e721-56e5-8009-12e5797ed514"
MIG5 = MIG[:-1] + "5"
CONTAINER = "bfc284fa500f31946e814ea11ec2be4519ab476d9d25d59d353062e9757262f0"
PIDS = [16052, 16910, 16911]
TENANT = 2**22 + 7  # no process can have this PID, so its name cannot be read

KEYS = {
    "": "schema verdict cause code message cure expected gpus container processes other_processes"
    " processes_listed notes",
    "expected": "id index uuid",
    "gpus": "index uuid pci_bus_id name memory_total_mib memory_used_mib driver_version",
    "container": "name id status health exit_code started_at image requested requested_count pids",
    "processes": "pid name gpu_uuid gpu_index memory_mib",
    "other_processes": "pid name gpu_uuid gpu_index memory_mib",
}

# Each call replays CALL.out, CALL.err and CALL.rc from the files beside it, after running CALL.sh.
# What it reads from standard input is kept: there must be nothing.
STAND_IN = r"""#!/bin/bash
here=${0%/*} program=${0##*/}
case "$program $*" in
  "nvidia-smi --query-gpu="*) call=gpus ;;
  "nvidia-smi --query-compute-apps="*) call=apps ;;
  "nvidia-smi -L") call=list ;;
  *) call=$1 ;;
esac
base=$here/$call
printf -v line '%q ' "$program" "$@"
echo "$line" >>"$here/calls" # a single write, as calls run side by side
cat >>"$here/stdin"
[[ -f $base.out ]] || exit 1
. "$base.sh"
cat "$base.out"
cat "$base.err" >&2
exit "$(<"$base.rc")"
"""


class Answer(NamedTuple):
    """What a call prints and returns, after running some bash."""

    out: str = ""
    rc: int = 0
    err: str = ""
    before: str = ""


def cards(used: tuple[object, object] = (0, 7697), name: str = "NVIDIA H200", end: str = "\n") -> str:
    return "".join(
        f"{n}, {uuid}, 00000000:00:0{n + 6}.0, 143771, {used[n]}, 580.159.04, {name}{end}"
        for n, uuid in enumerate((GPU0, GPU1))
    )


def apps(*rows: tuple[str, int, object]) -> str:
    return "".join(f"{uuid}, {pid}, {memory}\n" for uuid, pid, memory in rows)


def top(*processes: int | tuple[int, str]) -> str:
    pairs = (process if isinstance(process, tuple) else (process, "python3") for process in processes)
    return f"{'PID':<20}COMMAND\n" + "".join(f"{pid:<20}{name}\n" for pid, name in pairs)


def container(*ids: object, driver: str = "nvidia", count: int = 0, **fields: object) -> str:
    """Return the output of `docker inspect` in the script's format; without ids GPU 1 is requested."""
    devices = "".join(f"device {json.dumps(i)}\n" for i in ids or ("1",) if not count)
    request = f"driver {driver}\ncount {count}\n{devices}" if ids != (None,) else ""
    usual = {"id": CONTAINER, "name": "/vllm-server", "status": "running", "health": "", "code": 0}
    usual |= {"started": "2026-11-22T13:16:31.123456789Z", "image": "vllm/vllm-openai:v0.24.0"}
    lines = usual | fields | {"directory": json.dumps(fields.get("directory"))}
    return "".join(f"{'exit' if k == 'code' else k} {value}\n" for k, value in lines.items()) + request


def failed(text: str) -> Answer:
    return Answer("\n", 1, text + "\n")


def text_of(raw: bytes) -> str:
    """Return text that is written as these bytes again."""
    return raw.decode("utf-8", "surrogateescape")


@dataclass
class Result:
    code: int
    out: bytes
    err: str

    @property
    def flat(self) -> str:
        """The report without its line breaks."""
        return " ".join(self.out.decode().split())

    @property
    def json(self) -> dict[str, Any]:
        """The JSON object, after checking that it has the documented form."""
        assert bool(self.err) == (self.code == 2)
        data: dict[str, Any] = json.loads(self.out.decode("utf-8"))
        assert " ".join(data) == KEYS[""]
        for key, names in KEYS.items():
            for part in [data[key]] if isinstance(data.get(key), dict) else data.get(key) or []:
                assert " ".join(part) == names
        assert data["code"] == self.code == CODES[data["cause"]]
        assert data["verdict"] == ("ok", "misplaced", "usage", "unknown")[self.code]
        assert (data["cause"] is None) == (data["cure"] is None) == (self.code == 0)
        return data


class Host:
    """A machine with two cards and one container, in a directory of stand-ins."""

    def __init__(self, path: Path) -> None:
        """Make the recorded host: vLLM requested GPU 1 and runs on it."""
        self.path = path
        path.mkdir(exist_ok=True)
        for program in ("nvidia-smi", "docker"):
            (path / program).write_text(STAND_IN)
            (path / program).chmod(0o755)
        self.answer(gpus=cards(), apps=OURS, inspect=container(), top=TOP)

    def answer(self, **answers: Answer | str) -> Host:
        """Set what the calls `gpus`, `apps` and `list` of nvidia-smi and those of docker answer."""
        for call, answer in answers.items():
            parts = answer if isinstance(answer, Answer) else Answer(answer)
            for kind, text in zip(("out", "rc", "err", "sh"), parts, strict=True):
                (self.path / f"{call}.{kind}").write_bytes(str(text).encode("utf-8", "surrogateescape"))
        return self

    def run(
        self, *args: str | bytes, command: Sequence[str | Path] = (SCRIPT,), stdin: str = "", **env: str
    ) -> Result:
        """Run the script on this host."""
        done = subprocess.run(
            [*command, *args],
            env={"PATH": f"{self.path}:/usr/bin:/bin", "TERM": "xterm"} | env,
            cwd="/",
            input=stdin.encode(),
            capture_output=True,
            timeout=45,
            check=False,
        )
        return Result(done.returncode, done.stdout, done.stderr.decode(errors="replace"))

    def judge(self, *args: str, **env: str) -> dict[str, Any]:
        return self.run("--json", *args, **env).json

    def cause(self, *args: str) -> str | None:
        """Return the cause of the verdict: none where the server is on the right card."""
        cause: str | None = self.judge(*args)["cause"]
        return cause

    @property
    def calls(self) -> list[str]:
        return (self.path / "calls").read_text().splitlines()


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path / "bin")


# --- Output of the programs, and the verdict -------------------------------------------------------

NAMES = ("1", GPU1, GPU1.upper(), "00000000:00:07.0", "0000:00:07.0", "00:07.0")
NO_DRIVER = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n"
LOST = "Unable to determine the device handle for GPU0000:06:00.0: GPU is lost.\n"
MISMATCH = "Failed to initialize NVML: Driver/library version mismatch\nNVML: 580.1\n"
NVML_UNKNOWN = "Failed to initialize NVML: Unknown Error\n"
INFOROM = "WARNING: infoROM is corrupted at gpu 0000:B3:00.0\n"
WARNING = "WARNING: Error loading config file: permission denied\n"
ROW = f"0, {GPU0}, 00000000:00:06.0, 143771, 527, 580.159.04, NVIDIA H200\n"
OURS = apps((GPU1, 16911, 7688))
TOP = top(16052, 16910, (16911, "VLLM::EngineCor"))
BOTH = apps((GPU0, 16911, 7688)) + OURS
ON_MIG = apps((MIG, 16911, 7688))
ON0, ON1 = (f"GPU {n} (NVIDIA H200, {uuid})" for n, uuid in enumerate((GPU0, GPU1)))
SEES_ONE = f"GPU 0: NVIDIA H200 (UUID: {GPU1})\n"
SEES_TWO = f"GPU 0: NVIDIA H200 (UUID: {GPU0})\nGPU 1: NVIDIA H200 (UUID: {GPU1})\n"
MIG_ROW, MIG5_ROW = (f"  MIG 1g.18gb     Device  {uuid[-1]}: (UUID: {uuid})\n" for uuid in (MIG, MIG5))
DIVIDED = SEES_ONE + MIG_ROW
BOTH_INSTANCES = DIVIDED + MIG5_ROW
TWINS = cards().replace(GPU0, GPU1[:-1] + "0")
SAME_NAMES = "".join(f"1, {uuid}, 00000000:00:07.0, 1, 0, 580.1, H200\n" for uuid in (GPU0, GPU1))
RENUMBERED = cards().replace("0, GPU", "X, GPU").replace("1, GPU", "0, GPU").replace("X, GPU", "1, GPU")
SOCKET = "unix:///var/run/docker.sock"
DENIED = f"permission denied while trying to connect to the Docker daemon socket at {SOCKET}"
NO_DAEMON = "Cannot connect to the Docker daemon"
UNPARSABLE = "cannot parse the output of "
REQUESTS: list[tuple[tuple[object, ...], dict[str, Any], str, str]] = [
    ((None,), {}, "asked_for_no_gpu", "no GPU"),
    (("",), {}, "asked_for_no_gpu", "no GPU"),
    (("vendor.com/net=0",), {"driver": "cdi"}, "asked_for_no_gpu", "no GPU"),
    (("0",), {"driver": "amd"}, "asked_for_no_gpu", "no GPU"),
    ((), {"count": 1}, "asked_for_count", "a number of GPUs (1)"),
    ((), {"count": -1, "driver": ""}, "asked_for_count", 'a number of GPUs (all)…"requested_count": -1'),
    (("all",), {}, "asked_for_count", "a number of GPUs (all)"),
    (("nvidia.com/gpu=all",), {"driver": "cdi"}, "asked_for_count", "a number of GPUs (all)"),
    ((), {"count": 2}, "asked_for_count", 'a number of GPUs (2)…"requested_count": 2'),
    (("0", "1"), {}, "asked_for_several", "several GPUs (0 1)"),
    (("0,1",), {}, "asked_for_several", "several GPUs (0 1)"),
    (("7",), {}, "requested_gpu_missing", "GPU '7', which this machine does not have"),
    (("1", "7"), {}, "requested_gpu_missing", "GPU '7'"),
    (("GPU-00000000",), {}, "requested_gpu_missing", "GPU 'GPU-00000000'"),
    (("none",), {}, "requested_gpu_unclear", "GPU 'none'"),
    (("1:0",), {}, "requested_gpu_unclear", "GPU '1:0', a name that this script cannot match"),
    (("nvidia.com/gpu=1:0",), {"driver": "cdi"}, "requested_gpu_unclear", "GPU 'nvidia.com/gpu=1:0'"),
    (("GPU-6fbb",), {}, "requested_gpu_unclear", "GPU 'GPU-6fbb', a name that"),
    (('x"\n1',), {}, "requested_gpu_unclear", "GPU 'x"),
]
OTHERS_ROWS = [  # provably not of the container, or on the expected card
    *(
        f"{GPU0}, {TENANT}{memory}"
        for memory in ("", ", ERR!", ", [Unknown Error]", ", 17592186044", ", 7,688 MiB")
    ),
    *(f"{uuid}, {TENANT}, 5" for uuid in ("[N/A]", "GPU-\x1b[31m")),
    *(f"{GPU1}, {pid}, 7688" for pid in ("[N/A]", "12345678901")),
    f"  {GPU0} ,  {TENANT} , \t",
]
SUSPECT_ROWS = [  # perhaps of the container, on a wrong card
    *(f"{GPU0}, {pid}, 5" for pid in ("[N/A]", "12345678901", "0", "-1", "")),
    *("ERR!", GPU0, "[N/A], [N/A], [N/A]", "[N/A], 16910, 5", f"{MIG}, [N/A], 5"),
]
SEES_OTHERS = [
    SEES_TWO,
    f"GPU 0: NVIDIA H200 (UUID: {GPU0})\n",
    SEES_ONE + "GPU 1: ERR!",
    "",
    Answer(SEES_ONE, 1),
    Answer("OCI runtime exec failed", 127),
]
# Answers that differ from the recorded ones, options, the cause, and parts of the message, cure, notes and JSON.
VERDICTS: list[tuple[dict[str, Any], str, str | None, str]] = [
    ({}, "", None, f"vllm-server runs on {ON1} and on no other."),
    ({}, "--expect 0", "wrong_gpu", "gpu_device_id=0…GPU_DEVICE_ID=0"),
    ({"gpus": RENUMBERED}, "", "wrong_gpu", f"runs on GPU 0 (NVIDIA H200, {GPU1}), not on GPU 1"),
    ({"apps": apps((GPU0, 16911, 7))}, "", "wrong_gpu", f"on {ON0}, not on {ON1}…--force-recreate"),
    *(({"apps": apps((GPU0, pid, 5)) + OURS}, "", "additional_gpu", f"but holds {ON0} as well") for pid in PIDS),
    ({"inspect": container("0", "1"), "apps": BOTH}, "--expect 0", "additional_gpu", "gpu_device_id=0"),
    # Other tenants.
    ({"apps": apps((GPU0, TENANT, 100), (GPU1, TENANT, 518)) + OURS}, "", None, ""),
    ({"apps": apps((GPU1, TENANT, 7688))}, "", "no_process_yet", ""),
    # Processes that end during the check, or have no name.
    ({"top": top(16052, 16911, 16999)}, "", None, ""),
    ({"top": top(16052, (16910, "   "), 16911), "apps": OURS + apps((GPU0, 16910, 5))}, "", "additional_gpu", ""),
    ({"top": top(16052, (16910, "")), "apps": apps((GPU0, 16910, 5))}, "", "wrong_gpu", ""),
    # Names of a card.
    *(({}, f"--expect{by}{card}", None, f'"expected": {{"id": "{card}", "index": 1, "uuid": "{GPU1}"}}')
      for card in NAMES for by in (" ", "=")),
    *(({"inspect": container(prefix + card, driver=driver)}, "", None, ON1)
      for card in NAMES for prefix, driver in (("", "nvidia"), ("nvidia.com/gpu=", "cdi"))),
    *(({"inspect": container(start)}, "", None, ON1) for start in ("GPU-6fbb807e", "gpu-6FBB807E-f2")),
    ({"inspect": container(f"nvidia.com/gpu={GPU1[:-1]}")}, "", None, ON1),
    ({"inspect": container("1", GPU1)}, "", None, ""),
    ({"inspect": container("GPU-6fbb807f")}, "", "requested_gpu_missing", ""),
    ({"gpus": TWINS, "inspect": container(GPU1[:-1])}, "", "requested_gpu_unclear", "whole UUID"),
    ({"gpus": TWINS, "inspect": container(GPU1)}, "", None, ""),
    *(({"gpus": SAME_NAMES}, f"--expect {name}", "no_such_gpu", "") for name in ("1", "00:07.0")),
    ({"gpus": SAME_NAMES}, f"--expect {GPU1}", None, ""),
    # Requests that name no single card.
    *(({"inspect": container(*ids, **options)}, "", cause, f'vllm-server requested {words}…--expect…"expected": null')
      for ids, options, cause, words in REQUESTS),
    *(({"inspect": container(*ids, **options)}, expect, cause, "")
      for ids, options, _, _ in REQUESTS for expect, cause in (("--expect 1", None), ("--expect 0", "wrong_gpu"))),
    # MIG instances: a process on one, and on what is known only as a card with instances.
    *(({"list": listing, "apps": ON_MIG}, options, cause, words)
      for listing in (SEES_TWO + MIG_ROW, Answer(DIVIDED + INFOROM, 14))
      for options, cause, words in (
          (f"--expect {MIG}", None, f"runs on GPU 1 (NVIDIA H200, {MIG}) and on no other"),
          ("", None, ON1),
          ("--expect 0", "wrong_gpu", ""),
          (f"--expect {MIG5}", "no_such_gpu", ""),
      )),
    ({"list": DIVIDED}, f"--expect {MIG}", "mig_instance_unclear", f"--expect {GPU1}"),
    *(({"list": BOTH_INSTANCES, "apps": ON_MIG + f"{GPU1}, [N/A], 5\n", "exec": sees}, f"--expect {gpu}", cause, "")
      for sees, gpu, cause in ((BOTH_INSTANCES, MIG, "process_unclear"), (BOTH_INSTANCES, "1", None), (DIVIDED, MIG, None))),
    *(({"list": BOTH_INSTANCES, "apps": ON_MIG, "exec": sees}, f"--deep --expect {gpu}", None, words)
      for sees, gpu, words in ((DIVIDED, MIG, ""), (BOTH_INSTANCES, MIG, f"Note: …{MIG5}"), (BOTH_INSTANCES, "1", ""))),
    # nvidia-smi cannot read the cards.
    ({"gpus": Answer(NO_DRIVER, 9)}, "", "driver_not_loaded", "modprobe"),
    ({"gpus": Answer(MISMATCH, 18)}, "", "driver_library_mismatch", "Reboot"),
    *(({"gpus": Answer("No devices were found\n", rc)}, "", "no_devices", "lspci") for rc in (0, 6)),
    *(({"gpus": text}, "", "no_devices", "") for text in ("", "\r\n\n")),
    *(({"gpus": Answer(text, 255)}, "", "gpu_lost", "GPU is lost…dmesg") for text in (LOST, "GPU is lost\n", ROW + LOST)),
    ({"gpus": Answer("", 15)}, "", "gpu_lost", "no output"),
    ({"gpus": Answer(NVML_UNKNOWN, 255)}, "", "nvidia_smi_failed", "(exit code 255): Failed to initialize NVML"),
    ({"gpus": Answer('Field "nosuchfield" is not a valid field to query.\n\n', 2)}, "", "nvidia_smi_failed", "nosuchfield"),
    ({"gpus": Answer("", 1)}, "", "nvidia_smi_failed", "no output"),
    ({"gpus": ROW + "something else\n"}, "", "nvidia_smi_unparsable", "something else"),
    ({"gpus": ROW + ROW}, "", "nvidia_smi_unparsable", GPU0),
    ({"gpus": ROW.replace("0, ", "x, ", 1)}, "", "nvidia_smi_unparsable", "x, GPU"),
    ({"gpus": "index, uuid\n" + ROW}, "", "nvidia_smi_unparsable", ""),
    *(({"gpus": Answer("else\n", rc)}, "", "nvidia_smi_unparsable", UNPARSABLE + "nvidia-smi: else") for rc in (0, 14)),
    # It cannot list the processes.
    ({"apps": f"{GPU1[:-1]}0, 16911, 7688\n"}, "", "nvidia_smi_unparsable", "not in its list of GPUs"),
    ({"apps": Answer("x", 1)}, "", "nvidia_smi_failed", '(exit code 1): x…"processes_listed": false'),
    ({"apps": Answer(NO_DRIVER, 9)}, "", "driver_not_loaded", ""),
    # It works with a warning.
    *(({"gpus": Answer(cards() + text, 14), "apps": Answer(OURS + text, 14)}, "", None, "") for text in ("", INFOROM)),
    ({"gpus": Answer(cards(), err=WARNING), "apps": Answer(OURS, err=WARNING)}, "", None, ""),
    ({"inspect": Answer(container(), err=WARNING), "top": Answer(top(*PIDS), err=WARNING)}, "", None, ""),
    # docker fails.
    ({"inspect": failed(f"{NO_DAEMON} at {SOCKET}.")}, "", "engine_not_running", "systemctl start docker"),
    ({"inspect": failed(f"failed to connect to the docker API at {SOCKET}; check if")}, "", "engine_not_running", ""),
    ({"inspect": failed("error during connect: Get http://h:2375/: connection refused")}, "", "engine_not_running", ""),
    *(({"inspect": failed(got + DENIED)}, "", "engine_permission", "group 'docker'") for got in ("", "Got ")),
    *(({"inspect": failed(f"{error}: vllm-server"), "ps": "web-1\ndb-1\n"}, "", "no_such_container", "here: web-1 db-1.")
      for error in ("Error: No such container", "Error response from daemon: No such container", "Error: No such object")),
    ({"inspect": failed("template parsing error")}, "", "docker_failed", "(exit code 1): template parsing error"),
    ({"top": failed("oops")}, "", "docker_failed", "oops"),
    *(({"inspect": text}, "", "docker_unparsable", f"{UNPARSABLE}'docker inspect vllm-server'")
      for text in ("", "id zz\nstatus running\n", "something\n")),
    *(({"top": text}, "", "docker_unparsable", f"{UNPARSABLE}'docker top vllm-server -eo pid,comm': {shown}")
      for text, shown in (
          ("", "no output"),
          ("no table\n", "no table"),
          ("16911\n", "16911"),
          ("PID COMMAND\n16911 python3\nx y\n", "x y "),
          ("PID COMMAND\n16911python3\n", "16911python3"),
      )),
    # Both fail: the cards come first, and without them a missing container is no news.
    ({"gpus": Answer(NO_DRIVER, 9), "inspect": failed(NO_DAEMON)}, "", "driver_not_loaded",
     "driver is not loaded. Also: The Docker Engine…modprobe…systemctl start docker"),
    ({"gpus": Answer(NO_DRIVER, 9), "inspect": failed("No such container: x")}, "", "driver_not_loaded", ""),
    ({"inspect": failed(NO_DAEMON), "apps": apps((GPU1, TENANT, 5))}, "--expect 0", "engine_not_running",
     f'"index": 0, "uuid": "{GPU0}"}}, "gpus"…"container": null…"other_processes": [{{"pid": {TENANT},'),
    # The container of a Compose project.
    ({"ps": CONTAINER}, "--project team", None, ""),
    ({"ps": f"{CONTAINER}\n{CONTAINER[::-1]}\n"}, "--project team", "several_containers", "2 containers"),
    ({"ps": ""}, "--project team", "no_such_container", "service vllm in Compose project team"),
    ({"ps": failed(NO_DAEMON)}, "--project team", "engine_not_running", ""),
    # It does not run, or has stopped during the check.
    *(({"inspect": container(status=status, code=code)}, "", "container_not_running", f"it is {status}{words}")
      for status, code, words in (
          ("created", 0, '.…docker start…"status": "created", "health": null, "exit_code": null'),
          ("exited", 1, ' with exit code 1.…docker logs…"exit_code": 1'),
          ("exited", 0, ' with exit code 0.…docker logs…"exit_code": 0'),
          ("restarting", 137, ' with exit code 137.…keeps failing…"exit_code": 137'),
          ("paused", 0, '.…docker unpause…"exit_code": null'),
          ("dead", 255, ' with exit code 255.…docker logs…"exit_code": 255'),
          ("removing", 0, '.…docker logs…"exit_code": null'),
      )),
    ({"inspect": container(status="created", started="0001-01-01T00:00:00Z")}, "", "container_not_running", '"started_at": null'),
    ({"top": failed(f"container {CONTAINER} is not running")}, "", "container_not_running", "it is exited"),
    ({"top": failed(f"No such container: {CONTAINER}")}, "", "container_not_running", "it is exited"),
    ({"top": failed("Container x is restarting, wait until")}, "", "container_not_running", "it is restarting"),
    # It runs, but uses no GPU yet.
    ({"apps": ""}, "", "no_process_yet", 'Note: …although 7697 MiB of GPU 1 are in use…"processes_listed": true'),
    ({"apps": "No running processes found\n", "gpus": cards((0, 0))}, "", "no_process_yet", "docker logs"),
    ({"apps": apps((GPU0, TENANT, 5))}, "", "no_process_yet", ""),
    ({"apps": "", "gpus": cards((0, 0)), "exec": SEES_ONE}, "", "no_process_yet", ""),
    ({"apps": apps((GPU1, TENANT, 5)), "inspect": container(started="yesterday; really")}, "", "no_process_yet", ""),
    # What it sees, and what Docker's health check reports.
    ({"exec": Answer(NVML_UNKNOWN, 255)}, "--deep", "gpu_view_lost", "--force-recreate"),
    ({"exec": Answer(NVML_UNKNOWN, 255), "apps": ""}, "", "gpu_view_lost", ""),
    ({"exec": SEES_ONE}, "--deep", None, ""),
    ({"exec": SEES_TWO}, "", None, ""),
    ({"exec": SEES_TWO}, "--deep", None, f"Note: vllm-server also sees {ON0} and can use it"),
    ({"exec": SEES_TWO, "apps": apps((GPU0, 16911, 5))}, "--deep", "wrong_gpu", "Note: vllm-server also sees GPU 0"),
    ({"exec": failed("OCI runtime exec failed")}, "--deep", None, "Note: …exit code 1: OCI runtime exec failed"),
    ({"inspect": container(health="unhealthy")}, "", None,
     "Note: Docker's health check…docker inspect --format '{{json .State.Health}}' vllm-server"),
    ({"inspect": container(health="healthy")}, "", None, '"health": "healthy"'),
    ({"inspect": container(health="none")}, "", None, '"health": null'),
    # Odd rows and labels. (Domains and missing numbers of other drivers are from public bug reports.)
    ({"exec": SEES_ONE, "apps": f"{GPU0}, [N/A], 7688\n"}, "", "no_process_yet", ""),
    ({"exec": SEES_ONE, "apps": f"{GPU1}, [N/A], 7688\n"}, "", "process_unclear", "none of its other processes"),
    ({"gpus": cards(name='"A", B', end="\r\n"), "apps": OURS.replace("7688", "7688 MiB\r")}, "", None, '"A", B'),
    *(({"apps": text}, "", None, '"processes": [{"pid": 16911,…"other_processes": [{')
      for row in OTHERS_ROWS for text in (f"{OURS}{row}\n", f"{row}\n{OURS}")),
    *(({"apps": f"{OURS}{row}\n", "exec": sees}, "", "process_unclear", f"'{row}'")
      for row in SUSPECT_ROWS for sees in SEES_OTHERS),
    *(({"apps": f"{OURS}{row}\n", "exec": SEES_ONE}, "", None, "") for row in SUSPECT_ROWS),
    *(({"apps": f"{row}\n{GPU0}, 16911, 5\n", "exec": SEES_ONE}, "", "wrong_gpu", "") for row in SUSPECT_ROWS),
    *(({"gpus": cards((word, word)), "apps": OURS.replace("7688", word)}, "", None, "")
      for word in ("[N/A]", "[Not Supported]", "[Insufficient Permissions]", "N/A")),
    *(({"gpus": cards(("[N/A]", 0)).replace("00000000", domain)}, f"--expect {bus}:00:07.0", None, "")
      for domain in ("0000", "00000000") for bus in ("0000", "00000000")),
    *(({"inspect": container(directory=path)}, "", None, "") for path in ('/a"b', "relative", "", 7, "/no/such")),
]  # fmt: skip


@pytest.mark.parametrize(("answers", "options", "cause", "words"), VERDICTS)
def test_answers_of_the_programs_give_a_verdict(
    host: Host, answers: dict[str, Any], options: str, cause: str | None, words: str
) -> None:
    data = host.answer(**answers).judge(*options.split())
    sentences = " ".join([data["message"], data["cure"] or "", *(f"Note: {note}" for note in data["notes"])])
    text = f"{sentences} {json.dumps(data, ensure_ascii=False)}"
    assert data["cause"] == cause, text
    for part in words.split("…"):
        assert part in text
    assert ("Also: " in sentences) == ("Also: " in words)
    assert ("Note: " in sentences) == ("Note: " in words)
    if "gpus" not in answers:
        assert [gpu["uuid"] for gpu in data["gpus"]] == [GPU0, GPU1]
    if not answers.keys() & {"inspect", "top", "ps"}:
        assert data["container"]["pids"] == PIDS


def test_the_table_has_each_cause_of_the_programs() -> None:
    elsewhere = {"usage", "nvidia_smi_missing", "docker_missing", "nvidia_smi_timeout", "docker_timeout"}
    elsewhere |= {"remote_engine", "gpu_drifted"}
    assert {cause for _, _, cause, _ in VERDICTS} == CODES.keys() - elsewhere


@pytest.mark.parametrize(
    ("cause", "listing", "rc"),
    [
        ("nvidia_smi_timeout", "", 124),
        ("nvidia_smi_failed", "", 255),
        ("nvidia_smi_failed", SEES_ONE, 255),
        ("gpu_lost", SEES_ONE + LOST, 0),
        ("nvidia_smi_unparsable", SEES_ONE + "  MIG 1g.18gb  Device  0: (UUID: N/A)\n", 0),
    ],
)
def test_an_instance_that_may_be_unlisted_is_not_reported_missing(
    host: Host, cause: str, listing: str, rc: int
) -> None:
    host.answer(list=Answer(listing, rc), apps=ON_MIG)
    for ids, expect in (((MIG,), ()), ((f"nvidia.com/gpu={MIG}",), ()), ((), ()), ((), ("--expect", MIG))):
        (host.path / "calls").unlink(missing_ok=True)
        data = host.answer(inspect=container(*ids)).judge(*expect)
        assert data["cause"] == cause
        assert "Also:" not in data["message"]
        assert sum(call.startswith("nvidia-smi -L") for call in host.calls) == 1
    assert f"'{MIG}' = not known" in host.answer(inspect=container(MIG)).run().flat
    if rc:  # both calls fail in the same way: reported once
        assert "Also:" not in host.answer(apps=Answer(listing, rc)).judge("--expect", MIG)["message"]
    host.answer(inspect=container("7"), apps=ON_MIG)
    assert host.cause() == "requested_gpu_missing"
    assert "'7' = no GPU of this machine" in host.run().flat


def test_the_container_is_only_checked_inside_where_the_verdict_needs_it(host: Host) -> None:
    host.answer(exec=Answer(NVML_UNKNOWN, 255))
    assert host.cause() is None
    assert not any("exec" in call for call in host.calls)
    host.answer(inspect=container(status="paused")).judge()
    assert sum("docker top" in call for call in host.calls) == 1  # nor are the PIDs of a stopped one


# --- An index that means another card than it did ----------------------------------------------------


def proven(host: Host, text: str) -> Path:
    """Record in the container's project what was proven, as the role does."""
    project = host.path / "project"
    (project / ".proven/current").mkdir(parents=True)
    (project / ".proven/current/gpu").write_text(text)
    host.answer(inspect=container(directory=str(project)))
    return project


@pytest.mark.parametrize("expect", [(), ("--expect", "1"), ("--expect", GPU1)])
def test_an_index_that_means_another_card_is_reported(host: Host, expect: tuple[str, ...]) -> None:
    project = proven(host, f"1 {GPU0}\n")
    data = host.judge(*expect)
    assert (data["verdict"], data["cause"]) == ("misplaced", "gpu_drifted")
    assert data["message"] == f"{ON1} is not the GPU 1 on which vllm-server was proven: that was {GPU0}."
    assert "vllm_gpu_force" in data["cure"]
    assert host.cause("--no-drift", *expect) is None
    assert host.answer(inspect=container(GPU1, directory=str(project))).cause(*expect) is None


@pytest.mark.parametrize(
    "text", [f"1 {GPU1}\n", f"1 {GPU1}", f"0 {GPU0}\n", f"{GPU1} {GPU1}\n", "", "\n", "x\0y"]
)
def test_what_was_proven_and_still_holds_is_fine(host: Host, text: str) -> None:
    proven(host, text)
    assert host.cause() is None


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
    host.answer(inspect=container(directory=str(project)))
    assert host.cause() == "gpu_drifted"
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


@pytest.mark.parametrize("make", ["mkfifo", "mkdir", "ln -s gpu", "ln -s /dev/zero"])
def test_a_record_that_never_ends_or_is_no_file(host: Host, make: str) -> None:
    gpu = proven(host, f"1 {GPU0}\n") / ".proven/current/gpu"
    gpu.unlink()
    subprocess.run([*make.split(), gpu], check=True)
    data = host.judge()
    assert (data["verdict"], data["notes"]) == ("ok", [])


@pytest.mark.parametrize("closed", [".proven", "7", ".proven/current/gpu"])
def test_an_unreadable_record_is_not_taken_for_a_missing_one(host: Host, closed: str) -> None:
    """A user of the group docker cannot read root's .proven or what is in it."""
    project = proven(host, f"1 {GPU0}\n")
    (project / ".proven/current").rename(project / "7")
    (project / ".proven/current").symlink_to("../7")
    if not os.getuid():  # root can read everything, unless it drops these capabilities
        drop = "exec setpriv --bounding-set=-dac_override,-dac_read_search /bin/bash"
        (host.path / "bash").write_text(f'#!/bin/sh\n{drop} "$@"\n')
        (host.path / "bash").chmod(0o755)
    assert host.cause() == "gpu_drifted"
    mode = (project / closed).stat().st_mode
    (project / closed).chmod(0)
    data = host.judge()
    (project / closed).chmod(mode)
    gpu = project / ".proven/current/gpu"
    assert data["notes"] == [
        f"It is not known which GPU was proven: {gpu} cannot be read. Run this script as root."
    ]
    gpu.unlink()
    assert host.judge()["notes"] == []


# --- What the JSON and the report contain ------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 1])
def test_the_recorded_runs_are_ok(host: Host, index: int) -> None:
    """The two real runs on two H200s, with the cards, processes and PIDs that they had."""
    run = (RECORDED / "vllm-0.24-2xh200.txt").read_text().split("=== GPU ")[index + 1].split("\n## ")[0]
    smi = (RECORDED / "nvidia-smi-2xh200.txt").read_text()
    memory = re.findall(r"^(\d, GPU-\S+), (\d+) MiB$", run, re.MULTILINE)
    buses = re.findall(r"^\d, GPU-\S+, (\S+), ", smi, re.MULTILINE)
    processes = re.findall(r"^(GPU-\S+), (\d+), \S+, (\d+) MiB$", run, re.MULTILINE)
    table = run.split("COMMAND\n")[1].split("{")[0]
    names = re.findall(r"^(\d+) +\d+ +(\S+) ", table, re.MULTILINE)
    requested = re.findall(r'"DeviceIDs":\["(\d)"\]', run)
    assert (len(memory), len(processes), len(names), requested) == (2, 1, 3, [str(index)])
    host.answer(
        gpus="".join(
            f"{card}, {bus}, 143771, {used}, 580.159.04, NVIDIA H200\n"
            for (card, used), bus in zip(memory, buses, strict=True)
        ),
        apps=apps(*((uuid, int(pid), used) for uuid, pid, used in processes)),
        top=top(*((int(pid), name) for pid, name in names)),
        inspect=container(*requested),
    )
    data = host.judge()
    uuid = (GPU0, GPU1)[index]
    assert data["message"] == f"vllm-server runs on GPU {index} (NVIDIA H200, {uuid}) and on no other."
    assert data["expected"] == {"id": str(index), "index": index, "uuid": uuid}
    pid = (14918, 16911)[index]
    assert data["processes"] == [
        {"pid": pid, "name": "VLLM::EngineCor", "gpu_uuid": uuid, "gpu_index": index, "memory_mib": 7688}
    ]
    assert data["container"]["pids"] == [int(pid) for pid, _ in names]
    assert [gpu["memory_used_mib"] for gpu in data["gpus"]] == [int(used) for _, used in memory]
    assert host.run("--expect", str(1 - index)).code == 1


def test_everything_that_was_read_is_in_the_json(host: Host) -> None:
    host.answer(apps=OURS + apps((GPU0, TENANT, "[N/A]")), gpus=cards(("[N/A]", 7697)))
    data = host.judge()
    assert data["gpus"][0]["memory_used_mib"] is None
    values: tuple[Any, ...] = (1, GPU1, "00000000:00:07.0", "NVIDIA H200", 143771, 7697, "580.159.04")
    assert data["gpus"][1] == dict(zip(KEYS["gpus"].split(), values, strict=True))
    started, image = "2026-11-22T13:16:31.123456789Z", "vllm/vllm-openai:v0.24.0"
    values = ("vllm-server", CONTAINER, "running", None, None, started, image, ["1"], None, PIDS)
    assert data["container"] == dict(zip(KEYS["container"].split(), values, strict=True))
    assert [list(p.values()) for p in data["processes"]] == [[16911, "VLLM::EngineCor", GPU1, 1, 7688]]
    assert [list(p.values()) for p in data["other_processes"]] == [[TENANT, None, GPU0, 0, None]]


def test_the_report_for_a_person(host: Host) -> None:
    result = host.answer(apps=OURS + apps((GPU1, TENANT, 518))).run()
    assert result.code == 0
    text = result.out.decode()
    assert re.findall(r"^(\d\. .*)$", text, re.MULTILINE) == [
        "1. GPUs of this machine (driver 580.159.04)",
        "2. The container and the GPUs it requested",
        "3. Its processes on the GPUs",
        "4. Verdict",
    ]
    for part in (
        "GPU 1 NVIDIA H200, 7697 of 143771 MiB used",
        f"{GPU1} 00000000:00:07.0",
        "vllm-server (bfc284fa500f): running since 2026-11-22T13:16:31",
        f"requested: '1' = {ON1}",
        "GPU 1 pid 16911 7688 MiB VLLM::EngineCor",
        f"GPU 1 pid {TENANT} 518 MiB ?",
        f"OK: vllm-server runs on {ON1} and on no other.",
    ):
        assert part in result.flat
    assert max(map(len, text.splitlines())) <= 80
    host.answer(exec=SEES_TWO)
    assert "Note: vllm-server also sees GPU 0" in host.run("--deep").flat
    assert "requested: 'GPU-6fbb807e' = GPU 1 " in host.answer(inspect=container("GPU-6fbb807e")).run().flat
    for inspect, line in (
        (container("7", "1:0"), "'7' = no GPU of this machine requested: '1:0' = not known"),
        (container(None), "no GPU"),
        (container(count=2), "a number of GPUs (2)"),
        (container(count=-1), "a number of GPUs (all)"),
    ):
        assert f"requested: {line} 3. Its" in host.answer(inspect=inspect).run().flat
    host.answer(gpus=TWINS, inspect=container(GPU1[:-1]))
    assert f"requested: '{GPU1[:-1]}' = not known" in host.run().flat
    report = host.answer(gpus=Answer(NO_DRIVER, 9), inspect=failed(NO_DAEMON)).run().flat
    assert "machine not known 2. The container and the GPUs it requested not known 3." in report
    assert "4. Verdict UNKNOWN: The NVIDIA driver is not loaded." in report


def test_it_reports_for_how_long_the_server_has_been_loading(host: Host) -> None:
    started = time.strftime("%Y-%m-%dT%H:%M:%S.123456789Z", time.gmtime(time.time() - 40))
    message = host.answer(apps="", inspect=container(started=started)).judge()["message"]
    assert re.search(r"vllm-server, up for [45]\d s, has no process on any GPU yet", message)


# --- Odd rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        f"0, {GPU0}, 00000000:00:06.0, ERR!, [Unknown Error], 580.159.04, NVIDIA H200",
        f"0, {GPU0}, 00000000:00:06.0, 12345678901, , [N/A], NVIDIA, Inc., H200",
        f"0, {GPU0}, [N/A], 143771, 0, 580.159.04, NVIDIA H200",
        f"[N/A], {GPU0}, 00000000:00:06.0, 143771, 0, 580.159.04, NVIDIA H200",
        "0, [N/A], 00000000:00:06.0, 143771, 0, 580.159.04, NVIDIA H200",
        f"0, {GPU0}",
        f"0, {GPU0}, 00000000:00:06.0, 143771, 0, 5\x1b[31m80, NVIDIA \x9b31m",
        "0",
        "Unable to read the name of a GPU",
    ],
)
def test_an_odd_card_beside_the_expected_one(host: Host, row: str) -> None:
    good = cards().splitlines()[1]
    for text in (f"{row}\n{good}\n", f"{good}\n{row}\n"):
        host.answer(gpus=text)
        for expect in ((), ("--expect", GPU1), ("--expect", "1"), ("--expect", "00:07.0")):
            data = host.judge(*expect)
            assert (data["verdict"], data["expected"]["uuid"]) == ("ok", GPU1)
        assert data["gpus"][text.startswith(row)]["memory_used_mib"] == 7697
        report = host.run().out
        assert b"OK: " in report
        assert not re.search(CONTROL, report)


@pytest.mark.parametrize("expect", ["0", "7", GPU0, "00:06.0"])
@pytest.mark.parametrize(
    "row", ["[N/A], [N/A], [N/A], 1, 0, 5, H200", "something", "0, [N/A], 00000000:00:06.0"]
)
def test_an_odd_card_may_be_the_expected_one(host: Host, row: str, expect: str) -> None:
    host.answer(gpus=f"{row}\n{cards().splitlines()[1]}\n")
    assert host.cause("--expect", expect) == "nvidia_smi_unparsable"
    assert host.answer(inspect=container(expect)).cause() == "nvidia_smi_unparsable"
    assert f"requested: '{expect}' = not known" in host.run().flat


# --- Another machine's Docker Engine, or no program --------------------------------------------------


@pytest.mark.parametrize("address", ["ssh://gpu-b", "tcp://127.0.0.1:2375", "gpu-b:2375"])
def test_the_docker_engine_of_another_machine_proves_nothing(host: Host, address: str) -> None:
    data = host.judge(DOCKER_HOST=address, DOCKER_CONTEXT="default")
    assert (data["cause"], data["container"], len(data["gpus"])) == ("remote_engine", None, 2)
    assert address in data["message"]
    host.answer(context=f"{address}\n")
    (host.path / "config.json").write_text('{"auths": {},\n\t"currentContext": "gpu-b"}\n')
    for env in ({"DOCKER_CONTEXT": "gpu-b"}, {"DOCKER_CONFIG": str(host.path)}):
        assert host.judge(**env)["cause"] == "remote_engine"
    host.answer(context=failed('context "gpu-b": context not found'))
    assert "context not found" in host.judge(DOCKER_CONTEXT="gpu-b")["message"]


def test_another_socket_of_this_machine_is_fine(host: Host) -> None:
    (host.path / "config.json").write_text('{"currentContext": "gpu-b"}')
    local, config = {"DOCKER_HOST": "unix:///run/user/7/docker.sock"}, {"DOCKER_CONFIG": str(host.path)}
    other, default = {"DOCKER_CONTEXT": "gpu-b"}, {"DOCKER_CONTEXT": "default"}
    for env in ({}, local, local | config | other, config | default):
        assert host.judge(**env)["verdict"] == "ok"
    assert not [call for call in host.calls if call.startswith("docker context")]
    host.answer(context="unix:///run/user/7/docker.sock\n")
    assert host.judge(DOCKER_CONTEXT="rootless")["verdict"] == "ok"


@pytest.mark.parametrize("program", ["nvidia-smi", "docker"])
def test_a_program_is_missing(host: Host, program: str) -> None:
    for tool in ("bash", "timeout", "date", "cat", "sleep"):
        (host.path / tool).symlink_to(f"/usr/bin/{tool}")
    (host.path / program).unlink()
    data = host.judge(PATH=str(host.path))
    assert data["cause"] == f"{program.replace('-', '_')}_missing"
    assert bool(data["gpus"]) == (program == "docker")
    assert bool(data["container"]) == (program == "nvidia-smi")


# --- Time ------------------------------------------------------------------------------------------

ESCAPES = "setsid sleep 120 & sleep 120\n"  # keeps the pipes open out of reach of timeout's signals
IGNORES = "trap '' TERM; while :; do sleep 1; done\n"


@pytest.mark.parametrize("side", ["nvidia_smi", "docker"])
def test_a_call_hangs(tmp_path: Path, side: str) -> None:
    """Each call in each way, side by side to save time: no verdict, but an early end, and no process is left."""

    def hang(call: str, how: str) -> None:
        host = Host(tmp_path / f"{call}-{len(how)}")
        pid = host.path / "pid"
        host.answer(**{call: Answer(before=f"echo $$ >{pid}\n{how}")})
        start = time.monotonic()
        data = host.judge("--timeout", "3")
        assert data["cause"] == f"{side}_timeout"
        assert bool(data["container"]) == (call != "inspect")
        assert bool(data["gpus"]) == (call != "gpus")
        assert time.monotonic() - start < 60
        while Path("/proc", pid.read_text().strip()).exists():
            assert time.monotonic() - start < 90
            time.sleep(0.05)

    calls = ("inspect", "top") if side == "docker" else ("gpus", "apps")
    with ThreadPoolExecutor() as pool:
        for done in [pool.submit(hang, c, h) for c in calls for h in ("sleep 120", IGNORES, ESCAPES)]:
            done.result()


def test_calls_are_few_and_run_side_by_side(host: Host) -> None:
    first = ("gpus", "apps", "inspect")
    for call in first:
        # Each waits until the others have started: one after the other, none of them would ever answer.
        started = " && ".join(f"[[ -e {host.path}/{other}.started ]]" for other in first)
        (host.path / f"{call}.sh").write_text(
            f": >{host.path}/{call}.started\nuntil {started}; do sleep 0.02; done\n"
        )
    assert host.cause("--timeout", "30") is None
    assert len(host.calls) == 4


CALLS = {"inspect": "docker", "top": "docker", "gpus": "nvidia_smi", "apps": "nvidia_smi"}
FLOOD = "while :; do printf '%065536d'; done"


@pytest.mark.parametrize(
    ("how", "limit"),
    [
        (FLOOD, 60),
        (FLOOD + " >&2", 60),
        (f"trap '' PIPE TERM; {FLOOD}", 2),
        ("printf 'a\\0b\\0c\\0' >&2; false", 60),
    ],
)
def test_a_call_prints_without_end(tmp_path: Path, how: str, limit: int) -> None:
    """As much as it likes, on either stream: the memory stays small, and the script ends before the time limit."""
    for call, side in CALLS.items():
        host = Host(tmp_path / call).answer(**{call: Answer(rc=1, before=how)})
        limited = ("/bin/bash", "-c", 'ulimit -v 200000; exec "$0" "$@"', SCRIPT)
        cause = host.run("--json", "--timeout", str(limit), command=limited).json["cause"]
        assert cause == f"{side}_unparsable" or (limit == 2 and cause == f"{side}_timeout")


def test_a_long_text_is_cut(host: Host) -> None:
    host.answer(gpus=Answer("", 1, '\\"' * 99_000))
    assert len(host.judge()["message"]) < 1000
    assert len(host.run("--expect", "é" * 40_000).err) < 5000
    host.answer(gpus=cards(), inspect=container('\\"' * 20_000, image="é" * 50_000))
    start = time.monotonic()
    assert len(host.run().out) < 20_000
    assert host.cause() == "requested_gpu_unclear"
    assert len(host.run("--json").out) < 20_000
    assert time.monotonic() - start < 20


# --- Hostile names -----------------------------------------------------------------------------------

# C0 (but the report's own line breaks), and C1: as UTF-8, or as a byte that is part of no character.
CONTROL = rb"[\x00-\x09\x0b-\x1f\x7f]|\xc2[\x80-\x9f]|(?<![\x80-\xff])[\x80-\x9f]"


@pytest.mark.parametrize(
    "name",
    [
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
    ],
)
def test_hostile_names(host: Host, name: str | bytes) -> None:
    raw = (name if isinstance(name, str) else text_of(name)).replace("\n", "?")  # as ps writes it
    data = host.answer(top=top(16052, (16911, raw)), inspect=container(image=raw)).judge()
    assert data["verdict"] == "ok"
    if isinstance(name, str):
        assert data["processes"][0]["name"] == name.replace("\n", "?")
    else:
        assert "\ufffd" in data["processes"][0]["name"]
    assert not re.search(CONTROL, host.run().out)


@pytest.mark.parametrize("rc", [0, 1])
def test_control_characters_are_escaped_wherever_they_come_from(host: Host, rc: int) -> None:
    bad = "\x1b]0;owned\x07\t\x7f \x9b31m"
    assert not re.search(CONTROL, host.run("--expect", bad).err.encode().replace(b"\n", b""))
    usual = {
        "inspect": container(f"9{bad}", image=f"i{bad}", directory=f"/d{bad}"),
        "gpus": cards(name=f"H200 {bad}"),
        "top": top(*PIDS),
        "apps": OURS,
    }
    host.answer(exec=failed(f"exec {bad}"))
    for call in (*usual, ""):
        host.answer(**usual)
        if call:
            host.answer(**{call: Answer(f"out {bad}\n", rc, f"err {bad}\n")})
        for args in (("--deep",), ("--deep", "--json", "--expect", "1")):
            result = host.run(*args)
            assert not re.search(CONTROL, result.out + result.err.encode())
    host.answer(gpus=cards(name="H200 \x1b[31m"))
    assert "H200 \\u001b[31m" in host.run().flat
    assert host.judge()["gpus"][0]["name"] == "H200 \x1b[31m"


def test_valid_utf8_is_kept_and_only_the_rest_replaced(host: Host) -> None:
    text = "\u0080é\u07ff\u0800\ud7ff\ue000\uffff\U00010000\U0010ffff€"
    assert host.answer(top=top((16911, text))).judge()["processes"][0]["name"] == text
    host.answer(top=top((16911, text_of(b"a\xe2\x82b\xffc"))))
    assert host.judge()["processes"][0]["name"] == "a\ufffd\ufffdb\ufffdc"


FEW = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FEW
@given(name=st.binary(min_size=1, max_size=40), rows=st.binary(max_size=60))
def test_no_bytes_break_the_json_or_the_verdict(host: Host, name: bytes, rows: bytes) -> None:
    named = top(16052, (16911, text_of(name.replace(b"\n", b"?"))))
    image = text_of(name.replace(b"\n", b""))
    host.answer(gpus=cards((0, 0)), apps=OURS, top=named, inspect=container(image=image))
    assert host.judge()["code"] == 0
    assert host.answer(apps=text_of(rows)).judge()["code"] == 3
    assert host.answer(apps=OURS, gpus=text_of(rows)).judge()["code"] == 3


@FEW
@given(st.one_of(st.text().map(lambda text: text.encode()), st.binary()))
def test_no_expectation_is_guessed(host: Host, value: bytes) -> None:
    assume(value not in (b"0", b"1") and b"\0" not in value)
    result = host.run("--json", "--expect", value)
    assert result.json["verdict"] == "usage"
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", result.err)


def test_the_name_of_another_process_is_read_from_the_kernel(host: Host) -> None:
    own = Path("/proc/self/comm")
    before = own.read_bytes()
    try:
        own.write_bytes(b'x\n", 1\xff')
        data = host.answer(apps=OURS + apps((GPU1, os.getpid(), 1))).judge()
    finally:
        own.write_bytes(before)
    assert data["verdict"] == "ok"
    assert data["other_processes"][0]["name"] == 'x\n", 1\ufffd'


# --- How it is called --------------------------------------------------------------------------------


def test_read_from_standard_input(host: Host) -> None:
    """As `ssh host bash -s -- --json --expect 1 < check_gpu_allocation.sh` does."""
    script = SCRIPT.read_text() + "\necho never reached\n"
    result = host.run("--json", "--expect", "1", command=("bash", "-s", "--"), stdin=script)
    assert result.err == ""
    assert result.json["verdict"] == "ok"


def test_an_error_in_the_script_is_no_verdict(host: Host) -> None:
    """Bash exits with 1 after an unbound variable; 1 would mean "on a wrong card"."""
    script = SCRIPT.read_text().replace("judge() {\n", 'judge() {\n: "$no_such_variable"\n', 1)
    result = host.run(command=("bash", "-s"), stdin=script)
    assert "no_such_variable: unbound" in result.err
    assert result.code == 3


def test_nothing_reads_standard_input(host: Host) -> None:
    host.answer(apps="", inspect=failed("No such container")).run("--deep", stdin="the script's own text")
    host.answer(inspect=container()).run("--deep", stdin="the script's own text")
    host.run("--project", "vllm", stdin="the script's own text")
    assert (host.path / "stdin").read_bytes() == b""
    calls = {call.split()[1] for call in host.calls if call.startswith("docker")}
    assert calls == {"inspect", "top", "ps", "exec"}


@pytest.mark.parametrize(
    "args",
    [
        *([bad] for bad in ("--nonsense", "stray", "--json=1", "--expect", "--expect=")),
        *(["--expect", bad] for bad in ("", "-1", "01", "0,1", "all", "true", " 1", "1 ", "1.0", "1\n")),
        *(["--expect", bad] for bad in ("GPU-", "GPU-x y", "99999999999", "00:07", "--json", "\x1b[31m1")),
        *(["--container", bad] for bad in ("", "-f", "a b")),
        *(["--timeout", bad] for bad in ("0", "-1", "1.5", "ten", "10000", "08")),
        *(["--expect", bad] for bad in ("nvidia.com/gpu=1", "\u0661")),
        ["--project", "../x"],
        ["--container", "a", "--project", "b"],
        ["--json", "--quiet"],
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
        assert host.cause(*args) == "usage"


@pytest.mark.parametrize("card", ["7", "GPU-00000000-0000-0000-0000-000000000000", "00:08.0", MIG])
def test_no_such_card(host: Host, card: str) -> None:
    result = host.answer(list=f"GPU 0: NVIDIA H200 (UUID: {GPU0})\n").run("--expect", card)
    assert (result.code, result.out) == (2, b"")
    assert f"no GPU '{card}'. It has: {ON0}, {ON1}." in result.err
    assert host.cause("--expect", card) == "no_such_gpu"
    host.answer(inspect=failed(NO_DAEMON))
    assert host.cause("--expect", card) == "no_such_gpu"
    host.answer(gpus=Answer(NO_DRIVER, 9))  # without a list of cards it may exist
    assert host.cause("--expect", card) == "driver_not_loaded"


def test_quiet(host: Host) -> None:
    assert host.run("--quiet") == Result(0, b"", "")
    assert host.run("--quiet", "--expect", "0") == Result(1, b"", "")
    assert host.run("--quiet", "--expect", "7").code == 2
    assert host.answer(apps="").run("--quiet") == Result(3, b"", "")


def test_help_and_the_page_list_the_same_options(host: Host) -> None:
    result = host.run("--help")
    assert (result.code, result.err) == (0, "")
    options = re.findall(r"^  (--\w+(?:-\w+)?)", result.out.decode(), re.MULTILINE)
    assert len(options) == 9
    assert options == re.findall(r"^\| `(--[\w-]+)", PAGE, re.MULTILINE)
    assert max(map(len, result.out.decode().splitlines())) <= 80


def test_the_container_is_found_by_name_or_project(host: Host) -> None:
    host.run("--container", "other-1")
    host.answer(ps=f"{CONTAINER}\n").run("--project", "team")
    inspected = [call.split()[-1] for call in host.calls if call.startswith("docker inspect")]
    assert inspected == ["other-1", CONTAINER]
    (listing,) = [call for call in host.calls if call.startswith("docker ps")]
    assert "label=com.docker.compose.project=team " in listing
    assert "label=com.docker.compose.service=vllm " in listing


def test_secrets_are_never_read(host: Host) -> None:
    """Neither the environment nor arguments: what is not read cannot be printed."""
    host.run("--deep")
    calls = (host.path / "calls").read_text().replace("\\", "")
    assert "".join(re.findall(r"{{[^}]*}}", calls)) == (
        '{{.Id}}{{.Name}}{{.State.Status}}{{with index .State "Health"}}{{.Status}}{{end}}{{.State.ExitCode}}'
        '{{.State.StartedAt}}{{.Config.Image}}{{json (index .Config.Labels "com.docker.compose.project.working_dir")}}'
        "{{range .HostConfig.DeviceRequests}}{{.Driver}}{{.Count}}{{range .DeviceIDs}}{{json .}}{{end}}{{end}}"
    )
    assert f"docker top {CONTAINER} -eo pid\\,comm " in host.calls


def on_a_terminal(host: Host, **env: str) -> bytes:
    """Run the script with its output on a terminal."""
    ours, theirs = pty.openpty()
    env = {"PATH": f"{host.path}:/usr/bin:/bin", "TERM": "xterm"} | env
    subprocess.run([SCRIPT], stdin=subprocess.DEVNULL, stdout=theirs, env=env, timeout=45, check=False)
    os.close(theirs)
    out = bytearray()
    with contextlib.suppress(OSError):  # the terminal's end of file
        while more := os.read(ours, 4096):
            out += more
    os.close(ours)
    return bytes(out)


def test_colour_only_on_a_terminal(host: Host) -> None:
    assert b"\x1b[32m  OK: " in on_a_terminal(host)
    assert b"\x1b[32m  OK: " in on_a_terminal(host, NO_COLOR="")
    for out in (on_a_terminal(host, NO_COLOR="1"), on_a_terminal(host, TERM="dumb"), host.run().out):
        assert b"  OK: " in out
        assert b"\x1b" not in out
    assert b"\x1b[31m  MISPLACED: " in on_a_terminal(host.answer(apps=apps((GPU0, 16911, 7688))))
    assert b"\x1b[33m  UNKNOWN: " in on_a_terminal(host.answer(apps=""))


# --- The page matches the script -----------------------------------------------------------------------


def test_the_page_lists_exactly_the_causes_that_there_are() -> None:
    script = SCRIPT.read_text()
    used = set(re.findall(r"(?:problem |cause=|why=(?:\${why:-)?)([a-z]+(?:_[a-z]+)+)", script)) | {"usage"}
    used |= set(re.findall(r"usage_error .* (no_such_gpu) ", script))
    assert CODES.keys() - {None} == used
    assert len(used) > 25


def test_the_page_lists_exactly_the_fields_that_there_are() -> None:
    section = PAGE.split("## JSON")[1].split("\n## ")[0]
    lists = {"gpus", "processes"}
    fields = {
        (f"{part}[]." if part in lists else f"{part}." if part else "") + name
        for part, names in KEYS.items()
        for name in names.split()
        if part != "other_processes"  # has those of processes[]
    }
    assert set(re.findall(r"`([\w.\[\]]+)`(?=[^|\n]*\|[^|\n]*\|[^|\n]*\|$)", section, re.MULTILINE)) >= fields
