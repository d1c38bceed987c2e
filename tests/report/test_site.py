"""The results site: every number leads to its record, runs of others are merged and run again, nothing else is lost."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from fake_run import record, write_fake_run, write_rows
from typer.testing import CliRunner

import flowlik
from flowlik.cells import Cell, Options
from flowlik.cli import app
from flowlik.report.page import site
from flowlik.running.run import run_cells
from flowlik_estimators import get

NASTY = "<script>alert(1)</script>"


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report has tests of its own, and its figures take seconds."""
    monkeypatch.setattr(site, "write_report", lambda folder: (folder / "report.html").write_text("a report"))


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """One run of ours, and one by somebody else with a method of their own."""
    ours = write_fake_run(tmp_path / "ours", tasks=("gmm-2d",), n=20, steps=(1, 8))
    theirs = tmp_path / "theirs"
    known = {"estimator": "mine", "estimator_label": NASTY, "bpd_mae": 0.0123, "bpd": 1.5, "nfe_mean": 3.0}
    write_rows(
        theirs, [record(cell_id="theirs-1", task="digits", dim=64, **known, env_id="e1", family="own")]
    )
    (theirs / "environments.jsonl").write_text(json.dumps({"env_id": "e1", "cpu": "their CPU"}) + "\n")
    return [ours, theirs]


def call(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["gallery", *map(str, words)])
    return result.exit_code, result.output


def test_every_number_leads_to_its_record(runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "site"
    status, said = call(*runs, "--out", out)
    assert status == 0, said
    index = (out / "index.html").read_text()
    links = re.findall(r'<td><a href="([^"#]+)#([^"]+)">([^<]+)</a>', index)
    assert len(links) > 4
    for page, anchor, text in links:
        entry = (out / page).read_text().partition(f'<section id="{anchor}">')[2].partition("</section>")[0]
        assert f"<dd>{text.partition(' ')[0]}</dd>" in entry
        assert f"flowlik reproduce {anchor} --in run" in entry
    for link in re.findall(r'href="([^"#]+)', index):
        assert (out / link).is_file(), link
    assert "0.0123 (3)" in index
    assert {"theirs: 1 records"} < set(re.findall(r"<li>([^<]+)</li>", index))


def test_a_record_of_several_runs_is_that_of_the_run_it_was_taken_from(tmp_path: Path) -> None:
    for name, day, bpd in (("older", "2026-01-01", 1.7505), ("newer", "2026-02-01", 1.75)):
        row = record(cell_id="shared", task="gmm-2d", bpd=bpd, created_utc=f"{day}T00:00:00Z")
        write_rows(tmp_path / name, [row])
    site.write_site([tmp_path / "older", tmp_path / "newer"], tmp_path / "site")
    page = (tmp_path / "site" / "task-gmm-2d.html").read_text()
    assert "<dd>1.75</dd>" in page
    assert "<dt>run</dt><dd>newer</dd>" in page
    assert "<li>newer: 1 records</li>" in (tmp_path / "site" / "index.html").read_text()


def test_words_of_a_record_are_shown_and_never_run(runs: list[Path], tmp_path: Path) -> None:
    call(*runs, "--out", tmp_path / "site")
    page = (tmp_path / "site" / "task-digits.html").read_text()
    assert NASTY not in page + (tmp_path / "site" / "index.html").read_text()
    assert "&lt;script&gt;" in page
    assert "their CPU" in page
    assert "default-src 'none'" in page


def test_a_site_is_written_again_and_over_nothing_else(runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "site"
    assert call(*runs, "--out", out)[0] == 0
    assert call(runs[0], "--out", out)[0] == 0
    assert not (out / "task-digits.html").exists()
    assert len(flowlik.read_records(out / "run")) == len(flowlik.read_records(runs[0]))
    other = tmp_path / "other"
    other.mkdir()
    (other / "index.html").write_text("something else")
    status, said = call(*runs, "--out", other)
    assert (status, said.count("\n")) == (2, 1)
    assert "no results site" in said
    assert [path.name for path in other.iterdir()] == ["index.html"]


def test_an_installed_package_is_never_written_into(runs: list[Path], tmp_path: Path) -> None:
    inside = Path(flowlik.__file__).parent / "results-site"
    for out in (inside, tmp_path / "lib" / "site-packages" / "flowlik" / "site"):
        status, said = call(*runs, "--out", out)
        assert (status, said.count("\n")) == (2, 1)
        assert "never written into an installed package" in said
        assert not out.exists()


def test_runs_of_another_schema_are_one_line(runs: list[Path], tmp_path: Path) -> None:
    file = runs[1] / "records.jsonl"
    file.write_text(file.read_text().replace('"schema_version": 1', '"schema_version": 0'))
    status, said = call(*runs, "--out", tmp_path / "site")
    assert (status, said.count("\n")) == (2, 1)
    assert "its records have schema 0, not 1" in said
    assert not (tmp_path / "site").exists()


def test_the_history_of_timings_lies_beside_the_records(runs: list[Path], tmp_path: Path) -> None:
    asv, out = tmp_path / "asv-html", tmp_path / "site"
    asv.mkdir()
    status, said = call(*runs, "--out", out, "--timings", asv)
    assert (status, said.count("\n"), out.exists()) == (2, 1, False)
    assert "holds no pages of asv" in said
    for name in ("index.html", "index.json"):
        (asv / name).write_text(name)
    assert call(*runs, "--out", out, "--timings", asv)[0] == 0
    assert (out / "timings" / "index.json").read_text() == "index.json"
    for page in out.glob("*.html"):
        assert 'href="timings/index.html"' in page.read_text()
    assert call(*runs, "--out", out)[0] == 0
    assert not (out / "timings").exists()
    assert "timings/" not in (out / "index.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--check", "1"], "name its folder by --out"),
        (["--timings", "somewhere"], "name its folder by --out"),
        (["--out", "somewhere"], "name their folders"),
    ],
)
def test_options_without_effect_are_refused(words: list[str], message: str) -> None:
    status, said = call(*words)
    assert (status, said.count("\n")) == (2, 1)
    assert message in said


def test_a_record_is_run_again_before_it_is_shown(tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "site"
    options = Options(n_items=8, rounds=0)
    cell = Cell(task="gmm-2d", model="direct-f2d2", estimator=get("f2d2", steps=1), options=options)
    list(run_cells([cell], run))
    status, said = call(run, "--out", out, "--check", "3")
    assert status == 0, said
    assert "reproduced, bit for bit" in said
    assert "✓" in (out / "index.html").read_text()
    assert "reproduced, bit for bit" in (out / "task-gmm-2d.html").read_text()
    (row,) = (json.loads(line) for line in (run / "records.jsonl").read_text().splitlines())
    (run / "records.jsonl").write_text(json.dumps(row | {"work": 5.0, "nfe_mean": 5.0}) + "\n")
    status, said = call(run, "--out", tmp_path / "false", "--check", "1")
    assert status == 1
    assert "NOT reproduced" in said
    assert not (tmp_path / "false").exists()
