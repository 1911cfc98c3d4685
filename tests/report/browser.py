"""Headless Chromium with everything turned off that could touch the network, and what it saw."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.keys import Keys

Theme = Literal["light", "dark"]

ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


class Browser:
    """One page at a time, in the width, medium and theme that are asked for."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self._driver = driver

    def open(self, page: Path, *, width: int, theme: Theme = "light", medium: str = "screen") -> None:
        """Load `page` anew; below 500 pixels as a phone does."""
        self.command(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 500,
        )
        features = [{"name": "prefers-color-scheme", "value": theme}]
        self.command("Emulation.setEmulatedMedia", media=medium, features=features)
        self._driver.get(page.as_uri())

    def command(self, name: str, **parameters: object) -> dict[str, object]:
        """A command of the Chrome DevTools protocol."""
        answer = self._driver.execute_cdp_cmd(name, parameters)
        assert isinstance(answer, dict)
        return answer

    def ask(self, script: str, *arguments: object) -> object:
        """What a JavaScript function body returns for `arguments`."""
        return self._driver.execute_script(script, *arguments)

    def press_tab(self) -> None:
        self._driver.switch_to.active_element.send_keys(Keys.TAB)

    def console(self) -> list[str]:
        """Messages since the last call."""
        return [entry["message"] for entry in self._driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Addresses that were asked for since the last call."""
        entries = [json.loads(entry["message"])["message"] for entry in self._driver.get_log("performance")]
        return [
            entry["params"]["request"]["url"]
            for entry in entries
            if entry["method"] == "Network.requestWillBeSent"
        ]


@contextmanager
def started(chromium: str, chromedriver: str, folder: Path) -> Iterator[Browser]:
    """A browser whose profile lies in `folder`, which is empty."""
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (*ARGUMENTS, f"--user-data-dir={folder}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(chromedriver))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
