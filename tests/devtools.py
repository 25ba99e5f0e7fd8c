"""Chromium driven through its DevTools pipe: a page is opened, used, asked and photographed."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from browser import CHROMIUM, FLAGS


class Tab:
    """One tab. `requests` are the addresses that the page asked for, `complaints` what it logged as errors."""

    def __init__(self, asking: int, answering: int) -> None:
        self.asking, self.answering = asking, answering
        self.number, self.rest, self.session = 0, b"", ""
        self.requests: list[str] = []
        self.complaints: list[str] = []

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The answer to one command; what happens meanwhile is kept."""
        self.number += 1
        told = {"id": self.number, "method": method, "params": params}
        told |= {"sessionId": self.session} if self.session else {}
        os.write(self.asking, json.dumps(told).encode() + b"\0")
        while (message := self._next()).get("id") != self.number:
            self._keep(message)
        assert "error" not in message, message
        return message["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            self.rest += os.read(self.answering, 2**20) or b'{"id": -1}\0'
        line, _, self.rest = self.rest.partition(b"\0")
        return json.loads(line)

    def _keep(self, message: dict[str, Any]) -> None:
        kind, about = message.get("method"), message.get("params", {})
        if kind == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"])
        elif kind == "Log.entryAdded" and about["entry"]["level"] == "error":
            self.complaints.append(about["entry"]["text"])

    def ask(self, script: str) -> Any:
        """What an expression is on the page."""
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, script: str, seconds: float = 60) -> Any:
        """What an expression is once it is true."""
        end = time.monotonic() + seconds
        while not (found := self.ask(script)):
            assert time.monotonic() < end, f"never true: {script}; {self.ask('document.body.innerText')}"
            time.sleep(0.1)
        return found

    def size(self, width: int, height: int) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=False)  # fmt: skip

    def photograph(self, path: Path) -> None:
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))


@contextmanager
def tab(url: str, profile: Path) -> Iterator[Tab]:
    """A browser of its own with one tab that opens `url`."""
    hear, asking = os.pipe()
    answering, say = os.pipe()

    def wire() -> None:  # the browser hears at 3 and says at 4
        ears, mouth = os.dup(hear), os.dup(say)
        os.dup2(ears, 3)
        os.dup2(mouth, 4)

    rules = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
    flags = [rules if flag.startswith("--host-resolver-rules") else flag for flag in FLAGS]
    command = [str(CHROMIUM), *flags, "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
    done = subprocess.Popen(command, preexec_fn=wire, pass_fds=(3, 4, hear, say), stdin=subprocess.DEVNULL,
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    os.close(hear)
    os.close(say)
    page = Tab(asking, answering)
    try:
        targets = page.call("Target.getTargets")["targetInfos"]
        target = next(one["targetId"] for one in targets if one["type"] == "page")
        page.session = page.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            page.call(f"{domain}.enable")
        page.call("Page.navigate", url=url)
        yield page
    finally:
        done.terminate()
        done.wait(20)
        os.close(asking)
        os.close(answering)
