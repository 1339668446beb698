"""What prevents a change: each check by what the host shows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.mlops.vllm_gpu.plugins.module_utils import docker as docker_command
from ansible_collections.mlops.vllm_gpu.plugins.module_utils import gpus, identity, preflight, shell


def context(**changes: Any) -> identity.Context:  # noqa: ANN401
    gpu = {
        "index": 1,
        "uuid": "GPU-1",
        "pci_bus_id": "00000000:05:00.0",
        "name": "Card",
        "memory_total_mib": 1000,
        "memory_used_mib": 0,
    }
    state = {
        "gpu": {**gpu, **changes.pop("gpu", {})},
        "gpus": [gpu],
        "referee": {"processes": [], "other_processes": []},
        "last_proven": None,
        "container": None,
        "image_present": True,
        "image": "x",
        "project": "vllm-gpu",
        "serving": False,
        **changes.pop("state", {}),
    }
    service = {
        "command": changes.pop("command", ["m"]),
        "ports": [changes.pop("port", {"published": "8000", "host_ip": "127.0.0.1"})],
        "environment": changes.pop("environment", {}),
        "volumes": changes.pop("volumes", []),
    }
    return identity.Context(state, service, changes.pop("force", []), changes.pop("training", []))


@pytest.mark.parametrize(
    ("used", "own", "command", "fits"),
    [
        (100, 0, ["m"], True),
        (101, 0, ["m"], False),
        (900, 900, ["m"], True),
        (900, 700, ["m"], False),
        (500, 0, ["m", "--gpu-memory-utilization", "0.5"], True),
        (501, 0, ["m", "--gpu-memory-utilization=0.5"], False),
    ],
)
def test_memory_of_our_own_server_does_not_count(used: int, own: int, command: list[str], fits: bool) -> None:  # noqa: FBT001
    processes = [{"pid": 1, "name": "e", "gpu_uuid": "GPU-1", "memory_mib": own}]
    state = {"referee": {"processes": processes, "other_processes": []}}
    assert (
        preflight.check_memory(context(gpu={"memory_used_mib": used}, state=state, command=command)) is None
    ) == fits


def test_who_holds_the_memory_is_named() -> None:
    others = [{"pid": 2**22 + 1, "name": "train.py", "gpu_uuid": "GPU-1", "memory_mib": 800}]
    state = {"referee": {"processes": [], "other_processes": others}}
    problem = preflight.check_memory(context(gpu={"memory_used_mib": 800}, state=state))
    assert problem is not None
    assert f"train.py (pid {2**22 + 1}, 800 MiB)" in problem


@pytest.mark.parametrize("one", ["1", "GPU-1", "gpu-1", "00000000:05:00.0", "0000:05:00.0", "05:00.0"])
def test_a_training_card(one: str) -> None:
    assert preflight.check_training(context(training=[one])) is not None
    assert preflight.check_training(context(training=[one], force=["training"])) is None
    assert preflight.check_training(context(training=["0"])) is None


def test_an_instance_of_a_training_card() -> None:
    instance = {"uuid": "MIG-1", "card_uuid": "GPU-1"}
    assert preflight.check_training(context(gpu=instance, training=["GPU-1"])) is not None


OTHER = "  MIG 2g.35gb     Device  0: (UUID: MIG-57de94a5-be68-5b74-98a6-e7d1e21c58a7)\n"
LISTED = f"GPU 0: Card (UUID: GPU-0)\n{OTHER}GPU 1: Card (UUID: GPU-1)\n"
INSTANCE = "  MIG 1g.18gb     Device  0: (UUID: MIG-41b3359c-e721-56e5-8009-12e5797ed514)\n"


@pytest.mark.parametrize(
    ("uuid", "mode", "listed", "says"),
    [
        (
            "GPU-1",
            "Enabled\nWARNING: infoROM is corrupted at gpu 0000:B3:00.0\n",
            LISTED + INSTANCE,
            "gpu_device_id (MIG-41b3359c-e721-56e5-8009-12e5797ed514, 1g.18gb), or",
        ),
        (
            "GPU-0",
            "Enabled\n",
            LISTED + INSTANCE,
            "gpu_device_id (MIG-57de94a5-be68-5b74-98a6-e7d1e21c58a7, 2g.35gb), or",
        ),
        ("GPU-1", "Enabled\n", LISTED, "lists none yet"),
        ("MIG-41b3359c-e721-56e5-8009-12e5797ed514", "Enabled\n", LISTED + INSTANCE, None),
        ("GPU-1", "Disabled\n", LISTED, None),
        ("GPU-1", "[N/A]\n", LISTED, None),
        ("GPU-1", 'Field "mig.mode.current" is not a valid field to query.\n', LISTED, None),
    ],
)
def test_a_divided_card_is_asked_for_by_its_instance(
    monkeypatch: pytest.MonkeyPatch, uuid: str, mode: str, listed: str, says: str | None
) -> None:
    def run(argv: list[str]) -> shell.Output:
        return shell.Output(0, listed if "--list-gpus" in argv else mode, "")

    monkeypatch.setattr(shell, "run", run)
    problem = preflight.check_mig(context(gpu={"uuid": uuid}))
    assert problem == says or (says and problem and says in problem)
    assert preflight.check_mig(context(gpu={"uuid": uuid}, force=["mig"])) is None


def test_the_memory_of_a_divided_card_is_its_instances_affair(monkeypatch: pytest.MonkeyPatch) -> None:
    full = context(gpu={"memory_used_mib": 1000})
    assert preflight.check_memory(full) is not None
    monkeypatch.setattr(gpus, "is_divided", lambda _gpu: True)
    assert preflight.check_memory(full) is None


def drifted(**changes: Any) -> str | None:  # noqa: ANN401
    last = {"requested": "1", "proven_at": "then", "gpu": {"index": 1, "uuid": "GPU-9", "name": "Old"}}
    state = {
        "last_proven": {**last, **changes.pop("last", {})},
        "gpu_device_id": "1",
        **changes.pop("state", {}),
    }
    return identity.check_drift(context(state=state, **changes))


def test_drift() -> None:
    problem = drifted()
    assert problem is not None
    assert "Old (GPU-9)" in problem
    assert "now Card (GPU-1)" in problem
    # verify, with no card in the inventory: what the server was proven with counts.
    assert drifted(state={"gpu_device_id": None}) is not None


@pytest.mark.parametrize(
    "changes",
    [
        {"force": ["drift"]},
        {"last": {"gpu": {"index": 1, "uuid": "GPU-1", "name": "Card"}}},
        {"last": {"gpu": {"index": 0, "uuid": "GPU-9", "name": "Old"}}},
        # Who names the card by its UUID means that one, whatever its index was.
        {"state": {"gpu_device_id": "GPU-1"}},
        {"state": {"gpu_device_id": None}, "last": {"requested": "GPU-9"}},
    ],
)
def test_no_drift(changes: dict[str, Any]) -> None:
    assert drifted(**changes) is None


@pytest.mark.parametrize(
    ("address", "key", "fine"), [("127.0.0.1", "", True), ("0.0.0.0", "", False), ("0.0.0.0", "k", True)]
)
def test_exposure(address: str, key: str, fine: bool) -> None:  # noqa: FBT001
    one = context(port={"published": "8000", "host_ip": address}, environment={"VLLM_API_KEY": key})
    assert (preflight.check_exposure(one) is None) == fine


def test_a_model_by_its_path(tmp_path: Path) -> None:
    volume = {"type": "bind", "source": str(tmp_path), "target": "/models"}
    assert preflight.check_model(context(command=["/models/tiny"], volumes=[volume])) is not None
    (tmp_path / "tiny").mkdir()
    assert preflight.check_model(context(command=["/models/tiny"], volumes=[volume])) is None
    assert preflight.check_model(context(command=["org/model"], volumes=[volume])) is None


def test_a_directory_for_a_cache_that_is_not_there(tmp_path: Path) -> None:
    there = {"type": "bind", "source": str(tmp_path), "target": "/root/.cache/vllm"}
    missing = {"type": "bind", "source": str(tmp_path / "hf"), "target": "/root/.cache/huggingface"}
    named = {"type": "volume", "source": "vllm-models", "target": "/models"}
    problem = preflight.check_caches(context(command=["org/model"], volumes=[there, missing, named]))
    assert problem is not None
    assert f"There is no directory {tmp_path / 'hf'} on this host" in problem
    assert preflight.check_caches(context(command=["org/model"], volumes=[there, named])) is None
    # One cure for one cause: the model in it isn't asked for as well.
    missing["target"] = "/models"
    assert preflight.check_model(context(command=["/models/tiny"], volumes=[missing])) is None


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("20.10.24+dfsg1", (20, 10, 24)), ("v2.26.1-4", (2, 26, 1)), ("2.5", (2, 5)), ("dev", ())],
)
def test_versions(text: str, numbers: tuple[int, ...]) -> None:
    assert docker_command.version(text) == numbers


@pytest.mark.parametrize(
    ("info", "fine"),
    [
        ({"ServerVersion": "28.5.2", "Runtimes": {"nvidia": {}}}, True),
        ({"ServerVersion": "28.5.2", "Runtimes": {"runc": {}}, "CDISpecDirs": ["/no/such"]}, False),
        ({"ServerVersion": "19.3", "Runtimes": {"nvidia": {}}}, False),
    ],
)
def test_the_engine(info: dict[str, Any], fine: bool, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: FBT001
    monkeypatch.setattr(shell, "run", lambda *_a, **_k: shell.Output(0, json.dumps(info), ""))
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    assert (preflight.check_engine(context()) is None) == fine


@pytest.mark.parametrize("share", ["much", "", "0,9"])
def test_a_share_of_memory_that_somebody_wrote_into_the_files(share: str) -> None:
    """It is vLLM that will refuse it; the role's own is checked before (settings.check)."""
    full = {"memory_used_mib": 1000}
    assert preflight.check_memory(context(gpu=full, command=["m", "--gpu-memory-utilization", share])) is None


