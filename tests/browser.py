"""Chromium without a window, driven through its DevTools protocol over two pipes: nothing but the
browser is needed.

`python tests/browser.py docs/explore.png` takes the picture of the page that the README shows.

Source of the commands and events: https://chromedevtools.github.io/devtools-protocol/
"""

import base64
import fcntl
import io
import json
import os
import select
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
OPTIONS = (
    "--headless=new",
    "--remote-debugging-pipe",  # commands come on file descriptor 3, answers go to 4
    "--no-first-run",
    "--no-sandbox",  # containers let root have none; the pages are our own
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--disable-background-networking",
    "--force-color-profile=srgb",
    "--hide-scrollbars",
)
SECONDS = 60  # of patience with an answer
KEYS = {
    "Tab": 9,
    "PageUp": 33,
    "End": 35,
    "Home": 36,
    "ArrowLeft": 37,
    "ArrowUp": 38,
    "ArrowRight": 39,
    "ArrowDown": 40,
    " ": 32,
}


def program():
    """The path of a browser, $CHROMIUM first; None where there is none."""
    return next(filter(None, map(shutil.which, (os.environ.get("CHROMIUM", ""), *PROGRAMS))), None)


class Browser:
    """A browser process with one page."""

    def __init__(self, path):
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        pipes = [*os.pipe(), *os.pipe()]
        # away from 3 and 4, which they become in the browser
        reads, self._to, self._from, writes = (
            fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in pipes
        )
        for fd in pipes:
            os.close(fd)
        quiet = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in range(3)]
        self._process = os.posix_spawn(
            path,
            [path, *OPTIONS, f"--user-data-dir={self._folder.name}"],
            os.environ,
            file_actions=[
                *quiet,
                (os.POSIX_SPAWN_DUP2, reads, 3),
                (os.POSIX_SPAWN_DUP2, writes, 4),
            ],
            setpgroup=0,
        )
        os.close(reads)
        os.close(writes)
        self._received, self._calls, self._session = b"", 0, None
        self.events = []  # (name, parameters)
        try:
            self._open_a_page()
        except BaseException:
            self.close()
            raise

    def _open_a_page(self):
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Accessibility"):
            self.call(f"{domain}.enable")

    def close(self):
        """Ends the browser and all that it has started."""
        os.killpg(self._process, signal.SIGKILL)
        os.waitpid(self._process, 0)
        os.close(self._to)
        os.close(self._from)
        self._folder.cleanup()

    def call(self, method, **parameters):
        """The result of a command."""
        self._calls += 1
        command = {"id": self._calls, "method": method, "params": parameters}
        if self._session:
            command["sessionId"] = self._session
        os.write(self._to, json.dumps(command).encode() + b"\0")
        while True:
            message = self._next()
            if message.get("id") == self._calls:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]

    def _next(self):
        deadline = time.monotonic() + SECONDS
        while b"\0" not in self._received:
            ready, _, _ = select.select([self._from], [], [], max(deadline - time.monotonic(), 0))
            part = os.read(self._from, 1 << 16) if ready else b""
            if not part:
                raise RuntimeError("the browser does not answer" if not ready else "it has ended")
            self._received += part
        first, _, self._received = self._received.partition(b"\0")
        message = json.loads(first)
        if "method" in message:
            self.events.append((message["method"], message["params"]))
        return message

    def open(self, path):
        """Loads a file, at a size and colour scheme that `emulate` has set."""
        self.events.clear()
        self.call("Page.navigate", url=Path(path).resolve().as_uri())
        while not any(name == "Page.loadEventFired" for name, _ in self.events):
            self._next()

    def emulate(self, width, height, scheme="light", phone=False):
        """A window of this size, in pixels, for eyes that like it light or dark."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=phone,
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def evaluate(self, expression):
        """The value of a JavaScript expression, or of the promise that it is."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def press(self, key, times=1):
        """A key of KEYS or a digit, for what has the focus."""
        code = KEYS.get(key) or ord(key)
        of_key = {"key": key, "windowsVirtualKeyCode": code}
        if len(key) == 1:
            of_key["text"] = key
        for _ in range(times):
            self.call("Input.dispatchKeyEvent", type="keyDown", **of_key)
            self.call("Input.dispatchKeyEvent", type="keyUp", **of_key)

    def problems(self):
        """What was written to the console since the page was opened, and uncaught errors."""
        self.evaluate("0")  # events so far have come
        told = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [event for event in self.events if event[0] in told]

    def requests(self):
        """The addresses that were fetched since the page was opened."""
        return [p["request"]["url"] for n, p in self.events if n == "Network.requestWillBeSent"]

    def picture(self):
        """The window as a PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])


def main(path):
    from PIL import Image

    from rope_ext.viz.page import page

    if program() is None:
        raise SystemExit("no browser: install chromium, or name one in CHROMIUM")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "page.html")
        file.write_text(page(), encoding="utf-8")
        browser = Browser(program())
        browser.emulate(1000, 2140)
        browser.open(file)
        picture = Image.open(io.BytesIO(browser.picture()))
        browser.close()
    # 256 colours are enough, and half of the bytes
    picture.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    main(sys.argv[1])
