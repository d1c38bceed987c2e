"""The report in a real browser: nothing is cut, and every control does what it says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from browser import WIDER, browser
from fake_run import write_fake_run

from flowlik.report.page.write import write_report

pytestmark = pytest.mark.slow
A4 = 718
"""Pixels of a printed page between its margins."""


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    run_dir = write_fake_run(tmp_path_factory.mktemp("run"), tasks=("thin-2d", "gmm-64d"), n=40)
    return write_report(run_dir).as_uri()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as started:
        yield started


@pytest.mark.parametrize("scripts", [True, False])
@pytest.mark.parametrize(
    ("width", "media"), [(1400, "screen"), (800, "screen"), (400, "screen"), (A4, "print")]
)
def test_nothing_reaches_beyond_the_page(
    chromium: Any, page_file: str, width: int, media: str, scripts: bool
) -> None:
    page = chromium.new_page(viewport={"width": width, "height": 900}, java_script_enabled=scripts)
    page.emulate_media(media=media)
    page.goto(page_file)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(WIDER) == []
    page.close()


def test_a_switch_shows_the_other_columns_without_scripts(chromium: Any, page_file: str) -> None:
    page = chromium.new_page(viewport={"width": 1400, "height": 900}, java_script_enabled=False)
    page.goto(page_file)
    table = page.locator(".table", has=page.locator("input.all")).first
    heads = table.locator("thead th")
    before = [head for head in heads.all() if head.is_visible()]
    assert len(before) <= 8
    table.locator("input.all").check()
    assert all(head.is_visible() for head in heads.all())
    assert heads.count() > len(before)
    page.close()


def test_heads_stay_while_a_table_scrolls_and_a_row_has_an_address(chromium: Any, page_file: str) -> None:
    page = chromium.new_page(viewport={"width": 1400, "height": 300})
    page.goto(page_file)
    link = page.locator(".table tbody tr:last-child th a").nth(2)
    page.goto(f"{page_file}{link.get_attribute('href')}")
    row = page.locator(str(link.get_attribute("href")).replace(".", "\\."))
    top = row.evaluate("e => e.getBoundingClientRect().top")
    head = row.evaluate("e => e.closest('table').tHead.rows[0].cells[0].getBoundingClientRect()")
    assert 0 <= top <= 300
    assert 0 <= head["top"] <= 1
    assert head["bottom"] <= top + 1
    page.close()
