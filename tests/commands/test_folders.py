"""What commands do to files: whole or not at all, one line where they cannot, nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Barrier, BrokenBarrierError
from types import ModuleType
from typing import Any

import pytest
from fake_run import record, write_fake_run, write_rows
from file_systems import killed_while_writing, without_locks
from matplotlib.figure import Figure
from typer.testing import CliRunner, Result

from flowlik.cells import Cell, Options
from flowlik.cli import app
from flowlik.commands.run import run_folder
from flowlik.records import merging
from flowlik.records.journal import StorageError
from flowlik.records.reading import read_rows
from flowlik.report import gallery
from flowlik.report.figures import kinds
from flowlik.report.figures.kinds import draw_all
from flowlik.report.page.write import write_report
from flowlik.running import registry
from flowlik.running.inline import Inline
from flowlik.running.run import run_cells
from flowlik_estimators import get
from flowlik_models import files


def call(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def small_figures(*_: object) -> list[tuple[str, Figure]]:
    return [(f"thin-2d--{name}", Figure(figsize=(1, 1))) for name in ("bpd", "error", "scatter")]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(files, "_swept", set())
    monkeypatch.setattr(kinds, "_figures", small_figures)
    return write_fake_run(tmp_path / "run", tasks=("thin-2d",), n=20, steps=(1, 2))


# --- interrupted, and on a full disk ------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 3])
def test_a_report_after_an_interrupted_one_has_all_its_figures(
    run: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    expected = {path.name for path in draw_all(shutil.copytree(run, run.with_name("other")))}
    replace, calls = Path.replace, []

    def interrupted(self: Path, target: Path) -> Path:
        if target.suffix in (".png", ".pdf", ".svg"):
            calls.append(target)
            if len(calls) > after:
                raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_report(run)
    assert not (run / "report.html").exists()
    page = write_report(run).read_text(encoding="utf-8")
    assert {path.name for path in (run / "figures").glob("[!.]*")} == expected
    whole = write_report(run.with_name("other")).read_text(encoding="utf-8")
    assert page.count("data:image/") == whole.count("data:image/") == 3


def test_an_interrupted_drawing_leaves_the_figures_of_before(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.read_bytes() for path in draw_all(run)}

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Figure, "savefig", interrupted)
    with pytest.raises(KeyboardInterrupt):
        draw_all(run)
    assert {path: path.read_bytes() for path in before} == before
    assert not list(run.glob(".flowlik-*"))


@pytest.mark.parametrize("command", ["report", "figures"])
def test_a_full_disk_leaves_what_was_there_and_is_one_line(
    run: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    (run / "report.html").write_text("before")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    done = call(command, run)
    assert done.exit_code == 1
    assert done.stderr.strip().startswith(f"flowlik: {run}: the disk is full")
    assert len(done.stderr.strip().splitlines()) == 1
    assert (run / "report.html").read_text() == "before"
    assert not list(run.rglob(".flowlik-*"))


@pytest.mark.parametrize("command", ["table", "compare"])
def test_the_next_command_removes_what_a_killed_one_left(run: Path, command: str) -> None:
    (run / "items" / "below").mkdir()
    killed_while_writing(run / "items" / "below")
    assert len(list(run.rglob(".flowlik-*"))) == 2
    assert call(command, *[run] * (1 + (command == "compare"))).exit_code == 0
    assert not list(run.rglob(".flowlik-*"))


def test_a_gallery_of_a_run_without_figures_is_bad_usage_and_not_a_disks_fault(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gallery, "need_tree", lambda: tmp_path)  # tests may run beside an installed package
    (run / "run.json").write_text(json.dumps({"suite": "quick", "finished": "2026-01-01T00:00:00Z"}))
    done = call("gallery", run)
    assert done.exit_code == 2
    assert "has none of its published figures" in done.stderr


# --- no locks -----------------------------------------------------------------------------------------------


def test_without_locks_what_reads_works_and_a_run_says_the_cure(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run / "records.jsonl").open("ab").write(b'{"torn')
    note = (run / "run.json").read_bytes()
    without_locks(monkeypatch)
    merge = ("merge", run, "--out", run.with_name("both"))
    for words in (("table", run), ("compare", run, run), ("report", run), ("figures", run), merge):
        with pytest.warns(UserWarning, match="torn and was left out"):
            done = call(*words)
        assert done.exit_code == 0
    with pytest.raises(StorageError, match=r"no file locks .*write into a folder on a local disk"):
        run_folder(run, resume=True)
    assert (run / "run.json").read_bytes() == note


def test_a_run_without_locks_ends_with_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_locks(monkeypatch)
    done = call("run", "-t", "gmm-2d", "-e", "control-mean", "--out", tmp_path / "out")
    assert done.exit_code == 1
    assert "no file locks" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out" / "run.json").exists()


# --- folders that go ----------------------------------------------------------------------------------------


def removed(out: Path) -> None:
    shutil.rmtree(out)


def moved(out: Path) -> None:
    out.rename(out.with_name("elsewhere"))


def replaced(out: Path) -> None:
    shutil.rmtree(out)
    (out / "items").mkdir(parents=True)
    (out / ".claims").touch()


def emptied(out: Path) -> None:
    (out / "records.jsonl").unlink()


@pytest.mark.parametrize("what", [removed, moved, replaced, emptied])
@pytest.mark.parametrize("after", [1, 3])
def test_a_folder_that_goes_during_a_run_ends_it(
    tmp_path: Path, what: Callable[[Path], None], after: int
) -> None:
    options = Options(n_items=8, rounds=0)
    chosen = [
        Cell(task="gaussian-2d", model="closed-form", estimator=get("f2d2", steps=steps), options=options)
        for steps in (1, 2, 3)
    ]
    out = tmp_path / "out"
    outcomes = run_cells(chosen, out)
    for _ in range(after):
        next(outcomes)
    what(out)
    with pytest.raises(StorageError, match=r"out was removed or replaced during the run, .* --resume"):
        next(outcomes)
    assert what in (replaced, emptied) or not out.exists()
    assert len(list(run_cells(chosen, out, resume=True))) == 3


# --- records of another schema ------------------------------------------------------------------------------


def test_rows_of_another_schema_are_left_out_by_one_line(tmp_path: Path) -> None:
    rows = [record(cell_id=f"{number:016x}", seed=number, bpd=1.0) for number in range(600)]
    rows += [record(cell_id="f" * 16, bpd=99.5, schema_version=version) for version in (2, 0, "1", [])]
    write_rows(tmp_path, rows)
    (tmp_path / "run.json").write_text(json.dumps({"suite": "quick"}))
    for words in (("table", tmp_path, "--format", "csv"), ("compare", tmp_path, tmp_path)):
        with pytest.warns(UserWarning, match="of another schema version than 1 were left out") as told:
            done = call(*words)
        assert {str(one.message) for one in told} == {str(told[0].message)}
        assert done.exit_code == 0
        assert "99.5" not in done.output
    with pytest.warns(UserWarning, match="another schema version"):
        done = call("reproduce", "f" * 16, "--in", tmp_path)
    assert done.exit_code == 2
    assert "no cell" in done.stderr


# --- going on with records of other code --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("known", "made"),
    [
        (
            {"commit": "a" * 40, "dirty": False, "versions": {"flowlik": "0.0.1"}},
            "flowlik 0.0.1 at commit aaaaaaaaaa, this",
        ),
        ({"commit": None, "versions": {"flowlik": "0.0.1"}}, "flowlik 0.0.1, this"),
        (
            {"commit": "b" * 40, "dirty": True, "versions": []},
            "no known version at commit b+ with changed files,",
        ),
    ],
)
def test_going_on_with_records_of_other_code_says_so(
    tmp_path: Path, known: dict[str, object], made: str
) -> None:
    words = ("run", "-t", "gmm-2d", "-e", "control-mean", "--limit", "5", "--no-report", "--out", tmp_path)
    executors = {"serial": lambda setup, address: Inline(setup)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "EXECUTORS", executors)
        assert call(*words).exit_code == 0
        assert call(*words, "--resume").stderr == ""
        environment = json.loads((tmp_path / "environments.jsonl").read_text())
        (tmp_path / "environments.jsonl").write_text(json.dumps(environment | known) + "\n")
        done = call(*words, "--resume")
    assert done.exit_code == 0
    (line,) = done.stderr.splitlines()
    assert re.search(rf"^flowlik: \d of the cells that are done were run by .*{made}", line)
    assert "they stay as they are: give another --out" in line


# --- two at once ----------------------------------------------------------------------------------------------


def at_once(patch: pytest.MonkeyPatch, module: ModuleType, name: str, *calls: Callable[[], Any]) -> list[Any]:
    """Answers or errors of calls, of which none goes on from `name` before the others are there, if they may come."""
    meeting, real = Barrier(len(calls)), getattr(module, name)

    def met(*args: Any) -> Any:
        with suppress(BrokenBarrierError):
            meeting.wait(timeout=0.2)
        return real(*args)

    def ended(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except ValueError as error:
            return error

    patch.setattr(module, name, met)
    with ThreadPoolExecutor(len(calls)) as threads:
        return list(threads.map(ended, calls))


def test_of_two_merges_of_other_runs_into_one_folder_one_is_there_whole_and_one_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [write_fake_run(tmp_path / task, tasks=(task,), n=8, steps=(1,)) for task in ("thin-2d", "gmm-2d")]
    merges = [partial(merging.merge_runs, [run], tmp_path / "out") for run in runs]
    answers = at_once(monkeypatch, merging, "_copy_items", *merges)
    (won,) = (k for k, answer in enumerate(answers) if isinstance(answer, merging.Merged))
    assert "holds records already; give another --out" in str(answers[1 - won])
    rows = read_rows(tmp_path / "out")
    assert {row["cell_id"] for row in rows} == {row["cell_id"] for row in read_rows(runs[won])}
    assert {path.stem for path in (tmp_path / "out" / "items").iterdir()} <= {row["cell_id"] for row in rows}
    assert json.loads((tmp_path / "out" / "run.json").read_text())["merged"] == [runs[won].name]


def test_two_galleries_of_other_runs_are_both_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published = {"quick": "gmm-2d--density", "scaling": "scaling"}
    for suite, name in published.items():
        run = write_fake_run(tmp_path / suite, tasks=("gmm-2d",), n=8, steps=(1,))
        (run / "run.json").write_text(
            json.dumps({"argv": [], "suite": suite, "finished": "2026-11-20T10:00:00Z"})
        )
        (run / "figures").mkdir(exist_ok=True)
        (run / "figures" / f"{name}.png").write_bytes(name.encode())
    tree = tmp_path / "tree"
    calls = [partial(gallery.publish, [tmp_path / suite], tree) for suite in published]
    assert at_once(monkeypatch, gallery, "noted", *calls) == [[name] for name in published.values()]
    assert set(gallery.noted(tree)) == set(published.values())
    assert (tree / gallery.PAGE).read_text() == gallery.page(tree)
    assert "not recorded" not in gallery.page(tree)
