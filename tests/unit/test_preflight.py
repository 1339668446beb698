"""The checks before a change."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.mlops.vllm_gpu.plugins.module_utils import docker as docker_command
from ansible_collections.mlops.vllm_gpu.plugins.module_utils import gpus, identity, preflight, shell


def context(**changes: Any) -> identity.Context:  # noqa: ANN401
    gpu = {
        "index": 1, "uuid": "GPU-1", "pci_bus_id": "00000000:05:00.0", "name": "Card",
        "memory_total_mib": 1000, "memory_used_mib": 0,
    }  # fmt: skip
    state = {
        "gpu": {**gpu, **changes.pop("gpu", {})}, "gpus": [gpu],
        "referee": {"processes": [], "other_processes": []}, "last_proven": None, "container": None,
        "image_present": True, "image": "x", "project": "vllm-gpu", "serving": False, **changes.pop("state", {}),
    }  # fmt: skip
    service = {
        "command": changes.pop("command", ["m"]),
        "ports": [changes.pop("port", {"published": "8000", "host_ip": "127.0.0.1"})],
        "environment": changes.pop("environment", {}),
        "volumes": changes.pop("volumes", []),
    }
    return identity.Context(state, service, changes.pop("force", []), changes.pop("training", []))


def prints(monkeypatch: pytest.MonkeyPatch, output: str) -> None:
    """Let every command print this."""
    monkeypatch.setattr(shell, "run", lambda *_a, **_k: shell.Output(0, output, ""))


@pytest.mark.parametrize(
    ("used", "own", "command", "fits"),
    [
        (100, 0, ["m"], True),
        (101, 0, ["m"], False),
        # The server's own memory counts as free.
        (900, 900, ["m"], True),
        (900, 700, ["m"], False),
        (500, 0, ["m", "--gpu-memory-utilization", "0.5"], True),
        (501, 0, ["m", "--gpu-memory-utilization=0.5"], False),
        # In edited files: vLLM itself will refuse them.
        *((1000, 0, ["m", "--gpu-memory-utilization", share], True) for share in ("much", "", "0,9")),
    ],
)
def test_memory(used: int, own: int, command: list[str], fits: bool) -> None:  # noqa: FBT001
    processes = [{"pid": 1, "name": "e", "gpu_uuid": "GPU-1", "memory_mib": own}]
    state = {"referee": {"processes": processes, "other_processes": []}}
    found = preflight.check_memory(context(gpu={"memory_used_mib": used}, state=state, command=command))
    assert (found is None) == fits


def test_the_processes_that_hold_the_memory_are_named() -> None:
    others = [{"pid": 2**22 + 1, "name": "train.py", "gpu_uuid": "GPU-1", "memory_mib": 800}]
    state = {"referee": {"processes": [], "other_processes": others}}
    problem = str(preflight.check_memory(context(gpu={"memory_used_mib": 800}, state=state)))
    assert "has 200 MiB free, but the server needs 900 MiB (0.9 of 1000 MiB)." in problem
    assert f"train.py (pid {2**22 + 1}, 800 MiB)" in problem


def test_the_free_memory_of_an_instance_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    full = context(gpu={"memory_used_mib": 1000})
    assert preflight.check_memory(full) is not None
    monkeypatch.setattr(gpus, "is_divided", lambda _gpu: True)
    assert preflight.check_memory(full) is None


@pytest.mark.parametrize(
    "gpu_id", ["1", " 1", "1 ", "GPU-1", "gpu-1", "00000000:05:00.0", "0000:05:00.0", "05:00.0"]
)
def test_a_card_that_is_set_aside_for_training(gpu_id: str) -> None:
    assert preflight.check_training(context(training=["0", gpu_id])) is not None
    assert preflight.check_training(context(training=[gpu_id], force=["training"])) is None
    assert preflight.check_training(context(training=["0"])) is None
    assert identity.check_training_ids(context(training=[gpu_id])) is None


def test_an_instance_of_a_training_card() -> None:
    instance = {"uuid": "MIG-1", "card_uuid": "GPU-1"}
    assert preflight.check_training(context(gpu=instance, training=["GPU-1"])) is not None


OTHER = "  MIG 2g.35gb     Device  0: (UUID: MIG-57de94a5-be68-5b74-98a6-e7d1e21c58a7)\n"
LISTED = f"GPU 0: Card (UUID: GPU-0)\n{OTHER}GPU 1: Card (UUID: GPU-1)\n"
INSTANCE = "  MIG 1g.18gb     Device  0: (UUID: MIG-41b3359c-e721-56e5-8009-12e5797ed514)\n"
BOTH = LISTED + INSTANCE


@pytest.mark.parametrize(
    ("uuid", "mode", "listed", "choice"),
    [
        ("GPU-1", "Enabled\nWARNING: infoROM is corrupted at gpu 0000:B3:00.0\n", BOTH,
         "(MIG-41b3359c-e721-56e5-8009-12e5797ed514, 1g.18gb), or"),
        ("GPU-0", "Enabled\n", BOTH, "(MIG-57de94a5-be68-5b74-98a6-e7d1e21c58a7, 2g.35gb), or"),
        ("GPU-1", "Enabled\n", LISTED, "lists none yet"),
        ("MIG-41b3359c-e721-56e5-8009-12e5797ed514", "Enabled\n", BOTH, None),
        ("GPU-1", "Disabled\n", LISTED, None),
        ("GPU-1", "[N/A]\n", LISTED, None),
        ("GPU-1", 'Field "mig.mode.current" is not a valid field to query.\n', LISTED, None),
    ],
)  # fmt: skip
def test_a_divided_card_is_requested_by_its_instance(
    monkeypatch: pytest.MonkeyPatch, uuid: str, mode: str, listed: str, choice: str | None
) -> None:
    def run(argv: list[str]) -> shell.Output:
        return shell.Output(0, listed if "--list-gpus" in argv else mode, "")

    monkeypatch.setattr(shell, "run", run)
    problem = preflight.check_mig(context(gpu={"uuid": uuid}))
    assert problem == choice or (choice and choice in str(problem))
    assert preflight.check_mig(context(gpu={"uuid": uuid}, force=["mig"])) is None


@pytest.mark.parametrize(
    ("last", "gpu_device_id", "force", "drift"),
    [
        ({}, "1", [], True),
        # verify without a card in the inventory: the id that the server was proven with counts.
        ({}, None, [], True),
        ({}, "1", ["drift"], False),
        ({"gpu": {"index": 1, "uuid": "GPU-1", "name": "Card"}}, "1", [], False),
        ({"gpu": {"index": 0, "uuid": "GPU-9", "name": "Old"}}, "1", [], False),
        # A UUID means that card, whatever its index was.
        ({}, "GPU-1", [], False),
        ({"requested": "GPU-9"}, None, [], False),
    ],
)
def test_drift(last: dict[str, Any], gpu_device_id: str | None, force: list[str], drift: bool) -> None:  # noqa: FBT001
    proven = {"requested": "1", "proven_at": "then", "gpu": {"index": 1, "uuid": "GPU-9", "name": "Old"}}
    state = {"last_proven": {**proven, **last}, "gpu_device_id": gpu_device_id}
    problem = identity.check_drift(context(state=state, force=force))
    assert (problem is not None) == drift
    assert problem is None or ("Old (GPU-9)" in problem and "now Card (GPU-1)" in problem)


@pytest.mark.parametrize(
    ("address", "key", "passes"), [("127.0.0.1", "", True), ("0.0.0.0", "", False), ("0.0.0.0", "k", True)]
)
def test_exposure(address: str, key: str, passes: bool) -> None:  # noqa: FBT001
    service = {"port": {"published": "8000", "host_ip": address}, "environment": {"VLLM_API_KEY": key}}
    assert (preflight.check_exposure(context(**service)) is None) == passes
    assert preflight.check_exposure(context(**service, force=["exposure"])) is None


def test_a_model_by_its_path(tmp_path: Path) -> None:
    volume = {"type": "bind", "source": str(tmp_path), "target": "/models"}
    problem = preflight.check_model(context(command=["/models/tiny"], volumes=[volume]))
    assert f"{tmp_path}/tiny does not exist" in str(problem)
    (tmp_path / "tiny").mkdir()
    for model in ("/models/tiny", "org/model"):
        assert preflight.check_model(context(command=[model], volumes=[volume])) is None


def test_a_cache_directory_that_does_not_exist(tmp_path: Path) -> None:
    exists = {"type": "bind", "source": str(tmp_path), "target": "/root/.cache/vllm"}
    missing = {"type": "bind", "source": str(tmp_path / "hf"), "target": "/models"}
    named = {"type": "volume", "source": "vllm-models", "target": "/models"}
    problem = preflight.check_caches(context(volumes=[exists, missing, named]))
    assert f"There is no directory {tmp_path / 'hf'} on this host" in str(problem)
    assert preflight.check_caches(context(volumes=[exists, named])) is None
    # One cause, one problem.
    assert preflight.check_model(context(command=["/models/tiny"], volumes=[missing])) is None


def test_a_file_system_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As NFS does when its server is away: the play must not hang with it."""
    program = tmp_path / "test"
    program.write_text("#!/bin/sh\nsleep 20\n", encoding="ascii")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(preflight, "_FILE_SYSTEM", 0.2)
    one = context(
        command=["/models/m"], volumes=[{"type": "bind", "source": str(tmp_path), "target": "/models"}]
    )
    assert f"The file system of {tmp_path} gave no answer within 0.2 s." in str(preflight.check_caches(one))
    assert preflight.check_model(one) is None


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("20.10.24+dfsg1", (20, 10, 24)), ("v2.26.1-4", (2, 26, 1)), ("2.5", (2, 5)), ("dev", ())],
)
def test_versions(text: str, numbers: tuple[int, ...]) -> None:
    assert docker_command.version(text) == numbers


