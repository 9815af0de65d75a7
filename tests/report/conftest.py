"""The report of a small document, opened in a headless browser."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from report_browser import assert_quiet, missing_browser, opened, start_browser, written
from report_documents import small_document


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    reason = missing_browser()
    if reason is not None:
        pytest.skip(reason)
    browser = start_browser()
    yield browser
    browser.quit()


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return small_document()


@pytest.fixture(scope="module")
def address(document: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(document, tmp_path_factory.mktemp("report"))


@pytest.fixture
def page(chromium: Any, address: str) -> Iterator[Any]:
    """The page, freshly opened; at the end it must not have complained, nor asked for anything."""
    yield opened(chromium, address)
    assert_quiet(chromium)
