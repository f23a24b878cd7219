"""The report in a real browser, from a file, without a network."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (BROWSER and DRIVER), reason="no chromium or no chromedriver (Debian: chromium-driver)")
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (pip install '.[dev]')")

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run", "--disable-component-update",
    "--disable-sync",
)  # fmt: skip


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser: Any, report: Path) -> Callable[..., Any]:
    def opened(name: str = "index.html", width: int = 1400, scheme: str = "light") -> Any:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
        browser.get((report / name).as_uri())
        return browser

    return opened


COLUMN = """
const table = document.querySelector("table.sortable"), place = arguments[0];
return [...table.tBodies[0].rows].map((row) => row.cells[place].getAttribute("data-sort"));
"""
STATE = 'return [...document.querySelector("table.sortable").tHead.rows[0].cells].map((cell) => cell.getAttribute("aria-sort"));'


def place_of(driver: Any, name: str) -> tuple[int, Any]:
    buttons = driver.find_elements("css selector", "table.sortable:first-of-type thead button")
    first = next(i for i, button in enumerate(buttons) if button.text.startswith(name))
    return first, buttons[first]


def numbers(column: list[str | None]) -> list[float]:
    return [float(value) for value in column if value is not None]


def test_a_click_sorts_by_number_and_says_so(page: Callable[..., Any]):
    driver = page()
    place, button = place_of(driver, "in-mode")
    before = driver.execute_script(COLUMN, place)
    button.click()
    up = driver.execute_script(COLUMN, place)
    assert up != before
    assert numbers(up) == sorted(numbers(up))
    assert driver.execute_script(STATE)[place] == "ascending"
    button.click()
    down = driver.execute_script(COLUMN, place)
    assert numbers(down) == sorted(numbers(down), reverse=True)
    states = driver.execute_script(STATE)
    assert states[place] == "descending"
    assert states.count(None) == len(states) - 1
    empty = before.count(None)
    assert empty > 0, "the skipped and the failed method have no score"
    assert up[-empty:] == down[-empty:] == [None] * empty


def test_the_keyboard_sorts_too(page: Callable[..., Any]):
    driver = page()
    place, button = place_of(driver, "method")
    before = driver.execute_script(COLUMN, place)
    driver.execute_script("arguments[0].focus()", button)
    driver.switch_to.active_element.send_keys("\n")
    names = driver.execute_script(COLUMN, place)
    assert names == sorted(before)
    assert names != before
    driver.switch_to.active_element.send_keys(" ")
    assert driver.execute_script(COLUMN, place) == sorted(before, reverse=True)


def test_the_links_of_the_index_and_of_a_run_open(page: Callable[..., Any], report: Path):
    driver = page()
    links = {link.get_attribute("href") for link in driver.find_elements("css selector", "a[href]")}
    runs = sorted(link for link in links if "/runs/" in link)
    assert runs
    for link in links:
        assert Path(link.partition("#")[0].removeprefix("file://")).is_file(), link
    for link in runs[:3]:
        driver.get(link)
        assert driver.find_element("tag name", "h1").text
        back = driver.find_element("css selector", "header a")
        back.click()
        assert driver.title == "distillbench report"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_pages_fit_load_their_pictures_and_log_nothing(page: Callable[..., Any], report: Path, width: int, scheme: str):
    run = sorted((report / "runs").glob("*-1.png"))[0].name.replace("-1.png", ".html")
    for name in ("index.html", f"runs/{run}"):
        driver = page(name, width, scheme)
        for fold in driver.find_elements("css selector", "details"):
            driver.execute_script("arguments[0].open = true", fold)
        assert driver.execute_script("return document.documentElement.scrollWidth") <= width, name
        shown = driver.execute_script("return [...document.images].map((one) => [one.currentSrc, one.complete && one.naturalWidth > 0]);")
        assert all(loaded for _, loaded in shown), [source for source, loaded in shown if not loaded]
        if name == "index.html":
            endings = {("narrow" in source, "dark" in source) for source, _ in shown if "passes" in source}
            assert endings == {(width == 400, scheme == "dark")}
        assert driver.get_log("browser") == []


RATIO = """
const light = (colour) => {
  const parts = colour.match(/[\\d.]+/g).map((part) => part / 255);
  const [r, g, b] = parts.map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const page = light(getComputedStyle(document.body).backgroundColor);
return [...document.querySelectorAll("p, a, td, th, button, caption, figcaption, small, summary, .claim")].map((one) => {
  const ink = light(getComputedStyle(one).color);
  return [(Math.max(ink, page) + 0.05) / (Math.min(ink, page) + 0.05), one.textContent.trim().slice(0, 40)];
});
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_stands_out(page: Callable[..., Any], scheme: str):
    """WCAG AA: a contrast of 4.5."""
    driver = page("index.html", 1400, scheme)
    background = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 24, 29)"}[scheme]
    assert [found for found in driver.execute_script(RATIO) if found[0] < 4.5] == []