@pytest.mark.parametrize("one", ["1", " 1", "1 ", "GPU-1", "gpu-1", "00000000:05:00.0", "05:00.0"])
def test_a_training_id_that_is_a_gpu_of_the_host(one: str) -> None:
    assert identity.check_training_ids(context(training=[one])) is None
    assert preflight.check_training(context(training=[one])) is not None


# The third one is 0000:41:00.0 without its quotes.
@pytest.mark.parametrize(
    "one", ["01", "2460.0", "GPU 1", "rtx", "GPU-", "-1", "1,2", "GPU-2", "2", "\uff101"]
)
def test_a_training_id_that_protects_nothing(monkeypatch: pytest.MonkeyPatch, one: str) -> None:
    monkeypatch.setattr(shell, "run", lambda _: shell.Output(0, "GPU 1: Card (UUID: GPU-1)\n", ""))
    for force in ([], ["training"]):
        problem = identity.check_training_ids(context(training=["1", one], force=force))
        assert problem is not None
        assert f"names {json.dumps(one)}, but this host has no such GPU" in problem
        assert "1 (Card, GPU-1)" in problem


def test_nothing_is_set_aside_by_an_empty_text() -> None:
    """As Ansible makes a list of `-e vllm_gpu_training_gpus=` or `="1, 3"`."""
    for check in (preflight.check_training, identity.check_training_ids):
        assert check(context(training=["", " "])) is None
    assert preflight.check_training(context(training=["0", " 1"])) is not None


