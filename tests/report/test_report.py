"""The report is one file that needs nothing else, says what is not there, and runs nothing that a record says."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fake_run import record, write_fake_run, write_rows
from PIL import Image

from flowlik.report.page.write import write_report

HOSTILE = "<script>alert('x')</script>\"'><img src=x onerror=alert(1)>"


class _Page(HTMLParser):
    """Tags in order with their attributes, and the tags that were left open."""

    VOID = frozenset({"meta", "img", "br", "hr", "link", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag


def _parsed(page: str) -> _Page:
    parser = _Page()
    parser.feed(page)
    assert parser.open == []
    return parser


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    run_dir = write_fake_run(tmp_path_factory.mktemp("run"), tasks=("thin-2d",), n=40)
    (run_dir / "figures").mkdir()
    for kind in ("bpd", "error", "scatter", "density"):
        image = Image.new("RGB", (1200, 600), "white")
        image.save(run_dir / "figures" / f"thin-2d--{kind}.png")
    return write_report(run_dir).read_text(encoding="utf-8")


def test_figures_are_inlined_with_words_for_those_who_do_not_see_them(page: str) -> None:
    images = [attrs for tag, attrs in _parsed(page).tags if tag == "img"]
    assert len(images) == 4
    for attrs in images:
        assert str(attrs["src"]).startswith("data:image/png;base64,")
        assert len(str(attrs["alt"])) > 20


def test_nothing_is_loaded_from_elsewhere(page: str) -> None:
    for tag, attrs in _parsed(page).tags:
        assert tag not in ("link", "iframe", "object", "embed")
        for name in ("src", "href", "action"):
            value = attrs.get(name) or ""
            assert value == "" or value.startswith(("#", "data:image/png;base64,")), (tag, name, value[:80])
    assert not re.search(r"@import|url\(|https?://", page)


def test_the_contents_lead_to_places_that_exist_and_ids_are_unique(page: str) -> None:
    tags = _parsed(page).tags
    ids = [attrs["id"] for _, attrs in tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {str(attrs["href"])[1:] for tag, attrs in tags if tag == "a"} <= set(ids)


def test_environment_statuses_and_reasons_stand_in_it(page: str) -> None:
    for words in (
        "2.13.0+cpu",
        "abc123",
        "needs a joint map",
        "more than 60 s",
        "no data: flowlik data get cifar10",
    ):
        assert words in page
    for status in ("refused", "timeout", "skipped"):
        assert f"1 {status}" in page


def test_costs_are_defined_and_impossible_values_explained(page: str) -> None:
    for words in (
        "vector-Jacobian",
        "forward-equivalents",
        "Why plain few-step maps",
        "a + b/N",
        "control-gaussian",
    ):
        assert words in page
    assert "mass of every density drawn" in page


def test_numbers_can_be_sorted_by_their_values(page: str) -> None:
    values = [
        attrs["data-value"] for tag, attrs in _parsed(page).tags if tag == "td" and "data-value" in attrs
    ]
    assert len(values) > 50
    assert all(float(str(value)) == float(str(value)) for value in values)


def test_every_text_of_a_record_is_escaped(tmp_path: Path) -> None:
    rows = [
        record(
            cell_id="a",
            task=HOSTILE,
            model=HOSTILE,
            split=HOSTILE,
            bpd=1.0,
            bpd_ref=1.0,
            ref_id=HOSTILE,
            nfe_mean=4,
        )
        | {"estimator_label": f"f2d2[steps=4,x={HOSTILE}]", "reason": HOSTILE, "bpd_mae": 0.1, "mass": 3.0},
        record(
            cell_id="b",
            task=HOSTILE,
            status="error",
            reason=HOSTILE,
            estimator=HOSTILE,
            estimator_label=HOSTILE,
        ),
    ]
    write_rows(tmp_path, rows)
    (tmp_path / "environments.jsonl").write_text(
        json.dumps({"env_id": HOSTILE, HOSTILE: {HOSTILE: HOSTILE}}) + "\n[\n"
    )
    (tmp_path / "run.json").write_text(
        json.dumps({"argv": ["flowlik", HOSTILE], "suite": HOSTILE, "started": HOSTILE})
    )
    page = write_report(tmp_path).read_text(encoding="utf-8")
    tags = _parsed(page).tags
    scripts = [attrs.get("type") for tag, attrs in tags if tag == "script"]
    assert scripts == ["application/json", None]  # data of the explorer, and what runs
    assert not any(name.startswith("on") for _, attrs in tags for name in attrs)
    assert not any(tag == "img" and attrs.get("src") == "x" for tag, attrs in tags)
    assert "&lt;script&gt;" in page


def test_the_explorer_is_hidden_without_scripts_and_its_points_are_the_records(page: str) -> None:
    tags = _parsed(page).tags
    (section,) = (attrs for tag, attrs in tags if attrs.get("id") == "explorer")
    assert "hidden" in section
    data = json.loads(page.partition('id="explorer-data">')[2].partition("</script>")[0])
    ids = {attrs.get("id") for _, attrs in tags}
    assert len(data["points"]) > 20
    assert {point["row"] for point in data["points"] if point["method"] != "control"} <= ids
    assert {one["label"] for one in data["measures"]} >= {"mean |error| (bits/dim)", "Spearman ρ"}
    euler = next(point for point in data["points"] if point["estimator"].startswith("ode[solver=euler"))
    low, high = euler["y"][0][1:]
    assert low <= euler["y"][0][0] <= high


def test_a_run_without_records_says_so(tmp_path: Path) -> None:
    page = write_report(tmp_path).read_text(encoding="utf-8")
    _parsed(page)
    assert "This run has no records yet" in page
    assert "At a glance" not in page


def test_a_run_without_results_gives_the_reasons(tmp_path: Path) -> None:
    write_rows(tmp_path, [record(status="skipped", reason="make it with: flowlik train gmm-2d meanflow")])
    page = write_report(tmp_path).read_text(encoding="utf-8")
    _parsed(page)
    assert "No cell of this run has a result" in page
    assert "flowlik train gmm-2d meanflow" in page


def test_rows_without_numbers_survive(tmp_path: Path) -> None:
    rows = [record(cell_id="a"), record(cell_id="b", task=None, model=None, steps=None, dim=None, bpd=1.0)]
    write_rows(tmp_path, rows)
    _parsed(write_report(tmp_path).read_text(encoding="utf-8"))
