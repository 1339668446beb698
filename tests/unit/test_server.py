"""Reading a host: only problems that two readings find count."""

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.mlops.vllm_gpu.plugins.module_utils import (
    api,
    compare,
    compose,
    container,
    docker,
    identity,
    preflight,
    proof,
    referee,
    server,
    shell,
)

from tests.wanted import wanted


@pytest.mark.parametrize(("finds", "problems"), [([["a", "b"], ["b"]], ["b"]), ([["a"], []], []), ([[]], [])])
def test_only_problems_that_two_readings_find_count(
    monkeypatch: pytest.MonkeyPatch, finds: list[list[str]], problems: list[str]
) -> None:
    judged = proof.Judged({"command": ["m"]}, "hash", None)
    monkeypatch.setattr(referee, "read_cards", lambda *_: None)
    monkeypatch.setattr(compare, "read_files", lambda *_, **__: judged)

    def find(checks: list[Any], _context: object) -> list[str]:
        assert checks == preflight.CHECKS
        return finds.pop(0)

    monkeypatch.setattr(identity, "problems", find)
    assert server.read("1", wanted(), preflight=True)["problems"] == problems
    assert finds == []


@pytest.mark.parametrize(
    ("error", "unanswered"), [(docker.Unanswered("away"), True), (shell.Problem("no"), False)]
)
def test_a_docker_engine_that_does_not_answer(
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    unanswered: bool,  # noqa: FBT001
) -> None:
    def fail(*_arguments: object, **_options: object) -> None:
        raise error

    cards, contents = (referee, "read_cards"), (compare, "read_files")
    for fails, works in ((cards, contents), (contents, cards)):
        with monkeypatch.context() as patch:
            patch.setattr(*fails, fail)
            patch.setattr(*works, lambda *_, **__: proof.Judged({}, "", None))
            state = server.read("1", wanted(project_dir="/nowhere"))
            assert (state["unanswered"], state["problems"]) == (unanswered, [str(error)])
            assert not state["proven"]


def test_refused_values_are_reported_and_reach_no_other_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(referee, "read_cards", lambda *_: None)
    monkeypatch.setattr(compare, "read_files", lambda *_, **__: pytest.fail("Compose was called"))
    state = server.read("1", wanted(project_dir="/nowhere", VLLM_PORT="0", extra_args="--port 1"))
    variables = [problem.split()[0] for problem in state["problems"]]
    assert variables == ["vllm_gpu_port", "vllm_gpu_extra_args"]


def raw_container(config_hash: str | None) -> dict[str, Any]:
    """Return what `docker inspect` shows of the role's container."""
    return {
        "Id": "c1",
        "Name": "/vllm-server",
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
    ("known", "created_from", "error", "count"),
    [
        ("known", "known", None, 0),
        ("known", "other", None, 1),
        ("known", "known", "no answer", 1),
        (None, None, None, 1),
    ],
    ids=["right", "other settings", "in doubt", "neither proven nor made by Compose"],
)
def test_compose_is_only_called_where_the_container_may_differ(
    monkeypatch: pytest.MonkeyPatch,
    known: str | None,
    created_from: str | None,
    error: str | None,
    count: int,
) -> None:
    resolved = {"image": "vllm/vllm-openai:v1", "command": ["model"], "volumes": []}
    calls = []
    monkeypatch.setattr(container, "inspect", lambda: raw_container(created_from))
    monkeypatch.setattr(container, "image_id", lambda _: "sha256:1")
    monkeypatch.setattr(compare, "resolve", lambda *_, **__: calls.append(1) or resolved)  # type: ignore[func-returns-value]
    monkeypatch.setattr(compose, "config_hash", lambda *_: "new")
    monkeypatch.setattr(api, "probe", lambda *_, **__: {"healthy": True, "models": [], "error": error})
    state, _wanted = server.begin("0", wanted(project_dir="/opt/x"))
    state.update(problems=[], gpu={"index": 0}, project="vllm-gpu")
    state["referee"] = {"code": 0, "container_id": "c1", "processes": [1]}
    service, config_hash = compare.read_service(
        {}, wanted(project_dir="/opt/x"), state, known, as_installed=False
    )
    assert len(calls) == count
    assert ("volumes" in service) == bool(count)  # which the checks before a change read
    assert config_hash == ("known" if created_from == "known" else "new")
    assert state["recreate"] == (created_from != "known")
