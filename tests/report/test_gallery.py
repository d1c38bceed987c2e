"""The gallery: the page is what its notes say, and what a run tells goes into it, without its places."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from fake_run import write_fake_run

from flowlik.report import gallery

ROOT = Path(__file__).resolve().parents[2]
PICTURE = b"\x89PNG\r\n\x1a\n a picture"
ARGV = ["flowlik", "run", "quick", "--limit", "8", "--out", "/home/someone/run", "--no-report"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run of `quick` with one published figure and one that is not."""
    folder = write_fake_run(tmp_path / "run", tasks=("gmm-2d",), n=8, steps=(1,))
    environment = {"env_id": "abc123", "commit": "a" * 40, "dirty": False, "argv": ARGV}
    (folder / "environments.jsonl").write_text(json.dumps(environment) + "\n")
    finish(folder, "2026-11-20T10:00:00Z")
    (folder / "figures").mkdir()
    for name in ("gmm-2d--density", "gmm-2d--scatter"):
        (folder / "figures" / f"{name}.png").write_bytes(PICTURE)
    return folder


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A source tree with one picture of unknown origin and one that no table names."""
    root = tmp_path / "tree"
    (root / gallery.FIGURES).mkdir(parents=True)
    for name in ("scaling", "stray"):
        (root / gallery.FIGURES / f"{name}.png").write_bytes(PICTURE)
    return root


def finish(folder: Path, when: str | None, suite: str = "quick") -> None:
    (folder / "run.json").write_text(json.dumps({"argv": ARGV, "suite": suite, "finished": when}))


def test_the_page_is_what_the_notes_make() -> None:
    assert (ROOT / gallery.PAGE).read_text() == gallery.page(ROOT), "due: flowlik gallery [RUN]..."


def test_every_published_picture_is_on_the_page_once() -> None:
    shown = re.findall(r"!\[[^\]]+\]\(\.\./results/figures/([^)]+)\)", (ROOT / gallery.PAGE).read_text())
    assert sorted(shown) == sorted(path.name for path in (ROOT / gallery.FIGURES).glob("*.png"))


def test_notes_name_no_place_of_a_machine() -> None:
    commands = {command for entry in gallery.noted(ROOT).values() for command in entry["commands"]}
    assert commands
    assert all(command.startswith("flowlik run ") for command in commands)
    assert not [command for command in commands if re.search(r"--out|[ '=]~?/|\\", command)]


def test_table_names_suites_that_exist_and_each_picture_once() -> None:
    from flowlik.commands.listing import listed

    names = [shown.name for shown in gallery.SHOWN]
    assert len(set(names)) == len(names)
    assert {shown.suite for shown in gallery.SHOWN} <= set(listed("suites"))


def test_a_run_gives_its_published_figures_and_what_its_records_tell(run: Path, tree: Path) -> None:
    assert gallery.publish([run], tree) == ["gmm-2d--density"]
    assert (tree / gallery.FIGURES / "gmm-2d--density.png").read_bytes() == PICTURE
    assert not (tree / gallery.FIGURES / "gmm-2d--scatter.png").exists()
    page = (tree / gallery.PAGE).read_text()
    assert "```\nflowlik run quick --limit 8\n```" in page
    assert "Suite `quick`, finished on 2026-11-20; commit `aaaaaaaaaa`." in page
    assert "someone" not in page + (tree / gallery.FIGURES / gallery.STATE).read_text()
    assert page.count("Run not recorded.") == 2
    assert "flowlik run scaling" in page


def test_notes_stay_until_a_picture_is_another_one(run: Path, tree: Path) -> None:
    gallery.publish([run], tree)
    before = (tree / gallery.PAGE).read_text()
    assert gallery.publish([], tree) == []
    assert (tree / gallery.PAGE).read_text() == before
    (tree / gallery.FIGURES / "gmm-2d--density.png").write_bytes(PICTURE + b"!")
    gallery.publish([], tree)
    assert "Suite `quick`" not in (tree / gallery.PAGE).read_text()


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (["/usr/bin/flowlik", "run", "uses", "--out=x", "--resume"], "flowlik run uses"),
        (["f", "run", "-e", "ode[rtol=1e-3|1e-5]"], "flowlik run -e 'ode[rtol=1e-3|1e-5]'"),
        (["f", "run", "--checkpoints", "../me/train"], "flowlik run --checkpoints DIR"),
        (["f", "run", "--address=ray://host:10001"], "flowlik run --address ADDRESS"),
        (["f", "run", "../me/mine.toml"], "flowlik run mine.toml"),
        (["f", "run", "a\n```\n# b"], "flowlik run 'a ''' # b'"),
    ],
)
def test_commands_lose_places_and_nothing_else(argv: list[str], command: str) -> None:
    assert gallery.plain_command(argv) == command


@pytest.mark.parametrize(
    ("when", "suite", "message"),
    [
        (None, "quick", "is not finished"),
        ("2026-11-20T10:00:00Z", "quik", "did you mean 'quick'"),
        ("2026-11-20T10:00:00Z", "rules", "none of its published figures"),
    ],
)
def test_runs_that_cannot_be_shown_are_refused_whole(
    run: Path, tree: Path, when: str | None, suite: str, message: str
) -> None:
    finish(run, when, suite)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        gallery.publish([run], tree)
    assert not (tree / gallery.PAGE).exists()
