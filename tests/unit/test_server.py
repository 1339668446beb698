"""Reading a host: what names a GPU, what the API must list, what Compose says."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.mlops.vllm_gpu.plugins.module_utils import preflight, server, shell
from hypothesis import example, given
from hypothesis import strategies as st

UUIDS = ["GPU-5090a1c4-3f0e-4b7d-9a52-6e1d70c8b2f3", "GPU-5060b7e9-81d2-4c6f-b03a-2d94f5a7c1e8"]
GPUS: list[dict[str, Any]] = [
    {"index": index, "uuid": uuid, "name": f"Card {index}"} for index, uuid in enumerate(UUIDS)
]


@pytest.mark.parametrize("requested", ["1", UUIDS[1], UUIDS[1].upper(), "00000000:02:00.0", "02:00.0"])
def test_an_index_a_uuid_or_a_bus_id_is_what_the_referee_took_it_for(requested: str) -> None:
    verdict = {"gpus": GPUS, "expected": {"id": requested, "index": 1, "uuid": UUIDS[1]}}
    assert server.find_gpu(requested, verdict) == GPUS[1]


def test_a_mig_instance_has_no_memory_of_a_whole_card() -> None:
    mig = "MIG-3fae9b5e-8f29-5d51-9e26-b1c0c9a9b9f2"
    verdict = {"gpus": GPUS, "expected": {"id": mig, "index": 1, "uuid": mig}}
    gpu = server.find_gpu(mig, verdict)
    assert (gpu["index"], gpu["uuid"], gpu["memory_total_mib"]) == (1, mig, None)
    assert gpu["card_uuid"] == UUIDS[1]  # by which the card may be set aside


@given(st.one_of(st.text(), st.from_regex(r"[0-9 ,.\-]{1,6}"), st.sampled_from(UUIDS).map(str.upper)))
@example("01")
@example(" 1")
@example("1 ")
@example("1\n")
@example("1.0")
@example("0,1")
@example("-1")
@example("all")
@example("True")
@example("１")  # noqa: RUF001 - that is the point
@example("²")
@example("9" * 400)
@example("1\x00")
@example("$(id)")
@example("GPU-5090a1c4")
def test_everything_else_is_refused_with_the_choice(requested: str) -> None:
    with pytest.raises(server.Problem) as refusal:
        server.find_gpu(requested, {"gpus": GPUS, "expected": None})
    text = str(refusal.value)
    assert f"It could be 0 (Card 0, {UUIDS[0]}) or 1 (Card 1, {UUIDS[1]})." in text
    # Whatever was typed can't drive the terminal that shows the message.
    assert text.isprintable()


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["org/model", "--port", "8000"], ["org/model"]),
        (["org/model", "--served-model-name", "a", "b", "--port", "1"], ["a", "b"]),
        (["org/model", "--served-model-name=a"], ["a"]),
        (["org/model", "--served_model_name", "a", "-tp", "1"], ["a"]),
        (["org/model", "--served-model-name", "a", "--served-model-name", "b"], ["b"]),
        (["/models/tiny"], ["/models/tiny"]),
    ],
)
def test_served_names(arguments: list[str], names: list[str]) -> None:
    assert server.served_names({"command": arguments}) == names


@pytest.mark.parametrize(
    ("port", "url"),
    [
        ({"published": "8000", "host_ip": "127.0.0.1"}, "http://127.0.0.1:8000"),
        ({"published": "9000"}, "http://127.0.0.1:9000"),
        ({"published": "9000", "host_ip": "0.0.0.0"}, "http://127.0.0.1:9000"),
        ({"published": "9000", "host_ip": "10.0.0.5"}, "http://10.0.0.5:9000"),
        ({"published": "9000", "host_ip": "::"}, "http://[::1]:9000"),
    ],
)
def test_where_the_api_answers(port: dict[str, str], url: str) -> None:
    assert server.base_url({"ports": [port]}) == url


def test_what_compose_says_of_an_env_file_is_not_quoted() -> None:
    said = 'failed to read /proc/7/fd/4: line 12: unexpected character "\'" in variable name "s3cr3t"'
    explained = server.explain_compose(said, "/proc/7/fd/4", b"", "/opt/vllm-gpu")
    assert explained == "/opt/vllm-gpu/.env can't be read by Compose: look at line 12 of it."
    said = 'failed to read /proc/7/fd/4: Invalid template: "s3cr3t${x"'
    explained = server.explain_compose(said, "/proc/7/fd/4", b"", "/opt/vllm-gpu")
    assert explained == "/opt/vllm-gpu/.env can't be read by Compose: a value with a $ needs single quotes."
    said = "required variable b is missing: s3cr3t-value"
    explained = server.explain_compose(said, "/proc/7/fd/4", b"A='s3cr3t-value'\n", "/opt/vllm-gpu")
    assert (
        explained
        == "Compose refuses the configuration for /opt/vllm-gpu: required variable b is missing: (hidden)"
    )


@pytest.mark.parametrize(
    "said",
    [
        "docker: 'compose' is not a docker command.",
        "unknown shorthand flag: 'f' in -f",
        "unknown flag: --file",
    ],
)
def test_a_missing_plugin_is_named(said: str) -> None:
    assert "no Compose plugin" in server.explain_compose(said, "/proc/7/fd/4", b"", "/opt/vllm-gpu")


def test_a_secret_that_could_not_be_hidden_is_refused() -> None:
    """Ansible blacks it out of whatever a module says, the image's name in the record included."""
    wanted = {
        "project_dir": "/opt/vllm-gpu",
        "env": {"VLLM_IMAGE": "vllm/vllm-openai:v0.32.0"},
        "secrets": {},
    }
    for key, weak in (("sk-0123456789", False), ("", False), ("test", True), ("vllm-openai", True)):
        wanted["secrets"] = {"VLLM_API_KEY": key}
        assert server.weak_secrets(wanted) == (["VLLM_API_KEY"] if weak else [])


