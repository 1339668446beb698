"""Reports of roll-outs that never were: the same one for the same number of hosts."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

START = datetime(2026, 11, 22, 19, 3, 1, tzinfo=UTC)
CARDS = (
    {"index": 0, "uuid": "GPU-5090a1c4-3f0e-4b7d-9a52-6e1d70c8b2f3", "name": "NVIDIA GeForce RTX 5090"},
    {"index": 1, "uuid": "GPU-5060b7e9-81d2-4c6f-b03a-2d94f5a7c1e8", "name": "NVIDIA GeForce RTX 5060 Ti"},
)
OUTCOMES = ("changed", "already_right", "rolled_back", "failed", "unreachable", "refused", "untouched")
# How often each of them comes, but for "untouched": those are the hosts that a stop left over.
SHARES = (70, 22, 2, 2, 2, 2)
# What a host with this outcome goes through, with the seconds that it takes at least and at most.
LOOK, PULL, WRITE, START_UP, PROVE, BACK = (
    ("preflight", 1.1, 2.4),
    ("pull", 20, 140),
    ("configure", 0.6, 1.6),
    ("deploy", 1.5, 4),
    ("verify", 38, 75),
    ("rollback", 35, 60),
)
PHASES = {
    "changed": (LOOK, PULL, WRITE, START_UP, PROVE),
    "already_right": (LOOK,),
    "rolled_back": (LOOK, PULL, WRITE, START_UP, PROVE, BACK),
    "failed": (LOOK, PULL, WRITE, START_UP, PROVE, BACK),
    "unreachable": (),
    "refused": (LOOK,),
    "untouched": (),
}
ERRORS = {
    "rolled_back": (
        "The server was not ready after 300 s: the model is still loading.\n"
        "What was proven before serves again on GPU 0.\n"
        "Cure: look at 'docker logs --tail 50 vllm-server', or give it longer with vllm_gpu_start_timeout."
    ),
    "failed": (
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.90 GiB.\n"
        "The last proven server could not be put back: HAS NO PROVEN SERVER NOW.\n"
        "Cure: free the card ('nvidia-smi' names who holds it), then run this again."
    ),
    "unreachable": "Failed to connect to the host via ssh: connect to port 22: No route to host",
    "refused": (
        "gpu_device_id is 1, but this host has no such GPU.\n"
        "Cure: name one that it has: 0 (NVIDIA GeForce RTX 5090, GPU-5090a1c4-3f0e-4b7d-9a52-6e1d70c8b2f3)."
    ),
}


def stamp(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def card(index: int, number: int) -> dict[str, Any]:
    """The card of host `number`: no two hosts share one."""
    one = CARDS[index]
    return {**one, "uuid": f"{str(one['uuid'])[:-4]}{number:04x}"}


def host(number: int, outcome: str, chance: random.Random, *, digits: int) -> dict[str, Any]:
    """A host whose phases start at 0; `waves` moves them to where they belong."""
    served = outcome in {"changed", "already_right", "rolled_back"}
    before = None if outcome == "unreachable" else card(int(outcome == "already_right"), number)
    after = card(int(outcome != "rolled_back"), number) if served else None
    phases = [(name, round(chance.uniform(least, most), 1)) for name, least, most in PHASES[outcome]]
    downtime = sum(seconds for name, seconds in phases if name in {"deploy", "verify", "rollback"})
    return {
        "name": f"gpu{number:0{digits}}",
        "wave": None,
        "outcome": outcome,
        "before": before,
        "after": after,
        "verdict": "ok" if served else {"failed": "unknown", "untouched": "misplaced"}.get(outcome),
        "message": "vllm-server runs on GPU {index} ({name}, {uuid}) and on no other.".format(**after)
        if after
        else "",
        "error": ERRORS.get(outcome),
        "started_at": None,
        "ended_at": None,
        "seconds": round(sum(seconds for _name, seconds in phases), 1) if phases else None,
        "downtime_s": round(downtime, 1) if served else None,
        "phases": [{"name": name, "started_at": None, "seconds": seconds} for name, seconds in phases],
    }


def run(hosts: list[dict[str, Any]], start: datetime, forks: int) -> datetime:
    """Let `forks` hosts at a time go through their phases, and say when the last one was through."""
    free = [start] * forks
    for one in hosts:
        now = min(free)
        slot = free.index(now)
        one["started_at"] = stamp(now)
        for phase in one["phases"]:
            phase["started_at"] = stamp(now)
            now += timedelta(seconds=phase["seconds"])
        if not one["phases"]:
            now += timedelta(seconds=10)
            one["seconds"] = 10.0
        one["ended_at"] = stamp(now)
        free[slot] = now
    return max(free)


def sizes(hosts: int) -> Iterator[int]:
    """One host first, then some, then the rest."""
    yield 1
    some = (hosts - 1) // 20
    if some:
        yield some
    if hosts - 1 > some:
        yield hosts - 1 - some


def example(hosts: int) -> dict[str, Any]:
    """A report with this many hosts; from seven on every outcome is in it."""
    chance = random.Random(hosts)  # noqa: S311 - the same every time is what it is for
    left_over = hosts // 20
    outcomes = chance.choices(OUTCOMES[:-1], SHARES, k=hosts - left_over) + ["untouched"] * left_over
    outcomes[: min(len(OUTCOMES) - 1, hosts)] = OUTCOMES[: min(len(OUTCOMES) - 1, hosts)]
    if 7 <= hosts < 20:
        outcomes[-1] = "untouched"
    digits = max(2, len(str(hosts)))
    all_hosts = [host(number + 1, one, chance, digits=digits) for number, one in enumerate(outcomes)]
    # All are looked at first; those that are right already take part in no wave.
    now = run([one for one in all_hosts if one["outcome"] == "already_right"], START, forks=50)
    to_change = [one for one in all_hosts if one["outcome"] not in {"already_right", "untouched"}]
    waves = []
    for number, size in enumerate(sizes(len(to_change)), 1):
        wave, to_change = to_change[:size], to_change[size:]
        for one in wave:
            one["wave"] = number
        ended = run(wave, now, forks=min(50, max(4, size // 4)))
        waves.append(
            {
                "number": number,
                "hosts": [one["name"] for one in wave],
                "started_at": stamp(now),
                "ended_at": stamp(ended),
            }
        )
        now = ended + timedelta(seconds=3)
    counts = Counter(outcomes)
    wrong = [f"{one['name']} ({one['outcome'].replace('_', ' ')})" for one in all_hosts if one["error"]]
    outcome, message = "done", f"All {hosts} hosts are proven."
    if wrong:
        untouched = counts["untouched"]
        outcome = "failed"
        message = (
            f"Stopped in wave {len(waves)}: {', '.join(wrong[:3])} and {len(wrong) - 3} more. "
            f"{untouched} of {hosts} hosts {'was' if untouched == 1 else 'were'} not touched."
        )
    return {
        "schema": 1,
        "id": START.strftime("%Y%m%dT%H%M%SZ"),
        "outcome": outcome,
        "message": message,
        "started_at": stamp(START),
        "ended_at": stamp(now),
        "started_by": "deploy on controller",
        "inventory": "inventory/hosts.yml",
        "limit": "",
        "left_over": [],
        "request": {"gpu_device_id": "1"},
        "waves": waves,
        "hosts": all_hosts,
        "totals": {one: counts[one] for one in OUTCOMES},
    }