@pytest.mark.parametrize(
    ("info", "passes"),
    [
        ({"ServerVersion": "28.5.2", "Runtimes": {"nvidia": {}}}, True),
        ({"ServerVersion": "28.5.2", "Runtimes": {"runc": {}}, "CDISpecDirs": ["/no/such"]}, False),
        ({"ServerVersion": "19.3", "Runtimes": {"nvidia": {}}}, False),
    ],
)
def test_the_engine(info: dict[str, Any], passes: bool, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: FBT001
    prints(monkeypatch, json.dumps(info))
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    assert (preflight.check_engine(context()) is None) == passes


# The third one is 0000:41:00.0 without its quotes.
@pytest.mark.parametrize(
    "gpu_id", ["01", "2460.0", "GPU 1", "rtx", "GPU-", "-1", "1,2", "GPU-2", "2", "\uff101"]
)
@pytest.mark.parametrize("force", [[], ["training"]])
def test_training_ids_that_protect_nothing(
    monkeypatch: pytest.MonkeyPatch, gpu_id: str, force: list[str]
) -> None:
    prints(monkeypatch, "GPU 1: Card (UUID: GPU-1)\n")
    problem = str(identity.check_training_ids(context(training=["8", "1", gpu_id], force=force)))
    assert f'names "8", {json.dumps(gpu_id)}, but this host has no such GPU' in problem
    assert "1 (Card, GPU-1)" in problem


def test_an_empty_text_sets_nothing_aside() -> None:
    """Ansible makes a list with an empty text of `-e vllm_gpu_training_gpus=`."""
    for check in (preflight.check_training, identity.check_training_ids):
        assert check(context(training=["", " "])) is None


@pytest.mark.parametrize(
    ("uuid", "exists"),
    [
        ("MIG-41b3359c-e721-56e5-8009-12e5797ed514", True),
        ("mig-41b3359c-e721-56e5-8009-12e5797ed514", True),
        ("MIG-41b3359c", False),
        ("MIG-", False),
    ],
)
def test_an_instance_that_is_set_aside(monkeypatch: pytest.MonkeyPatch, uuid: str, exists: bool) -> None:  # noqa: FBT001
    prints(monkeypatch, BOTH)
    assert (identity.check_training_ids(context(training=[uuid])) is None) == exists


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        ([], None),
        (["vllm-server"], None),
        (["0a1b_vllm-server"], None),
        (["vllm-server", "web"], "not this role's: web."),
    ],
)
def test_other_containers_in_the_project(
    monkeypatch: pytest.MonkeyPatch, names: list[str], problem: str | None
) -> None:
    prints(monkeypatch, "\n".join(names))
    found = preflight.check_project(context())
    assert found is None if problem is None else problem in str(found)


