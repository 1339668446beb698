"""Fold the runner's events into the report of a roll-out.

Everything is decided from events and stats: which task of the role ran, what
its module returned, and what Ansible counted. No text that is meant for people
is ever read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import PurePath
from typing import Any

from fleet.text import without

Event = Mapping[str, Any]
# How the pattern of playbooks/rollout.yml's waves ends.
CHANGING = "&vllm_gpu_to_change"
# The outcomes of a host in the report, and for a person; what needs a person comes first.
OUTCOMES = {
    "failed": "failed", "unreachable": "unreachable", "rolled_back": "rolled back", "refused": "refused",
    "changed": "changed", "already_right": "already right", "untouched": "untouched",
}  # fmt: skip
WAY = "Mend the way to this host (ssh, become, python3), and run it again."
# The task files of the role, by the phase of the lifecycle that they are. Those
# that are missing here, as the lock's, belong to whatever phase goes on.
PHASES = {
    "preflight": "preflight", "plan": "preflight", "remember": "preflight", "keep": "preflight",
    "pull": "pull",
    "configure": "configure",
    "deploy": "deploy",
    "verify": "verify",
    "restore": "rollback", "start_proven": "rollback",
}  # fmt: skip


def n_hosts(count: int) -> str:
    """Say how many hosts."""
    return f"{count} host{'' if count == 1 else 's'}"


def waves_of(count: int, sizes: Iterable[object]) -> int:
    """Return how many waves Ansible's `serial` makes of `count` hosts."""
    steps = [
        max(1, int(count * float(str(one)[:-1]) / 100)) if str(one).endswith("%") else int(str(one))
        for one in sizes
    ]
    number = 0
    while count > 0 and steps:
        step = steps[min(number, len(steps) - 1)]
        count -= step if step > 0 else count  # 0 is all of them, for Ansible
        number += 1
    return number


def card_in_use(look: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the card that the server's processes hold by a look at the host, or None."""
    processes = look["referee"]["processes"] or []
    # The UUID may be that of a MIG instance, which is in no list of cards; the index is its card's.
    held = {process.get(key) for process in processes for key in ("gpu_uuid", "gpu_index")} - {None}
    for gpu in look["gpus"]:
        if gpu["uuid"] in held or gpu["index"] in held:
            return {key: gpu[key] for key in ("index", "uuid", "name")}
    return None


def short(gpu: Mapping[str, Any] | None) -> str:
    """Return a card for a line of text: `GPU 1`."""
    return f"GPU {gpu['index']}" if gpu else "nothing"


@dataclass
class Host:
    """One host of the roll-out, as far as it is known."""

    name: str
    wave: int | None = None
    wanted: dict[str, Any] | None = None
    before: dict[str, Any] | None = None
    after: dict[str, Any] | None = None
    verdict: str | None = None
    message: str = ""
    error: str | None = None
    started: datetime | None = None
    ended: datetime | None = None
    down_since: datetime | None = None
    down_for: float | None = None
    phases: list[dict[str, Any]] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)
    right: bool = False
    touched: bool = False
    proven: bool = False
    verified: bool = False
    back: bool = False
    lost: bool = False
    failed: bool = False

    @property
    def phase(self) -> str:
        """The phase of the lifecycle that it is in."""
        return str(self.phases[-1]["name"]) if self.phases else ""

    @property
    def outcome(self) -> str:
        """What became of it, in the report's words."""
        if self.lost:
            return "unreachable"
        if self.failed and not self.touched:
            return "refused"
        if self.failed:
            return "rolled_back" if self.back else "failed"
        if self.touched:
            # A host whose change was cut off is no success, whatever Ansible counted; nor is one that was
            # about to be recorded when Ansible was killed.
            return "changed" if self.proven and (self.ended or self.verified) else "failed"
        return "already_right" if self.right else "untouched"

    def enter(self, phase: str, at: datetime) -> bool:
        """Note that a phase begins; False where it goes on."""
        if phase == self.phase:
            return False
        self.leave(at)
        self.phases.append({"name": phase, "started_at": at.isoformat(), "seconds": 0.0})
        return True

    def leave(self, at: datetime) -> None:
        """Note that its phase has ended."""
        if self.phases and not self.phases[-1]["seconds"]:
            begun = datetime.fromisoformat(self.phases[-1]["started_at"])
            self.phases[-1]["seconds"] = round((at - begun).total_seconds(), 3)

    def report(self) -> dict[str, Any]:
        """Return what the report says of it."""
        seconds = (self.ended - self.started).total_seconds() if self.started and self.ended else None
        return {
            "name": self.name,
            "wave": self.wave,
            "outcome": self.outcome,
            "before": self.before,
            "after": self.after,
            "verdict": self.verdict,
            "message": self.message,
            "error": self.error,
            "started_at": self.started.isoformat() if self.started else None,
            "ended_at": self.ended.isoformat() if self.ended else None,
            "seconds": None if seconds is None else round(seconds, 3),
            "downtime_s": None if self.down_for is None else round(self.down_for, 3),
            "phases": self.phases,
        }


