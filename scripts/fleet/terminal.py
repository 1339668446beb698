"""Show a rollout: live in a terminal, as lines in a pipe, or as JSON."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from fleet.progress import OUTCOMES, Host, Rollout, gpu_name, n_hosts
from fleet.text import visible, visible_in

SIGNS = {
    "changed": ("green", "✔"), "already_right": ("green", "✔"), "rolled_back": ("yellow", "↩"),
    "failed": ("red", "✘"), "unreachable": ("red", "✘"), "refused": ("yellow", "✘"), "untouched": ("dim", "·"),
}  # fmt: skip
# How many hosts the live view lists; it counts the others.
_LISTED = 8
# How long a pipe may stay silent during a long phase.
_REMINDER_S = 30


def print_error(text: str) -> None:
    """Print what went wrong to the standard error."""
    with suppress(OSError):  # the terminal is gone
        print(visible(text), file=sys.stderr)


def discard_output() -> None:
    """Discard further output: a closed pipe or terminal must not end a rollout half-way."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Screen(Console):
    """Rich's console, without its exit when the pipe is closed."""

    def on_broken_pipe(self) -> None:
        discard_output()


class Lines:
    """Plain lines, for a pipe."""

    def __init__(self, rollout: Rollout) -> None:
        self.rollout = rollout
        self.console = Screen(highlight=False, soft_wrap=True)
        self.printed = time.monotonic()

    def __call__(self, what: str, **values: Any) -> None:  # noqa: ANN401
        getattr(self, f"on_{what}", lambda **_: None)(**values)

    def print(self, text: str, style: str = "") -> None:
        self.printed = time.monotonic()
        try:
            self.console.print(Text(visible(text), style))
        except OSError:  # the terminal is gone
            discard_output()

    def on_plan(self) -> None:
        changing, waves = len(self.rollout.to_change), self.rollout.expected_waves
        right = sum(host.right for host in self.rollout.hosts.values())
        self.print(
            f"{n_hosts(changing)} will change in {waves} wave{'' if waves == 1 else 's'}, "
            f"{right} already right."
        )

    def on_wave(self, number: int, of: int) -> None:
        self.print(f"Wave {number} of {of}{' (the canary)' if number == 1 else ''}", "bold")

    def on_phase(self, host: Host) -> None:
        if host.wave:
            self.print(f"  {host.name}: {host.phase}")

    def on_host(self, host: Host) -> None:
        colour, sign = SIGNS[host.outcome]
        down = "" if host.down_for is None else f", down for at most {host.down_for:.0f} s"
        self.print(
            f"  {sign} {host.name}: {gpu_name(host.before)} → {gpu_name(host.after)}, {OUTCOMES[host.outcome]} "
            f"after {host.seconds(host.ended):.0f} s{down}",
            colour,
        )

    def check(self, change: list[Host], right: int, refused: list[Host], unread: Sequence[str] = ()) -> None:
        """Show what a rollout would do."""
        for host in change:
            move = f"  {host.name}: {gpu_name(host.before)} → {gpu_name(host.wanted)}"
            self.print("; ".join([move, *host.changes]))
        for host in refused:
            self.print(f"  {host.name}: would be refused", "yellow")
            self.print("\n".join(f"      {line}" for line in (host.error or "").splitlines()))
        names = ": " + ", ".join(host.name for host in refused) if refused else ""
        changing = f"{n_hosts(len(change))} {'changes' if len(change) == 1 else 'change'}"
        self.print(f"{changing}, {right} already right, {len(refused)} would be refused{names}", "bold")
        if unread:
            self.print(f"Not checked, and therefore unknown: {', '.join(unread)}", "bold red")

    def end(self, report: dict[str, Any]) -> None:
        """Show each host that has an error, then the result."""
        for host in report["hosts"]:
            if host["error"]:
                colour, sign = SIGNS[host["outcome"]]
                self.print(f"\n{sign} {host['name']}: {OUTCOMES[host['outcome']]}", f"bold {colour}")
                self.print("\n".join(f"    {line}" for line in host["error"].splitlines()))
        self.print(f"\n{report['message']}", "bold green" if report["outcome"] == "done" else "bold red")

    @contextmanager
    def shown(self) -> Iterator[None]:
        yield

    def tick(self) -> None:
        """Report that a long phase is still running; called every half second."""
        if time.monotonic() - self.printed > _REMINDER_S:
            now = datetime.now(UTC)
            for host in at_work(self.rollout):
                self.print(f"  {host.name}: {host.phase}, {host.seconds(now):.0f} s so far")


class Terminal(Lines):
    """Lines, with a live view below them."""

    def __init__(self, rollout: Rollout) -> None:
        super().__init__(rollout)
        self.started = time.monotonic()
        self.spinner = Spinner("dots")
        # Last: it renders at once.
        self.live = Live(
            console=self.console, get_renderable=self.render, refresh_per_second=4, transient=True
        )

    @contextmanager
    def shown(self) -> Iterator[None]:
        with self.live:
            yield

    def on_phase(self, host: Host) -> None:
        """Print nothing: the live view shows it."""

    def tick(self) -> None:
        """Print nothing: the live view shows the time."""

    def render(self) -> RenderableType:
        rollout, grid = self.rollout, Table.grid(padding=(0, 1))
        if not rollout.to_change:
            checked = sum(host.verdict is not None or bool(host.error) for host in rollout.hosts.values())
            progress = f"{checked} of {len(rollout.hosts)}"
            grid.add_row(self.spinner, f"Checking every host before changing the first: {progress}")
            return grid
        now = datetime.now(UTC)
        working = at_work(rollout)
        for host in working[:_LISTED]:
            move = f"{gpu_name(host.before)} → {gpu_name(host.wanted)}"
            cells = (host.name, move, host.phase, f"{host.seconds(now):4.0f} s")
            grid.add_row(self.spinner, *(Text(visible(cell)) for cell in cells))
        if len(working) > _LISTED:
            grid.add_row("", f"and {len(working) - _LISTED} more")
        done, total = sum(bool(host.ended) for host in rollout.hosts.values()), len(rollout.to_change)
        line = Table.grid(padding=(0, 1))
        line.add_row(
            ProgressBar(total=total, completed=done, width=30, complete_style="green"),
            f"{done} of {n_hosts(total)}, {time.monotonic() - self.started:.0f} s",
        )
        return Group(grid, line)


class Events(Lines):
    """One JSON object per line."""

    def print(self, text: str, style: str = "") -> None:
        """Print no lines for people."""

    @staticmethod
    def put(event: str, **values: object) -> None:
        line = {"event": event, "at": datetime.now(UTC).isoformat(), **values}
        try:
            print(json.dumps(visible_in(line)), flush=True)
        except OSError:
            discard_output()

    def on_plan(self) -> None:
        hosts = self.rollout.hosts.values()
        self.put(
            "plan",
            to_change=self.rollout.to_change,
            already_right=[host.name for host in hosts if host.right],
            waves=self.rollout.expected_waves,
        )

    def check(self, change: list[Host], right: int, refused: list[Host], unread: Sequence[str] = ()) -> None:
        """Show what a rollout would do."""
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
    """Return the hosts that are being changed."""
    return [host for host in rollout.hosts.values() if host.started and not host.ended]


def view_for(rollout: Rollout, *, as_json: bool) -> Lines:
    """Return the view that suits where the output goes."""
    if as_json:
        return Events(rollout)
    return Terminal(rollout) if sys.stdout.isatty() else Lines(rollout)