@pytest.mark.parametrize(
    ("serving", "listed", "passes"), [(True, [], False), (True, [1], True), (False, [], True)]
)
@pytest.mark.parametrize("key", ["processes", "other_processes"])
def test_a_driver_that_lists_no_process(key: str, serving: bool, listed: list[int], passes: bool) -> None:  # noqa: FBT001
    referee = {"processes_listed": True, "processes": [], "other_processes": [], key: listed}
    state = {"container": {"id": "c"}, "serving": serving, "referee": referee}
    assert (preflight.check_listing(context(state=state)) is None) == passes
    assert preflight.check_listing(context(state={**state, "container": None})) is None


@pytest.mark.parametrize(
    ("out", "err", "message"),
    [
        ("", "Cannot connect to the Docker daemon", "Cannot connect to the Docker daemon"),
        ('{"ServerVersion": "", "ServerErrors": ["permission denied."]}', "", "permission denied"),
        *((out, "", "no message") for out in ("null", "[]", '{"ServerErrors": null}')),
    ],
)
def test_an_engine_that_reports_no_version(
    docker: Callable[..., object], out: str, err: str, message: str
) -> None:
    docker(out, err, 1)
    problem = str(preflight.check_engine(context()))
    start = "`docker info` does not report the Docker Engine's version"
    assert problem.startswith(f"{start}: {message}. Check the Docker service")
