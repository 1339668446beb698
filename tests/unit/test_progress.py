"""What a roll-out's report makes of the runner's events."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fleet.progress import Rollout, card_in_use, waves_of

CARDS = [{"index": n, "uuid": f"GPU-{n}", "name": f"Card {n}"} for n in (0, 1)]


def look(on: int | None, **changes: Any) -> dict[str, Any]:  # noqa: ANN401
    """What a look at a host returns, with its server on that card."""
    held = [] if on is None else [{"gpu_uuid": f"GPU-{on}"}]
    state = {
        "referee": {"processes": held, "message": "It runs.", "verdict": "ok"}, "gpus": CARDS, "gpu": CARDS[1],
        "recorded": False, "proven": False, "problems": [], "changes": ["GPU 0 → 1", "VLLM_API_KEY changes"],
    }  # fmt: skip
    return {**state, **changes}


class Feed:
    """A roll-out over a, b and c, fed event by event, a second after another."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.rollout = Rollout(["a", "b", "c"], {"id": "x"}, lambda what, **_: self.told.append(what))
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

    def plan(self, *change: str, right: str = "") -> None:
        self.play()
        for host in "abc":
            self.task(host, "server_info", **look(0, recorded=host in right))
        stats = {"data": {"vllm_gpu_rollout": {"to_change": list(change), "waves": [1, "100%"]}}}
        self.put(
            "runner_on_ok", host="a", task_action="ansible.builtin.set_stats", res={"ansible_stats": stats}
        )

    def change(self, host: str) -> None:
        self.task(host, "server_info", **look(0))
        self.task(host, "server_info", **look(0, proven=True))
        self.task(host, "server_files", changed=True)
        self.task(host, "server_up", changed=True)
        self.task(host, "wait_for_server", **look(1, proven=True))

    def fail(self, host: str, *, back: bool) -> None:
        self.task(host, "server_info", **look(0))
        self.task(host, "server_files", changed=True)
        self.task(host, "server_up", changed=True)
        self.task(host, "wait_for_server", "failed", msg="It died.")
        self.task(host, "server_snapshot", changed=True)
        self.task(host, "wait_for_server", **look(0, proven=back))
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
def test_how_many_waves_serial_makes(count: int, sizes: list[object], waves: int) -> None:
    assert waves_of(count, sizes) == waves


def test_a_good_one(feed: Feed) -> None:
    feed.plan("a", "b", right="c")
    for host in "ab":
        feed.play()
        feed.change(host)
    assert feed.end() == {"a": "changed", "b": "changed", "c": "already_right"}
    report = feed.rollout.report()
    assert (report["outcome"], report["totals"]["changed"]) == ("done", 2)
    assert [wave["hosts"] for wave in report["waves"]] == [["a"], ["b"]]
    a = report["hosts"][0]
    assert (a["before"]["index"], a["after"]["index"], a["verdict"]) == (0, 1, "ok")
    assert [phase["name"] for phase in a["phases"]] == ["preflight", "configure", "deploy", "verify"]
    assert a["downtime_s"] == 3  # from the recreation's start to the proof
    assert feed.told.count("wave") == feed.told.count("host") == 2


def test_a_failed_host_is_put_back_or_not(feed: Feed) -> None:
    feed.plan("a", "b", "c")
    feed.play()
    feed.fail("a", back=True)
    feed.fail("b", back=False)
    found = feed.end(failures={"a": 1, "b": 1}, rescued={"a": 1, "b": 1})
    assert found == {"a": "rolled_back", "b": "failed", "c": "untouched"}
    report = feed.rollout.report()
    assert report["outcome"] == "failed"
    assert report["hosts"][0]["error"] == "It died. Do this."
    assert (
        "Stopped at the canary: a (rolled back), b (failed). 1 of 3 hosts is left untouched."
        in report["message"]
    )


def test_rescued_is_no_success_whatever_else_ansible_counts(feed: Feed) -> None:
    feed.plan("a")
    feed.play()
    feed.change("a")
    assert feed.end(rescued={"a": 1})["a"] == "failed"


def test_refused_and_unreachable_before_anything(feed: Feed) -> None:
    feed.play()
    feed.task("a", "fail", "failed", msg="No such GPU. Choose 0.")
    # The look passes over it, so that it is refused with the others and not counted as dark.
    feed.task("b", "server_info", "unreachable", msg="ssh: no route")
    feed.task("b", "fail", "failed", msg="It can not be reached.")
    feed.task("c", "server_info", **look(0))
    assert feed.end(failures={"a": 1, "b": 1}) == {
        "a": "refused",
        "b": "unreachable",
        "c": "untouched",
    }
    assert feed.rollout.outcome() == "refused"


