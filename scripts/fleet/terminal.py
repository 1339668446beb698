"""Show a roll-out to the person in front of it, or as lines or JSON to whatever reads them."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from fleet.progress import OUTCOMES, Host, Rollout, n_hosts, short
from fleet.text import visible, visible_in

SIGNS = {
    "changed": ("green", "✔"), "already_right": ("green", "✔"), "rolled_back": ("yellow", "↩"),
    "failed": ("red", "✘"), "unreachable": ("red", "✘"), "refused": ("yellow", "✘"), "untouched": ("dim", "·"),
}  # fmt: skip
# Hosts at work that are shown at once; of a larger wave, the number of the others.
_SHOWN = 8
# How often to say on a pipe that a phase goes on; seconds.
_REMINDER = 30


def complain(text: str) -> None:
    """Print what went wrong to the standard error."""
    with suppress(OSError):  # the terminal is gone
        print(visible(text), file=sys.stderr)


def go_on_unread() -> None:
    """Print to nobody from now on: a closed pipe or terminal must not end a roll-out half-way."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Screen(Console):
    """Rich's console, which would end the program where its pipe is closed."""

    def on_broken_pipe(self) -> None:
        go_on_unread()


class Lines:
    """Plain lines: for a log, a pipe, or a terminal that can no more."""

    def __init__(self, rollout: Rollout) -> None:
        self.rollout = rollout
        self.console = Screen(highlight=False, soft_wrap=True)

    def __call__(self, what: str, **values: Any) -> None:  # noqa: ANN401
        getattr(self, f"on_{what}", lambda **_: None)(**values)

    def say(self, text: str, style: str = "") -> None:
        try:
            self.console.print(Text(visible(text), style))
        except OSError:  # the terminal is gone
            go_on_unread()

    def on_plan(self) -> None:
        rollout, changing = self.rollout, len(self.rollout.to_change)
        right = sum(host.right for host in rollout.hosts.values())
        verb, waves = "changes" if changing == 1 else "change", rollout.expected_waves
        self.say(
            f"{n_hosts(changing)} {verb} in {waves} wave{'' if waves == 1 else 's'}, "
            f"{right} {'is' if right == 1 else 'are'} right already."
        )

    def on_wave(self, number: int, of: int) -> None:
        self.say(f"Wave {number} of {of}{' (the canary)' if number == 1 else ''}", "bold")

    def on_phase(self, host: Host) -> None:
        if host.wave:
            self.say(f"  {host.name}: {host.phase}")

    def on_host(self, host: Host) -> None:
        outcome = host.outcome
        _colour, sign = SIGNS[outcome]
        seconds = (host.ended - host.started).total_seconds() if host.ended and host.started else 0
        down = "" if host.down_for is None else f", down for at most {host.down_for:.0f} s"
        cards = f"{short(host.before)} → {short(host.after)}"
        self.say(
            f"  {sign} {host.name}: {cards}, {OUTCOMES[outcome]} after {seconds:.0f} s{down}",
            SIGNS[outcome][0],
        )

    def check(self, change: list[Host], right: int, refused: list[Host], unread: Sequence[str] = ()) -> None:
        """Say what a roll-out would do."""
        for host in change:
            self.say(
                "; ".join([f"  {host.name}: {short(host.before)} → {short(host.wanted)}", *host.changes])
            )
        for host in refused:
            self.say(f"  {host.name}: would be refused", "yellow")
            self.say("\n".join(f"      {line}" for line in (host.error or "").splitlines()))
        names = ": " + ", ".join(host.name for host in refused) if refused else ""
        changing = f"{n_hosts(len(change))} {'changes' if len(change) == 1 else 'change'}"
        self.say(f"{changing}, {right} already right, {len(refused)} would be refused{names}", "bold")
        if unread:
            self.say(f"Not checked, so that nobody knows: {', '.join(unread)}", "bold red")

    def end(self, report: dict[str, Any]) -> None:
        """Say what became of it: each host that is not right, then the whole."""
        for host in report["hosts"]:
            if host["error"]:
                colour, sign = SIGNS[host["outcome"]]
                self.say(f"\n{sign} {host['name']}: {OUTCOMES[host['outcome']]}", f"bold {colour}")
                self.say("\n".join(f"    {line}" for line in host["error"].splitlines()))
        self.say(f"\n{report['message']}", "bold green" if report["outcome"] == "done" else "bold red")

    @contextmanager
    def shown(self) -> Iterator[None]:
        yield

    def tick(self) -> None:
        """Called now and then, so that a long phase is no silence."""