def test_an_instance_that_is_set_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shell, "run", lambda _: shell.Output(0, LISTED + INSTANCE, ""))
    for one, there in (
        ("MIG-41b3359c-e721-56e5-8009-12e5797ed514", True),
        ("MIG-41b3359c", False),
        ("MIG-", False),
    ):
        assert (identity.check_training_ids(context(training=[one])) is None) == there


def test_every_lost_id_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shell, "run", lambda _: shell.Output(0, "", ""))
    problem = identity.check_training_ids(context(training=["8", "1", "GPU-x"]))
    assert 'names "8", "GPU-x", but' in str(problem)


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        ([], None),
        (["vllm-server"], None),
        (["0a1b_vllm-server"], None),
        (["vllm-server", "web"], "not this role's: web."),
    ],
)
def test_a_project_that_is_somebody_elses(
    monkeypatch: pytest.MonkeyPatch, names: list[str], problem: str | None
) -> None:
    monkeypatch.setattr(shell, "run", lambda *_a, **_k: shell.Output(0, "\n".join(names), ""))
    found = preflight.check_project(context())
    assert found is None if problem is None else problem in str(found)


@pytest.mark.parametrize(
    ("serving", "listed", "fine"), [(True, [], False), (True, [1], True), (False, [], True)]
)
@pytest.mark.parametrize("who", ["processes", "other_processes"])
def test_a_driver_that_lists_no_process(who: str, serving: bool, listed: list[int], fine: bool) -> None:  # noqa: FBT001
    state = {
        "container": {"id": "c"}, "serving": serving,
        "referee": {"processes_listed": True, "processes": [], "other_processes": [], who: listed},
    }  # fmt: skip
    problem = preflight.check_listing(context(state=state))
    assert (problem is None) == fine
    assert preflight.check_listing(context(state={**state, "container": None})) is None


@pytest.mark.parametrize(
    ("out", "err", "said"),
    [
        ("", "Cannot connect to the Docker daemon", "Cannot connect to the Docker daemon"),
        ('{"ServerVersion": "", "ServerErrors": ["permission denied."]}', "", "permission denied"),
        ("null", "", "no message"),
        ("[]", "", "no message"),
        ('{"ServerErrors": null}', "", "no message"),
    ],
)
def test_an_engine_that_says_no_version_is_quoted(
    docker: Callable[..., object], out: str, err: str, said: str
) -> None:
    docker(out, err, 1)
    problem = str(preflight.check_engine(context()))
    assert problem.startswith(
        f"`docker info` doesn't tell the engine's version: {said}. Check the Docker service"
    )
    assert "None" not in problem
