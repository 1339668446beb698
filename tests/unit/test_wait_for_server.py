"""The wait: what it goes on for, what ends it, and what it then says."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
from ansible.errors import AnsibleConnectionFailure
from ansible.plugins.action import ActionBase
from ansible_collections.mlops.vllm_gpu.plugins.action import wait_for_server

REFEREE = {"code": 0, "cause": "", "message": "vllm-server runs on GPU 1.", "cure": ""}
LOADING = {"code": 3, "cause": "no_process_yet", "message": "no process on any GPU yet", "cure": ""}
DOWN: dict[str, Any] = {"healthy": False, "error": "no answer"}


def look(**changes: object) -> dict[str, Any]:
    """One look at a server that is still loading."""
    container = {
        "id": "c1", "status": "running", "exit_code": 0, "error": "", "oom_killed": False, "restarts": 0,
    }  # fmt: skip
    container.update(changes.pop("container", {}))  # type: ignore[call-overload]
    state = {
        "problems": [], "proven": False, "recorded": False, "container": container, "referee": LOADING,
        "api": DOWN, "doubts": ["API: no answer."], "log": ["loading"],
    }  # fmt: skip
    return {**state, **changes}


class Scripted(wait_for_server.ActionModule):
    """The action, with the looks that it is to take; the last one stays."""

    def __init__(self, looks: list[dict[str, Any]], arguments: dict[str, Any]) -> None:
        self._task = SimpleNamespace(args={"timeout": 60, **arguments}, async_val=0)
        self._looks = looks

    def _execute_module(self, **_arguments: object) -> dict[str, Any]:
        one = self._looks.pop(0) if len(self._looks) > 1 else self._looks[0]
        if "lost" in one:
            raise AnsibleConnectionFailure(one["lost"])
        return one


def wait(monkeypatch: pytest.MonkeyPatch, looks: list[dict[str, Any]], **arguments: object) -> dict[str, Any]:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    monkeypatch.setattr(ActionBase, "run", lambda *_arguments: {})
    return Scripted(looks, dict(arguments)).run(task_vars={"inventory_hostname": "gpu01"})


def test_it_waits_while_a_model_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    result = wait(monkeypatch, [look(), look(), look(proven=True)])
    assert result["proven"]
    assert result["elapsed"] == 4


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"container": None}, "The container is gone."),
        ({"container": {"status": "exited", "exit_code": 7}}, "The server died with exit code 7."),
        ({"container": {"restarts": 1}}, "has started it again (1 times)"),
        ({"container": {"oom_killed": True}}, "ran out of memory"),
        ({"referee": {"code": 1, "message": "runs on GPU 0", "cure": "Do this."}}, "runs on GPU 0 Do this."),
        ({"referee": REFEREE, "api": {"healthy": True, "error": "it serves x"}}, "answers, but it serves x"),
    ],
)
def test_it_ends_at_once(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], said: str) -> None:
    one = look(**changes) if changes != {"container": None} else {**look(), "container": None}
    result = wait(monkeypatch, [look(), one])
    assert result["failed"]
    assert not result["proven"]
    assert result["elapsed"] == 2
    assert said in result["msg"]
    assert result["msg"].endswith("The last lines of its log:\n  loading")


def test_restarts_of_the_container_before_are_old_news(monkeypatch: pytest.MonkeyPatch) -> None:
    again = look(container={"restarts": 3})
    before = {"id": "c1", "restarts": 3, "was_ready": False}
    assert wait(monkeypatch, [again, look(proven=True)], before=before)["proven"]


def test_a_server_that_was_found_dying_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def died(restarts: int) -> list[dict[str, Any]]:
        return [
            look(container={"status": status, "restarts": restarts}) for status in ("restarting", "running")
        ]

    before = {"id": "c1", "restarts": 3, "was_ready": True}
    assert wait(monkeypatch, [look(), *died(4), look(proven=True)], before=before)["proven"]
    result = wait(monkeypatch, [*died(4), *died(5)], before=before)
    assert "The server died" in result["msg"]
    # One that never came up gets no second chance, nor does one that nothing brings back.
    assert "The server died" in wait(monkeypatch, died(4), before={**before, "was_ready": False})["msg"]
    gone = look(container={"status": "exited"})
    assert "The server died" in wait(monkeypatch, [look(), gone], before=before)["msg"]


def test_one_look_that_stumbles_is_looked_past(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = look(problems=["docker gave no answer in 20 s."])
    assert wait(monkeypatch, [look(), bad, look(), bad, look(proven=True)])["proven"]
    result = wait(monkeypatch, [look(), bad, bad])
    assert "no answer in 20 s" in result["msg"]


def test_ready_but_on_no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    result = wait(monkeypatch, [look(api={"healthy": True, "error": None})])
    assert "The API is ready, but no process on any GPU yet" in result["msg"]
    assert result["elapsed"] < 30


def test_out_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "was not ready after 60 s: API: no answer." in wait(monkeypatch, [look()])["msg"]


AWAY = wait_for_server._AWAY  # noqa: SLF001 - the limit is what it is about
LOST: dict[str, Any] = {"lost": "Connection reset by peer"}
UNANSWERED = look(unanswered=True, problems=["The Docker Engine can't be reached."])


def away(one: dict[str, Any], seconds: int) -> list[dict[str, Any]]:
    """So many seconds of it: a read every two."""
    return [one] * (seconds // 2 + 1)


@pytest.mark.parametrize("one", [LOST, UNANSWERED], ids=["connection", "engine"])
def test_what_is_away_for_a_while_is_waited_for(monkeypatch: pytest.MonkeyPatch, one: dict[str, Any]) -> None:
    looks = [look(), *away(one, AWAY), look(), *away(one, AWAY), look(proven=True)]
    result = wait(monkeypatch, looks, timeout=30 * AWAY)
    assert result["proven"]
    assert result["elapsed"] > 2 * AWAY
    # Also where it is away from the first read on, as on the way back.
    assert wait(monkeypatch, [*away(one, AWAY), look(proven=True)])["proven"]
    # Both in turn, as when a host restarts.
    mixed = [LOST, UNANSWERED] * (AWAY // 4)
    assert wait(monkeypatch, [look(), *mixed, look(proven=True)], timeout=30 * AWAY)["proven"]


def test_a_connection_that_stays_away_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AnsibleConnectionFailure):
        wait(monkeypatch, [look(), *away(LOST, AWAY + 2), look(proven=True)])


def test_an_engine_that_stays_away_ends_the_wait_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    result = wait(monkeypatch, [look(), *away(UNANSWERED, 3 * AWAY)], timeout=30 * AWAY)
    assert result["failed"]
    assert "The Docker Engine can't be reached." in result["msg"]
    assert AWAY < result["elapsed"] <= 3 * AWAY


def test_that_something_is_away_is_shown_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr(wait_for_server.display, "display", shown.append)
    wait(monkeypatch, [look(proven=False), *away(UNANSWERED, 20), *away(LOST, 20), look(proven=True)])
    assert [line for line in shown if "gives no answer" in line] == [
        f"gpu01: waiting: the Docker Engine gives no answer; trying again for {AWAY} s"
    ]