class Pipe(Lines):
    """Lines, and now and then a word that a phase goes on."""

    def __init__(self, rollout: Rollout) -> None:
        super().__init__(rollout)
        self.spoke = time.monotonic()

    def say(self, text: str, style: str = "") -> None:
        super().say(text, style)
        self.spoke = time.monotonic()

    def tick(self) -> None:
        if time.monotonic() - self.spoke > _REMINDER:
            now = datetime.now(UTC)
            for host in at_work(self.rollout):
                seconds = (now - host.started).total_seconds() if host.started else 0
                self.say(f"  {host.name}: {host.phase}, {seconds:.0f} s so far")


class Terminal(Lines):
    """A live view below the lines that stay."""

    def __init__(self, rollout: Rollout) -> None:
        super().__init__(rollout)
        self.begun = time.monotonic()
        self.spinner = Spinner("dots")
        # It renders at once.
        self.live = Live(
            console=self.console, get_renderable=self.render, refresh_per_second=4, transient=True
        )

    @contextmanager
    def shown(self) -> Iterator[None]:
        with self.live:
            yield

    def on_phase(self, host: Host) -> None:
        """The live view shows it."""

    def render(self) -> RenderableType:
        rollout = self.rollout
        grid = Table.grid(padding=(0, 1))
        if not rollout.to_change:
            looked = sum(host.verdict is not None or bool(host.error) for host in rollout.hosts.values())
            grid.add_row(
                self.spinner,
                f"Looking at every host before the first is touched: {looked} of {len(rollout.hosts)}",
            )
            return grid
        now = datetime.now(UTC)
        working = at_work(rollout)
        for host in working[:_SHOWN]:
            seconds = (now - host.started).total_seconds() if host.started else 0
            words = (
                host.name,
                f"{short(host.before)} → {short(host.wanted)}",
                host.phase,
                f"{seconds:4.0f} s",
            )
            grid.add_row(self.spinner, *(Text(visible(one)) for one in words))
        if len(working) > _SHOWN:
            grid.add_row("", f"and {len(working) - _SHOWN} more")
        done = sum(bool(host.ended) for host in rollout.hosts.values())
        view = Table.grid()
        view.add_row(grid)
        line = Table.grid(padding=(0, 1))
        line.add_row(
            ProgressBar(total=len(rollout.to_change), completed=done, width=30, complete_style="green"),
            f"{done} of {n_hosts(len(rollout.to_change))}, {time.monotonic() - self.begun:.0f} s",
        )
        view.add_row(line)
        return view


class Events(Lines):
    """A JSON object on a line for each thing that happens."""

    def say(self, text: str, style: str = "") -> None:
        """Lines for people are not for machines."""

    @staticmethod
    def put(event: str, **values: object) -> None:
        said = {"event": event, "at": datetime.now(UTC).isoformat(), **values}
        try:
            print(json.dumps(visible_in(said)), flush=True)
        except OSError:
            go_on_unread()

    def on_plan(self) -> None:
        hosts = self.rollout.hosts.values()
        self.put(
            "plan",
            to_change=self.rollout.to_change,
            already_right=[host.name for host in hosts if host.right],
            waves=self.rollout.expected_waves,
        )

    def check(self, change: list[Host], right: int, refused: list[Host], unread: Sequence[str] = ()) -> None:
        """Say what a roll-out would do."""
        self.put(
            "check",
            to_change=[host.name for host in change],
            already_right=right,
            refused={host.name: host.error for host in refused},
            not_checked=list(unread),
        )

    def on_wave(self, number: int, of: int) -> None:
        self.put("wave", number=number, of=of)

    def on_phase(self, host: Host) -> None:
        self.put("phase", host=host.name, wave=host.wave, phase=host.phase)

    def on_host(self, host: Host) -> None:
        self.put("host", **host.report())

    def end(self, report: dict[str, Any]) -> None:
        self.put("end", **{key: report[key] for key in ("id", "outcome", "message", "totals")})


def at_work(rollout: Rollout) -> list[Host]:
    """Return the hosts that are being changed now."""
    return [host for host in rollout.hosts.values() if host.started and not host.ended]


def view_for(rollout: Rollout, *, as_json: bool) -> Lines:
    """Return the view that suits where the output goes."""
    if as_json:
        return Events(rollout)
    return Terminal(rollout) if sys.stdout.isatty() else Pipe(rollout)
