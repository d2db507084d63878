"""Debian's Firefox, driven through its own WebDriver BiDi socket: no driver beside it is needed.

A tab has what the tests of the page use: JavaScript that is evaluated, real keys and clicks, pictures.
"""

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
from pathlib import Path

import pytest
from websockets.sync.client import ClientConnection, connect

FIREFOX = shutil.which("firefox-esr") or shutil.which("firefox")
SECONDS = 30
KEYS = {"Enter": "\ue007", "Escape": "\ue00c", "Tab": "\ue004", "ArrowUp": "\ue013", "Shift": "\ue008", "Control": "\ue009", "Alt": "\ue00a"}  # fmt: skip
PREFERENCES = {
    "browser.shell.checkDefaultBrowser": False,
    "datareporting.policy.dataSubmissionEnabled": False,
    "network.captive-portal-service.enabled": False,
    "network.connectivity-service.enabled": False,
    "intl.accept_languages": "en-US",
}


class Firefox:
    """A running browser. commands are sent one at a time; events that come between are kept by their tab."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._number = 0
        self.logged: list[dict] = []
        self.send("session.new", capabilities={})
        self.send("session.subscribe", events=["log.entryAdded"])

    def send(self, method: str, **params: object) -> dict:
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": params}))
        while True:
            said = json.loads(self._socket.recv(SECONDS * 2))
            if said.get("type") == "event":
                self.logged.append(said["params"])
            elif said.get("id") == self._number:
                assert said["type"] == "success", f"{method}: {said}"
                return said["result"]

    @contextlib.contextmanager
    def tab(self, url: str, *, width: int = 1280, height: int = 860) -> Iterator["Tab"]:
        """A page in a profile of its own; nothing may have gone wrong in it when it ends."""
        profile = self.send("browser.createUserContext")["userContext"]
        context = self.send("browsingContext.create", type="tab", userContext=profile)["context"]
        self.send("browsingContext.setViewport", context=context, viewport={"width": width, "height": height})
        tab = Tab(self, context, url)
        try:
            tab.open()
            yield tab
            faults = [
                one["text"]
                for one in self.logged
                if one["level"] == "error" and one["source"].get("context") == context
            ]
            assert faults == []
        finally:
            self.send("browser.removeUserContext", userContext=profile)


class Tab:
    """One page of Firefox."""

    def __init__(self, browser: Firefox, context: str, url: str) -> None:
        self._browser, self._context, self.url = browser, context, url

    def open(self, *, path: str = "/") -> None:
        self._browser.send(
            "browsingContext.navigate", context=self._context, url=self.url + path, wait="complete"
        )
        self.until("document.documentElement.dataset.ready")

    def evaluate(self, expression: str) -> object:
        """The value of an expression, through JSON."""
        found = self._browser.send(
            "script.evaluate",
            expression=f"(async () => JSON.stringify((await ({expression})) ?? null))()",
            target={"context": self._context},
            awaitPromise=True,
        )
        assert found["type"] == "success", found
        return json.loads(found["result"]["value"])

    def until(self, condition: str) -> None:
        """Waits until an expression is true."""
        end = time.monotonic() + SECONDS
        while not self.evaluate(f"Boolean({condition})"):
            assert time.monotonic() < end, f"waited too long for {condition}"
            time.sleep(0.05)

    def press(self, *keys: str) -> None:
        """Keys that are held together, such as ("Alt", "r"); or one text."""
        values = [KEYS.get(key, key) for key in keys] if len(keys) > 1 or keys[0] in KEYS else list(keys[0])
        if len(keys) > 1:
            actions = [{"type": "keyDown", "value": v} for v in values] + [
                {"type": "keyUp", "value": v} for v in reversed(values)
            ]
        else:
            actions = [{"type": kind, "value": v} for v in values for kind in ("keyDown", "keyUp")]
        self._act({"type": "key", "id": "keys", "actions": actions})

    def click(self, selector: str) -> None:
        box = self.evaluate(
            f"(e => {{ e.scrollIntoView({{block: 'nearest'}}); const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; }})"
            f"(document.querySelector({json.dumps(selector)}))"
        )
        move = {"type": "pointerMove", "x": int(box[0]), "y": int(box[1])}
        pressed = [{"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}]
        self._act({"type": "pointer", "id": "mouse", "actions": [move, *pressed]})

    def fill(self, selector: str, text: str) -> None:
        """As pasted text."""
        self.evaluate(
            f"(e => {{ e.focus(); e.value = {json.dumps(text)}; e.dispatchEvent(new Event('input', {{bubbles: true}})); return 0; }})"
            f"(document.querySelector({json.dumps(selector)}))"
        )

    def send(self, text: str, *, waits: bool = True) -> None:
        self.fill("#ask", text)
        self.press("Enter")
        if waits:
            self.wait()

    def wait(self) -> None:
        """Until no answer runs."""
        self.until("document.getElementById('stop').hidden && !document.querySelector('.running')")

    @property
    def words(self) -> object:
        """What is said, first to last."""
        return self.evaluate(
            "[...document.querySelectorAll('.bubble, .answer > .prose')].map((e) => e.innerText.trim())"
        )

    def picture(self, file: Path) -> None:
        data = self._browser.send("browsingContext.captureScreenshot", context=self._context)["data"]
        file.write_bytes(base64.b64decode(data))

    def _act(self, *sources: dict) -> None:
        self._browser.send("input.performActions", context=self._context, actions=list(sources))


@contextlib.contextmanager
def firefox() -> Iterator[Firefox]:
    """A browser, where there is one."""
    if FIREFOX is None:
        pytest.skip("needs Firefox: apt-get install firefox-esr")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        lines = [
            f"user_pref({json.dumps(name)}, {json.dumps(value)});" for name, value in PREFERENCES.items()
        ]
        Path(profile, "user.js").write_text("\n".join(lines))
        command = [
            FIREFOX,
            "--headless",
            "--no-remote",
            "--profile",
            profile,
            "--remote-debugging-port=0",
            "about:blank",
        ]
        environment = {**os.environ, "HOME": profile, "MOZ_DISABLE_CONTENT_SANDBOX": "1"}
        process = subprocess.Popen(
            command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment
        )
        try:
            with connect(f"{_address(process)}/session", max_size=None) as socket:
                yield Firefox(socket)
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stderr is not None
            process.stderr.close()


def _address(process: subprocess.Popen) -> str:
    """Where it listens, as it says once it does."""
    assert process.stderr is not None
    said, end = b"", time.monotonic() + 2 * SECONDS
    while time.monotonic() < end and process.poll() is None:
        if select.select([process.stderr], [], [], 1.0)[0]:
            said += os.read(process.stderr.fileno(), 4096)
        for line in said.decode("utf-8", "replace").splitlines(keepends=True):
            if "WebDriver BiDi listening on" in line and line.endswith("\n"):
                return line.split()[-1]
    raise AssertionError(f"Firefox does not start: {said[-2000:]!r}")
