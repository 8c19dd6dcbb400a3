"""Debian's Chromium, without a screen, for tests of pages."""

import shutil

import pytest

webdriver = pytest.importorskip("selenium.webdriver")


def open_chromium(seconds):
    """A driver; pages that load for longer than ``seconds`` are an error."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "window-size=1200,1000"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    driver.set_page_load_timeout(seconds)
    return driver
