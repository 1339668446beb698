"""Reading a host: what prevents a change counts when two readings find it."""

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
def test_only_what_two_looks_find_stands_in_the_way(
    monkeypatch: pytest.MonkeyPatch, finds: list[list[str]], problems: list[str]
) -> None:
    """What changes between two reads of one look, as a server that dies, is no problem of the host."""
    monkeypatch.setattr(referee, "read_cards", lambda *_: None)
    monkeypatch.setattr(
        compare, "read_files", lambda *_, **__: proof.Judged({"command": ["m"]}, "hash", None)
    )

    def find(checks: list[Any], _context: object) -> list[str]:
        assert checks == preflight.CHECKS
        return finds.pop(0)

    monkeypatch.setattr(identity, "problems", find)
    assert server.read("1", wanted(), preflight=True)["problems"] == problems
    assert finds == []


@pytest.mark.parametrize(
    ("error", "unanswered"), [(docker.Unanswered("away"), True), (shell.Problem("no"), False)]
)
def test_an_engine_that_is_away_is_told_apart(
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


def test_values_that_are_refused_are_told_with_what_the_host_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """And Compose isn't asked about them."""
    monkeypatch.setattr(referee, "read_cards", lambda *_: None)
    monkeypatch.setattr(compare, "read_files", lambda *_, **__: pytest.fail("asked"))
    state = server.read("1", wanted(project_dir="/nowhere", VLLM_PORT="0", extra_args="--port 1"))
    assert [one.split()[0] for one in state["problems"]] == ["vllm_gpu_port", "vllm_gpu_extra_args"]


def raw_container(config_hash: str | None) -> dict[str, Any]:
    """Return what the engine says of a container of the role's."""
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
    monkeypatch.setattr(compare, "resolve", lambda *_, **__: calls.append(1) or resolved)  # type: ignore[func-returns-value]
    monkeypatch.setattr(compose, "config_hash", lambda *_: "new")
    monkeypatch.setattr(api, "probe", lambda *_, **__: {"healthy": True, "models": [], "error": error})
    state, _wanted = server.begin("0", wanted(project_dir="/opt/x"))
    state.update(problems=[], gpu={"index": 0}, project="vllm-gpu")
    state["referee"] = {"code": 0, "container_id": "c1", "processes": [1]}
    service, config_hash = compare.read_service(
        {}, wanted(project_dir="/opt/x"), state, known, as_installed=False
    )
    assert len(calls) == asked
    assert ("volumes" in service) == bool(asked)  # which the checks before a change read
    assert config_hash == ("known" if made_from == "known" else "new")
    assert state["recreate"] == (made_from != "known")
