"""Using the report in a real browser: filters, keys, hover, widths, schemes, and what a screen reader is given."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from report_browser import (
    LUMINANCE,
    MODULES,
    assert_quiet,
    assert_shows,
    by_module,
    cells,
    choose,
    opened,
    texts,
    written,
)
from report_documents import HOSTILE


def test_text_from_outside_never_becomes_markup(page: Any, document: dict[str, Any]) -> None:
    assert page.title == document["title"]
    assert texts(page, "h1") == [document["title"]]
    assert page.execute_script("return window.hurt") is None
    assert page.execute_script("return document.images.length") == 0
    token = page.find_element("css selector", "[data-key='text:0:2']")
    assert token.text.endswith(HOSTILE)


def test_filters_keep_what_they_name(page: Any, document: dict[str, Any]) -> None:
    choose(page, "module", MODULES[1])
    assert texts(page, "#load figcaption")[:-1] == [MODULES[1]]
    assert page.find_element("id", "shown").text == f"4 of 12 routers; in detail: layer 0, {MODULES[1]}."
    choose(page, "layer", "layer 2")
    router = by_module(document, MODULES[1])[2]
    found = cells(page, "load-1")
    assert set(found) == {(0, expert) for expert in range(5)}
    for expert in range(5):
        assert_shows(found[0, expert], router["load"]["share"][expert])
    assert set(cells(page, "balance")) == {(0, 0)}

    choose(page, "task", "task 01")
    found = cells(page, "load-1")
    for expert in range(5):
        assert_shows(found[0, expert], router["by_task"]["share"][1][expert])
    assert {row for row, _ in cells(page, "tasks")} == {0}
    assert [heading.split(",")[0] for heading in texts(page, "#text h3")] == ["task 01"]
    assert not page.find_element("id", "f-part").is_enabled()

    page.find_element("css selector", "#filters [type=reset]").click()
    assert page.find_element("id", "shown").text.startswith("12 of 12 routers")
    assert len(cells(page, "load-0")) == len(cells(page, "load-2")) == 20
    assert texts(page, "#f-module option:checked") == ["all modules"]


def test_a_verdict_leads_to_its_router(chromium: Any, document: dict[str, Any], tmp_path: Path) -> None:
    document = copy.deepcopy(document)
    router = document["routers"][7]
    verdicts = [{"level": "ok", "router": router["name"], "measure": "load", "value": 0.1, "text": "all is well"}]
    verdicts += [{"level": "note", "router": "", "measure": "load", "value": 0.1, "text": "about the whole"}]
    verdicts += [
        {"level": "warning", "router": router["name"], "measure": "load", "value": 0.1, "text": f"no {n}"}
        for n in range(12)
    ]
    page = opened(chromium, written(document | {"verdicts": verdicts}, tmp_path))
    shown = texts(page, "#summary .verdict .words")
    assert shown == ["about the whole", *(f"no {number}" for number in range(12)), "all is well"]
    assert texts(page, "#summary .more > summary") == ["4 more"]
    assert texts(page, ".verdict .badge")[:2] == ["●\u00a0Note", "▲\u00a0Warning"]
    page.find_element("css selector", ".verdict button").click()
    assert page.find_element("id", "shown").text == f"1 of 12 routers; in detail: layer 2, {router['module']}."
    assert_quiet(page)


def test_gates_show_on_hover_and_on_focus(page: Any) -> None:
    from selenium.webdriver import ActionChains, Keys  # only where it is installed

    tip = page.find_element("id", "tip")
    token = page.find_element("css selector", "[data-key='text:0:4']")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", token)
    assert not tip.is_displayed()
    ActionChains(page).move_to_element(token).perform()
    assert tip.is_displayed()
    assert tip.text == token.get_attribute("aria-label")
    ActionChains(page).move_to_element(page.find_element("id", "text-h")).perform()
    assert not tip.is_displayed()

    first = page.find_element("css selector", "[data-key='text:0:0']")
    page.execute_script("arguments[0].focus()", first)
    for key, at in [
        (Keys.ARROW_RIGHT, 1),
        (Keys.ARROW_DOWN, 11),
        (Keys.END, 39),
        (Keys.ARROW_LEFT, 38),
        (Keys.HOME, 0),
    ]:
        page.switch_to.active_element.send_keys(key)
        active = page.switch_to.active_element
        assert active.get_attribute("data-key") == f"text:0:{at}"
        assert active.get_attribute("aria-selected") == "true"
        assert tip.text == active.get_attribute("aria-label")
    active.send_keys(Keys.ESCAPE)
    assert not tip.is_displayed()


def test_one_expert_is_brought_out(page: Any, document: dict[str, Any]) -> None:
    choose(page, "expert", "3")
    name = document["routers"][0]["name"]
    faded = page.execute_script(
        "return [...document.querySelectorAll('[data-key^=\"text:0:\"]')].map((n) => n.classList.contains('faded'))"
    )
    gates = document["text"][0]["routers"][name]["all"]
    assert faded == [max(pairs, key=lambda pair: pair[1])[0] != 3 for pairs in gates]
    assert page.switch_to.active_element.get_attribute("id") == "f-expert"


def test_the_arrow_keys_walk_a_heat_map(page: Any, document: dict[str, Any]) -> None:
    from selenium.webdriver import Keys  # only where it is installed

    def at() -> str | None:
        return page.switch_to.active_element.get_attribute("data-key")

    def press(*keys: str) -> None:
        page.switch_to.active_element.send_keys(*keys)

    page.find_element("id", "f-part").click()
    press(Keys.ESCAPE)
    press(Keys.TAB)
    assert at() == "load-0:0:0"
    for keys, expected in [
        ([Keys.ARROW_RIGHT], "0:1"),
        ([Keys.ARROW_DOWN], "1:1"),
        ([Keys.END], "1:4"),
        ([Keys.ARROW_RIGHT], "1:4"),
        ([Keys.CONTROL, Keys.END], "3:4"),
        ([Keys.HOME], "3:0"),
        ([Keys.ARROW_UP], "2:0"),
        ([Keys.PAGE_UP], "0:0"),
        ([Keys.ARROW_UP], "0:0"),
        ([Keys.PAGE_DOWN], "3:0"),
        ([Keys.CONTROL, Keys.HOME], "0:0"),
        ([Keys.ARROW_DOWN], "1:0"),
    ]:
        press(*keys)
        assert at() == f"load-0:{expected}", keys
    press(Keys.ENTER)
    assert at() == "load-0:1:0", "the focus survives the redraw"
    assert page.find_element("id", "shown").text.endswith(f"layer 1, {MODULES[0]}.")
    assert texts(page, "#load tr.chosen th") == ["1"]
    press(Keys.TAB)
    assert at() == "load-1:0:0", "one stop per grid"
    press(Keys.SHIFT, Keys.TAB)
    assert at() == "load-0:1:0", "and back to the cell that was left"
    # The diagonal is no cell: the keys step over it.
    page.execute_script("document.querySelector('[data-key=\"together:0:1\"]').focus()")
    press(Keys.ARROW_LEFT)
    assert at() == "together:0:1"
    press(Keys.ARROW_DOWN)
    assert at() == "together:2:1"


def test_what_a_screen_reader_needs(page: Any) -> None:
    found = page.execute_script(
        """
        const all = (selector) => [...document.querySelectorAll(selector)];
        const named = (node) => node.labels?.length || node.getAttribute('aria-label')
          || node.getAttribute('aria-labelledby');
        const pictures = 'select, [role=grid], [role=listbox], svg:not([aria-hidden]), section, form, nav';
        const ids = all('[id]').map((node) => node.id);
        return {
          lang: document.documentElement.lang,
          levels: all('h1, h2, h3, h4').map((node) => Number(node.tagName[1])),
          unnamed: all(pictures).filter((node) => !named(node)).map((node) => node.outerHTML.slice(0, 80)),
          dangling: all('[aria-labelledby]')
            .filter((node) => !ids.includes(node.getAttribute('aria-labelledby'))).length,
          scopes: all('th').filter((node) => !node.scope).length,
          twice: ids.length - new Set(ids).size,
          stops: all('[role=grid], [role=listbox]').map((grid) => grid.querySelectorAll('[tabindex="0"]').length),
          anchors: all('nav a').filter((node) => !document.querySelector(node.getAttribute('href'))).length,
          marks: ['main', 'header', 'nav'].map((tag) => document.querySelectorAll(tag).length),
        };
        """
    )
    assert found["lang"] == "en"
    assert found["levels"].count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(found["levels"]))
    assert found["unnamed"] == []
    assert (found["dangling"], found["scopes"], found["twice"], found["anchors"]) == (0, 0, 0, 0)
    assert set(found["stops"]) == {1}
    assert found["marks"] == [1, 1, 1]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_numbers_are_legible_in_both_schemes(
    chromium: Any, address: str, document: dict[str, Any], scheme: str
) -> None:
    page = opened(chromium, address, scheme=scheme)
    ((back, ink),) = page.execute_script(LUMINANCE, "body")
    assert (back < 0.05) is (scheme == "dark")
    assert (max(back, ink) + 0.05) / (min(back, ink) + 0.05) > 7
    pairs = page.execute_script(LUMINANCE, ".heat td[data-value], .legend .steps span")
    assert len(pairs) > 60
    assert all((max(pair) + 0.05) / (min(pair) + 0.05) > 4.5 for pair in pairs)
    # In grey, a larger value is always further from the page: darker by day, lighter by night.
    values = [cells(page, "load-0")[layer, expert][2] for layer in range(4) for expert in range(5)]
    shades = [pair[0] for pair in page.execute_script(LUMINANCE, "#load .heatmap:first-child td")]
    ordered = [shade for _, shade in sorted(zip(values, shades, strict=True), reverse=scheme == "light")]
    assert all(a <= b + 0.004 for a, b in pairwise(ordered))
    assert max(shades) - min(shades) > 0.3
    tokens = page.execute_script(LUMINANCE, ".token.sample")
    assert all((max(pair) + 0.05) / (min(pair) + 0.05) > 4.5 for pair in tokens)
    assert_quiet(page)


def test_the_scheme_may_change_while_the_page_is_open(page: Any) -> None:
    before = page.execute_script(LUMINANCE, "[data-key='load-0:0:0']")
    media = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    page.execute_async_script(
        "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(() => done()))"
    )
    assert page.execute_script(LUMINANCE, "[data-key='load-0:0:0']") != before


@pytest.mark.parametrize("width", [400, 900, 1400])
def test_no_width_makes_the_page_scroll_sideways(chromium: Any, address: str, width: int) -> None:
    page = opened(chromium, address, width)
    found = page.execute_script(
        "const root = document.documentElement; const room = root.clientWidth;"
        "return [root.scrollWidth - room, [...document.querySelectorAll('svg.chart, .block, .text, select')]"
        ".filter((node) => node.getBoundingClientRect().right > room + 1).length];"
    )
    assert found == [0, 0]
    expected = MODULES[0] if width == 400 else "all modules"
    assert texts(page, "#f-module option:checked") == [expected]
    assert_quiet(page)


def test_charts_follow_the_width(page: Any) -> None:
    before = page.find_element("css selector", "#entropy svg.chart").size["width"]
    size = {"width": 700, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    after = page.execute_async_script(
        "const [old, done] = arguments; const start = performance.now(); const look = () => {"
        "const now = document.querySelector('#entropy svg.chart').getAttribute('width');"
        "if (Number(now) !== old || performance.now() - start > 3000) done(Number(now)); else setTimeout(look, 20); };"
        "look();",
        before,
    )
    assert 500 < after < 700 < before
