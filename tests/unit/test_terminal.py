"""What a rollout prints to a terminal, a pipe or a program."""

from __future__ import annotations

import json
import re
import sys
import time
from datetime import UTC, datetime

import pytest
from fleet.progress import Host, Rollout
from fleet.terminal import Events, Lines, Terminal, print_error, view_for
from rich.console import Console

from tests.unit.test_progress import Feed


def test_the_view_suits_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    for is_terminal, view in ((True, Terminal), (False, Lines)):
        monkeypatch.setattr(sys.stdout, "isatty", lambda is_terminal=is_terminal: is_terminal)
        assert type(view_for(Feed().rollout, as_json=False)) is view


def test_the_live_view(capsys: pytest.CaptureFixture[str]) -> None:
    feed = Feed()
    view = Terminal(feed.rollout)

    def shown() -> str:
        Console(width=80).print(view.render())
        return capsys.readouterr().out

    assert "Checking every host before changing the first: 0 of 3" in shown()
    feed.plan("a", "b", "c")
    feed.task("a", "server_info")
    feed.task("a", "server_files")
    text = shown()
    assert "a GPU 0 → GPU 1 configure" in text
    assert "0 of 3 hosts" in text


def test_a_pipe_shows_that_a_long_phase_is_still_running(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    feed = Feed()
    feed.plan("a")
    feed.task("a", "server_info")
    view = Lines(feed.rollout)
    start = view.printed
    for seconds, lines in ((29, 0), (31, 1), (32, 0)):
        monkeypatch.setattr(time, "monotonic", lambda seconds=seconds: start + seconds)
        view.tick()
        assert capsys.readouterr().out.count("  a: preflight, ") == lines


NAME = "gpu[bold]\x1b]0;x\x07"
SHOWN = r"gpu[bold]\x1b]0;x\x07"
LOG = "first :smile: [red]\n\tsecond \x1b[2J\x9b31m \u202e"
LINES = ["    first :smile: [red]", r"        second \x1b[2J\x9b31m \u202e"]


def hostile() -> Rollout:
    """A rollout over a host with control characters in its log and name."""
    rollout = Rollout([NAME], {"id": "x", "left_over": []})
    at = datetime(2026, 11, 22, tzinfo=UTC)
    rollout.hosts[NAME] = Host(NAME, wave=1, error=LOG, failed=True, started=at)
    rollout.to_change = [NAME]
    return rollout


@pytest.mark.parametrize("kind", [Lines, Terminal])
def test_hosts_cannot_control_the_terminal(kind: type[Lines], capsys: pytest.CaptureFixture[str]) -> None:
    rollout = hostile()
    view = kind(rollout)
    view.end(rollout.report())
    view.check([], 0, list(rollout.hosts.values()))
    view.on_host(rollout.hosts[NAME])
    if isinstance(view, Terminal):
        Console(width=120).print(view.render())
    text = capsys.readouterr().out
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text)
    assert text.count(SHOWN) == (6 if kind is Terminal else 5)
    lines = text.splitlines()
    assert lines[lines.index(LINES[0]) + 1] == LINES[1]


def test_events_and_errors_contain_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    rollout = hostile()
    view = Events(rollout)
    view.on_host(rollout.hosts[NAME])
    view.check([], 0, list(rollout.hosts.values()))
    print_error(NAME)
    out, err = capsys.readouterr()
    host, check = map(json.loads, out.splitlines())
    error = LOG.replace("\x1b", r"\x1b").replace("\x9b", r"\x9b").replace("\u202e", r"\u202e")
    assert (host["name"], host["error"], check["refused"]) == (SHOWN, error, {SHOWN: error})
    assert err == f"{SHOWN}\n"


def test_a_check_shows_what_changes_besides_the_card(capsys: pytest.CaptureFixture[str]) -> None:
    feed = Feed()
    feed.plan("a", right="bc")
    hosts = list(feed.rollout.hosts.values())
    Lines(feed.rollout).check(hosts[:1], 2, [])
    assert capsys.readouterr().out == (
        "  a: GPU 0 → GPU 1; VLLM_API_KEY changes\n1 host changes, 2 already right, 0 would be refused\n"
    )
