"""What scripts/rollout makes of an Ansible that doesn't reach its end."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pytest

from tests.unit.conftest import Script as Rollout
from tests.unit.test_progress import Feed, look

Play = Callable[[Feed], None]


class Fed:
    """Hands events to whoever listens to the runner."""

    def __init__(self, feed: Callable[[dict[str, Any]], object]) -> None:
        self.feed = feed


class Runner:
    """An ansible-runner whose play is given."""

    def __init__(self, play: Play, rc: int | None, handler: Callable[[dict[str, Any]], object]) -> None:
        self.play, self.code, self.handler = play, rc, handler
        self.rc: int | None = None
        self.stdout = io.StringIO("PLAY [Look]\nKilled\n")

    def run(self) -> None:
        feed = Feed()
        feed.rollout = Fed(self.handler)  # type: ignore[assignment]
        self.play(feed)
        self.rc = self.code


class Script(Protocol):
    def __call__(self, play: Play, rc: int | None, *words: str) -> tuple[int, str, str]: ...


@pytest.fixture
def rollout(script: Rollout, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Script:
    """Return the script, over three hosts and the given play."""
    (tmp_path / "hosts.yml").write_text("vllm_gpu: {hosts: {a: {}, b: {}, c: {}}}\n", encoding="utf-8")

    def run(play: Play, rc: int | None, *words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(
            script.module, "init_runner", lambda event_handler, **_: Runner(play, rc, event_handler)
        )
        return script("-i", "hosts.yml", *words)

    return run


def stats(feed: Feed) -> None:
    feed.put("playbook_on_stats", failures={}, rescued={}, dark={})


def reads(hosts: str) -> Play:
    """Return a play that has read these hosts, and was killed."""

    def play(feed: Feed) -> None:
        feed.play()
        for host in hosts:
            feed.task(host, "server_info", **look(0))

    return play


def breaks(_feed: Feed) -> None:
    raise OSError(28, "No space left on device")


def odd(feed: Feed) -> None:
    """An event that can't be read, and then all that belongs to a good play."""
    feed.task("a", "server_info", referee={}, proven=1)
    reads("abc")(feed)
    stats(feed)


def reads_all(feed: Feed) -> None:
    reads("abc")(feed)
    stats(feed)


@pytest.mark.parametrize(
    ("play", "rc", "hosts", "said"),
    [
        (reads("a"), 137, ("a", "bc"), "ended before its play was over:\nPLAY [Look]\nKilled"),
        (reads("abc"), 137, ("abc", ""), "ended before its play was over"),
        (reads("abc"), None, ("abc", ""), "ended before its play was over"),
        (reads(""), 137, ("", "abc"), "ended before it had looked at any host"),
        (breaks, None, ("", "abc"), "No space left on device"),
        (odd, 0, ("abc", ""), "could not be read"),
        (reads_all, 2, ("abc", ""), "ended before its play was over"),
    ],
    ids=["killed", "killed late", "by a signal", "killed early", "no space", "odd event", "its own error"],
)
def test_a_plan_names_the_hosts_that_nobody_checked(
    rollout: Script, play: Play, rc: int | None, hosts: tuple[str, str], said: str
) -> None:
    change, unread = hosts
    code, out, err = rollout(play, rc, "--check", "--json")
    found = json.loads(out.splitlines()[-1])
    assert (code, found["to_change"], found["not_checked"]) == (3, list(change), list(unread))
    assert said in err
    code, out, _err = rollout(play, rc, "--check")
    assert code == 3
    assert [line[2] for line in out.splitlines() if "→" in line] == list(change)
    assert (f"nobody knows: {', '.join(unread)}" in out) == bool(unread)


def test_a_whole_plan(rollout: Script) -> None:
    code, out, err = rollout(reads_all, 0, "--check")
    assert (code, err, out.count("→")) == (0, "", 3)


def changes(*, verified: str, end: bool) -> Play:
    """Return a play that changes all hosts at once, and reaches its end or doesn't."""

    def play(feed: Feed) -> None:
        feed.plan("a", "b", "c")
        feed.play()
        for host in "abc":
            feed.change(host)
        for host in verified:
            feed.task(host, "server_info", **look(1, proven=True, recorded=True))
        if end:
            stats(feed)

    return play


@pytest.mark.parametrize(
    ("play", "rc", "outcome", "resume"),
    [
        (changes(verified="abc", end=True), 0, "done", ""),
        (changes(verified="", end=False), 137, "failed", "--resume"),
        (changes(verified="a", end=False), None, "failed", "--resume"),
        (changes(verified="abc", end=False), 137, "failed", ""),
        (changes(verified="abc", end=True), 250, "failed", ""),
        (reads("a"), 137, "failed", "--resume"),
        (breaks, None, "failed", "--resume"),
    ],
)
def test_a_killed_ansible_is_no_success(
    rollout: Script, play: Play, rc: int | None, outcome: str, resume: str
) -> None:
    code, out, err = rollout(play, rc)
    found = json.loads(Path("rollouts/latest/report.json").read_text(encoding="utf-8"))
    assert (code, found["outcome"]) == (int(outcome != "done"), outcome)
    assert ("--resume" in out) == bool(resume)  # where something is left
    assert bool(err) == bool(code)


def test_settings_that_are_exported_in_vain_are_named(
    rollout: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "exported" not in rollout(reads_all, 0, "--check")[2]
    monkeypatch.setenv("GPU_DEVICE_ID", "1")
    monkeypatch.setenv("VLLM_PORT", "1")
    assert (
        "GPU_DEVICE_ID, VLLM_PORT is exported here and has no effect" in rollout(reads_all, 0, "--check")[2]
    )


def test_what_an_error_of_the_runner_quotes_is_no_secret(rollout: Script) -> None:
    Path("vars.yml").write_text("vllm_gpu_api_key: sk-planted-71\n", encoding="utf-8")

    def quotes(_feed: Feed) -> None:
        raise ValueError("sk-planted-71")

    code, _out, err = rollout(quotes, None, "-e", "@vars.yml", "--check")
    assert (code, "ValueError: (hidden)" in err) == (3, True)
