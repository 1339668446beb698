"""scripts/rollout when Ansible does not reach its end."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.unit.conftest import Script
from tests.unit.test_progress import Feed, host_state

Play = Callable[[Feed], None]
Rollout = Callable[..., tuple[int, str, str]]


@pytest.fixture
def rollout(script: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Rollout:
    """Return the script over three hosts, with an ansible-runner that runs the given play."""
    (tmp_path / "hosts.yml").write_text("vllm_gpu: {hosts: {a: {}, b: {}, c: {}}}\n", encoding="utf-8")

    def run(play: Play, rc: int | None, *words: str) -> tuple[int, str, str]:
        def init_runner(event_handler: Callable[..., object], **_: object) -> SimpleNamespace:
            runner = SimpleNamespace(rc=None, stdout=io.StringIO("PLAY [Read]\nKilled\n"))

            def start() -> None:
                feed = Feed()
                feed.rollout = SimpleNamespace(feed=event_handler)  # type: ignore[assignment]
                play(feed)
                runner.rc = rc

            runner.run = start
            return runner

        monkeypatch.setattr(script.module, "init_runner", init_runner)
        return script("-i", "hosts.yml", *words)

    return run


def stats(feed: Feed) -> None:
    feed.put("playbook_on_stats", failures={}, rescued={}, dark={})


def reads(hosts: str, *, end: bool = False) -> Play:
    """Return a play that reads these hosts, and is killed or reaches its end."""

    def play(feed: Feed) -> None:
        feed.play()
        for host in hosts:
            feed.task(host, "server_info", **host_state(0))
        if end:
            stats(feed)

    return play


def breaks(_feed: Feed) -> None:
    raise OSError(28, "No space left on device")


def odd(feed: Feed) -> None:
    """Send an event that cannot be read, and then those of a good play."""
    feed.task("a", "server_info", referee={}, proven=1)
    reads("abc", end=True)(feed)


@pytest.mark.parametrize(
    ("play", "rc", "hosts", "message"),
    [
        (reads("a"), 137, ("a", "bc"), "ended before it was finished:\nPLAY [Read]\nKilled"),
        (reads("abc"), 137, ("abc", ""), "ended before it was finished"),
        (reads("abc"), None, ("abc", ""), "ended before it was finished"),
        (reads(""), 137, ("", "abc"), "ended before it had checked any host"),
        (breaks, None, ("", "abc"), "No space left on device"),
        (odd, 0, ("abc", ""), "could not be read"),
        (reads("abc", end=True), 2, ("abc", ""), "ended before it was finished"),
    ],
    ids=["killed", "killed late", "by a signal", "killed early", "no space", "odd event", "its own error"],
)
def test_a_check_names_the_hosts_that_were_not_checked(
    rollout: Rollout, play: Play, rc: int | None, hosts: tuple[str, str], message: str
) -> None:
    change, unread = hosts
    code, out, err = rollout(play, rc, "--check", "--json")
    found = json.loads(out.splitlines()[-1])
    assert (code, found["to_change"], found["not_checked"]) == (3, list(change), list(unread))
    assert message in err
    code, out, _err = rollout(play, rc, "--check")
    assert code == 3
    assert [line[2] for line in out.splitlines() if "→" in line] == list(change)
    assert (f"therefore unknown: {', '.join(unread)}" in out) == bool(unread)


def test_a_complete_check(rollout: Rollout) -> None:
    code, out, err = rollout(reads("abc", end=True), 0, "--check")
    assert (code, err, out.count("→")) == (0, "", 3)


def changes(*, verified: str, end: bool) -> Play:
    """Return a play that changes all hosts at once, and reaches its end or is killed."""

    def play(feed: Feed) -> None:
        feed.plan("a", "b", "c")
        for host in "abc":
            feed.change(host)
        for host in verified:
            feed.task(host, "server_info", **host_state(1, proven=True, recorded=True))
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
    rollout: Rollout, play: Play, rc: int | None, outcome: str, resume: str
) -> None:
    code, out, err = rollout(play, rc)
    found = json.loads(Path("rollouts/latest/report.json").read_text(encoding="utf-8"))
    assert (code, found["outcome"]) == (int(outcome != "done"), outcome)
    assert ("--resume" in out) == bool(resume)  # if something is left
    assert bool(err) == bool(code)


def test_exported_settings_without_effect_are_named(
    rollout: Rollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "exported" not in rollout(reads("abc", end=True), 0, "--check")[2]
    monkeypatch.setenv("GPU_DEVICE_ID", "1")
    monkeypatch.setenv("VLLM_PORT", "1")
    assert (
        "GPU_DEVICE_ID, VLLM_PORT is exported here and has no effect"
        in rollout(reads("abc", end=True), 0, "--check")[2]
    )


def test_an_error_of_the_runner_shows_no_secret(rollout: Rollout) -> None:
    Path("vars.yml").write_text("vllm_gpu_api_key: sk-planted-71\n", encoding="utf-8")

    def quotes(_feed: Feed) -> None:
        raise ValueError("sk-planted-71")

    code, _out, err = rollout(quotes, None, "-e", "@vars.yml", "--check")
    assert (code, "ValueError: (hidden)" in err) == (3, True)
