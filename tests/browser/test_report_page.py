"""The report's page in a real browser: how a person reads, sorts, filters and shares it."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fleet import report as reports
from playwright.sync_api import Browser, Page

from tests.example_report import OUTCOMES, example
from tests.pictures import CHROMIUM, chromium

SIZES = (3, 60, 1000)
# The visible names in the table, from the top.
SHOWN = "[...document.querySelectorAll('tbody tr:not([hidden]) th')].map(cell => cell.textContent)"
FOCUSED = "document.activeElement.id || document.activeElement.textContent.trim()"

Show = Callable[..., Page]
# Each page with the messages of its console and the addresses that it fetched.
Opened = list[tuple[Page, list[str], list[str]]]


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    if not CHROMIUM:
        pytest.skip("Chromium is not installed; `make browser` reports why")
    with chromium() as started:
        yield started


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """The addresses of the reports, by their number of hosts."""
    directories = {hosts: tmp_path_factory.mktemp(f"report-{hosts}") for hosts in SIZES}
    for hosts, directory in directories.items():
        reports.write(example(hosts), directory)
    return {hosts: (directory / "report.html").as_uri() for hosts, directory in directories.items()}


@pytest.fixture
def opened() -> Opened:
    return []


@pytest.fixture
def opening(browser: Browser, opened: Opened) -> Iterator[Show]:
    """Open a page in its own window."""

    def open_page(url: str, *, width: int = 1400, dark: bool = False, script: bool = True) -> Page:
        page = browser.new_page(
            viewport={"width": width, "height": 900},
            color_scheme="dark" if dark else "light",
            java_script_enabled=script,
        )
        messages: list[str] = []
        fetched: list[str] = []
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("request", lambda request: fetched.append(request.url))
        page.goto(url)
        opened.append((page, messages, fetched))
        return page

    yield open_page
    for page, _messages, _fetched in opened:
        page.close()


@pytest.fixture
def show(opening: Show, pages: dict[int, str], opened: Opened) -> Iterator[Show]:
    """Open a report with a view in its address; the page must fetch nothing and log no error."""
    yield lambda hosts, state="", **options: opening(pages[hosts] + state, **options)
    for page, messages, fetched in opened:
        assert (messages, fetched) == ([], [page.url.partition("#")[0]])


def names(report: dict[str, Any], *outcomes: str) -> list[str]:
    return [host["name"] for host in report["hosts"] if host["outcome"] in (outcomes or OUTCOMES)]


@pytest.mark.parametrize("hosts", SIZES)
def test_every_host_has_a_row_and_failures_come_first(show: Show, hosts: int) -> None:
    report = example(hosts)
    rows = show(hosts).evaluate(SHOWN)
    assert sorted(rows) == names(report)
    worst = next(name for name in ("failed", "unreachable", "rolled_back") if report["totals"][name])
    assert rows[: report["totals"][worst]] == names(report, worst)


@pytest.mark.parametrize("direction", ["asc", "desc"])
@pytest.mark.parametrize("hosts", SIZES)
def test_the_address_sorts_and_unknown_values_come_last(show: Show, hosts: int, direction: str) -> None:
    rows = show(hosts, f"#sort=downtime&dir={direction}").evaluate(SHOWN)
    downtime = {host["name"]: host["downtime_s"] for host in example(hosts)["hosts"]}
    known = [downtime[name] for name in rows if downtime[name] is not None]
    assert known == sorted(known, reverse=direction == "desc")
    assert [downtime[name] for name in rows] == known + [None] * (len(rows) - len(known))


@pytest.mark.parametrize("hosts", SIZES)
def test_the_address_filters(show: Show, hosts: int) -> None:
    report = example(hosts)
    assert sorted(show(hosts, "#outcome=changed").evaluate(SHOWN)) == names(report, "changed")
    rows = show(hosts, "#outcome=rolled_back,failed").evaluate(SHOWN)
    assert sorted(rows) == names(report, "rolled_back", "failed")
    # All words, in any column and in any case; also in collapsed details.
    rows = show(hosts, "#q=NOT+ready+GPU").evaluate(SHOWN)
    assert sorted(rows) == names(report, "rolled_back")
    assert show(hosts, f"#q={report['hosts'][1]['after']['uuid']}").evaluate(SHOWN) == names(report)[1:2]


def test_the_filters_work_together(show: Show) -> None:
    report = example(60)
    page = show(60, "#sort=host&dir=desc&outcome=changed,failed&q=gpu1")
    wanted = [name for name in names(report, "changed", "failed") if name.startswith("gpu1")]
    assert page.evaluate(SHOWN) == sorted(wanted, reverse=True)
    assert page.evaluate("document.querySelector('#shown').textContent") == f"{len(wanted)} of 60"
    # The timelines show the same hosts.
    bright = page.evaluate("[...document.querySelectorAll('g:not(.off)')].map(bar => bar.dataset.host)")
    assert sorted(bright) == wanted


def test_a_meaningless_address_shows_everything(show: Show) -> None:
    page = show(60, "#sort=nonsense&dir=up&outcome=<b>,__proto__&q=")
    assert page.evaluate(SHOWN) == show(60).evaluate(SHOWN)
    page.click(".chips .failed")
    assert page.evaluate(SHOWN) == names(example(60), "failed")
    assert show(60, "#q=<img src=x onerror=alert(1)>").evaluate(SHOWN) == []


def test_a_click_sorts_each_column_and_another_reverses_it(show: Show) -> None:
    page = show(60)
    for key in page.evaluate("[...document.querySelectorAll('thead th')].map(head => head.dataset.key)"):
        seen = {}
        for _ in range(2):
            page.click(f"th[data-key={key}] button")
            way = page.evaluate(f"document.querySelector('th[data-key={key}]').ariaSort")
            assert page.evaluate("document.querySelectorAll('th[aria-sort]').length") == 1
            seen[way] = page.evaluate(SHOWN)
        assert set(seen) == {"ascending", "descending"}
        assert seen["ascending"] != seen["descending"], key
        # The address gives the same view in another window.
        assert show(60, page.evaluate("location.hash")).evaluate(SHOWN) == page.evaluate(SHOWN), key


def test_a_total_is_a_filter_and_the_address_follows(show: Show) -> None:
    report = example(60)
    page = show(60)
    page.click(".chips .failed")
    page.click(".chips .refused")
    assert sorted(page.evaluate(SHOWN)) == names(report, "failed", "refused")
    assert page.evaluate("location.hash") == "#outcome=failed,refused"
    page.click(".chips .failed")
    assert page.evaluate(SHOWN) == names(report, "refused")
    pressed = "[...document.querySelectorAll('[aria-pressed=true]')].map(chip => chip.className)"
    assert page.evaluate(pressed) == ["refused"]
    page.click(".chips .all")
    assert len(page.evaluate(SHOWN)) == 60


def test_text_is_typed_and_cleared(show: Show) -> None:
    page = show(60)
    page.click("#q")
    page.keyboard.insert_text("gpu2 5060")
    assert page.evaluate(SHOWN)
    assert page.evaluate("location.hash") == "#q=gpu2+5060"
    page.keyboard.insert_text(" no such thing")
    assert page.evaluate(SHOWN) == []
    page.click("#clear")
    assert len(page.evaluate(SHOWN)) == 60
    assert page.evaluate(FOCUSED) == "q"


def test_a_bar_leads_to_its_host(show: Show) -> None:
    page = show(60, "#outcome=failed")
    page.click("g[data-host=gpu10] rect:last-child")
    assert page.evaluate(SHOWN) == ["gpu10"]
    top = page.evaluate("document.querySelector('tbody tr:not([hidden])').getBoundingClientRect().top")
    assert 0 <= top < 900


def test_going_back_in_the_history_restores_the_view(show: Show) -> None:
    page = show(60)
    for step, expected in (
        ("location.hash = 'outcome=failed'", names(example(60), "failed")),
        ("history.back()", page.evaluate(SHOWN)),
    ):
        page.evaluate(f"new Promise(done => {{ addEventListener('hashchange', done); {step} }})")
        assert page.evaluate(SHOWN) == expected


def test_the_keyboard_reaches_everything_with_a_visible_focus(show: Show) -> None:
    page = show(3)
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.append(page.evaluate(FOCUSED))
        if page.evaluate("document.activeElement !== document.body"):
            outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            assert outline == "solid", reached[-1]
    assert {"all 3", "changed 1", "q", "shown", "Host", "Downtime", "proof"} <= set(reached)


def test_without_javascript_everything_is_readable(show: Show) -> None:
    report = example(60)
    page = show(60, script=False)
    content = page.content()
    rows = re.findall(r"<tr class=.*?</tr>", content, re.DOTALL)
    seen = [re.sub(r"<[^>]+>", "", row).split()[0] for row in rows]
    assert sorted(seen) == names(report)
    assert seen[:2] == names(report, "failed")
    for host in report["hosts"]:
        (row,) = (row for row in rows if f"<bdi>{host['name']}<" in row)
        assert all(html.escape(line, quote=False) in row for line in (host["error"] or "").split("\n"))
    assert "<noscript><p" in content
    box = page.locator("tbody").bounding_box()
    assert box
    assert box["height"] > 60 * 20


@pytest.mark.parametrize("width", [380, 700, 1250, 1400])
@pytest.mark.parametrize("hosts", SIZES)
def test_nothing_sticks_out_at_any_width(show: Show, hosts: int, width: int) -> None:
    page = show(hosts, width=width)
    assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
    # No text overlaps the next column.
    overlaps = page.evaluate(
        "[...document.querySelectorAll('tbody td, tbody th, dd, .picture')].slice(0, 400)"
        ".filter(box => box.scrollWidth > box.clientWidth + 1).map(box => box.className + box.textContent)"
    )
    assert overlaps == []


BACKGROUND = "getComputedStyle(document.body).backgroundColor.match(/[\\d.]+/g).map(Number)"


@pytest.mark.parametrize("width", [380, 1400])
@pytest.mark.parametrize("hosts", SIZES)
def test_light_and_dark(show: Show, hosts: int, width: int) -> None:
    light, dark = (show(hosts, width=width, dark=scheme) for scheme in (False, True))
    assert min(light.evaluate(BACKGROUND)) > 230
    assert max(dark.evaluate(BACKGROUND)) < 40
    # A blank window of this size is a PNG of some 5 kB.
    assert min(len(page.screenshot()) for page in (light, dark)) > 25_000


@pytest.mark.parametrize("hosts", SIZES)
def test_it_can_be_printed(show: Show, hosts: int) -> None:
    page = show(hosts, dark=True)
    pdf = page.pdf(prefer_css_page_size=True, print_background=True)
    assert 1 <= max(map(int, re.findall(rb"/Count (\d+)", pdf))) <= 3 + hosts / 10
    page.emulate_media(media="print")
    # On white paper, also with a dark screen; and the cure is not collapsed.
    assert page.evaluate(BACKGROUND) == [0, 0, 0, 0]  # transparent
    cures = "[...document.querySelectorAll('tbody details:not(.proof) p')]"
    assert page.evaluate(f"{cures}.filter(cure => !cure.checkVisibility()).length") == 0


def test_text_from_a_host_is_not_executed(opening: Show, opened: Opened, tmp_path: Path) -> None:
    """The policy is only the second line of defence: nothing reaches it."""
    report = example(3)
    hostile = "<img src=x onerror=alert(1)><script>alert(1)</script>\"' onmouseover=alert(1) {{ 7 * 7 }}"
    text = json.dumps(report).replace("gpu0", f"{hostile}gpu0".replace('"', '\\"'))
    reports.write(json.loads(text), tmp_path)
    page = opening((tmp_path / "report.html").as_uri())
    assert len(page.evaluate(SHOWN)) == 3
    assert all(name.startswith(hostile) for name in page.evaluate(SHOWN))
    page.click("g[data-host] rect:last-child")
    assert len(page.evaluate(SHOWN)) == 1
    assert opened == [(page, [], [(tmp_path / "report.html").as_uri()])]


def test_the_policy_holds(opening: Show, opened: Opened, tmp_path: Path) -> None:
    """If something gets into the page, the browser refuses it."""
    reports.write(example(3), tmp_path)
    path = tmp_path / "report.html"
    evil = "<script>document.title = 'owned'</script><img src='http://example.org/x.png'>"
    path.write_text(path.read_text(encoding="utf-8").replace("<main>", f"<main>{evil}"), encoding="utf-8")
    page = opening(path.as_uri())
    assert page.title() != "owned"
    ((_page, messages, _fetched),) = opened
    assert sum("Content Security Policy" in message for message in messages) == 2
