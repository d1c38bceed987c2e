"""The report in a real browser: nothing is cut, and every control does what it says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import WIDER, browser
from fake_run import write_fake_run

from flowlik.report.page import site
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


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 800, 400])
def test_the_explorer_filters_and_leads_to_records(
    chromium: Any, page_file: str, width: int, scheme: str
) -> None:
    page = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(page_file)
    page.locator("select[name=task]").select_option("gmm-64d")
    points = page.locator(".plot a")
    usable = points.count()
    page.locator("select[name=kind]").select_option("closed")
    assert points.count() == 0  # the run has none
    assert "No result" in page.locator(".best").inner_text()
    page.locator("select[name=kind]").select_option("network")
    assert points.count() == usable
    assert page.locator(".plot .hollow").count() == 0
    page.locator("select[name=method]").select_option("f2d2")
    assert 0 < points.count() < usable
    page.locator("select[name=method]").select_option("")
    page.locator("input[name=budget]").fill("40")
    within = points.count()
    assert 0 < within < usable
    page.locator("select[name=cost]").select_option("1")
    page.locator("select[name=measure]").select_option("1")
    assert "bias" in str(page.locator(".plot svg").get_attribute("aria-label"))
    points.first.focus()
    detail = page.locator(".detail")
    record = str(points.first.get_attribute("data-id"))
    assert record in detail.inner_text()
    assert f"flowlik reproduce {record}" in detail.inner_text()
    assert "flowlik run -t gmm-64d" in detail.inner_text()
    points.last.hover()
    assert str(points.last.get_attribute("data-id")) in detail.inner_text()
    points.first.focus()
    page.keyboard.press("Enter")
    address = page.evaluate("location.hash")
    assert address == points.first.get_attribute("href")
    assert page.evaluate("document.querySelector(':target').tagName") == "TR"
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert problems == []
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 400])
def test_axe_finds_nothing_of_any_weight(chromium: Any, page_file: str, width: int, scheme: str) -> None:
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="no axe here: pip install axe-playwright-python"
    )
    # the page's own policy would keep the examiner's script out
    context = chromium.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, bypass_csp=True
    )
    page = context.new_page()
    page.goto(page_file)
    found = axe.Axe().run(page).response
    assert found["passes"]
    assert [(each["id"], each["nodes"][0]["html"]) for each in found["violations"]] == []
    context.close()


@pytest.mark.parametrize("width", [1400, 400])
def test_no_page_of_the_results_site_is_wider_than_the_window(
    chromium: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setattr(site, "write_report", lambda folder: (folder / "report.html").write_text("a report"))
    tasks = ("thin-2d", "gmm-2d", "gmm-64d", "digits", "fashion-mnist", "cifar10")
    site.write_site([write_fake_run(tmp_path / "run", tasks=tasks, n=20, steps=(1, 8))], tmp_path / "site")
    page = chromium.new_page(viewport={"width": width, "height": 900})
    for file in ("index.html", "task-gmm-64d.html"):
        page.goto((tmp_path / "site" / file).as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width, file
    page.close()
