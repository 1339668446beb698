"""The report of a rollout in three forms: JSON for programs, HTML for people, and JUnit XML for CI.

Names and errors come from the hosts: whatever they contain stays visible text.
docs/rollout-report.md describes the fields.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree as ET

from ansible_collections.mlops.vllm_gpu.plugins.module_utils import atomic
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fleet.progress import OUTCOMES
from fleet.text import visible_in

HERE = Path(__file__).parent
PASSES = {"changed", "already_right"}
PHASES = ("preflight", "pull", "configure", "deploy", "verify", "rollback")

# Pixels: a timeline's line with a name, and all lines of a fleet that has too many hosts for names.
_LINE, _HEIGHT = 24, 1200
_STEPS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800, 86400)


def write(report: Mapping[str, Any], directory: Path) -> None:
    """Write report.json, report.html and report.xml, each completely or not at all."""
    # JSON first: it has everything that the others show.
    for name, render in (("report.json", as_json), ("report.html", as_html), ("report.xml", as_junit)):
        atomic.write(str(directory / name), render(report), 0o640)


def as_json(report: Mapping[str, Any]) -> bytes:
    """Return the form for programs."""
    return f"{json.dumps(visible_in(report), indent=1, ensure_ascii=False, allow_nan=False)}\n".encode()


def as_junit(report: Mapping[str, Any]) -> bytes:
    """Return the form for CI: every host is a test case, and a host that is not right is a failure."""
    report = visible_in(report)
    hosts = report["hosts"]
    counts = {
        "tests": str(len(hosts)),
        "failures": str(sum(host["outcome"] not in PASSES | {"untouched"} for host in hosts)),
        "errors": "0",
        "skipped": str(sum(host["outcome"] == "untouched" for host in hosts)),
        "time": f"{_seconds(report['started_at'], report['ended_at']) or 0:.3f}",
    }
    root = ET.Element("testsuites", counts)
    # The format requires a time without zone or fractions.
    about = {"name": f"rollout {report['id']}", "timestamp": report["started_at"][:19]}
    suite = ET.SubElement(root, "testsuite", {**about, **counts})
    for host in sorted(hosts, key=_by_wave):
        _test_case(suite, host)
    return (
        b'<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode").encode() + b"\n"
    )


def _test_case(suite: ET.Element, host: Mapping[str, Any]) -> None:
    wave = "no wave" if host["wave"] is None else f"wave {host['wave']}"
    about = {"classname": f"rollout.{wave}", "name": host["name"], "time": f"{host['seconds'] or 0:.3f}"}
    case = ET.SubElement(suite, "testcase", about)
    error = host["error"] or host["message"] or OUTCOMES[host["outcome"]]
    message = error.partition("\n")[0]
    if host["outcome"] == "untouched":
        ET.SubElement(case, "skipped", {"message": message})
    elif host["outcome"] not in PASSES:
        ET.SubElement(case, "failure", {"type": host["outcome"], "message": message}).text = error
    if host["message"]:
        ET.SubElement(case, "system-out").text = host["message"]


class Segment(NamedTuple):
    """A part of a bar, in percent of its axis."""

    phase: str
    x: str
    width: str


class Bar(NamedTuple):
    """A host in the timeline of its wave."""

    host: Mapping[str, Any]
    title: str
    y: int
    height: int
    segments: list[Segment]


class Timeline(NamedTuple):
    """The picture of a wave."""

    wave: Mapping[str, Any]
    counts: list[tuple[str, int]]
    named: bool
    bars: list[Bar]
    height: int
    ticks: list[tuple[str, str]]


def as_html(report: Mapping[str, Any]) -> bytes:
    """Return the form for people: one page that loads nothing else."""
    report = visible_in(report)
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(duration=duration, moment=moment, model=model)
    # They contain no text of the report, so the page's policy can allow them by their hashes.
    style, script = (
        Markup((HERE / name).read_text(encoding="utf-8"))  # noqa: S704 - our own
        for name in ("report.css", "report.js")
    )
    counts = Counter(host["outcome"] for host in report["hosts"])
    timelines = list(_timelines(report))
    drawn = {part.phase for timeline in timelines for row in timeline.bars for part in row.segments}
    down = [host for host in report["hosts"] if host["downtime_s"]]
    page = environment.get_template("report.html.j2").render(
        report=report,
        hosts=sorted(report["hosts"], key=_by_need),
        totals=[(outcome, word, counts[outcome]) for outcome, word in OUTCOMES.items()],
        shares=list(_shares(counts)),
        right=sum(counts[outcome] for outcome in PASSES),
        words=OUTCOMES,
        ranks={outcome: rank for rank, outcome in enumerate(OUTCOMES)},
        longest=max(down, key=lambda host: host["downtime_s"], default=None),
        took=_seconds(report["started_at"], report["ended_at"]),
        phases=[name for name in (*PHASES, "other") if name in drawn],
        timelines=timelines,
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
    )
    return page.encode()


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _time(text: str | None) -> datetime | None:
    try:
        time = datetime.fromisoformat(text or "")
    except ValueError:
        return None
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _seconds(start: str | None, end: str | None) -> float | None:
    first, last = _time(start), _time(end)
    return (last - first).total_seconds() if first and last else None


def duration(seconds: float | None) -> str:
    """Return `12.3 s`, `4 min 05 s` or `1 h 02 min`."""
    if seconds is None:
        return ""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s" if seconds else "0 s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def moment(text: str | None, form: str = "%Y-%m-%d %H:%M:%S") -> str:
    """Return a time for a person, in UTC; other text stays as it is."""
    time = _time(text)
    return time.astimezone(UTC).strftime(form) if time else text or ""


def model(card: Mapping[str, Any]) -> str:
    """Return a card's name without the vendor."""
    return str(card["name"]).removeprefix("NVIDIA ").removeprefix("GeForce ")


