"""The report of a rollout from the runner's events."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from fleet.progress import Rollout, card_in_use, waves_of

CARDS = [{"index": n, "uuid": f"GPU-{n}", "name": f"Card {n}"} for n in (0, 1)]


def host_state(on: int | None, **changes: Any) -> dict[str, Any]:  # noqa: ANN401
    """What server_info returns, with the server on that card."""
    held = [] if on is None else [{"gpu_uuid": f"GPU-{on}"}]
    state = {
        "referee": {"processes": held, "message": "It runs.", "verdict": "ok"}, "gpus": CARDS, "gpu": CARDS[1],
        "recorded": False, "proven": False, "problems": [], "changes": ["GPU 0 → 1", "VLLM_API_KEY changes"],
    }  # fmt: skip
    return {**state, **changes}


class Feed:
    """Feeds a rollout over a, b and c with one event per second."""

    def __init__(self) -> None:
        self.notified: list[str] = []
        self.rollout = Rollout(["a", "b", "c"], {"id": "x"}, lambda what, **_: self.notified.append(what))
        self.seconds = 0

    def put(self, event: str, **data: Any) -> None:  # noqa: ANN401
        self.seconds += 1
        created = f"2026-11-22T10:{self.seconds // 60:02d}:{self.seconds % 60:02d}+00:00"
        self.rollout.feed({"event": event, "created": created, "event_data": data})

    def play(self) -> None:
        self.put("playbook_on_play_start")

    def task(self, host: str, action: str, end: str = "ok", **res: Any) -> None:  # noqa: ANN401
        data = {"host": host, "task_action": f"mlops.vllm_gpu.{action}"}
        self.put("runner_on_start", **data)
        self.put(f"runner_on_{end}", **data, res=res)

    def plan(self, *change: str, right: str = "", on: int | None = 0) -> None:
        """Plan the change, and start the first wave."""
        self.play()
        for host in "abc":
            self.task(host, "server_info", **host_state(on, recorded=host in right))
        stats = {"data": {"vllm_gpu_rollout": {"to_change": list(change), "waves": [1, "100%"]}}}
        self.task("a", "set_stats", ansible_stats=stats)
        self.play()

    def change(self, host: str) -> None:
        self.task(host, "server_info", **host_state(0))
        self.task(host, "server_info", **host_state(0, proven=True))
        self.task(host, "server_files", changed=True)
        self.task(host, "server_up", changed=True)
        self.task(host, "wait_for_server", **host_state(1, proven=True))

    def fail(self, host: str, *, restored: bool) -> None:
        self.task(host, "server_info", **host_state(0))
        self.task(host, "server_files", changed=True)
        self.task(host, "server_up", changed=True)
        self.task(host, "wait_for_server", "failed", msg="It died.")
        self.task(host, "server_snapshot", changed=True)
        self.task(host, "wait_for_server", **host_state(0, proven=restored))
        self.task(host, "fail", "failed", msg="It died. Do this.")

    def end(self, **counted: dict[str, int]) -> dict[str, str]:
        self.put("playbook_on_stats", **{"failures": {}, "rescued": {}, "dark": {}, **counted})
        return {host["name"]: host["outcome"] for host in self.rollout.report()["hosts"]}


@pytest.fixture
def feed() -> Feed:
    return Feed()


@pytest.mark.parametrize(
    ("count", "sizes", "waves"),
    [(6, [1, "10%", "30%", "100%"], 4), (200, [1, "10%", "30%", "100%"], 4), (5, [1, 2], 3), (1, ["50%"], 1), (0, [1], 0),
     (3, ["1"], 3), (5, [0], 1), (5, [1, -1], 2), (5, ["0%"], 5)],
)  # fmt: skip
def test_number_of_waves(count: int, sizes: list[object], waves: int) -> None:
    assert waves_of(count, sizes) == waves


def test_success(feed: Feed) -> None:
    feed.plan("a", "b", right="c")
    feed.change("a")
    feed.play()
    feed.change("b")
    assert feed.end() == {"a": "changed", "b": "changed", "c": "already_right"}
    report = feed.rollout.report()
    assert (report["outcome"], report["totals"]["changed"]) == ("done", 2)
    assert [wave["hosts"] for wave in report["waves"]] == [["a"], ["b"]]
    a = report["hosts"][0]
    assert (a["before"]["index"], a["after"]["index"], a["verdict"]) == (0, 1, "ok")
    assert [phase["name"] for phase in a["phases"]] == ["preflight", "configure", "deploy", "verify"]
    assert a["downtime_s"] == 3  # from the start of the recreation to the proof
    assert feed.notified.count("wave") == feed.notified.count("host") == 2


def test_a_failed_host_is_restored_or_not(feed: Feed) -> None:
    feed.plan("a", "b", "c")
    feed.fail("a", restored=True)
    feed.fail("b", restored=False)
    found = feed.end(failures={"a": 1, "b": 1}, rescued={"a": 1, "b": 1})
    assert found == {"a": "rolled_back", "b": "failed", "c": "untouched"}
    report = feed.rollout.report()
    assert (report["outcome"], report["hosts"][0]["error"]) == ("failed", "It died. Do this.")
    message = "Stopped at the canary: a (rolled back), b (failed). 1 of 3 hosts was left untouched."
    assert message in report["message"]


def test_refused_and_unreachable_before_any_change(feed: Feed) -> None:
    feed.play()
    feed.task("a", "fail", "failed", msg="No such GPU. Choose 0.")
    # The play ignores it here, so that it is refused with the others and not counted as dark.
    feed.task("b", "server_info", "unreachable", msg="ssh: no route")
    feed.task("b", "fail", "failed", msg="It cannot be reached.")
    feed.task("c", "server_info", **host_state(0))
    assert feed.end(failures={"a": 1, "b": 1}) == {"a": "refused", "b": "unreachable", "c": "untouched"}
    assert feed.rollout.outcome() == "refused"


def test_known_secrets_are_hidden(feed: Feed) -> None:
    secret = "sk-planted-71c2d9"
    feed.rollout.secrets = [secret]
    feed.play()
    referee = {"processes": [], "message": secret, "verdict": "ok"}
    feed.task("a", "server_info", **host_state(0, changes=[f"VLLM_MODEL: {secret}"], referee=referee))
    feed.task("a", "fail", "failed", msg=f"A log says {secret}", module_stderr=secret)
    feed.task("b", "server_info", "unreachable", msg=f"ssh: {secret}")
    host = feed.rollout.hosts["a"]
    assert host.changes == ["VLLM_MODEL: (hidden)"]
    assert str(host.error).startswith("A log says (hidden)\n(hidden)\n")
    assert secret not in json.dumps(feed.rollout.report())


def test_a_host_that_runs_no_module_reports_why(feed: Feed) -> None:
    feed.play()
    result = {"msg": "No start of json char found", "module_stderr": "/bin/sh: 1: sudo: not found\n"}
    feed.task("a", "server_info", "failed", **result)
    error = "/bin/sh: 1: sudo: not found\nCorrect the connection to this host"
    assert error in (feed.rollout.hosts["a"].error or "")


def rescued(feed: Feed) -> None:
    feed.change("a")
    feed.end(rescued={"a": 1})


def cut_off(feed: Feed) -> None:
    """The last server that was proven is the old one."""
    feed.task("a", "server_info", **host_state(0, proven=True))
    feed.task("a", "server_files", changed=True)
    feed.end()


def restored_as_before(feed: Feed) -> None:
    feed.fail("a", restored=True)
    feed.task("a", "wait_for_server", **host_state(0, proven=True, recorded=True))


def killed_during_server_up(feed: Feed) -> None:
    feed.put("runner_on_start", host="a", task_action="mlops.vllm_gpu.server_up")


@pytest.mark.parametrize("play", [rescued, cut_off, restored_as_before, killed_during_server_up])
def test_an_incomplete_change_is_a_failure(feed: Feed, play: Callable[[Feed], None]) -> None:
    feed.plan("a")
    play(feed)
    assert feed.rollout.hosts["a"].outcome == "failed"


def test_a_killed_ansible_leaves_success_only_where_it_was_recorded_and_verified(feed: Feed) -> None:
    """It sends no stats, and starts no other play."""
    feed.plan("a", "b", "c")
    for host in "abc":
        feed.change(host)
    feed.task("a", "server_info", **host_state(1, proven=True, recorded=True))
    feed.task("b", "server_info", **host_state(1, proven=True, recorded=True))
    feed.task("b", "fail", "failed", msg="Another GPU.")
    assert [host.outcome for host in feed.rollout.hosts.values()] == ["changed", "failed", "failed"]
    assert feed.rollout.outcome() == "failed"


@pytest.mark.parametrize(("stopped", "outcome"), [(False, "failed"), (True, "stopped")])
def test_an_ansible_that_failed_is_no_success(feed: Feed, stopped: bool, outcome: str) -> None:  # noqa: FBT001
    feed.plan(right="abc")
    feed.rollout.broken = True
    report = feed.rollout.report(stopped=stopped)
    assert report["outcome"] == outcome
    assert "3 hosts" in report["message"]


@pytest.mark.parametrize(
    ("process", "card"),
    [
        ({"gpu_uuid": "MIG-1", "gpu_index": 1}, 1),  # an instance of card 1
        ({"gpu_uuid": "GPU-1", "gpu_index": None}, 1),
        ({"gpu_uuid": "MIG-1", "gpu_index": None}, None),
        ({"gpu_uuid": None, "gpu_index": None}, None),
    ],
)
def test_card_in_use(process: dict[str, Any], card: int | None) -> None:
    odd = {"index": None, "uuid": None, "name": None}
    found = card_in_use(host_state(0, gpus=[odd, *CARDS], referee={"processes": [process]}))
    assert (found and found["index"]) == card


def test_unreachable_during_the_change(feed: Feed) -> None:
    feed.plan("a", "b", "c")
    feed.change("a")
    feed.task("a", "server_info", "unreachable", msg="gone")
    assert feed.rollout.hosts["a"].phase == "verify"
    feed.change("b")
    assert feed.end(dark={"a": 1}) == {"a": "unreachable", "b": "changed", "c": "untouched"}
    assert feed.rollout.outcome() == "failed"
    a, b, _c = feed.rollout.report()["hosts"]
    assert a["ended_at"] < b["started_at"]  # it does not take until the wave's end


def test_stopped_on_request(feed: Feed) -> None:
    feed.plan("a", "b", "c")
    feed.change("a")
    feed.play()  # it ends before its first host
    assert feed.end() == {"a": "changed", "b": "untouched", "c": "untouched"}
    report = feed.rollout.report(stopped=True)
    assert (report["outcome"], len(report["waves"])) == ("stopped", 1)


def test_a_new_server_has_no_downtime(feed: Feed) -> None:
    feed.plan("a", on=None)
    feed.change("a")
    feed.end()
    host = feed.rollout.report()["hosts"][0]
    assert (host["outcome"], host["before"], host["downtime_s"]) == ("changed", None, None)
