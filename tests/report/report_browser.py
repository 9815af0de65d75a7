"""A browser for the report, and what to ask of a page in it."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest

from moadapt.report import render_report

# What the page says about its cells, by the ids of their tables.
CELLS = """
const found = {};
for (const cell of document.querySelectorAll(`[data-key^="${arguments[0]}:"]`)) {
  found[cell.dataset.key.slice(arguments[0].length + 1)] = [cell.textContent, cell.getAttribute('aria-label'),
    cell.dataset.value === undefined ? null : Number(cell.dataset.value)];
}
return found;
"""
LUMINANCE = """
const light = (rgb) => {
  const [r, g, b] = rgb.match(/[\\d.]+/g).slice(0, 3).map((v) => (rgb.startsWith('color(srgb') ? Number(v) : v / 255))
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
return [...document.querySelectorAll(arguments[0])].map((cell) => { const style = getComputedStyle(cell);
  return [light(style.backgroundColor), light(style.color)]; });
"""


def missing_browser() -> str | None:
    """Why no page can be opened here; None: it can."""
    if importlib.util.find_spec("selenium") is None:
        return "selenium is not installed (pip install 'moadapt[test]')"
    for program in ("chromium", "chromedriver"):
        if shutil.which(program) is None:
            return f"{program} is not installed (Debian: apt-get install chromium chromium-driver)"
    return None


def start_browser() -> Any:
    """A headless Chromium that may use no network, not even for its own driver."""
    from selenium import webdriver  # only where it is installed

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1400,1000"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(str(shutil.which("chromedriver"))))


def written(document: dict[str, Any], folder: Path) -> str:
    path = folder / "routing.html"
    path.write_text(render_report(document), encoding="utf-8")
    return path.as_uri()


def opened(chromium: Any, address: str, width: int = 1400, scheme: str = "light") -> Any:
    size = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    chromium.get_log("browser")
    chromium.get(address)
    return chromium


def assert_quiet(page: Any) -> None:
    assert page.get_log("browser") == []
    assert page.execute_script("return performance.getEntriesByType('resource').length") == 0


def choose(page: Any, name: str, text: str) -> None:
    from selenium.webdriver.support.ui import Select  # only where it is installed

    Select(page.find_element("id", f"f-{name}")).select_by_visible_text(text)


def cells(page: Any, table: str) -> dict[tuple[int, int], tuple[str, str, float | None]]:
    found = page.execute_script(CELLS, table)
    return {tuple(map(int, key.split(":"))): tuple(value) for key, value in found.items()}  # type: ignore[misc]


def assert_shows(cell: tuple[str, str, float | None], value: float, scale: float = 100.0, digits: int = 1) -> None:
    """A cell prints the value, carries it to five digits, and says it aloud."""
    text, say, carried = cell
    printed = text.split()[0]
    if printed.startswith("<"):
        assert 0 < value * scale < float(printed[1:])
    else:
        assert abs(float(printed) - value * scale) <= 0.5 * 10**-digits + 5e-5 * abs(value * scale) + 1e-9
    assert carried == pytest.approx(value, rel=5e-5)
    assert f": {printed}" in say


def texts(page: Any, selector: str) -> list[str]:
    found: list[str] = page.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map((node) => node.textContent)", selector
    )
    return found


def open_numbers(page: Any, section: str, which: int = 0) -> list[list[str]]:
    """The table behind a picture."""
    box = page.find_elements("css selector", f"#{section} details")[which]
    box.find_element("tag name", "summary").click()
    rows: list[list[str]] = page.execute_async_script(
        "const [box, done] = arguments; const look = () => { const rows = [...box.querySelectorAll('tbody tr')];"
        "if (rows.length) done(rows.map((row) => [...row.children].map((cell) => cell.textContent)));"
        "else setTimeout(look, 10); }; look();",
        box,
    )
    return rows


def by_module(document: dict[str, Any], module: str) -> list[dict[str, Any]]:
    return [router for router in document["routers"] if router["module"] == module]


MODULES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
