"""The server runs on the requested GPU and on no other, and it answers.

These tests check that with nvidia-smi, docker and /proc before they compare with
the referee, so that a wrong verdict of the referee is caught.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from testinfra.host import Host

DIRECTORY = "/opt/vllm-gpu"
CONTAINER = "vllm-server"


class Card(NamedTuple):
    number: str
    uuid: str


@pytest.fixture(scope="module")
def requested() -> str:
    """The GPU that the last play requested, as recorded by the scenario."""
    return (Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"]) / "asked").read_text(encoding="utf-8").strip()


@pytest.fixture(scope="module")
def cards(host: Host) -> list[Card]:
    lines = host.check_output("nvidia-smi --query-gpu=index,uuid --format=csv,noheader").splitlines()
    return [Card(*line.split(", ")) for line in lines]


@pytest.fixture(scope="module")
def requested_card(requested: str, cards: list[Card]) -> Card:
    (card,) = [card for card in cards if requested in card]
    return card


@pytest.fixture(scope="module")
def container(host: Host) -> dict[str, Any]:
    return dict(json.loads(host.check_output(f"docker inspect {CONTAINER}"))[0])


def get(host: Host, path: str, *options: str) -> tuple[int, str]:
    out = host.check_output(
        f"curl -sS -m 10 -w '\\n%{{http_code}}' {' '.join(options)} http://127.0.0.1:8000{path}"
    )
    body, _, code = out.rpartition("\n")
    return int(code), body


def test_the_container_requests_only_that_card(container: dict[str, Any], requested: str) -> None:
    (request,) = container["HostConfig"]["DeviceRequests"]
    assert request["Driver"] == "nvidia"
    assert request["DeviceIDs"] == [requested]
    assert request["Count"] == 0
    assert request["Capabilities"] == [["gpu"]]


def test_its_processes_use_only_that_card(
    host: Host, container: dict[str, Any], requested_card: Card
) -> None:
    listing = host.check_output("nvidia-smi --query-compute-apps=gpu_uuid,pid --format=csv,noheader")
    rows = listing.splitlines()
    pids = {pid for pid in host.check_output(f"docker top {CONTAINER} -eo pid").split() if pid.isdigit()}
    own = {uuid for uuid, pid in (row.split(", ") for row in rows) if pid in pids}
    assert own == {requested_card.uuid}
    # Independently of docker top: the cgroup of every process on a card.
    for uuid, pid in (row.split(", ") for row in rows):
        if container["Id"] in host.check_output(f"cat /proc/{pid}/cgroup"):
            assert uuid == requested_card.uuid


def test_it_sees_only_that_card(host: Host, requested_card: Card) -> None:
    seen = host.check_output(f"docker exec {CONTAINER} nvidia-smi --query-gpu=uuid --format=csv,noheader")
    assert seen.split() == [requested_card.uuid]


def test_the_api_answers(host: Host) -> None:
    assert get(host, "/health") == (200, "")
    code, body = get(host, "/v1/models")
    assert code == 200
    assert [model["id"] for model in json.loads(body)["data"]] == ["Qwen/Qwen3-0.6B"]
    question = json.dumps({"model": "Qwen/Qwen3-0.6B", "prompt": "GPU", "max_tokens": 4})
    code, body = get(host, "/v1/completions", "-H 'Content-Type: application/json'", f"-d '{question}'")
    assert code == 200
    assert json.loads(body)["choices"][0]["text"]


def test_it_listens_only_on_loopback(host: Host) -> None:
    assert host.check_output(f"docker port {CONTAINER}").strip() == "8000/tcp -> 127.0.0.1:8000"


def test_the_referee_agrees_about_both_cards(host: Host, requested: str, cards: list[Card]) -> None:
    for card in cards:
        verdict = host.run(f"{DIRECTORY}/check_gpu_allocation.sh --json --expect {card.uuid}")
        expected = (0, "ok") if requested in card else (1, "misplaced")
        assert (verdict.rc, json.loads(verdict.stdout)["verdict"]) == expected


def test_the_report_for_a_person_has_its_four_parts(host: Host, requested_card: Card) -> None:
    report = host.check_output(f"{DIRECTORY}/check_gpu_allocation.sh")
    for card_model in ("RTX 5090", "RTX 5060 Ti"):
        assert card_model in report
    assert f"requested: '{requested_card.number}'" in report
    assert "VLLM::EngineCor" in report
    assert f"runs on GPU {requested_card.number}" in report


@pytest.mark.parametrize(
    ("name", "mode"),
    [("docker-compose.serving.yml", 0o644), (".env", 0o600), ("check_gpu_allocation.sh", 0o755)],
)
def test_the_installed_files(host: Host, name: str, mode: int) -> None:
    file = host.file(f"{DIRECTORY}/{name}")
    assert file.is_file
    assert file.mode == mode
    assert file.user == "root"


def test_the_env_file_names_that_card(host: Host, requested: str) -> None:
    assert f"GPU_DEVICE_ID={requested}\n" in host.file(f"{DIRECTORY}/.env").content_string


def test_the_container_has_few_privileges_and_limits(container: dict[str, Any]) -> None:
    settings = container["HostConfig"]
    assert settings["CapDrop"] == ["ALL"]
    assert settings["SecurityOpt"] == ["no-new-privileges:true"]
    assert not settings["Privileged"]
    assert settings["ShmSize"] == 8 << 30
    assert settings["Init"] is True
    assert settings["RestartPolicy"]["Name"] == "unless-stopped"
    assert settings["LogConfig"]["Config"] == {"max-file": "5", "max-size": "10m"}
