"""Headless Chromium, as the tests of pages use it."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException, TimeoutException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from tests.system_packages import program

PROGRAMS = ("chromium", "chromedriver")
PATIENCE = 120  # seconds; the machine may be busy
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
    "--disable-extensions", "--window-size=1500,1000", "--lang=en-US",
)  # fmt: skip


class Page:
    """A browser with waits that outlast redrawing.

    Args:
        driver: Of selenium.
    """

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def until(self, found: Callable[[], Any], what: str) -> Any:
        """Waits for a true answer; an element that was redrawn meanwhile is asked for again."""
        wait = WebDriverWait(self.driver, PATIENCE, 0.2, ignored_exceptions=[StaleElementReferenceException])
        try:
            return wait.until(lambda _: found())
        except TimeoutException:
            raise AssertionError(f"waited for {what}; {self.driver.current_url} says:\n{self.text()[:3000]}") from None

    def text(self) -> str:
        """All that a reader sees."""
        return str(self.driver.find_element(By.TAG_NAME, "body").text)

    def all(self, css: str) -> list[Any]:
        """Elements by CSS selector."""
        return self.driver.find_elements(By.CSS_SELECTOR, css)

    def first(self, css: str) -> Any:
        """The first element, as soon as it is there."""
        return self.until(lambda: next(iter(self.all(css)), None), css)

    def click(self, element: Any) -> None:
        """A click that nothing floating above intercepts."""
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'}); arguments[0].click()", element)

    def shoot(self, path: Path) -> None:
        """A screenshot."""
        path.parent.mkdir(parents=True, exist_ok=True)
        assert self.driver.save_screenshot(str(path))

    def hosts(self) -> set[str]:
        """host:port of everything that the page asked for since the last call."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return {urlsplit(url).netloc for url in urls if urlsplit(url).scheme in ("http", "https", "ws", "wss")}


@contextmanager
def browser(profile: Path, headers: dict[str, str] | None = None, microphone: Path | None = None) -> Iterator[Page]:
    """Chromium, or Chrome, with an empty profile.

    Args:
        profile: Directory that is not there yet.
        headers: Sent with every request, such as a password.
        microphone: WAV file that is heard again and again where a page records.
    """
    options = webdriver.ChromeOptions()
    options.binary_location = program("chromium")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    heard = ["--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream",
             f"--use-file-for-fake-audio-capture={microphone}"] if microphone else []  # fmt: skip
    for flag in (*FLAGS, *heard, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=Service(program("chromedriver")))
    try:
        driver.set_page_load_timeout(PATIENCE)
        if headers:
            driver.execute_cdp_cmd("Network.enable", {})
            driver.execute_cdp_cmd("Network.setExtraHTTPHeaders", {"headers": headers})
        yield Page(driver)
    finally:
        driver.quit()
