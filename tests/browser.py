"""Chromium without a window, driven by selenium and the system's chromedriver.

`python tests/browser.py docs/explore.png` takes the README's picture of the page.

Source of the commands and events: https://chromedevtools.github.io/devtools-protocol/
"""

import io
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from selenium import webdriver
from selenium.webdriver import ActionChains, Keys

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
OPTIONS = (
    "--headless=new",
    "--no-first-run",
    "--no-sandbox",  # root has no sandbox in containers; the pages are our own
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--disable-background-networking",
    "--force-color-profile=srgb",
    "--hide-scrollbars",
)
KEYS = {
    "Tab": Keys.TAB,
    "PageUp": Keys.PAGE_UP,
    "End": Keys.END,
    "Home": Keys.HOME,
    "ArrowLeft": Keys.ARROW_LEFT,
    "ArrowUp": Keys.ARROW_UP,
    "ArrowRight": Keys.ARROW_RIGHT,
    "ArrowDown": Keys.ARROW_DOWN,
}


def programs():
    """The paths of a browser, $CHROMIUM first, and of its driver; None if one is missing."""
    names = (os.environ.get("CHROMIUM", ""), *PROGRAMS)
    browser = next(filter(None, map(shutil.which, names)), None)
    driver = shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


class Browser:
    """A browser with one page."""

    def __init__(self):
        browser, driver = programs()
        options = webdriver.ChromeOptions()
        options.binary_location = browser
        for option in OPTIONS:
            options.add_argument(option)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self._driver = webdriver.Chrome(options, webdriver.ChromeService(driver))
        self.close = self._driver.quit

    def call(self, method, **parameters):
        """The result of a command of the DevTools protocol."""
        return self._driver.execute_cdp_cmd(method, parameters)

    def open(self, path):
        """Loads a file, with the size and colour scheme that `emulate` has set."""
        for log in ("browser", "performance"):
            self._driver.get_log(log)  # this clears the log
        self._driver.get(Path(path).resolve().as_uri())

    def emulate(self, width, height, scheme="light", phone=False):
        """Sets the size of the window, in pixels, and a light or dark scheme."""
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
        """The value of a JavaScript expression; a promise is awaited."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def press(self, key, times=1):
        """Presses a key of KEYS or a character, in the focused element."""
        ActionChains(self._driver).send_keys(KEYS.get(key, key) * times).perform()

    def problems(self):
        """Console messages since the page was opened, and uncaught errors."""
        return self._driver.get_log("browser")

    def requests(self):
        """The addresses that were fetched since the page was opened."""
        logged = self._driver.get_log("performance")
        events = (json.loads(entry["message"])["message"] for entry in logged)
        sent = (e["params"] for e in events if e["method"] == "Network.requestWillBeSent")
        return [event["request"]["url"] for event in sent]

    def picture(self):
        """The window as a PNG."""
        return self._driver.get_screenshot_as_png()


def main(path):
    from PIL import Image

    from rope_ext.viz.page import page

    if programs() is None:
        raise SystemExit("no browser: install chromium and chromium-driver")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "page.html")
        file.write_text(page(), encoding="utf-8")
        browser = Browser()
        browser.emulate(1000, 2140)
        browser.open(file)
        picture = Image.open(io.BytesIO(browser.picture()))
        browser.close()
    # 256 colours are enough, and take half of the bytes
    picture.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    main(sys.argv[1])
