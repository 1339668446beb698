"""Chromium, asked over its DevTools protocol: what a page shows, says and fetches."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from typing import Any

# Not /snap/bin: a snap can't read the page.
EXECUTABLE = next(
    filter(None, (shutil.which(name, path="/usr/bin:/bin") for name in ("chromium", "google-chrome"))), None
)
# Of this machine's root the sandbox wants nothing to do; no name is looked up.
OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND")
PATIENCE = 60


class Browser:
    """A browser that runs: `open` pages in it."""

    def __init__(self, reader: int, writer: int) -> None:
        self._reader, self._writer = reader, writer
        self._unread = b""
        self._last_id = 0
        self.events: list[dict[str, Any]] = []

    def ask(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:  # noqa: ANN401
        """Call a method of the protocol and return its result."""
        self._last_id += 1
        call = {"id": self._last_id, "method": method, "params": parameters}
        if session:
            call["sessionId"] = session
        os.write(self._writer, json.dumps(call).encode() + b"\0")
        while (answer := self._next()).get("id") != self._last_id:
            self.events.append(answer)
        assert "error" not in answer, (method, answer)
        result: dict[str, Any] = answer["result"]
        return result

    def _next(self) -> dict[str, Any]:
        until = time.monotonic() + PATIENCE
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self._reader], [], [], max(0, until - time.monotonic()))
            chunk = os.read(self._reader, 1 << 20) if ready else b""
            assert chunk, "Chromium says nothing any more"
            self._unread += chunk
        message, _, self._unread = self._unread.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        return answer

    def open(
        self, url: str, *, width: int = 1400, height: int = 900, dark: bool = False, script: bool = True
    ) -> Page:
        """Load a page in a window of its own."""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session, target)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.ask(f"{domain}.enable")
        page.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 500,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.ask("Emulation.setEmulatedMedia", features=[scheme])
        page.ask("Emulation.setScriptExecutionDisabled", value=not script)
        page.ask("Page.navigate", url=url)
        while not any(page.events("Page.loadEventFired")):
            self.events.append(self._next())
        return page


class Page:
    """A page that was loaded."""

    def __init__(self, browser: Browser, session: str, target: str) -> None:
        self._browser, self._session, self._target = browser, session, target

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:  # noqa: ANN401
        return self._browser.ask(method, self._session, **parameters)

    def run(self, expression: str) -> Any:  # noqa: ANN401
        """The value of an expression of JavaScript; of a promise, what it becomes."""
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def click(self, selector: str) -> None:
        """Press the mouse where the element is, as a person does."""
        place = self.run(
            "(() => { const element = document.querySelector(" + json.dumps(selector) + ");"
            "element.scrollIntoView({block: 'center', behavior: 'instant'});"
            "const {x, y, width, height} = element.getBoundingClientRect();"
            "return {x: x + width / 2, y: y + height / 2}; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.ask("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)

    def type(self, text: str) -> None:
        self.ask("Input.insertText", text=text)

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=9)

    def screenshot(self, **clip: float) -> bytes:
        """A PNG of the window, or of the part `x`, `y`, `width`, `height`."""
        part = {"clip": {**clip, "scale": 1}} if clip else {}
        return base64.b64decode(self.ask("Page.captureScreenshot", format="png", **part)["data"])

    def pdf(self) -> bytes:
        answer = self.ask("Page.printToPDF", preferCSSPageSize=True, printBackground=True)
        return base64.b64decode(answer["data"])

    def events(self, *methods: str) -> Iterator[dict[str, Any]]:
        """What was told of this page so far."""
        for event in self._browser.events:
            if event.get("sessionId") == self._session and event["method"] in methods:
                yield event["params"]

    @property
    def fetched(self) -> list[str]:
        """Every address that the page asked for."""
        self.run("1")
        return [event["request"]["url"] for event in self.events("Network.requestWillBeSent")]

    @property
    def complaints(self) -> list[dict[str, Any]]:
        """What a developer would see in the console: errors, warnings, what the policy refused."""
        self.run("1")
        return list(self.events("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"))

    def close(self) -> None:
        self._browser.ask("Target.closeTarget", targetId=self._target)


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """A browser with a profile of its own, gone afterwards."""
    # It reads the protocol from its descriptor 3 and writes it to 4.
    to_read, writer = os.pipe()
    reader, to_write = os.pipe()
    command = [str(EXECUTABLE), *OPTIONS, "--remote-debugging-pipe"]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [
                "bash",
                "-c",
                f'exec "$@" 3<&{to_read} 4>&{to_write}',
                "-",
                *command,
                f"--user-data-dir={profile}",
            ],
            pass_fds=(to_read, to_write),
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        try:
            yield Browser(reader, writer)
        finally:
            os.close(writer)
            os.close(reader)
            process.terminate()
            process.wait(PATIENCE)
