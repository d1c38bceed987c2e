"""What the documents say is so: links lead somewhere, blocks run, commands and columns exist."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from flowlik.records.columns import COLUMNS

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "results").rglob("*.md")])
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SOURCES = ("benchmarks", "estimators", "models")


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def anchors(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub forms them."""
    text = BLOCK.sub("", document.read_text())
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def blocks(document: Path, language: str) -> list[str]:
    return [body for kind, body in BLOCK.findall(document.read_text()) if kind == language]


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_links_lead_somewhere(document: Path) -> None:
    for target in LINK.findall(BLOCK.sub("", document.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), target


KEEPS_THE_CONTRACT = """
from flowlik.checks.contract import contract_verdicts
failed = [verdict.line() for verdict in contract_verdicts(("euler-rule",)) if not verdict.passed]
assert not failed, failed
"""
AFTERWARDS = {"README.md": KEEPS_THE_CONTRACT, "CONTRIBUTING.md": "", "docs/score-your-own-model.md": ""}
"""What has to hold once the blocks of a page have run; the estimator of CONTRIBUTING is that of the templates."""


@pytest.mark.parametrize("name", list(AFTERWARDS))
def test_python_blocks_run_and_are_short(tmp_path: Path, name: str) -> None:
    code = blocks(ROOT / name, "python")
    assert code
    assert max(len(block.strip().splitlines()) for block in code) < 30
    script = tmp_path / "blocks.py"
    script.write_text("\n".join([*code, AFTERWARDS[name]]))
    (tmp_path / "flowlik_templates").symlink_to(ROOT / "docs" / "templates")  # as if they were installed
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_readme_commands_exist() -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for document in (ROOT / "README.md", ROOT / "docs" / "install.md"):
        commands = re.findall(r"(?:^|`)make ([a-z]+)", document.read_text(), re.MULTILINE)
        assert commands
        assert set(commands) <= set(targets)


def test_ci_runs_the_test_command_of_the_readme() -> None:
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert re.search(r"^make test\b", (ROOT / "README.md").read_text(), re.MULTILINE)


def test_documented_commands_and_options_exist() -> None:
    from typer.main import get_command

    from flowlik.cli import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    (synopsis,) = (block for block in blocks(ROOT / "docs" / "command-line.md", "") if "flowlik run" in block)
    assert set(re.findall(r"^flowlik (\w+)", synopsis, re.MULTILINE)) == set(commands)
    for name, rest in re.findall(r"^flowlik (\w+)(.*(?:\n +.*)*)", synopsis, re.MULTILINE):
        known = {
            option
            for parameter in commands[name].params
            for option in (*parameter.opts, *parameter.secondary_opts)
        }
        assert set(re.findall(r"(?<!\w)--?[a-z][a-z-]*", rest)) <= known, name


def test_every_option_of_a_suite_is_documented_with_its_default() -> None:
    from flowlik.cells import Options

    page = (ROOT / "docs" / "command-line.md").read_text().partition("## A suite of your own")[2]
    rows = [row.split(" | ") for row in page.splitlines() if row.startswith("| `")]
    said = {name: row[1] for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    for field in fields(Options):
        assert json.dumps(field.default) in said.pop(field.name), field.name
    assert not said


def test_every_column_is_documented() -> None:
    text = (ROOT / "docs" / "records.md").read_text().partition("## Columns")[2]
    listed = [name for name in re.findall(r"`(\w+)`", text) if name in COLUMNS]
    assert sorted(set(listed)) == sorted(COLUMNS)


def test_the_columns_of_the_records_page_are_those_of_the_table() -> None:
    from flowlik.report.tables.columns import in_page

    page = (ROOT / "docs" / "records.md").read_text()
    assert in_page(page) == page, "due: python -m flowlik.report.tables.columns docs/records.md"


def test_documents_that_code_cites_exist() -> None:
    cited = {
        (named(path), name)
        for folder in SOURCES
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".html", ".toml"}
        for name in re.findall(r"docs/[\w-]+\.md", path.read_text())
    }
    assert not [(path, name) for path, name in cited if not (ROOT / name).exists()]


def test_sections_that_docstrings_cite_exist() -> None:
    headings = re.findall(r"^## (\d+)\.", (ROOT / "docs" / "math.md").read_text(), re.MULTILINE)
    cited = {
        (named(path), number)
        for folder in SOURCES
        for path in (ROOT / folder).rglob("*.py")
        for number in re.findall(r"docs/math\.md,? section (\d+)", path.read_text())
    }
    assert cited
    assert not [(path, number) for path, number in cited if number not in headings]


def test_no_sentence_of_the_readme_is_long() -> None:
    """At most 30 words, code and tables apart; a link counts as its words."""
    text = re.sub(r"```.*?```", "", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    lines = [line for line in text.splitlines() if not line.startswith(("|", "!"))]
    sentences = [part for line in lines for part in re.split(r"(?<=[.:;])\s|\s·\s", line)]
    assert not [s for s in sentences if len(re.sub(r"\]\([^)]*\)", "", s).split()) > 30]


def test_every_file_that_a_page_names_is_there() -> None:
    """Paths in backticks that end as a source file does, from the root, from a package or from `flowlik_models`."""
    roots = [
        ROOT,
        *(ROOT / name for name in ("benchmarks", "estimators", "models")),
        ROOT / "models" / "flowlik_models",
    ]
    missing = {
        f"{page.relative_to(ROOT)}: {name}"
        for page in DOCUMENTS
        for name in re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|toml|sh))`", page.read_text())
        if not any((root / name).exists() for root in roots) and not name.startswith(("runs/", "my_", "mine"))
    }
    assert not missing
