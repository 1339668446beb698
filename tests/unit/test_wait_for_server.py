"""The wait for a starting server: how long it lasts, what ends it, and its message."""

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


def reading(**changes: object) -> dict[str, Any]:
    """Return a reading of a server that is still loading."""
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
    """The action, with its readings; the last one repeats."""

    def __init__(self, readings: list[dict[str, Any]], arguments: dict[str, Any]) -> None:
        self._task = SimpleNamespace(args={"timeout": 60, **arguments}, async_val=0)
        self._readings = readings

    def _execute_module(self, **_arguments: object) -> dict[str, Any]:
        state = self._readings.pop(0) if len(self._readings) > 1 else self._readings[0]
        if "lost" in state:
            raise AnsibleConnectionFailure(state["lost"])
        return state


def wait(
    monkeypatch: pytest.MonkeyPatch, readings: list[dict[str, Any]], **arguments: object
) -> dict[str, Any]:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    monkeypatch.setattr(ActionBase, "run", lambda *_arguments: {})
    return Scripted(readings, dict(arguments)).run(task_vars={"inventory_hostname": "gpu01"})


def test_it_waits_while_a_model_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    result = wait(monkeypatch, [reading(), reading(), reading(proven=True)])
    assert (result["proven"], result["elapsed"]) == (True, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"container": None}, "The container is gone."),
        ({"container": {"status": "exited", "exit_code": 7}}, "The server died with exit code 7."),
        ({"container": {"restarts": 1}}, "has started it again (1 times)"),
        ({"container": {"oom_killed": True}}, "ran out of memory"),
        ({"referee": {"code": 1, "message": "runs on GPU 0", "cure": "Do this."}}, "runs on GPU 0 Do this."),
        ({"referee": REFEREE, "api": {"healthy": True, "error": "it serves x"}}, "answers, but it serves x"),
    ],
)
def test_it_ends_at_once(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str) -> None:
    last = reading(**changes) if changes != {"container": None} else {**reading(), "container": None}
    result = wait(monkeypatch, [reading(), last])
    assert (result["failed"], result["proven"], result["elapsed"]) == (True, False, 2)
    assert message in result["msg"]
    assert result["msg"].endswith("The last lines of its log:\n  loading")


def test_earlier_restarts_of_the_container_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    again = reading(container={"restarts": 3})
    before = {"id": "c1", "restarts": 3, "was_ready": False}
    assert wait(monkeypatch, [again, reading(proven=True)], before=before)["proven"]


def test_a_server_that_was_found_dying_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def died(restarts: int) -> list[dict[str, Any]]:
        return [
            reading(container={"status": status, "restarts": restarts})
            for status in ("restarting", "running")
        ]

    before = {"id": "c1", "restarts": 3, "was_ready": True}
    assert wait(monkeypatch, [reading(), *died(4), reading(proven=True)], before=before)["proven"]
    result = wait(monkeypatch, [*died(4), *died(5)], before=before)
    assert "The server died" in result["msg"]
    # Not one that never worked, nor one without a restart policy.
    assert "The server died" in wait(monkeypatch, died(4), before={**before, "was_ready": False})["msg"]
    gone = reading(container={"status": "exited"})
    assert "The server died" in wait(monkeypatch, [reading(), gone], before=before)["msg"]


def test_a_problem_counts_when_two_readings_find_it(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = reading(problems=["docker gave no answer in 20 s."])
    assert wait(monkeypatch, [reading(), bad, reading(), bad, reading(proven=True)])["proven"]
    assert "no answer in 20 s" in wait(monkeypatch, [reading(), bad, bad])["msg"]


def test_ready_but_on_no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    result = wait(monkeypatch, [reading(api={"healthy": True, "error": None})])
    assert "The API is ready, but no process on any GPU yet" in result["msg"]
    assert result["elapsed"] < 30


def test_out_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "was not ready after 60 s: API: no answer." in wait(monkeypatch, [reading()])["msg"]


AWAY = wait_for_server._AWAY  # noqa: SLF001 - the limit is what it is about
LOST: dict[str, Any] = {"lost": "Connection reset by peer"}
UNANSWERED = reading(unanswered=True, problems=["The Docker Engine can't be reached."])


def away(state: dict[str, Any], seconds: int) -> list[dict[str, Any]]:
    """Return the readings of so many seconds, one every two."""
    return [state] * (seconds // 2 + 1)


@pytest.mark.parametrize(
    "readings",
    [
        [reading(), *away(LOST, AWAY), reading(), *away(LOST, AWAY)],
        [reading(), *away(UNANSWERED, AWAY), reading(), *away(UNANSWERED, AWAY)],
        # From the first read on, as after a restoration.
        away(LOST, AWAY),
        away(UNANSWERED, AWAY),
        # Both in turn, as when a host restarts.
        [reading(), *[LOST, UNANSWERED] * (AWAY // 4)],
    ],
)
def test_a_short_loss_is_waited_for(monkeypatch: pytest.MonkeyPatch, readings: list[dict[str, Any]]) -> None:
    expected = 2 * len(readings)
    result = wait(monkeypatch, [*readings, reading(proven=True)], timeout=30 * AWAY)
    assert (result["proven"], result["elapsed"]) == (True, expected)


def test_a_connection_that_stays_lost_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AnsibleConnectionFailure):
        wait(monkeypatch, [reading(), *away(LOST, AWAY + 2), reading(proven=True)])


def test_a_docker_engine_that_stays_away_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    result = wait(monkeypatch, [reading(), *away(UNANSWERED, 3 * AWAY)], timeout=30 * AWAY)
    assert result["failed"]
    assert "The Docker Engine can't be reached." in result["msg"]
    assert AWAY < result["elapsed"] <= 3 * AWAY


def test_a_loss_is_shown_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr(wait_for_server.display, "display", shown.append)
    wait(monkeypatch, [reading(proven=False), *away(UNANSWERED, 20), *away(LOST, 20), reading(proven=True)])
    assert [line for line in shown if "gives no answer" in line] == [
        f"gpu01: waiting: the Docker Engine gives no answer; trying again for {AWAY} s"
    ]
