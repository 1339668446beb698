"""Example rollouts: the same events, and the same report, each time for the same number of hosts."""

from __future__ import annotations

import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

from fleet.progress import PHASE_OF, Rollout

START = datetime(2026, 11, 22, 19, 3, 1, tzinfo=UTC)
CARDS = (
    {"index": 0, "uuid": "GPU-5090a1c4-3f0e-4b7d-9a52-6e1d70c8b2f3", "name": "NVIDIA GeForce RTX 5090"},
    {"index": 1, "uuid": "GPU-5060b7e9-81d2-4c6f-b03a-2d94f5a7c1e8", "name": "NVIDIA GeForce RTX 5060 Ti"},
)
OUTCOMES = ("changed", "already_right", "rolled_back", "failed", "unreachable", "refused", "untouched")
# The frequency of each outcome but "untouched", which a stop leaves at the end.
SHARES = (70, 22, 2, 2, 2, 2)
# The shortest and the longest time of each phase.
SECONDS = {
    "preflight": (1.1, 2.4), "pull": (20, 140), "configure": (0.6, 1.6), "deploy": (1.5, 4), "verify": (38, 75),
    "rollback": (35, 60),
}  # fmt: skip
ACTIONS = {phase: action for action, phase in PHASE_OF.items()} | {"rollback": "server_snapshot"}
ERRORS = {
    "rolled_back": (
        "The server was not ready after 300 s: the model is still loading.\n"
        "What was proven before serves again on GPU 0.\n"
        "Cure: read 'docker logs --tail 50 vllm-server', or give it longer with vllm_gpu_start_timeout."
    ),
    "failed": (
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.90 GiB.\n"
        "The last proven server could not be restored: NO PROVEN SERVER IS RUNNING.\n"
        "Cure: free the card ('nvidia-smi' names who holds it), then run this again."
    ),
    "unreachable": "Failed to connect to the host via ssh: connect to port 22: No route to host",
    "refused": (
        "gpu_device_id is 1, but this host has no such GPU.\n"
        "Cure: name one that it has: 0 (NVIDIA GeForce RTX 5090, GPU-5090a1c4-3f0e-4b7d-9a52-6e1d70c8b2f3)."
    ),
}


Event = dict[str, Any]


def event(name: str, at: datetime, **data: Any) -> Event:  # noqa: ANN401
    return {"event": name, "created": at.isoformat(timespec="microseconds"), "event_data": data}


def task(
    host: str, action: str, at: datetime, seconds: float, end: str = "ok", **result: Any  # noqa: ANN401
) -> list[Event]:  # fmt: skip
    data = {"host": host, "task_action": f"mlops.vllm_gpu.{action}"}
    ended = event(f"runner_on_{end}", at + timedelta(seconds=seconds), **data, res=result)
    return [event("runner_on_start", at, **data), ended]


def state(number: int, on: int | None, *, verdict: str = "ok", recorded: bool = False) -> dict[str, Any]:
    """Return what server_info reads on host `number`; no two hosts share a card."""
    gpus = [{**card, "uuid": f"{str(card['uuid'])[:-4]}{number:04x}"} for card in CARDS]
    held = [] if on is None else [{"gpu_uuid": gpus[on]["uuid"]}]
    message = "vllm-server runs on GPU {index} ({name}, {uuid}) and on no other."
    message = "" if on is None else message.format(**gpus[on])
    return {
        "referee": {"processes": held, "message": message, "verdict": verdict}, "gpus": gpus, "gpu": gpus[1],
        "changes": [], "proven": verdict == "ok", "recorded": recorded,
    }  # fmt: skip


