"""Reading a host: what names a GPU, what the API must list, what Compose says."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.mlops.vllm_gpu.plugins.module_utils import (
    api,
    compose,
    container,
    dotenv,
    preflight,
    server,
    shell,
)
from hypothesis import example, given
from hypothesis import strategies as st

from tests.wanted import COMPOSE, wanted

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


@pytest.mark.parametrize("index", [None, 1])
def test_a_card_whose_row_is_odd_is_not_taken_for_another(index: int | None) -> None:
    odd = {"index": index, "uuid": None, "name": None}
    right = {"index": index, "uuid": UUIDS[1], "name": "Card"}
    verdict = {"gpus": [odd, right], "expected": {"id": UUIDS[1], "index": index, "uuid": UUIDS[1]}}
    assert server.find_gpu(UUIDS[1], verdict) == right


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
    ("found", "judged", "fine"),
    [
        (None, None, True),
        (None, "c1", False),
        ({"id": "c1", "status": "running"}, "c1", True),
        ({"id": "c2", "status": "running"}, "c1", False),
        # One that came after the referee had seen none: it is not proven, and no problem of the host.
        ({"id": "c1", "status": "running"}, None, True),
        ({"id": "c1", "status": "paused"}, "c1", False),
    ],
)
def test_the_container_that_is_inspected_is_the_one_that_was_judged(
    found: dict[str, Any] | None,
    judged: str | None,
    fine: bool,  # noqa: FBT001
) -> None:
    with (
        contextlib.nullcontext()
        if fine
        else pytest.raises(
            server.Problem, match=r"replaced or removed while it was being checked|docker unpause"
        )
    ):
        server.check_container(found, {"container_id": judged})


@pytest.mark.parametrize(
    "service",
    [{"command": ["m"]}, {"command": ["m"], "ports": [{"target": 8000}]}, {"ports": [{"published": "8000"}]}],
)
def test_a_compose_file_that_somebody_has_rewritten_is_named(service: dict[str, Any]) -> None:
    server.check_service({"command": ["m"], "ports": [{"published": "8000"}]})
    with pytest.raises(server.Problem, match="has been edited by hand"):
        server.check_service(service)


@pytest.mark.parametrize(("finds", "problems"), [([["a", "b"], ["b"]], ["b"]), ([["a"], []], []), ([[]], [])])
def test_only_what_two_looks_find_stands_in_the_way(
    monkeypatch: pytest.MonkeyPatch, finds: list[list[str]], problems: list[str]
) -> None:
    """What changes between two reads of one look, as a server that dies, is no problem of the host."""
    monkeypatch.setattr(server, "read_cards", lambda *_: None)
    monkeypatch.setattr(
        server, "read_files", lambda *_, **__: server.Judged({"command": ["m"]}, "hash", None)
    )
    monkeypatch.setattr(preflight, "problems", lambda *_: iter(finds.pop(0)))
    assert server.read("1", wanted(), preflight=True)["problems"] == problems
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
    one = wanted(
        env={"GPU_DEVICE_ID": "1", "VLLM_PORT": "8000"},
        server_env={"HF_HUB_OFFLINE": 1, "SAME": "x"},
        secrets={"VLLM_API_KEY": "new-s3cr3t"},
        secret_env={"MINE": "mine-s3cr3t"},
    )
    before = b"GPU_DEVICE_ID=0\nVLLM_PORT=8000\nVLLM_API_KEY=old-s3cr3t\nSAME='x'\nGONE=gone-s3cr3t\nMINE=\n"
    change = server.FileChange("/opt/vllm-gpu/.env", before, b"GPU_DEVICE_ID=1\n", 0o600, differs=True)
    told = server.describe_changes([change], one)
    assert told[:4] == ["GPU 0 → 1", "HF_HUB_OFFLINE (unset) → 1", "VLLM_API_KEY changes", "MINE changes"]
    assert "GONE is removed" in told
    assert "s3cr3t" not in "".join(told)


def test_an_installation_of_the_earlier_project_keeps_its_volumes() -> None:
    assert server.env_keys(None, wanted()).get("VLLM_VOLUME_PREFIX") is None
    assert server.env_keys(b"COMPOSE_PROJECT_NAME=vllm\n", wanted())["VLLM_VOLUME_PREFIX"] == "vllm"
    moved = b"COMPOSE_PROJECT_NAME=vllm\nVLLM_VOLUME_PREFIX=mine\n"
    assert "VLLM_VOLUME_PREFIX" not in server.env_keys(moved, wanted())
    assert "VLLM_VOLUME_PREFIX" not in server.env_keys(b"COMPOSE_PROJECT_NAME=vllm-gpu\n", wanted())


def installed(folder: Path, one: dict[str, Any]) -> None:
    """Write the files as the role does."""
    for change in server.compare_files(one):
        Path(change.path).write_bytes(change.after)
        Path(change.path).chmod(change.mode)
    assert [change.differs for change in server.compare_files(one)] == [False, False, False]
    assert folder.is_dir()


def test_what_the_server_is_no_longer_given_leaves_env_and_what_was_the_users_stays(tmp_path: Path) -> None:
    given = COMPOSE.replace("    environment:\n", "    environment:\n      A:\n      B:\n")
    installed(
        tmp_path,
        wanted(project_dir=str(tmp_path), compose=given, server_env={"A": "1"}, secret_env={"B": "2"}),
    )
    path = tmp_path / ".env"
    path.write_bytes(path.read_bytes() + b"MINE=3\nHF_TOKEN=hf-0123\n")
    (_compose, env, _referee) = server.compare_files(wanted(project_dir=str(tmp_path)))
    values = dotenv.values(env.after)
    assert {"A", "B"}.isdisjoint(values)
    assert (values["MINE"], values["HF_TOKEN"]) == ("3", "hf-0123")


@pytest.mark.parametrize(
    ("env", "told"),
    [
        (b"GPU_DEVICE_ID=0\nHF_TOKEN=x\nVLLM_API_KEY=x\nMINE=1\nVLLM_VOLUME_PREFIX=x\n", None),
        (b"HF_ENDPOINT=\n", None),
        (b"#HF_ENDPOINT=x\n", None),
        (b"HF_ENDPOINT=https://x\n", "HF_ENDPOINT in .env has no effect"),
        (
            b"HTTPS_PROXY=x\nno_proxy=y\nNCCL_DEBUG=z\n",
            "HTTPS_PROXY, no_proxy, NCCL_DEBUG in .env have no effect",
        ),
        (b"CUDA_VISIBLE_DEVICES=$X\n", "CUDA_VISIBLE_DEVICES in .env has no effect"),
    ],
)
def test_settings_that_reach_nobody_are_told(env: bytes, told: str | None) -> None:
    def files(text: str) -> list[server.FileChange]:
        return [
            server.FileChange(f"/opt/x/{name}", content, content, 0o600, differs=False)
            for name, content in ((server.COMPOSE_FILE, text.encode()), (server.ENV_FILE, env))
        ]

    notes = list(server.orphans(files(COMPOSE)))
    assert [str(told) in note for note in notes] == [True] * bool(told)
    passes = "".join(f"      {line.partition('=')[0]}:\n" for line in env.decode().splitlines())
    passing = COMPOSE.replace("    environment:\n", f"    environment:\n{passes}")
    assert list(server.orphans(files(passing))) == []


@pytest.mark.parametrize(
    ("error", "unanswered"), [(container.Unanswered("away"), True), (server.Problem("no"), False)]
)
def test_an_engine_that_is_away_is_told_apart(
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    unanswered: bool,  # noqa: FBT001
) -> None:
    def fail(*_arguments: object, **_options: object) -> None:
        raise error

    for name, after in (("read_cards", "read_files"), ("read_files", "read_cards")):
        with monkeypatch.context() as patch:
            patch.setattr(server, name, fail)
            patch.setattr(server, after, lambda *_, **__: server.Judged({}, "", None))
            state = server.read("1", wanted(project_dir="/nowhere"))
            assert (state["unanswered"], state["problems"]) == (unanswered, [str(error)])
            assert not state["proven"]


def test_values_that_are_refused_are_told_with_what_the_host_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """And Compose isn't asked about them."""
    monkeypatch.setattr(server, "read_cards", lambda *_: None)
    monkeypatch.setattr(server, "read_files", lambda *_, **__: pytest.fail("asked"))
    state = server.read("1", wanted(project_dir="/nowhere", VLLM_PORT="0", extra_args="--port 1"))
    assert [one.split()[0] for one in state["problems"]] == ["vllm_gpu_port", "vllm_gpu_extra_args"]


