"""A browser without a window, asked over a pipe in the DevTools protocol."""

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from types import TracebackType
from urllib.parse import urlsplit

from typing_extensions import Self

from tritonmoe.runtime.files import Json

__all__ = ["Browser", "find_browser"]

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
OPTIONS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--no-first-run",
)
TIMEOUT_S = 30.0


def find_browser() -> str | None:
    """Return the path of the first of PROGRAMS that is installed."""
    return next((path for name in PROGRAMS if (path := shutil.which(name))), None)


class Browser:
    """One tab. `errors` has what the page that is open wrote into the console, or raised."""

    def __init__(self, program: str) -> None:
        self.errors: list[str] = []
        self._folder = tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True)
        self._number = 0
        self._is_loaded = False
        self._session: str | None = None
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()

        def connect() -> None:  # the protocol's pipes are the descriptors 3 and 4
            read, write = os.dup(to_browser), os.dup(from_browser)
            os.dup2(read, 3)
            os.dup2(write, 4)

        self._process = subprocess.Popen(
            [program, *OPTIONS, f"--user-data-dir={self._folder.name}", "about:blank"],
            preexec_fn=connect,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._rest = b""
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._ask(f"{domain}.enable")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.terminate()
        self._process.wait(TIMEOUT_S)
        os.close(self._write)
        os.close(self._read)
        self._folder.cleanup()

    def resize(self, size: tuple[int, int], is_phone: bool = False) -> None:
        """Make the page's window so many pixels wide and high."""
        width, height = size
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": is_phone}
        self._ask("Emulation.setDeviceMetricsOverride", **screen)

    def open(self, address: str, scheme: str) -> None:
        """Load a page for a new reader of the "light" or the "dark" scheme, and wait until its scripts have run."""
        self._ask("Page.navigate", url="about:blank")
        preference = {"name": "prefers-color-scheme", "value": scheme}
        self._ask("Emulation.setEmulatedMedia", features=[preference])
        self.evaluate("new Promise(done => setTimeout(done, 100))")  # until the page before has ended
        origin = "{0.scheme}://{0.netloc}".format(urlsplit(address))  # a page keeps the scheme that it has chosen
        self._ask("Storage.clearDataForOrigin", origin=origin, storageTypes="local_storage")
        self.errors.clear()
        self._is_loaded = False
        self._ask("Page.navigate", url=address)
        ends = time.monotonic() + TIMEOUT_S
        while not self._is_loaded:
            if time.monotonic() > ends:
                raise TimeoutError(f"{address} has not loaded after {TIMEOUT_S:.0f} s")
            self._take()
        for _ in range(2):  # a frame in which what scripts changed is laid out
            self.evaluate("new Promise(done => requestAnimationFrame(() => setTimeout(done, 50)))")

    def evaluate(self, script: str) -> Json:
        """Return the value of an expression in the page."""
        answer = self._ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"]["description"])
        return answer["result"].get("value")

    def screenshot(self, height: int | None = None) -> bytes:
        """Return the window as a PNG, or the page's first so many pixels."""
        clip = {}
        if height is not None:
            width = self.evaluate("innerWidth")
            clip = {"clip": {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}}
        answer = self._ask("Page.captureScreenshot", captureBeyondViewport=height is not None, **clip)
        return base64.b64decode(answer["data"])

    def _ask(self, method: str, **parameters: object) -> Json:
        self._number += 1
        number = self._number
        message: dict[str, object] = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._take()).get("id") != number:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def _take(self) -> Json:
        """Return the next message, and note what it says of the page."""
        while b"\0" not in self._rest:
            piece = os.read(self._read, 1 << 20)
            if not piece:
                raise RuntimeError(f"the browser ended with {self._process.wait(TIMEOUT_S)}")
            self._rest += piece
        text, _, self._rest = self._rest.partition(b"\0")
        message = json.loads(text)
        method, said = message.get("method"), message.get("params", {})
        if method == "Page.loadEventFired":
            self._is_loaded = True
        elif method == "Runtime.exceptionThrown":
            self.errors.append(said["exceptionDetails"].get("exception", {}).get("description", "an exception"))
        elif method == "Runtime.consoleAPICalled" and said["type"] in ("error", "assert"):
            self.errors.append(" ".join(str(one.get("value", one.get("description"))) for one in said["args"]))
        elif method == "Log.entryAdded" and said["entry"]["level"] == "error":
            self.errors.append(f"{said['entry']['text']} {said['entry'].get('url', '')}")
        return message
