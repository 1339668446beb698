"""Turn the runner's events into the report of a rollout.

Everything is decided from events and stats: which task of the role ran, what
its module returned, and what Ansible counted. No text for people is parsed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from fleet.text import without

Event = Mapping[str, Any]
# The outcomes of a host in the report, and for a person; those that need a person come first.
OUTCOMES = {
    "failed": "failed", "unreachable": "unreachable", "rolled_back": "rolled back", "refused": "refused",
    "changed": "changed", "already_right": "already right", "untouched": "untouched",
}  # fmt: skip
NOT_RIGHT = ("failed", "unreachable", "rolled_back", "refused")
CONNECTION_ADVICE = "Correct the connection to this host (ssh, become, python3), then run it again."
# The phase that each module of the collection starts. Any other module, such as the lock's, belongs to the
# current phase.
PHASE_OF = {
    "server_info": "preflight", "command": "pull", "server_files": "configure", "server_up": "deploy",
    "wait_for_server": "verify",
}  # fmt: skip


def n_hosts(count: int) -> str:
    """Return `1 host`, `2 hosts`."""
    return f"{count} host{'' if count == 1 else 's'}"


def waves_of(count: int, sizes: Iterable[object]) -> int:
    """Return how many waves Ansible's `serial` makes of `count` hosts."""
    steps = [
        max(1, int(count * float(str(size)[:-1]) / 100)) if str(size).endswith("%") else int(str(size))
        for size in sizes
    ]
    number = 0
    while count > 0 and steps:
        step = steps[min(number, len(steps) - 1)]
        count -= step if step > 0 else count  # for Ansible, 0 means all of them
        number += 1
    return number


def card_in_use(state: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the card that the server's processes hold, from what server_info read."""
    processes = state["referee"]["processes"] or []
    # The UUID may be that of a MIG instance, which is in no list of cards; the index is its card's.
    held = {process.get(key) for process in processes for key in ("gpu_uuid", "gpu_index")} - {None}
    for gpu in state["gpus"]:
        if gpu["uuid"] in held or gpu["index"] in held:
            return {key: gpu[key] for key in ("index", "uuid", "name")}
    return None


def gpu_name(gpu: Mapping[str, Any] | None) -> str:
    """Return a card for a line of text: `GPU 1`."""
    return f"GPU {gpu['index']}" if gpu else "nothing"


@dataclass
class Host:
    """What is known of one host of the rollout."""

    name: str
    wave: int | None = None
    wanted: dict[str, Any] | None = None
    before: dict[str, Any] | None = None
    after: dict[str, Any] | None = None
    verdict: str | None = None
    message: str = ""
    error: str | None = None
    started: datetime | None = None
    last_event: datetime | None = None
    ended: datetime | None = None
    down_since: datetime | None = None
    down_for: float | None = None
    phases: list[dict[str, Any]] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)
    right: bool = False
    touched: bool = False
    proven: bool = False
    verified: bool = False
    restored: bool = False
    unreachable: bool = False
    failed: bool = False

    @property
    def phase(self) -> str:
        """The current phase of the lifecycle."""
        return str(self.phases[-1]["name"]) if self.phases else ""

    @property
    def outcome(self) -> str:
        """The host's outcome in the report."""
        if self.unreachable:
            return "unreachable"
        if self.failed and not self.touched:
            return "refused"
        if self.failed:
            return "rolled_back" if self.restored else "failed"
        if self.touched:
            # Ansible may count a host as good whose change was cut off, or not yet recorded when it was killed.
            return "changed" if self.proven and (self.ended or self.verified) else "failed"
        return "already_right" if self.right else "untouched"

    def enter(self, phase: str, at: datetime) -> bool:
        """Start a phase; return False if it is the current one."""
        if phase == self.phase:
            return False
        self.leave(at)
        self.phases.append({"name": phase, "started_at": at.isoformat(), "seconds": 0.0})
        return True

    def leave(self, at: datetime) -> None:
        """End the current phase."""
        if self.phases and not self.phases[-1]["seconds"]:
            started = datetime.fromisoformat(self.phases[-1]["started_at"])
            self.phases[-1]["seconds"] = round((at - started).total_seconds(), 3)

    def seconds(self, until: datetime | None) -> float:
        """Return how long the host has been worked on."""
        return (until - self.started).total_seconds() if until and self.started else 0.0

    def report(self) -> dict[str, Any]:
        """Return the host's part of the report."""
        shown = ("name", "wave", "outcome", "before", "after", "verdict", "message", "error", "phases")
        return {
            **{name: getattr(self, name) for name in shown},
            "started_at": self.started.isoformat() if self.started else None,
            "ended_at": self.ended.isoformat() if self.ended else None,
            "seconds": round(self.seconds(self.ended), 3) if self.started and self.ended else None,
            "downtime_s": None if self.down_for is None else round(self.down_for, 3),
        }


