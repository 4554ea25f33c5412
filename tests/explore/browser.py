"""A headless Chromium on the page to explore, driven by Selenium."""

from __future__ import annotations

import importlib.util
import shutil
import time

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROME = next(filter(None, map(shutil.which, BROWSERS)), None)
DRIVER = shutil.which("chromedriver")


def missing() -> str:
    """Why these tests cannot run; "" if they can."""
    if importlib.util.find_spec("selenium") is None:
        return "selenium is not installed"
    needed = {"a browser (chromium)": CHROME, "chromedriver": DRIVER}
    lacks = [name for name, found in needed.items() if found is None]
    return f"{' and '.join(lacks)} not found" if lacks else ""


class Window:
    """A browser on the page."""

    def __init__(self, port: int):
        from selenium import webdriver
        from selenium.webdriver.common.keys import Keys

        options = webdriver.ChromeOptions()
        options.binary_location = CHROME
        for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
            options.add_argument(f"--{argument}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.keys, self.url = Keys, f"http://127.0.0.1:{port}/"
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
        self.size(1000)

    def size(self, width: int, height: int = 800) -> None:
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)

    def scheme(self, name: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": name}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def open(self) -> None:
        self.driver.get(self.url)
        self.until("return document.querySelectorAll('[role=option]').length > 0")

    def js(self, code: str, *arguments):
        return self.driver.execute_script(code, *arguments)

    def until(self, code: str, *arguments, seconds: float = 120.0):
        deadline = time.monotonic() + seconds
        while not (found := self.js(code, *arguments)):
            assert time.monotonic() < deadline, f"{code} {arguments}: never"
            time.sleep(0.02)
        return found

    def press(self, *keys: str) -> None:
        self.driver.switch_to.active_element.send_keys(*keys)

    def type(self, text: str) -> None:
        """As input methods do it: keys of a driver have no emoji. Waits for the answer."""
        self.js(
            "const p = document.getElementById('prompt'); p.focus(); p.value = arguments[0];"
            "window.drawn = false; new MutationObserver((_, o) => { window.drawn = true;"
            "o.disconnect(); }).observe(document.getElementById('length'), {childList: true});"
            "p.dispatchEvent(new Event('input', {bubbles: true}))",
            text,
        )

    def shows(self, text: str) -> None:
        self.type(text)
        self.until("return window.drawn && !document.getElementById('busy').textContent")

    def texts(self, selector: str) -> list[str]:
        return self.js(
            "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)", selector
        )

    def chosen(self) -> int:
        return int(
            self.js("return document.getElementById('list').getAttribute('aria-activedescendant')")[
                6:
            ]
        )

    def wait_for(self, place: int) -> None:
        """Until everything about that token is drawn."""
        self.until(
            "return document.getElementById('chosen').textContent.startsWith(arguments[0])",
            f"Token {place + 1} of ",
        )

    def focused(self) -> str:
        return self.js("return document.activeElement.id")