class Rollout:
    """The state of a roll-out; `feed` it the runner's events in their order.

    `notify` is called with a word and values for whoever shows the progress:
    plan, wave, phase, host.
    """

    def __init__(
        self,
        names: Iterable[str],
        header: Mapping[str, Any],
        notify: Callable[..., None] = lambda *_, **__: None,
        secrets: Iterable[str] = (),
    ) -> None:
        """Begin with the hosts that are asked for: those never reached appear in no event."""
        self.secrets = list(secrets)
        self.hosts = {name: Host(name) for name in names}
        self.header = dict(header)
        self.notify = notify
        self.waves: list[dict[str, Any]] = []
        self.to_change: list[str] = []
        self.expected_waves = 0
        # Whether Ansible ended with an error that is none of a host's.
        self.broken = False
        self.ended: datetime | None = None

    def feed(self, event: Event) -> None:
        """Take one event of ansible-runner."""
        handler = getattr(self, f"_{event['event']}", None)
        if handler:
            data = event["event_data"]
            handler(data, self.hosts.get(data.get("host", "")), datetime.fromisoformat(event["created"]))

    def _playbook_on_play_start(self, data: Event, _host: Host | None, at: datetime) -> None:
        self._end_wave(at)
        if data["play_pattern"].endswith(CHANGING) and self.to_change:
            self.waves.append(
                {"number": len(self.waves) + 1, "hosts": [], "started_at": at.isoformat(), "ended_at": None}
            )

    def _end_wave(self, at: datetime) -> None:
        if self.waves and not self.waves[-1]["ended_at"]:
            self.waves[-1]["ended_at"] = at.isoformat()
            for name in self.waves[-1]["hosts"]:
                self._end_host(self.hosts[name], at)

    def _end_host(self, host: Host, at: datetime) -> None:
        if host.started and not host.ended:
            host.leave(at)
            host.ended = at
            self.notify("host", host=host)

    def _runner_on_start(self, data: Event, host: Host | None, at: datetime) -> None:
        if host is None:
            return
        if self.waves and host.wave is None:
            wave = self.waves[-1]
            if not wave["hosts"]:
                self.notify("wave", number=wave["number"], of=max(self.expected_waves, wave["number"]))
            wave["hosts"].append(host.name)
            host.wave, host.started, host.phases = wave["number"], at, []
        phase = self._phase(data, host)
        if phase and host.enter(phase, at):
            self.notify("phase", host=host)
        if data["task_action"].endswith(".server_up"):
            # It may be cut off before it can say what it changed.
            host.touched = host.touched or bool(host.wave)
            if host.before and not host.down_since:
                host.down_since = at

    @staticmethod
    def _phase(data: Event, host: Host) -> str:
        path = PurePath(data.get("task_path", "").rpartition(":")[0])
        if path.parent.name != "tasks":
            return ""
        phase = PHASES.get(path.stem, "")
        if phase == "deploy" and data["task_action"].endswith(".wait_for_server"):
            return "verify"
        # The same files serve a change and the way back from it.
        return "rollback" if host.phase == "rollback" and phase != "verify" and phase else phase

    def _runner_on_ok(self, data: Event, host: Host | None, at: datetime) -> None:
        result = data.get("res") or {}
        if data["task_action"].endswith(".set_stats"):
            self._plan(result["ansible_stats"]["data"])
        if host is None:
            return
        if host.wave and result.get("changed"):
            host.touched = True
            if host.phase in ("configure", "deploy"):
                host.proven = host.verified = False  # what was proven until now is being replaced
        if "referee" in result and "proven" in result:
            self._look(host, result, at)

    def _look(self, host: Host, look: Event, at: datetime) -> None:
        host.message = without(self.secrets, look["referee"]["message"] or "")
        host.verdict = look["referee"]["verdict"]
        if host.wave is None:
            host.before = card_in_use(look)
            host.right = bool(look["recorded"])
            # The card is told as `before → after`, and new files say nothing more.
            host.changes = [
                without(self.secrets, one)
                for one in look["changes"]
                if not (one.startswith("GPU ") or one.endswith(" is new"))
            ]
            host.wanted = look["gpu"]
        host.after = card_in_use(look)
        host.proven = bool(look["proven"])
        host.verified = host.proven and bool(look["recorded"]) and host.phase != "rollback"
        if host.proven and host.phase == "rollback":
            host.back = True
        if host.proven and host.down_since and host.down_for is None:
            host.down_for = (at - host.down_since).total_seconds()

    def _plan(self, stats: Event) -> None:
        plan = stats["vllm_gpu_rollout"]
        self.to_change = list(plan["to_change"])
        self.expected_waves = waves_of(len(self.to_change), plan["waves"])
        self.notify("plan")

    def _runner_on_failed(self, data: Event, host: Host | None, _at: datetime) -> None:
        if host is not None:
            result = data.get("res") or {}
            error = str(result.get("msg") or result.get("stderr") or "It failed without a message.")
            if result.get("module_stderr"):  # no module ran: sudo is missing, or Python
                error += f"\n{str(result['module_stderr']).strip()}\n{WAY}"
            host.error = without(self.secrets, error)
            host.verified = False

    def _runner_on_unreachable(self, data: Event, host: Host | None, _at: datetime) -> None:
        if host is not None:
            host.lost = True
            error = (data.get("res") or {}).get("msg", "It could not be reached.")
            host.error = without(self.secrets, f"{error}\n{WAY}")

    def _playbook_on_stats(self, data: Event, _host: Host | None, at: datetime) -> None:
        for host in self.hosts.values():
            # Rescued means that something failed: such a host is no success.
            host.failed = bool(data["failures"].get(host.name) or data["rescued"].get(host.name))
            host.lost = host.lost or bool(data["dark"].get(host.name))
        self._end_wave(at)
        self.ended = at

    @property
    def totals(self) -> dict[str, int]:
        """How many hosts there are of each outcome."""
        counted = Counter(host.outcome for host in self.hosts.values())
        return {outcome: counted[outcome] for outcome in OUTCOMES}

    def outcome(self, *, running: bool = False, stopped: bool = False) -> str:
        """What became of the whole roll-out, in the report's words."""
        totals = self.totals
        if running:
            return "running"
        if any(totals[one] for one in ("failed", "rolled_back", "refused", "unreachable")):
            return "failed" if any(host.wave for host in self.hosts.values()) else "refused"
        if totals["untouched"] or self.broken:
            return "stopped" if stopped else "failed"
        return "done"

    def report(self, *, running: bool = False, stopped: bool = False) -> dict[str, Any]:
        """Return the report as it stands; docs/rollout-report.md explains its fields."""
        outcome = self.outcome(running=running, stopped=stopped)
        return {
            "schema": 1,
            **self.header,
            "outcome": outcome,
            "message": self.sentence(outcome) + self.rest(),
            "ended_at": self.ended.isoformat() if self.ended else None,
            "waves": [wave for wave in self.waves if wave["hosts"]],
            "hosts": [host.report() for host in self.hosts.values()],
            "totals": self.totals,
        }

    def rest(self) -> str:
        """Say which hosts of the roll-out that this one resumes were left out of it."""
        names = self.header.get("left_over")
        return f" Not done yet, as --limit left them out: {', '.join(names)}." if names else ""

    def sentence(self, outcome: str) -> str:
        """Say in a sentence or two what became of it."""
        totals = self.totals
        right = totals["changed"] + totals["already_right"]
        lost = [
            h for h in self.hosts.values() if h.outcome in ("failed", "rolled_back", "refused", "unreachable")
        ]
        who = ", ".join(f"{host.name} ({OUTCOMES[host.outcome]})" for host in lost[:3])
        who += f" and {len(lost) - 3} others" if len(lost) > 3 else ""
        untouched = totals["untouched"]
        left = f"{untouched or 'None'} of {n_hosts(len(self.hosts))} {'is' if untouched == 1 else 'are'} left untouched."
        if outcome == "done":
            what = "The host is" if right == 1 else f"All {right} hosts are"
            return (
                f"{what} proven: {totals['changed']} changed, {totals['already_right']} were right already."
            )
        if outcome == "refused":
            return (
                f"Nothing was touched, as {len(lost)} of {n_hosts(len(self.hosts))} can't be served: {who}."
            )
        if outcome == "running":
            return f"{right} of {n_hosts(len(self.hosts))} {'is' if right == 1 else 'are'} proven so far."
        if outcome == "stopped":
            return f"Stopped as asked: {n_hosts(right)} {'is' if right == 1 else 'are'} proven. {left}"
        if not lost:
            early = (
                "It ended before all hosts had their turn."
                if untouched
                else "Ansible itself ended with an error."
            )
            return f"{early} {left}"
        wave = max((host.wave or 0) for host in lost)
        where = "at the canary" if wave == 1 else f"in wave {wave}"
        return f"Stopped {where}: {who}. {left}"