class Rollout:
    """The state of a rollout; `feed` it the runner's events in their order.

    `notify` is called for each event that a view shows: plan, wave, phase, host.
    """

    def __init__(
        self,
        names: Iterable[str],
        header: Mapping[str, Any],
        notify: Callable[..., None] = lambda *_, **__: None,
        secrets: Iterable[str] = (),
    ) -> None:
        """Start with the names of all hosts: those never reached appear in no event."""
        self.secrets = list(secrets)
        self.hosts = {name: Host(name) for name in names}
        self.header = dict(header)
        self.notify = notify
        self.waves: list[dict[str, Any]] = []
        self.to_change: list[str] = []
        self.expected_waves = 0
        # Whether Ansible itself failed, and not a host.
        self.broken = False
        self.ended: datetime | None = None

    def feed(self, event: Event) -> None:
        """Handle one event of ansible-runner."""
        handler = getattr(self, f"_{event['event']}", None)
        if handler:
            data, at = event["event_data"], datetime.fromisoformat(event["created"])
            host = self.hosts.get(data.get("host", ""))
            if host:
                host.last_event = at
            handler(data, host, at)

    def _playbook_on_play_start(self, _data: Event, _host: Host | None, at: datetime) -> None:
        self._end_wave(at)
        # The plays after the plan are the waves.
        if self.to_change:
            self.waves.append(
                {"number": len(self.waves) + 1, "hosts": [], "started_at": at.isoformat(), "ended_at": None}
            )

    def _end_wave(self, at: datetime) -> None:
        if not self.waves or self.waves[-1]["ended_at"]:
            return
        self.waves[-1]["ended_at"] = at.isoformat()
        for host in map(self.hosts.__getitem__, self.waves[-1]["hosts"]):
            # Not the wave's end: a host that is refused has long been done.
            host.ended = host.last_event or at
            host.leave(host.ended)
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
        action = data["task_action"].rpartition(".")[2]
        phase = self._phase(action, host)
        if phase and host.enter(phase, at):
            self.notify("phase", host=host)
        if action == "server_up":
            # It may be cut off before it reports a change.
            host.touched = host.touched or bool(host.wave)
            if host.before and not host.down_since:
                host.down_since = at

    @staticmethod
    def _phase(action: str, host: Host) -> str:
        if host.phase == "rollback":
            return ""
        if action == "server_snapshot":
            # After an error, it restores what was changed.
            return "rollback" if host.error else ""
        if action == "server_info" and host.phase in ("configure", "deploy", "verify"):
            return "verify"
        return PHASE_OF.get(action, "")

    def _runner_on_ok(self, data: Event, host: Host | None, at: datetime) -> None:
        result = data.get("res") or {}
        if data["task_action"].endswith(".set_stats"):
            self._plan(result["ansible_stats"]["data"])
        if host is None:
            return
        if host.wave and result.get("changed"):
            host.touched = True
            if host.phase in ("configure", "deploy"):
                host.proven = host.verified = False  # the server that was proven is being replaced
        if "referee" in result and "proven" in result:
            self._server_read(host, result, at)

    def _server_read(self, host: Host, state: Event, at: datetime) -> None:
        host.message = without(self.secrets, state["referee"]["message"] or "")
        host.verdict = state["referee"]["verdict"]
        host.after = card_in_use(state)
        if host.wave is None:
            host.before = host.after
            host.right = bool(state["recorded"])
            # The card is shown as `before → after`, and new files add nothing.
            host.changes = [
                without(self.secrets, change)
                for change in state["changes"]
                if not (change.startswith("GPU ") or change.endswith(" is new"))
            ]
            host.wanted = state["gpu"]
        host.proven = bool(state["proven"])
        host.verified = host.proven and bool(state["recorded"]) and host.phase != "rollback"
        if host.proven and host.phase == "rollback":
            host.restored = True
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
                error += f"\n{str(result['module_stderr']).strip()}\n{CONNECTION_ADVICE}"
            host.error = without(self.secrets, error)
            host.verified = False

    def _runner_on_unreachable(self, data: Event, host: Host | None, _at: datetime) -> None:
        if host is not None:
            host.unreachable = True
            error = (data.get("res") or {}).get("msg", "It could not be reached.")
            host.error = without(self.secrets, f"{error}\n{CONNECTION_ADVICE}")

    def _playbook_on_stats(self, data: Event, _host: Host | None, at: datetime) -> None:
        for host in self.hosts.values():
            # Rescued means that something failed: such a host is no success.
            host.failed = bool(data["failures"].get(host.name) or data["rescued"].get(host.name))
            host.unreachable = host.unreachable or bool(data["dark"].get(host.name))
        self._end_wave(at)
        self.ended = at

    @property
    def totals(self) -> dict[str, int]:
        """How many hosts have each outcome."""
        counted = Counter(host.outcome for host in self.hosts.values())
        return {outcome: counted[outcome] for outcome in OUTCOMES}

    def outcome(self, *, running: bool = False, stopped: bool = False) -> str:
        """Return the outcome of the whole rollout."""
        totals = self.totals
        if running:
            return "running"
        if any(totals[outcome] for outcome in NOT_RIGHT):
            return "failed" if any(host.wave for host in self.hosts.values()) else "refused"
        if totals["untouched"] or self.broken:
            return "stopped" if stopped else "failed"
        return "done"

    def report(self, *, running: bool = False, stopped: bool = False) -> dict[str, Any]:
        """Return the report; docs/rollout-report.md explains its fields."""
        outcome = self.outcome(running=running, stopped=stopped)
        message, left_over = self.sentence(outcome), self.header.get("left_over")
        if left_over:
            message += f" Not done yet, because --limit excluded them: {', '.join(left_over)}."
        return {
            "schema": 1,
            **self.header,
            "outcome": outcome,
            "message": message,
            "ended_at": self.ended.isoformat() if self.ended else None,
            "waves": [wave for wave in self.waves if wave["hosts"]],
            "hosts": [host.report() for host in self.hosts.values()],
            "totals": self.totals,
        }

    def sentence(self, outcome: str) -> str:
        """Return the outcome in a sentence or two."""
        totals, every = self.totals, n_hosts(len(self.hosts))
        right = totals["changed"] + totals["already_right"]
        are = "is" if right == 1 else "are"
        if outcome == "done":
            which = "The host is" if right == 1 else f"All {right} hosts are"
            return f"{which} proven: {totals['changed']} changed, {totals['already_right']} already right."
        if outcome == "running":
            return f"{right} of {every} {are} proven so far."
        untouched = totals["untouched"]
        left = f"{untouched or 'None'} of {every} {'was' if untouched == 1 else 'were'} left untouched."
        if outcome == "stopped":
            return f"Stopped on request: {n_hosts(right)} {are} proven. {left}"
        bad = [host for host in self.hosts.values() if host.outcome in NOT_RIGHT]
        names = ", ".join(f"{host.name} ({OUTCOMES[host.outcome]})" for host in bad[:3])
        names += f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        if outcome == "refused":
            return f"Nothing was changed, because {len(bad)} of {every} cannot be served: {names}."
        if not bad:
            why = "It ended before every host had its turn" if untouched else "Ansible itself failed"
            return f"{why}. {left}"
        wave = max((host.wave or 0) for host in bad)
        where = "at the canary" if wave == 1 else f"in wave {wave}"
        return f"Stopped {where}: {names}. {left}"
