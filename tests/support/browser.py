"""A real browser, driven over a pipe by its own debugging protocol: no package, no port.

Source: the Chrome DevTools Protocol; with ``--remote-debugging-pipe`` messages are JSON ended by a zero byte, read by
the browser from descriptor 3 and written to 4.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
_FLAGS = (
    *(
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
    ),
    *("--disable-component-update", "--disable-sync", "--remote-debugging-pipe", "--hide-scrollbars"),
)
#: Puts the two descriptors where the browser looks for them.
_LAUNCH = (
    "import fcntl, os, sys; r, w, *rest = sys.argv[1:]; "
    "r, w = (fcntl.fcntl(int(n), fcntl.F_DUPFD, 10) for n in (r, w)); "
    "os.dup2(r, 3); os.dup2(w, 4); os.execvp(rest[0], rest)"
)
_SECONDS = 60.0


class Page:
    """One tab."""

    def __init__(self, send: int, receive: int) -> None:
        self._send, self._receive = send, receive
        self._number = 0
        self._rest = b""
        self._session: str | None = None
        #: What the browser told by itself, in order.
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: object) -> dict[str, Any]:
        """Send a command; returns its result."""
        self._number += 1
        message: dict[str, object] = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._send, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return dict(answer["result"])
            self.events.append(answer)

    def _next(self) -> dict[str, Any]:
        limit = time.monotonic() + _SECONDS
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._receive], [], [], max(0.0, limit - time.monotonic()))
            assert ready, "the browser does not answer"
            more = os.read(self._receive, 2**20)
            assert more, "the browser has ended"
            self._rest += more
        message, self._rest = self._rest.split(b"\0", 1)
        return dict(json.loads(message))

    def run(self, code: str) -> Any:
        """The value of an expression in the page."""
        found = self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def settle(self) -> None:
        """Wait until what was asked for is painted."""
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 0))))")

    def open(self, file: Path, fragment: str = "") -> None:
        """Open a file, and wait for it."""
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=file.as_uri() + (f"#{fragment}" if fragment else ""))
        limit = time.monotonic() + _SECONDS
        while not self.run("document.readyState === 'complete' && location.protocol === 'file:'"):
            assert time.monotonic() < limit, "the page does not load"
            time.sleep(0.02)
        self.settle()

    def look(self, width: int, height: int, *, dark: bool = False) -> None:
        """Set size and colour scheme."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def press(self, key: str, text: str = "") -> None:
        """Press a key, as its name in ``KeyboardEvent.key``."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, text=text if kind == "keyDown" else "")

    def type(self, text: str) -> None:
        """Type a text."""
        self.call("Input.insertText", text=text)

    def click(self, x: float, y: float) -> None:
        """Click at a point of the window."""
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def screenshot(self, to: Path, *, whole: bool = False) -> None:
        """Write what is seen as a PNG file; the whole page, or what fits."""
        self.settle()
        clip: dict[str, object] = {}
        if whole:
            tall = self.run("document.documentElement.scrollHeight")
            wide = self.run("document.documentElement.clientWidth")
            clip = {"clip": {"x": 0, "y": 0, "width": wide, "height": tall, "scale": 1}, "captureBeyondViewport": True}
        to.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png", **clip)["data"]))


@contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """A browser with a new profile, ended with the block."""
    assert CHROMIUM is not None
    (to_read, send), (receive, to_write) = os.pipe(), os.pipe()
    command = [
        sys.executable,
        "-c",
        _LAUNCH,
        str(to_read),
        str(to_write),
        CHROMIUM,
        *_FLAGS,
        f"--user-data-dir={profile}",
    ]
    quiet = profile.with_suffix(".log").open("wb")
    with quiet, subprocess.Popen(command, pass_fds=(to_read, to_write), stdout=quiet, stderr=quiet) as process:
        os.close(to_read)
        os.close(to_write)
        try:
            page = Page(send, receive)
            yield page
            page._session = None
            page.call("Browser.close")
        finally:
            os.close(send)
            os.close(receive)
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