def test_a_container_that_vanishes_during_a_look_is_no_container_that_is_not_there() -> None:
    nothing = {"code": 3, "cause": "no_such_container"}
    server.check_container(None, nothing)
    for seen in (
        {"code": 0, "cause": None},
        {"code": 1, "cause": "wrong_gpu"},
        {"code": 3, "cause": "no_process_yet"},
    ):
        with pytest.raises(server.Problem, match="was there a moment ago"):
            server.check_container(None, seen)


@pytest.mark.parametrize(
    "service",
    [{"command": ["m"]}, {"command": ["m"], "ports": [{"target": 8000}]}, {"ports": [{"published": "8000"}]}],
)
def test_a_compose_file_that_somebody_has_rewritten_is_named(service: dict[str, Any]) -> None:
    server.check_service({"command": ["m"], "ports": [{"published": "8000"}]})
    with pytest.raises(server.Problem, match="has been edited by hand"):
        server.check_service(service)


def test_ports_that_somebody_else_has_published_are_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = {
        "id": "c1", "state": {"Status": "running", "ExitCode": 0, "StartedAt": "2026-01-01T00:00:00Z"}, "image_id": "i",
        "image": "i", "stop_timeout": None, "labels": None, "restarts": 0, "requests": None,
        "ports": {"80/tcp": [{"HostPort": ""}], "81/tcp": None, "82/tcp": [{"HostPort": "9000"}, {"HostPort": "1-2"}]},
    }  # fmt: skip
    monkeypatch.setattr(shell, "run", lambda _argv: shell.Output(0, json.dumps(raw), ""))
    container = server.inspect_container()
    assert container is not None
    assert container["ports"] == [9000]


def test_a_server_that_answers_health_and_then_nothing_is_not_judged_by_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def get(url: str, _key: str) -> tuple[int, bytes]:
        if url.endswith("/health"):
            return 200, b""
        raise TimeoutError("timed out")

    monkeypatch.setattr(server, "_get", get)
    api = server.probe_api({"command": ["m"], "ports": [{"published": "8000"}]}, placed=True)
    assert (api["healthy"], api["error"]) == (False, "no answer from http://127.0.0.1:8000 (timed out)")