def test_secrets_that_are_known_stay_out(feed: Feed) -> None:
    secret = "sk-planted-71c2d9"
    feed.rollout.secrets = [secret]
    feed.play()
    state = look(
        0, changes=[f"VLLM_MODEL: {secret}"], referee={"processes": [], "message": secret, "verdict": "ok"}
    )
    feed.task("a", "server_info", **state)
    feed.task("a", "fail", "failed", msg=f"A log says {secret}", module_stderr=secret)
    feed.task("b", "server_info", "unreachable", msg=f"ssh: {secret}")
    hosts = feed.rollout.hosts
    assert hosts["a"].changes == ["VLLM_MODEL: (hidden)"]
    assert str(hosts["a"].error).startswith("A log says (hidden)\n(hidden)\n")
    assert secret not in json.dumps(feed.rollout.report())


def test_a_host_where_no_module_runs_says_why(feed: Feed) -> None:
    feed.play()
    said = {"msg": "No start of json char found", "module_stderr": "/bin/sh: 1: sudo: not found\n"}
    feed.task("a", "server_info", "failed", **said)
    feed.end(failures={"a": 1})
    assert "/bin/sh: 1: sudo: not found\nMend the way to this host" in (feed.rollout.hosts["a"].error or "")


def test_a_change_that_was_cut_off_is_no_success(feed: Feed) -> None:
    """The last look before it showed a proven server: the old one."""
    feed.plan("a")
    feed.play()
    feed.task("a", "server_info", **look(0, proven=True))
    feed.task("a", "server_files", changed=True)
    assert feed.end()["a"] == "failed"


def test_a_killed_ansible_leaves_no_success_but_what_was_recorded_and_verified(feed: Feed) -> None:
    """No stats come then, and no other play begins."""
    feed.plan("a", "b", "c")
    feed.play()
    for host in "abc":
        feed.change(host)
    feed.task("a", "server_info", **look(1, proven=True, recorded=True))
    feed.task("b", "server_info", **look(1, proven=True, recorded=True))
    feed.task("b", "fail", "failed", msg="Another GPU.")
    assert [host.outcome for host in feed.rollout.hosts.values()] == ["changed", "failed", "failed"]
    assert feed.rollout.outcome() == "failed"


def test_a_server_that_ran_again_as_before_was_not_changed(feed: Feed) -> None:
    feed.plan("a")
    feed.play()
    feed.fail("a", back=True)
    feed.task("a", "wait_for_server", **look(0, proven=True, recorded=True))
    assert feed.rollout.hosts["a"].outcome == "failed"


def test_what_was_cut_off_while_the_server_was_replaced_was_touched(feed: Feed) -> None:
    feed.plan("a")
    feed.play()
    feed.put("runner_on_start", host="a", task_action="mlops.vllm_gpu.server_up")
    assert feed.rollout.hosts["a"].outcome == "failed"


@pytest.mark.parametrize(("stopped", "outcome"), [(False, "failed"), (True, "stopped")])
def test_an_ansible_that_failed_makes_no_good_roll_out(feed: Feed, stopped: bool, outcome: str) -> None:  # noqa: FBT001
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
def test_the_card_in_use(process: dict[str, Any], card: int | None) -> None:
    odd = {"index": None, "uuid": None, "name": None}
    found = card_in_use(look(0, gpus=[odd, *CARDS], referee={"processes": [process]}))
    assert (found and found["index"]) == card


def test_lost_in_the_middle(feed: Feed) -> None:
    feed.plan("a", "b", "c")
    feed.play()
    feed.change("a")
    feed.task("a", "server_info", "unreachable", msg="gone")
    assert feed.rollout.hosts["a"].phase == "verify"
    assert feed.end(dark={"a": 1}) == {"a": "unreachable", "b": "untouched", "c": "untouched"}
    assert feed.rollout.outcome() == "failed"


def test_stopped_on_request(feed: Feed) -> None:
    feed.plan("a", "b", "c")
    feed.play()
    feed.change("a")
    feed.play()  # which ends before its first host
    assert feed.end() == {"a": "changed", "b": "untouched", "c": "untouched"}
    report = feed.rollout.report(stopped=True)
    assert (report["outcome"], len(report["waves"])) == ("stopped", 1)


def test_a_server_that_was_not_there_has_no_downtime(feed: Feed) -> None:
    feed.play()
    feed.task("a", "server_info", **look(None))
    stats = {"data": {"vllm_gpu_rollout": {"to_change": ["a"], "waves": [1]}}}
    feed.put("runner_on_ok", host="a", task_action="ansible.builtin.set_stats", res={"ansible_stats": stats})
    feed.play()
    feed.change("a")
    feed.end()
    assert feed.rollout.report()["hosts"][0]["before"] is None
    assert feed.rollout.report()["hosts"][0]["downtime_s"] is None
