"""What protects a host: the record of what was proven, the preflight checks."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.mlops.vllm_gpu.plugins.module_utils import preflight, record, shell

FILES = {"docker-compose.serving.yml": b"services: {}\n", ".env": b"GPU_DEVICE_ID=0\n\xff\r\n"}


def kept(directory: Path, which: str) -> record.Proven:
    proven = record.load(str(directory), which)
    assert proven is not None
    return proven


def proof(number: int) -> dict[str, Any]:
    return {"number": number, "requested": "1", "gpu": {"uuid": f"GPU-{number}"}}


def test_nothing_was_proven_yet(tmp_path: Path) -> None:
    assert record.load(str(tmp_path), "current") is None
    assert record.load(str(tmp_path), "previous") is None


def test_files_come_back_byte_for_byte_and_the_last_two_are_kept(tmp_path: Path) -> None:
    for number in range(4):
        record.save(str(tmp_path), {**FILES, ".env": FILES[".env"] * (number + 1)}, proof(number))
    assert kept(tmp_path, "current").record == proof(3)
    assert kept(tmp_path, "current").files[".env"] == FILES[".env"] * 4
    assert kept(tmp_path, "previous").record == proof(2)
    # For the referee, which reads no JSON: which card the index meant.
    assert (tmp_path / ".proven/current/gpu").read_text(encoding="utf-8") == "1 GPU-3\n"
    # Older ones, which hold secrets too, are gone.
    assert len(list((tmp_path / ".proven").glob("state.*"))) == 2
    for path in (tmp_path / ".proven").rglob("*"):
        if path.is_file() and not path.is_symlink():
            assert path.stat().st_mode & 0o777 == 0o600


def test_the_same_state_once_more_keeps_the_previous_one(tmp_path: Path) -> None:
    for number in (1, 2):
        record.save(str(tmp_path), FILES, proof(number))
    record.save(str(tmp_path), {**FILES, ".env": b"# a note"}, proof(2), again=True)
    assert kept(tmp_path, "current").files[".env"] == b"# a note"
    assert kept(tmp_path, "previous").record == proof(1)


@pytest.mark.parametrize("broken", ["{", "[]", ""])
def test_a_record_that_cannot_be_read_is_none(tmp_path: Path, broken: str) -> None:
    record.save(str(tmp_path), FILES, proof(1))
    (tmp_path / ".proven/current/record.json").write_text(broken, encoding="utf-8")
    assert record.load(str(tmp_path), "current") is None


def test_a_crash_while_saving_leaves_the_old_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record.save(str(tmp_path), FILES, proof(1))

    def crash(*_arguments: object) -> None:
        raise KeyboardInterrupt

    for name in ("_point", "write_whole"):
        with monkeypatch.context() as patch:
            patch.setattr(record, name, crash)
            with pytest.raises(KeyboardInterrupt):
                record.save(str(tmp_path), FILES, proof(2))
        assert kept(tmp_path, "current").record == proof(1)


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / ".env"
    path.write_bytes(b"old")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        record.write_whole(str(path), b"new", 0o600)
    assert path.read_bytes() == b"old"
    assert [one.name for one in tmp_path.iterdir()] == [".env"]


def asked(**changes: Any) -> preflight.Asked:  # noqa: ANN401
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
        "referee": {"processes": [], "other_processes": []},
        "last_proven": None,
        "container": None,
        "image_present": True,
        "image": "x",
        **changes.pop("state", {}),
    }
    service = {
        "command": changes.pop("command", ["m"]),
        "ports": [changes.pop("port", {"published": "8000", "host_ip": "127.0.0.1"})],
        "environment": changes.pop("environment", {}),
        "volumes": changes.pop("volumes", []),
    }
    return preflight.Asked(state, service, {}, changes.pop("force", []), changes.pop("training", []))


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
        preflight.check_memory(asked(gpu={"memory_used_mib": used}, state=state, command=command)) is None
    ) == fits


@pytest.mark.parametrize("share", ["0", "1.5", "-1", "nan", "much"])
def test_a_share_of_memory_that_makes_no_sense(share: str) -> None:
    problem = preflight.check_memory(asked(command=["m", "--gpu-memory-utilization", share]))
    assert problem is not None
    assert "must be a number above 0" in problem


def test_who_holds_the_memory_is_named() -> None:
    others = [{"pid": 2**22 + 1, "name": "train.py", "gpu_uuid": "GPU-1", "memory_mib": 800}]
    state = {"referee": {"processes": [], "other_processes": others}}
    problem = preflight.check_memory(asked(gpu={"memory_used_mib": 800}, state=state))
    assert problem is not None
    assert f"train.py (pid {2**22 + 1}, 800 MiB)" in problem


@pytest.mark.parametrize("one", ["1", "GPU-1", "gpu-1", "00000000:05:00.0", "0000:05:00.0", "05:00.0"])
def test_a_training_card(one: str) -> None:
    assert preflight.check_training(asked(training=[one])) is not None
    assert preflight.check_training(asked(training=[one], force=["training"])) is None
    assert preflight.check_training(asked(training=["0"])) is None


def test_an_instance_of_a_training_card() -> None:
    instance = {"uuid": "MIG-1", "card_uuid": "GPU-1"}
    assert preflight.check_training(asked(gpu=instance, training=["GPU-1"])) is not None


def test_nothing_is_set_aside_by_an_empty_text() -> None:
    """As Ansible makes a list of `-e vllm_gpu_training_gpus=` or `="1, 3"`."""
    assert preflight.check_training(asked(training=[""])) is None
    assert preflight.check_training(asked(training=["0", " 1"])) is not None


# The first one is 0000:41:00.0 without its quotes.
@pytest.mark.parametrize("one", ["2460.0", "GPU 1", "rtx", "GPU-", "-1"])
def test_a_training_card_that_is_none(one: str) -> None:
    problem = preflight.check_training(asked(training=["0", one]))
    assert problem is not None
    assert one.lower() in problem


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
    problem = preflight.check_mig(asked(gpu={"uuid": uuid}))
    assert problem == says or (says and problem and says in problem)
    assert preflight.check_mig(asked(gpu={"uuid": uuid}, force=["mig"])) is None


def test_the_memory_of_a_divided_card_is_its_instances_affair(monkeypatch: pytest.MonkeyPatch) -> None:
    full = asked(gpu={"memory_used_mib": 1000})
    assert preflight.check_memory(full) is not None
    monkeypatch.setattr(preflight, "is_divided", lambda _gpu: True)
    assert preflight.check_memory(full) is None


def drifted(**changes: Any) -> str | None:  # noqa: ANN401
    last = {"requested": "1", "proven_at": "then", "gpu": {"index": 1, "uuid": "GPU-9", "name": "Old"}}
    state = {
        "last_proven": {**last, **changes.pop("last", {})},
        "gpu_device_id": "1",
        **changes.pop("state", {}),
    }
    return preflight.check_drift(asked(state=state, **changes))


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
    ("present", "code", "said", "fine"),
    [
        (False, 1, "no such manifest: docker.io/vllm/vllm-openai:v9", False),
        (False, 1, "denied: requested access to the resource is denied", False),
        (False, 1, "Get https://registry-1.docker.io/v2/: dial tcp: no route to host", True),
        (False, None, "no answer in 20 s", True),
        (False, 0, "", True),
        (True, 1, "no such manifest", True),
    ],
)
def test_only_a_clear_no_of_the_registry_counts(
    monkeypatch: pytest.MonkeyPatch,
    present: bool,  # noqa: FBT001
    code: int | None,
    said: str,
    fine: bool,  # noqa: FBT001
) -> None:
    monkeypatch.setattr(shell, "run", lambda _argv: shell.Output(code, "", said))
    state = {"image_present": present, "image": "vllm/vllm-openai:v9"}
    assert (preflight.check_image(asked(state=state)) is None) == fine


@pytest.mark.parametrize(
    ("address", "key", "fine"), [("127.0.0.1", "", True), ("0.0.0.0", "", False), ("0.0.0.0", "k", True)]
)
def test_exposure(address: str, key: str, fine: bool) -> None:  # noqa: FBT001
    one = asked(port={"published": "8000", "host_ip": address}, environment={"VLLM_API_KEY": key})
    assert (preflight.check_exposure(one) is None) == fine


def test_a_port_that_is_taken_names_who_listens() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        problem = preflight.check_port(asked(port={"published": str(port), "host_ip": "127.0.0.1"}))
        assert problem is not None
        assert f"(pid {os.getpid()}) does. End that program" in problem
        ours = {"container": {"status": "running", "ports": [port]}}
        assert (
            preflight.check_port(asked(port={"published": str(port), "host_ip": "127.0.0.1"}, state=ours))
            is None
        )
    problem = preflight.check_port(asked(port={"published": "8000", "host_ip": "192.0.2.1"}))
    assert problem is not None
    assert "no address 192.0.2.1" in problem


@pytest.mark.parametrize(
    ("status", "program", "published_by", "said"),
    [
        ("restarting", "docker-proxy", "vllm-server", None),  # its policy brought it back meanwhile
        ("restarting", "dockerd", "", None),  # an engine that has no userland proxy
        ("restarting", "", "", None),  # between two starts
        ("restarting", "docker-proxy", "grafana", "container grafana does. Stop that container"),
        ("restarting", "python3", "", "python3 (pid 7) does. End that program"),
        ("exited", "docker-proxy", "", "docker-proxy (pid 7) does. End that program"),
    ],
)
def test_a_port_that_the_engine_listens_on(
    monkeypatch: pytest.MonkeyPatch, status: str, program: str, published_by: str, said: str | None
) -> None:
    monkeypatch.setattr(preflight, "listener", lambda _port: (program, 7))
    monkeypatch.setattr(shell, "run", lambda _argv, **_options: shell.Output(0, published_by + "\n", ""))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        state = {"container": {"status": status, "ports": [port]}}
        one = asked(port={"published": str(port), "host_ip": "127.0.0.1"}, state=state)
        problem = preflight.check_port(one)
    assert problem is None if said is None else said in str(problem)


def test_a_model_by_its_path(tmp_path: Path) -> None:
    volume = {"type": "bind", "source": str(tmp_path), "target": "/models"}
    assert preflight.check_model(asked(command=["/models/tiny"], volumes=[volume])) is not None
    (tmp_path / "tiny").mkdir()
    assert preflight.check_model(asked(command=["/models/tiny"], volumes=[volume])) is None
    assert preflight.check_model(asked(command=["org/model"], volumes=[volume])) is None


def test_a_directory_for_a_cache_that_is_not_there(tmp_path: Path) -> None:
    there = {"type": "bind", "source": str(tmp_path), "target": "/root/.cache/vllm"}
    missing = {"type": "bind", "source": str(tmp_path / "hf"), "target": "/root/.cache/huggingface"}
    named = {"type": "volume", "source": "vllm-models", "target": "/models"}
    problem = preflight.check_caches(asked(command=["org/model"], volumes=[there, missing, named]))
    assert problem is not None
    assert f"There is no directory {tmp_path / 'hf'} on this host" in problem
    assert preflight.check_caches(asked(command=["org/model"], volumes=[there, named])) is None
    # One cure for one cause: the model in it isn't asked for as well.
    missing["target"] = "/models"
    assert preflight.check_model(asked(command=["/models/tiny"], volumes=[missing])) is None


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("20.10.24+dfsg1", (20, 10, 24)), ("v2.26.1-4", (2, 26, 1)), ("2.5", (2, 5)), ("dev", ())],
)
def test_versions(text: str, numbers: tuple[int, ...]) -> None:
    assert preflight.version(text) == numbers


@pytest.mark.parametrize(
    ("info", "fine"),
    [
        ({"ServerVersion": "28.5.2", "Runtimes": {"nvidia": {}}}, True),
        ({"ServerVersion": "28.5.2", "Runtimes": {"runc": {}}, "CDISpecDirs": ["/no/such"]}, False),
        ({"ServerVersion": "19.3", "Runtimes": {"nvidia": {}}}, False),
    ],
)
def test_the_engine(info: dict[str, Any], fine: bool, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: FBT001
    monkeypatch.setattr(shell, "run", lambda _argv: shell.Output(0, json.dumps(info), ""))
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    assert (preflight.check_engine(asked()) is None) == fine