def change(host: str, number: int, outcome: str, at: datetime, chance: random.Random) -> Iterator[Event]:
    """Yield the events of a host in its wave."""
    if outcome == "unreachable":
        yield from task(host, "host_lock", at, 10, "unreachable", msg=ERRORS[outcome])
        return
    if outcome == "refused":
        yield from task(host, "server_info", at, 2, "failed", msg=ERRORS[outcome])
        return
    good = outcome == "changed"
    after = state(number, 0) if outcome == "rolled_back" else state(number, None, verdict="unknown")
    results = {"verify": state(number, 1) if good else {}, "rollback": after}
    for phase, action in ACTIONS.items():
        if phase == "rollback" and good:
            return
        seconds = chance.uniform(*SECONDS[phase])
        end = "failed" if phase == "verify" and not good else "ok"
        yield from task(host, action, at, seconds, end, **results.get(phase, {}))
        at += timedelta(seconds=seconds)
    yield from task(host, "fail", at, 0, "failed", msg=ERRORS[outcome])


def plan(hosts: int, chance: random.Random, kinds: tuple[str, ...]) -> dict[str, str]:
    """Return the hosts with their outcomes; from seven hosts on, every outcome occurs."""
    left_over = hosts // 20
    outcomes = chance.choices(OUTCOMES[:-1], SHARES, k=hosts - left_over) + ["untouched"] * left_over
    outcomes[: min(len(OUTCOMES) - 1, hosts)] = OUTCOMES[: min(len(OUTCOMES) - 1, hosts)]
    if 7 <= hosts < 20:
        outcomes[-1] = "untouched"
    digits = max(2, len(str(hosts)))
    return {
        f"gpu{number:0{digits}}": outcome if outcome in kinds else "changed"
        for number, outcome in enumerate(outcomes, 1)
    }


def events(hosts: int, kinds: tuple[str, ...] = OUTCOMES) -> Iterator[Event]:
    """Yield the events in their order; an outcome that is not one of `kinds` becomes "changed"."""
    chance = random.Random(hosts)  # noqa: S311 - the same each time is its purpose
    planned = plan(hosts, chance, kinds)
    numbers = {host: number for number, host in enumerate(planned, 1)}
    yield event("playbook_on_play_start", START)
    for host, outcome in planned.items():
        right = outcome == "already_right"
        read = state(numbers[host], int(right), verdict="ok" if right else "misplaced", recorded=right)
        yield from task(host, "server_info", START, 2, **read)
    to_change = [host for host, outcome in planned.items() if outcome not in ("already_right", "untouched")]
    # One host first, then some, then the rest.
    some = (len(to_change) - 1) // 20
    waves = list(filter(None, (1, some, len(to_change) - 1 - some)))
    stats = {"data": {"vllm_gpu_rollout": {"to_change": to_change, "waves": waves}}}
    now = START + timedelta(seconds=3)
    yield from task("gpu01", "set_stats", now, 0, ansible_stats=stats)
    for size in waves:
        yield event("playbook_on_play_start", now)
        found: list[Event] = []
        for place, host in enumerate(to_change[:size]):
            started = now + timedelta(seconds=place / 5)
            found += change(host, numbers[host], planned[host], started, chance)
        found.sort(key=lambda each: str(each["created"]))
        yield from found
        to_change = to_change[size:]
        now = datetime.fromisoformat(found[-1]["created"])
    failed = {host: 1 for host, outcome in planned.items() if outcome in ("failed", "rolled_back", "refused")}
    yield event("playbook_on_stats", now, failures=failed, rescued={}, dark={})


def rollout(hosts: int) -> Rollout:
    """Return a rollout before its first event."""
    header = {
        "id": START.strftime("%Y%m%dT%H%M%SZ"), "started_at": START.isoformat(), "started_by": "deploy on controller",
        "inventory": "inventory/hosts.yml", "limit": "", "wave": None, "request": {"gpu_device_id": "1"},
        "files": list[str](), "left_over": list[str](),
    }  # fmt: skip
    return Rollout(plan(hosts, random.Random(hosts), OUTCOMES), header)  # noqa: S311


def example(hosts: int) -> dict[str, Any]:
    """Return the report of these events."""
    found = rollout(hosts)
    for each in events(hosts):
        found.feed(each)
    return found.report()