def test_a_file_with_another_mode_differs(tmp_path: Path) -> None:
    one = wanted(project_dir=str(tmp_path))
    files = server.compare_files(one)
    assert [change.differs for change in files] == [True, True, True]
    installed(tmp_path, one)
    (tmp_path / ".env").chmod(0o644)
    assert [change.differs for change in server.compare_files(one)] == [False, True, False]


def raw_container(config_hash: str | None) -> dict[str, Any]:
    """Return what the engine says of a container of the role's."""
    return {
        "Id": "c1",
        "Image": "sha256:1",
        "State": {"Status": "running", "ExitCode": 0, "StartedAt": "2026-01-01T00:00:00Z"},
        "Config": {
            "Image": "vllm/vllm-openai:v1",
            "Cmd": ["model"],
            "Env": ["VLLM_API_KEY=k"],
            "Labels": {
                "com.docker.compose.config-hash": config_hash,
                "com.docker.compose.project": "vllm-gpu",
                "com.docker.compose.project.working_dir": "/opt/x",
            },
        },
        "HostConfig": {
            "PortBindings": {"8000/tcp": [{"HostIp": "127.0.0.1", "HostPort": "8000"}]},
            "DeviceRequests": [{"DeviceIDs": ["0"]}],
        },
    }


@pytest.mark.parametrize(
    ("known", "made_from", "error", "asked"),
    [
        ("known", "known", None, 0),
        ("known", "other", None, 1),
        ("known", "known", "no answer", 1),
        (None, None, None, 1),
    ],
    ids=["right", "other settings", "in doubt", "neither proven nor made by Compose"],
)
def test_compose_is_asked_where_the_server_is_not_right_and_of_its_proven_files(
    monkeypatch: pytest.MonkeyPatch, known: str | None, made_from: str | None, error: str | None, asked: int
) -> None:
    resolved = {"image": "vllm/vllm-openai:v1", "command": ["model"], "volumes": []}
    calls = []
    monkeypatch.setattr(container, "inspect", lambda: raw_container(made_from))
    monkeypatch.setattr(container, "image_id", lambda _: "sha256:1")
    monkeypatch.setattr(server, "resolve", lambda *_, **__: calls.append(1) or resolved)  # type: ignore[func-returns-value]
    monkeypatch.setattr(compose, "config_hash", lambda *_: "new")
    monkeypatch.setattr(api, "probe", lambda *_, **__: {"healthy": True, "models": [], "error": error})
    state, _wanted = server.begin("0", wanted(project_dir="/opt/x"))
    state.update(problems=[], gpu=GPUS[0], project="vllm-gpu")
    state["referee"] = {"code": 0, "container_id": "c1", "processes": [1]}
    service, config_hash = server.read_service(
        {}, wanted(project_dir="/opt/x"), state, known, as_installed=False
    )
    assert len(calls) == asked
    assert ("volumes" in service) == bool(asked)  # which the checks before a change read
    assert config_hash == ("known" if made_from == "known" else "new")
    assert state["recreate"] == (made_from != "known")