@pytest.mark.parametrize("body", [b"{}", b"[]", b"hello"])
def test_an_answer_that_is_no_list_of_models_is_one(monkeypatch: pytest.MonkeyPatch, body: bytes) -> None:
    """So that nobody waits for a program that will never say anything else."""
    monkeypatch.setattr(server, "_get", lambda *_: (200, body))
    api = server.probe_api({"command": ["m"], "ports": [{"published": "8000"}]}, placed=True)
    assert api["healthy"]
    assert api["error"].startswith("/v1/models answers with no list of models")


@pytest.mark.parametrize(("finds", "problems"), [([["a", "b"], ["b"]], ["b"]), ([["a"], []], []), ([[]], [])])
def test_only_what_two_looks_find_stands_in_the_way(
    monkeypatch: pytest.MonkeyPatch, finds: list[list[str]], problems: list[str]
) -> None:
    """What changes between two reads of one look, as a server that dies, is no problem of the host."""
    monkeypatch.setattr(server, "read_cards", lambda *_: None)
    monkeypatch.setattr(server, "compare_files", lambda _: [])
    monkeypatch.setattr(server, "read_service", lambda *_: ({}, "hash"))
    monkeypatch.setattr(preflight, "problems", lambda *_: iter(finds.pop(0)))
    wanted = {"project_dir": "/nowhere", "env": {}, "secrets": {}}
    assert server.read("1", wanted, preflight=True)["problems"] == problems
    assert finds == []


def test_docker_is_the_hosts_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "tcp://elsewhere:2375")
    monkeypatch.setenv("DOCKER_CONTEXT", "elsewhere")
    said = shell.run(["sh", "-c", "echo $DOCKER_HOST $DOCKER_CONTEXT"]).out
    assert said == "unix:///var/run/docker.sock\n"


def test_a_command_that_does_not_exist_or_end() -> None:
    assert shell.run(["/no/such/program"]).code == 127
    assert shell.run(["sleep", "5"], timeout=0.2) == shell.Output(None, "", "no answer in 0.2 s")


def test_nothing_of_a_command_goes_through_a_shell() -> None:
    assert shell.run(["printf", "%s", "$HOME;id"]).out == "$HOME;id"


def test_changes_are_told_without_secrets() -> None:
    wanted = {"env": {"GPU_DEVICE_ID": "1", "VLLM_PORT": "8000"}, "secrets": {"VLLM_API_KEY": "new-s3cr3t"}}
    before = b"GPU_DEVICE_ID=0\nVLLM_PORT=8000\nVLLM_API_KEY=old-s3cr3t\n"
    after = before.replace(b"ID=0", b"ID=1").replace(b"old", b"new")
    change = server.FileChange("/opt/vllm-gpu/.env", before, after, 0o600, differs=True)
    assert server.describe_changes([change], wanted) == ["GPU 0 → 1", "VLLM_API_KEY changes"]


def test_a_file_with_another_mode_differs(tmp_path: Path) -> None:
    wanted = {
        "project_dir": str(tmp_path),
        "compose": "services: {}\n",
        "referee": "#!/bin/bash\n",
        "env_example": "# example\nGPU_DEVICE_ID=0\n",
        "env": {"GPU_DEVICE_ID": "0"},
        "secrets": {},
    }
    files = server.compare_files(wanted)
    assert [change.differs for change in files] == [True, True, True]
    for change in files:
        with open(change.path, "wb", opener=lambda path, flags: os.open(path, flags, 0o600)) as stream:
            stream.write(change.after)
        Path(change.path).chmod(change.mode)
    assert [change.differs for change in server.compare_files(wanted)] == [False, False, False]
    (tmp_path / ".env").chmod(0o644)
    assert [change.differs for change in server.compare_files(wanted)] == [False, True, False]
