"""A page in a browser: opened, looked at and pointed at."""

from typing import Any

from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

Driver = Any


def open_page(browser: Driver, place: str) -> None:
    """Open the page on a desk's screen, with nothing remembered from before and nothing in its console."""
    look(browser)
    browser.get(place)
    browser.execute_script("localStorage.clear()")
    browser.get_log("browser")
    browser.get("about:blank")
    browser.get_log("performance")
    browser.get(place)


def look(browser: Driver, width: int = 1280, height: int = 900, scheme: str = "light", media: str = "") -> None:
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [
        {"name": "prefers-color-scheme", "value": scheme},
        {"name": "prefers-reduced-motion", "value": "reduce"},
    ]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})


def one(page: Driver, selector: str) -> WebElement:
    return page.find_element(By.CSS_SELECTOR, selector)


def every(page: Driver, selector: str) -> list[WebElement]:
    return list(page.find_elements(By.CSS_SELECTOR, selector))


def point(page: Driver, words: str) -> WebElement:
    return one(page, f'.pt[aria-label^="{words}"]')