def _natural(name: str) -> str:
    """Sort gpu2 before gpu10."""
    return re.sub("[0-9]+", lambda number: number[0].zfill(12), name)


def _by_wave(host: Mapping[str, Any]) -> tuple[float, str]:
    return (float("inf") if host["wave"] is None else host["wave"], _natural(host["name"]))


def _by_need(host: Mapping[str, Any]) -> tuple[int, tuple[float, str]]:
    return (list(OUTCOMES).index(host["outcome"]), _by_wave(host))


def _by_start(host: Mapping[str, Any]) -> tuple[int, float, str]:
    time = _time(host["started_at"])
    start = time.timestamp() if time else float("inf")
    return (list(OUTCOMES).index(host["outcome"]), start, _natural(host["name"]))


def _shares(counts: Mapping[str, int]) -> Iterable[Segment]:
    """Yield the outcomes as the parts of one bar."""
    x = 0.0
    for outcome in OUTCOMES:
        width = 100 * counts[outcome] / (sum(counts.values()) or 1)
        if width:
            yield Segment(outcome, f"{x:.2f}%", f"{width:.2f}%")
        x += width


def _timelines(report: Mapping[str, Any]) -> Iterable[Timeline]:
    by_wave: dict[int, list[Mapping[str, Any]]] = {}
    for host in sorted(report["hosts"], key=_by_start):
        by_wave.setdefault(host["wave"], []).append(host)
    total = sum(len(hosts) for wave, hosts in by_wave.items() if wave is not None) or 1
    names = 40 if total <= 200 else 5
    for wave in report["waves"]:
        hosts = by_wave.get(wave["number"], [])
        # A small wave of a large fleet may take a little more than its share.
        thin = max(1, min(8, max(_HEIGHT // total, 80 // (len(hosts) or 1))))
        yield _timeline(wave, hosts, thin if len(hosts) > names else _LINE)


def _timeline(wave: Mapping[str, Any], hosts: list[Mapping[str, Any]], line: int) -> Timeline:
    parts = {host["name"]: list(_parts(host)) for host in hosts}
    known = [part for host_parts in parts.values() for part in host_parts]
    begin = _time(wave["started_at"]) or min((start for _name, start, _end in known), default=None)
    # A running wave extends to the last time that is known of it.
    ends = [end for _name, _start, end in known]
    end = max([*ends, *filter(None, [_time(wave["ended_at"])])], default=begin)
    span = max((end - begin).total_seconds() if begin and end else 0, 1)
    bars, y = [], 0
    for host in hosts:
        # Among bars of a pixel or two, those that need a person must stay visible.
        height = line if host["outcome"] in PASSES else max(line, 3)
        # Each part extends a little below the next one, so that rounding leaves no gap.
        segments = [
            Segment(
                name,
                x=f"{100 * (start - begin).total_seconds() / span:.2f}%",
                width=f"{100 * (last - start).total_seconds() / span + 0.15:.2f}%",
            )
            for name, start, last in parts[host["name"]]
            if begin
        ]
        bars.append(Bar(host, _bar_title(host), y, height, segments))
        y += height
    counts = Counter(host["outcome"] for host in hosts)
    words = [(word, counts[outcome]) for outcome, word in OUTCOMES.items() if counts[outcome]]
    return Timeline(wave, words, line == _LINE, bars, y, list(_ticks(span)))


def _parts(host: Mapping[str, Any]) -> Iterable[tuple[str, datetime, datetime]]:
    """Yield the phases of a host; without any, its start and end."""
    for phase in host["phases"]:
        start = _time(phase["started_at"])
        if start:
            name = phase["name"] if phase["name"] in PHASES else "other"
            yield name, start, start + timedelta(seconds=phase["seconds"])
    start, end = _time(host["started_at"]), _time(host["ended_at"])
    if start and end and not host["phases"]:
        yield "other", start, end


def _bar_title(host: Mapping[str, Any]) -> str:
    phases = ", ".join(f"{phase['name']} {duration(phase['seconds'])}" for phase in host["phases"])
    total = f" in {duration(host['seconds'])}" if host["seconds"] is not None else ""
    return f"{host['name']}: {OUTCOMES[host['outcome']]}{total}{phases and f' ({phases})'}"


def _ticks(span: float) -> Iterable[tuple[str, str]]:
    """Yield the place and text of each line of the axis: at most eight."""
    step = next((step for step in _STEPS if span / step <= 7), _STEPS[-1])
    for seconds in range(0, int(span) + 1, step):
        minutes, rest = divmod(seconds, 60)
        hours, minutes = divmod(minutes, 60)
        text = f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
        yield f"{100 * seconds / span:.2f}%", text
