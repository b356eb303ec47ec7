"""Chromium without a window, driven by selenium and the system's chromedriver.

`python tests/browser.py FOLDER` takes pictures of the page: explore.png and explore-phone.png.

Source of the commands and events: https://chromedevtools.github.io/devtools-protocol/
"""

import io
import json
import os
import shutil
import sys
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver import ActionChains

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# root has no sandbox in containers; the pages are our own
OPTIONS = "headless=new no-first-run no-sandbox disable-dev-shm-usage disable-gpu hide-scrollbars"
OPTIONS += " disable-background-networking force-color-profile=srgb"
PICTURES = {
    "explore": (1000, 2300, "light", ""),
    "explore-phone": (360, 1600, "dark", "#model=Phi-3+128k&pair=12&m=300"),
}


def programs():
    """The paths of a browser and of its driver; None if one is missing."""
    names = (os.environ.get("CHROMIUM", ""), *PROGRAMS)
    browser = next(filter(None, map(shutil.which, names)), None)
    driver = shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


class Browser:
    def __init__(self):
        browser, driver = programs()
        options = webdriver.ChromeOptions()
        options.binary_location = browser
        for option in OPTIONS.split():
            options.add_argument(f"--{option}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self._driver = webdriver.Chrome(options, webdriver.ChromeService(driver))
        self.close = self._driver.quit
        self.call = self._driver.execute_cdp_cmd  # a command of the DevTools protocol

    def open(self, path, fragment=""):
        """Loads a file anew, with the size and colour scheme that `emulate` has set."""
        self._driver.get("about:blank")  # only another fragment would not load it again
        self.problems(), self.requests()  # both clear the log
        self._driver.get(Path(path).resolve().as_uri() + fragment)

    def emulate(self, width, height, scheme="light"):
        """Sets the size of the window, in pixels, and a light or dark scheme."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", {"features": features})

    def evaluate(self, expression):
        """The value of a JavaScript expression; a promise is awaited."""
        of = {"expression": expression, "returnByValue": True, "awaitPromise": True}
        answer = self.call("Runtime.evaluate", of)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def press(self, key, times=1):
        """Presses a key of selenium's Keys or a character, in the focused element."""
        ActionChains(self._driver).send_keys(key * times).perform()

    def problems(self):
        return self._driver.get_log("browser")

    def requests(self):
        """The addresses that were fetched since the page was opened, without their fragments."""
        logged = self._driver.get_log("performance")
        events = (json.loads(entry["message"])["message"] for entry in logged)
        sent = (e["params"] for e in events if e["method"] == "Network.requestWillBeSent")
        return [event["request"]["url"].partition("#")[0] for event in sent]

    def picture(self):
        return Image.open(io.BytesIO(self._driver.get_screenshot_as_png())).convert("RGB")


def main(folder):
    from rope_ext.viz.page import page

    file = Path(folder, "page.html")
    file.write_text(page(), encoding="utf-8")
    browser = Browser()
    for name, (width, height, scheme, fragment) in PICTURES.items():
        browser.emulate(width, height, scheme)
        browser.open(file, fragment)
        browser.picture().save(Path(folder, f"{name}.png"), optimize=True)
    browser.close()
    file.unlink()


if __name__ == "__main__":
    main(sys.argv[1])
