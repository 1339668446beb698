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
from typing import Any

from fleet import report as reports
from fleet.progress import PHASE_OF, Rollout
from fleet.terminal import Screen, Terminal
from playwright.sync_api import Browser, sync_playwright

from tests.example_report import CARDS, example

PICTURES = Path(__file__).resolve().parents[1] / "docs/pictures"
# Not one in /snap/bin: a snap cannot read the page.
CHROMIUM = shutil.which("chromium", path="/usr/bin") or shutil.which("google-chrome", path="/usr/bin")
ACTIONS = {phase: action for action, phase in PHASE_OF.items()}


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start the distribution's Chromium, without name resolution."""
    with sync_playwright() as playwright:
        arguments = ["--host-resolver-rules=MAP * ~NOTFOUND"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


def events(report: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield the runner's events that lead to this report, each with its time."""
    start, hosts = report["started_at"], report["hosts"]
    yield start, "playbook_on_play_start", {}
    for host in hosts:
        yield start, "runner_on_ok", _read(host, host["before"], recorded=host["outcome"] == "already_right")
    plan = {"to_change": [host["name"] for host in hosts if host["wave"]], "waves": [1, "100%"]}
    stats = {"ansible_stats": {"data": {"vllm_gpu_rollout": plan}}}
    yield start, "runner_on_ok", {"task_action": "ansible.builtin.set_stats", "res": stats}
    for wave in report["waves"]:
        yield wave["started_at"], "playbook_on_play_start", {}
        changing = [host for host in hosts if host["wave"] == wave["number"]]
        phases = [(phase["started_at"], phase["name"], host) for host in changing for phase in host["phases"]]
        for at, name, host in sorted(phases, key=lambda phase: phase[0]):
            yield at, "runner_on_start", {"host": host["name"], "task_action": ACTIONS[name]}
        for host in changing:
            yield wave["ended_at"], "runner_on_ok", _read(host, host["after"], recorded=True)


def _read(host: dict[str, Any], gpu: dict[str, Any], *, recorded: bool) -> dict[str, Any]:
    referee = {"processes": [{"gpu_uuid": gpu["uuid"]}], "message": "", "verdict": "ok"}
    result = {"referee": referee, "gpus": [gpu], "gpu": CARDS[1], "changes": [], "recorded": recorded}
    return {"host": host["name"], "task_action": "server_info", "res": {**result, "proven": True}}


def terminal(report: dict[str, Any], seconds: float) -> str:
    """Return what a terminal of 80 columns shows so many seconds after the start, as SVG."""
    view = Terminal(Rollout([host["name"] for host in report["hosts"]], {}))
    view.rollout.notify = view
    view.console = Screen(record=True, width=80, highlight=False, file=io.StringIO(), force_terminal=True)
    view.console.print("$ scripts/rollout -e gpu_device_id=1")
    start = datetime.fromisoformat(report["started_at"])
    shift = datetime.now(UTC) - start - timedelta(seconds=seconds)
    view.started = time.monotonic() - seconds
    for moment, name, data in events(report):
        at = datetime.fromisoformat(moment)
        if at <= start + timedelta(seconds=seconds):
            created = (at + shift).isoformat()
            view.rollout.feed({"event": name, "created": created, "event_data": data})
    view.console.print(view.render())
    return view.console.export_svg(title="scripts/rollout")


def main() -> None:
    """Write both pictures."""
    PICTURES.mkdir(exist_ok=True)
    good = example(16)
    good["hosts"] = [host for host in good["hosts"] if host["outcome"] in reports.PASSES]
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
        page.set_content(terminal(good, 345))
        page.locator("svg").screenshot(path=PICTURES / "rollout-terminal.png", omit_background=True)


if __name__ == "__main__":
    main()
