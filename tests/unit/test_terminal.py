"""What a person at a terminal sees of a roll-out."""

from __future__ import annotations

import sys

import pytest
from fleet.terminal import Pipe, Terminal, view_for
from rich.console import Console

from tests.unit.test_progress import Feed


def test_the_view_suits_where_the_output_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    for is_terminal, view in ((True, Terminal), (False, Pipe)):
        monkeypatch.setattr(sys.stdout, "isatty", lambda is_terminal=is_terminal: is_terminal)
        assert type(view_for(Feed().rollout, as_json=False)) is view


def test_the_live_view(capsys: pytest.CaptureFixture[str]) -> None:
    feed = Feed()
    view = Terminal(feed.rollout)

    def shown() -> str:
        Console(width=80).print(view.render())
        return capsys.readouterr().out

    assert "Looking at every host before the first is touched: 0 of 3" in shown()
    feed.plan("a", "b", "c")
    feed.wave()
    feed.task("a", "preflight", "server_info")
    feed.task("a", "configure", "server_files")
    text = shown()
    assert "a GPU 0 → GPU 1 configure" in text
    assert "0 of 3 hosts" in text


def test_a_plan_says_what_changes_besides_the_card(capsys: pytest.CaptureFixture[str]) -> None:
    feed = Feed()
    feed.plan("a", right="bc")
    hosts = list(feed.rollout.hosts.values())
    Pipe(feed.rollout).check(hosts[:1], 2, [])
    assert capsys.readouterr().out == (
        "  a: GPU 0 → GPU 1; VLLM_API_KEY changes\n1 host changes, 2 already right, 0 would be refused\n"
    )
