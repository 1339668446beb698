"""The three forms of a rollout's report, whatever text the hosts put into it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import stat
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from fleet import report as reports
from fleet.text import visible_in

from tests.example_report import OUTCOMES, example

ROOT = Path(__file__).resolve().parents[2]
# Text that a host can put into a name, an error, or the name of a card.
MARKUP = """<script>alert(1)</script><img src=x onerror=alert(1)>"' --></style></title>]]>&amp;{{ 7 * 7 }}"""
CONTROL = "\x00\x08\x1b[31m\x7f\x9b\u202e\ud800\ufffe"
WRITTEN_OUT = r"\x00\x08\x1b[31m\x7f\x9b\u202e\ud800\ufffe"
READABLE = "Größe 東京 🚀 a\u2028b"
HOSTILE = MARKUP + CONTROL + READABLE
SEEN = MARKUP + WRITTEN_OUT + READABLE


class Page(HTMLParser):
    """The elements of a page, and the text of each."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.text.setdefault(tag, []).append("")
        if tag not in {"meta", "link", "input", "col", "wbr", "br"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.text[tag][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(report: dict[str, Any]) -> Page:
    return Page(reports.as_html(report).decode())


def spoiled(value: Any, key: str = "") -> Any:  # noqa: ANN401
    """The same report with hostile text at the end of every text in it."""
    if isinstance(value, dict):
        suffix = HOSTILE if key == "request" else ""
        return {f"{name}{suffix}": spoiled(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [spoiled(inner, key) for inner in value]
    return value + HOSTILE if isinstance(value, str) and key != "outcome" else value


def test_a_file_is_replaced_completely_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reports.write(example(3), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert before.keys() == {"report.json", "report.html", "report.xml"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o640}

    def no_space(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", no_space)
    with pytest.raises(OSError, match="No space left"):
        reports.write(example(60), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_json_is_the_report() -> None:
    assert json.loads(reports.as_json(example(60))) == example(60)


def junit(report: dict[str, Any]) -> ET.Element:
    return ET.fromstring(reports.as_junit(report))  # noqa: S314 - our own


def test_junit_has_a_case_for_each_host() -> None:
    report = example(60)
    root = junit(report)
    cases = {case.get("name"): case for case in root.iter("testcase")}
    assert len(cases) == len(report["hosts"])
    for host in report["hosts"]:
        case = cases[host["name"]]
        failure, skipped = case.find("failure"), case.find("skipped")
        wave = f"wave {host['wave']}" if host["wave"] else "no wave"
        expected = (f"rollout.{wave}", host["seconds"] or 0)
        assert (case.get("classname"), float(case.get("time", ""))) == expected
        assert (skipped is not None) == (host["outcome"] == "untouched")
        assert (failure is not None) == (
            host["outcome"] in {"failed", "rolled_back", "unreachable", "refused"}
        )
        if failure is not None:
            assert failure.text == host["error"]
            assert failure.attrib == {"type": host["outcome"], "message": host["error"].split("\n")[0]}
    totals = report["totals"]
    failures = 60 - totals["changed"] - totals["already_right"] - totals["untouched"]
    for element in (root, *root.iter("testsuite")):
        counts = [element.get(name) for name in ("tests", "skipped", "failures")]
        assert counts == ["60", str(totals["untouched"]), str(failures)]


def test_hostile_text_stays_text_in_html() -> None:
    clean, page = page_of(example(12)), page_of(spoiled(example(12)))
    content = reports.as_html(spoiled(example(12))).decode()
    # It opens and closes nothing.
    assert {tag for tag, _ in page.elements} <= {tag for tag, _ in clean.elements}
    for tag in ("script", "style", "meta", "link", "section", "table", "tr", "td", "th", "h1", "h2", "h3"):
        assert len(page.all(tag)) == len(clean.all(tag)), tag
    assert page.text["script"] == clean.text["script"]
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    # Readable text stays as it was sent; the rest is written out.
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\ufffe]", content)
    host = example(12)["hosts"][0]
    rows = " ".join(page.text["tr"])
    for text in (host["name"], host["after"]["uuid"], host["verdict"], host["message"]):
        assert text + SEEN in rows
    assert SEEN in page.text["header"][0]
    in_waves = {f"{host['name']}{SEEN}" for host in example(12)["hosts"] if host["wave"]}
    assert {bar["data-host"] for bar in page.all("g")} == in_waves


def test_hostile_text_stays_text_in_json_and_xml() -> None:
    report = spoiled(example(12))
    content = reports.as_json(report)
    assert json.loads(content) == visible_in(report)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]|\\u00", content.decode())
    assert READABLE.encode() in content
    root = junit(report)
    names = [case.get("name") for case in root.iter("testcase")]
    assert sorted(map(str, names)) == sorted(f"{host['name']}{SEEN}" for host in example(12)["hosts"])
    assert all(str(failure.text).endswith(SEEN) for failure in root.iter("failure"))


def test_the_policy_allows_only_our_style_and_script() -> None:
    page = page_of(spoiled(example(12)))
    (policy,) = (meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    for tag in ("style", "script"):
        (text,) = page.text[tag]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}';" in str(policy)
    assert str(policy).startswith("default-src 'none';")
    assert "unsafe" not in str(policy)
    for tag, attributes in page.elements:
        assert "style" not in attributes, tag
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            assert not re.match(r"(https?:)?//", attributes.get(name) or ""), (tag, attributes)


def rows(report: dict[str, Any]) -> list[str]:
    """The names in the table, from the top."""
    return [text.split()[0] for text in page_of(report).text["tr"][1:]]


def test_hosts_that_need_a_person_come_first() -> None:
    report = example(60)
    outcome = {host["name"]: host["outcome"] for host in report["hosts"]}
    names = rows(report)
    assert sorted(names) == sorted(outcome)
    order = ("failed", "unreachable", "rolled_back", "refused", "changed", "already_right", "untouched")
    assert [outcome[name] for name in names] == sorted(outcome.values(), key=order.index)
    # Within an outcome by wave.
    changed = [host["name"] for host in report["hosts"] if host["outcome"] == "changed"]
    assert [name for name in names if outcome[name] == "changed"] == changed


def test_names_are_sorted_by_their_numbers() -> None:
    report = example(12)
    for host in report["hosts"]:
        host.update(name=f"gpu{int(host['name'][3:])}", outcome="untouched", wave=None)
    assert rows(report) == [f"gpu{number}" for number in range(1, 13)]


def test_every_outcome_has_its_own_headline_and_sign() -> None:
    signs = set()
    for outcome in ("done", "stopped", "failed", "refused", "running"):
        page = page_of({**example(3), "outcome": outcome})
        assert outcome in page.text["h1"][0]
        used = [str(use["href"])[1:] for use in page.all("use")]
        assert set(used) <= {symbol["id"] for symbol in page.all("symbol")}
        signs.add(used[0])
    assert len(signs) == 5


def test_a_running_rollout_and_one_without_hosts() -> None:
    report = example(12)
    report.update(outcome="running", ended_at=None)
    report["waves"][-1]["ended_at"] = None
    for host in report["hosts"][6:]:
        host.update(outcome="untouched", ended_at=None, seconds=None, phases=host["phases"][:1])
    report["waves"].append({"number": 4, "hosts": [], "started_at": None, "ended_at": None})
    assert "Ended" not in page_of(report).text["dt"]
    refused = {**example(1), "outcome": "refused", "hosts": [], "waves": []}
    page = page_of(refused)
    assert not page.all("table") + page.all("script")
    assert junit(refused).get("tests") == "0"


@pytest.mark.parametrize(("hosts", "tallest"), [(3, 200), (60, 800), (1000, 1600)])
def test_timelines_have_a_bar_for_each_host_and_a_limited_height(hosts: int, tallest: int) -> None:
    report = example(hosts)
    assert len(reports.as_html(report)) < 2_000_000
    page = page_of(report)
    pictures = [svg for svg in page.all("svg") if svg.get("class") == "bars"]
    assert len(pictures) == len(report["waves"])
    assert sum(int(str(svg["height"])) for svg in pictures) <= tallest
    in_waves = {host["name"] for host in report["hosts"] if host["wave"]}
    assert {bar["data-host"] for bar in page.all("g")} == in_waves
    (title, *_) = (text for text in page.text["title"] if text.startswith(f"{report['hosts'][0]['name']}: "))
    assert all(phase["name"] in title for phase in report["hosts"][0]["phases"])


def test_the_length_of_a_bar_is_its_time() -> None:
    report = example(1)
    page = page_of(report)
    (picture,) = reports._timelines(report)  # noqa: SLF001
    (bar,) = picture.bars
    total = report["hosts"][0]["seconds"]
    x = 0.0
    for phase, segment in zip(report["hosts"][0]["phases"], bar.segments, strict=True):
        assert segment.phase == phase["name"]
        assert float(segment.x[:-1]) == pytest.approx(100 * x / total, abs=0.1)
        assert float(segment.width[:-1]) == pytest.approx(100 * phase["seconds"] / total, abs=0.3)
        x += phase["seconds"]
    assert picture.ticks[0] == ("0.00%", "0:00")
    assert 3 <= len(picture.ticks) <= 8
    drawn = [rect["class"] for rect in page.all("rect") if rect.get("class") in reports.PHASES]
    assert drawn == [segment.phase for segment in bar.segments]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, ""), (0, "0 s"), (0.04, "0.0 s"), (59.94, "59.9 s"), (59.96, "1 min 00 s"), (3599, "59 min 59 s"),
     (3599.9, "1 h 00 min"), (7325, "2 h 02 min")],
)  # fmt: skip
def test_durations_are_written_for_people(seconds: float | None, text: str) -> None:
    assert reports.duration(seconds) == text


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_contrast_is_sufficient(scheme: int) -> None:
    """WCAG AA: 4.5 for text, 3 for parts of a picture."""
    css = (ROOT / "scripts/fleet/report.css").read_text(encoding="utf-8")
    block = re.findall(r":root \{(.*?)\}", css, re.DOTALL)[scheme]
    colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block))
    assert set(OUTCOMES) | set(reports.PHASES) <= set(colours)
    required = dict.fromkeys(colours, 4.5) | dict.fromkeys(reports.PHASES, 3)
    required |= {"ground": 0, "sheet": 0, "line": 0, "other": 2}
    for name, colour in colours.items():
        for ground in ("ground", "sheet"):
            dark, light = sorted([luminance(colour), luminance(colours[ground])])
            assert (light + 0.05) / (dark + 0.05) >= required[name], f"--{name} {colour} on --{ground}"


def fields(value: Any) -> set[str]:  # noqa: ANN401
    if isinstance(value, list):
        return set().union(*map(fields, value))
    if not isinstance(value, dict):
        return set()
    return set(value).union(*(fields(value[key]) for key in value.keys() - {"request", "totals"}))


def test_every_field_and_outcome_is_documented() -> None:
    page = (ROOT / "docs/rollout-report.md").read_text(encoding="utf-8")
    for name in fields(example(12)) | set(OUTCOMES) | set(reports.PHASES):
        assert re.search(rf"`(\w+(\[\])?\.)*{name}`", page), f"{name} is not documented"
