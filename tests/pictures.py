"""Make README's pictures from the example report: the rollout's page, and the terminal during a rollout."""

from __future__ import annotations

import io
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

from fleet import report as reports
from fleet.terminal import Screen, Terminal
from playwright.sync_api import Browser, sync_playwright

from tests.example_report import START, events, example, rollout

PICTURES = Path(__file__).resolve().parents[1] / "docs/pictures"
# Not one in /snap/bin: a snap cannot read the page.
CHROMIUM = shutil.which("chromium", path="/usr/bin") or shutil.which("google-chrome", path="/usr/bin")


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start the distribution's Chromium, without name resolution."""
    with sync_playwright() as playwright:
        arguments = ["--host-resolver-rules=MAP * ~NOTFOUND"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


def terminal(hosts: int, seconds: float) -> str:
    """Return what a terminal of 80 columns shows this long after the start of a good rollout, as SVG."""
    view = Terminal(rollout(hosts))
    view.rollout.notify = view
    view.console = Screen(record=True, width=80, highlight=False, file=io.StringIO(), force_terminal=True)
    view.console.print("$ scripts/rollout -i ../fleet/hosts.yml -e gpu_device_id=1")
    view.started = time.monotonic() - seconds
    shift = datetime.now(UTC) - START - timedelta(seconds=seconds)
    for event in events(hosts, kinds=("changed", "already_right")):
        at = datetime.fromisoformat(event["created"])
        if at <= START + timedelta(seconds=seconds):
            view.rollout.feed({**event, "created": (at + shift).isoformat()})
    view.console.print(view.render())
    return view.console.export_svg(title="scripts/rollout")


def main() -> None:
    """Write both pictures."""
    PICTURES.mkdir(exist_ok=True)
    with TemporaryDirectory() as folder, chromium() as browser:
        reports.write(example(12), Path(folder))
        page = browser.new_page(viewport={"width": 1260, "height": 1000}, color_scheme="light")
        page.goto((Path(folder) / "report.html").as_uri())
        row = page.locator("tbody tr").first.bounding_box()
        assert row
        page.screenshot(
            path=PICTURES / "rollout-report.png",
            clip={"x": 0, "y": 0, "width": 1260, "height": row["y"] + row["height"]},
            full_page=True,
        )
        page = browser.new_page(viewport={"width": 1000, "height": 1000})
        page.set_content(terminal(11, 215))
        page.locator("svg").screenshot(path=PICTURES / "rollout-terminal.png", omit_background=True)


if __name__ == "__main__":
    main()
