"""Reading a host: what prevents a change counts when two readings find it."""

from __future__ import annotations

import pytest
from ansible_collections.mlops.vllm_gpu.plugins.module_utils import (
    compare,
    docker,
    identity,
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
    monkeypatch.setattr(identity, "problems", lambda *_: iter(finds.pop(0)))
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
