"""Whatever surrounds a command, it works or ends with one line: the cause and the cure, before work is lost."""

from __future__ import annotations

import errno
import os
import pwd
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import pytest
from bound_by_permissions import bound_by_permissions
from fake_run import record, write_fake_run
from hostile_input import line_of
from own_files import write_task
from typer.testing import CliRunner, Result

import flowlik
from flowlik.cli import app
from flowlik.records.writing import write_arrays
from flowlik.report.figures import kinds
from flowlik.report.figures.kinds import draw_all
from flowlik.tasks.own import task_file
from flowlik_models.images import cache_dir


def call(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def refused(*words: object, status: int = 2) -> str:
    done = call(*words)
    assert done.exit_code == status, done.output
    assert isinstance(done.exception, SystemExit)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("flowlik: ")]
    return line


@pytest.fixture(autouse=True)
def one_kind_of_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "all_kinds", lambda: {"scatter": kinds.KINDS["scatter"]})
    monkeypatch.setattr(kinds, "error_overview", lambda records: None)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_fake_run(tmp_path / "run", tasks=("thin-2d",), n=20, steps=(1,))


@pytest.fixture
def mine(tmp_path: Path) -> str:
    task_file.forget()
    return str(write_task(tmp_path / "user", "around"))


# --- names, paths and permissions ---------------------------------------------------------------------------

PLACES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a long name": (lambda folder: folder / ("n" * 300), "file name too long; give a shorter name"),
    "a long path": (
        lambda folder: folder.joinpath(*["d" * 99] * 50),
        "file name too long; give a shorter name",
    ),
    "closed": (
        lambda folder: folder / "closed" / "out",
        "permission denied; give another place or change who",
    ),
    "below a file": (lambda folder: folder / "file" / "x", "not a directory; a file stands where a folder"),
    "a link to itself": (
        lambda folder: folder / "loop",
        "too many levels of symbolic links; its links point",
    ),
    "not UTF-8": (lambda folder: folder / "caf\udce9", r"caf\\udce9: its name is not UTF-8"),
}


@pytest.mark.parametrize("place", PLACES)
def test_what_takes_long_tries_where_it_will_write_first(
    tmp_path: Path, mine: str, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    (tmp_path / "closed").mkdir(mode=0o555)
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    make, words = PLACES[place]
    before = sorted(tmp_path.iterdir())
    with bound_by_permissions():
        for command in (
            ("train", "gmm-2d", "teacher"), ("train", mine, "direct-f2d2"), ("reference", mine), ("score", mine),
        ):  # fmt: skip
            line = refused(*command, "--out", make(tmp_path))
            assert re.search(words, line), line
            assert len(line) < 300
    assert sorted(tmp_path.iterdir()) == before


def test_what_cannot_be_read_is_named_and_nobody_says_that_it_could_not_be_written(
    tmp_path: Path, run: Path
) -> None:
    (run / "records.jsonl").chmod(0)
    (tmp_path / "suite.toml").touch(mode=0)
    (tmp_path / "mine.py").touch(mode=0)
    commands = {
        "table": (run,),
        "report": (run,),
        "figures": (run,),
        "compare": (run, run),
        "gallery": (run,),
    }
    with bound_by_permissions():
        for command, words in commands.items():
            assert f"{run / 'records.jsonl'}: permission denied; " in refused(command, *words), command
        assert "suite.toml: permission denied" in refused("run", tmp_path / "suite.toml", "--dry-run")
        assert "mine.py: cannot be read" in refused("run", "-t", tmp_path / "mine.py", "--dry-run")


def test_a_run_that_nobody_may_write_into_can_be_read_and_not_drawn(run: Path) -> None:
    run.chmod(0o555)
    with bound_by_permissions():
        assert call("table", run).exit_code == 0
        assert call("compare", run, run).exit_code == 0
        assert "cannot be written (Permission denied)" in refused("report", run, status=1)
    run.chmod(0o755)


def test_items_that_cannot_be_read_are_left_out_with_a_line(run: Path) -> None:
    for file in (run / "items").iterdir():
        file.chmod(0)
    with (
        bound_by_permissions(),
        pytest.warns(UserWarning, match=r"npz: .*Permission denied.*; its items are left out"),
    ):
        assert call("figures", run).exit_code == 0


def test_a_run_folder_whose_name_is_not_utf_8_is_read_and_drawn(run: Path) -> None:
    strange = run.rename(run.with_name("caf\udce9"))
    for command in ("table", "figures", "report"):
        assert call(command, strange).exit_code == 0
    assert r"caf\udce9" in (strange / "report.html").read_text(encoding="utf-8")


def test_a_pipe_in_place_of_an_array_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.npy")
    with pytest.raises(ValueError, match=r"train: .*x\.npy: no such file"):
        flowlik.ArrayTask(id="a", train=tmp_path / "x.npy", test=[[1.0]], models={"net": lambda: None})


def test_a_file_in_place_of_a_run_is_read_and_not_drawn(run: Path) -> None:
    assert call("table", run / "records.jsonl").exit_code == 0
    assert "expected a run folder" in refused("report", run / "records.jsonl")


def test_a_path_from_a_home_that_nobody_has_is_one_line() -> None:
    assert "begins with ~" in refused("run", "--inception", "~nobody-of-that-name/x", "--dry-run")


# --- full disks ---------------------------------------------------------------------------------------------


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("command", ["train", "reference", "score"])
def test_a_disk_that_is_full_is_one_line_that_names_the_file_and_nothing_stays(
    tmp_path: Path, mine: str, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr(os, "fsync", full)
    words = {"train": ("gmm-2d", "teacher", "--steps", "1"), "reference": (mine, "--limit", "4")}
    given = words.get(command, (mine, "--limit", "8", "--accuracy", "1"))
    line = refused(command, *given, "--out", tmp_path / "out", status=1)
    assert re.search(rf"^flowlik: {tmp_path}/out/.*: no space left on device; free some space", line)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


# --- records ------------------------------------------------------------------------------------------------

TOKENS = {
    "NaN": ("bpd", "NaN"),
    "infinity": ("bpd", "-Infinity"),
    "huge": ("bpd_mae", "1e308"),
    "beyond": ("bpd", "1e400"),
    "half a character": ("model", '"a\\ud800"'),
    "half a name": ("params", '{"\\udfff": "\\udc80"}'),
}


@pytest.mark.parametrize("case", TOKENS)
def test_strange_tokens_are_read_printed_drawn_and_joined(tmp_path: Path, case: str) -> None:
    rows = [record(cell_id=name, bpd=1.0, bpd_mae=0.1) for name in ("a", "b")]
    tmp_path.joinpath("records.jsonl").write_bytes(
        line_of(rows[0], dict([TOKENS[case]])) + line_of(rows[1], {})
    )
    (tmp_path / "run.json").write_text('{"argv": ["caf\\udce9"], "suite": ' + "[" * 5000)
    frame = flowlik.read_records(tmp_path)
    assert frame["cell_id"].tolist() == ["a", "b"]
    frame.to_csv(tmp_path / "frame.csv")
    for words in (("table", tmp_path), ("report", tmp_path), ("compare", tmp_path, tmp_path)):
        assert call(*words).exit_code == 0, words
    assert call("merge", tmp_path, "--out", tmp_path / "merged").exit_code == 0
    assert len(flowlik.read_records(tmp_path / "merged")) == 2


@pytest.mark.parametrize("text", ["description = " + "[" * 5000 + "]" * 5000, "a = {b = " * 3000])
def test_toml_that_is_nested_deeply_is_one_line_that_names_the_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "deep.toml").write_text(text)
    assert "deep.toml: expected a TOML file" in refused("run", tmp_path / "deep.toml", "--dry-run")


# --- settings and streams -----------------------------------------------------------------------------------


def test_figures_are_the_same_whatever_the_users_plotting_settings(run: Path) -> None:
    drawn = {path.name: path.stat().st_size for path in draw_all(run) if path.suffix == ".png"}
    with mpl.rc_context(
        {"text.usetex": True, "savefig.bbox": "tight", "lines.linewidth": 9, "font.size": 30}
    ):
        again = {path.name: path.stat().st_size for path in draw_all(run) if path.suffix == ".png"}
        assert mpl.rcParams["text.usetex"]
    assert again == drawn


def flowlik_(*words: object, **environment: str | None) -> subprocess.CompletedProcess[str]:
    known = {name: value for name, value in (os.environ | environment).items() if value is not None}
    command = [sys.executable, "-m", "flowlik", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=known, check=False)


def test_a_terminal_of_ascii_no_home_and_strange_plotting_settings_change_nothing(
    tmp_path: Path, run: Path
) -> None:
    (tmp_path / "rc").write_text("text.usetex: True\n")
    ascii_ = {
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONIOENCODING": "ascii:strict",
    }
    plots = {"MPLBACKEND": "nonsense", "MATPLOTLIBRC": str(tmp_path / "rc"), "HOME": "/nonexistent/home"}
    drawn = flowlik_("report", run, **ascii_, **plots)
    assert (drawn.returncode, drawn.stdout) == (0, f"{run / 'report.html'}\n"), drawn.stderr
    assert "Reference" in flowlik_("table", run, **ascii_).stdout


def test_standard_output_that_is_full_or_closed(run: Path) -> None:
    command = f"{sys.executable} -m flowlik table {run}"
    done = subprocess.run(f"{command} > /dev/full", shell=True, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        "flowlik: standard output: no space left on device; free some space and give the same command again\n"
    )
    closed = f"{command} >&-; {command} | head -c 1"
    done = subprocess.run(closed, shell=True, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_without_a_home_folder_everything_works_and_nothing_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody(*_: object) -> None:
        raise KeyError("no such user")

    for name in ("HOME", "FLOWLIK_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    with pytest.raises(OSError, match=r"Not a directory|File exists"):
        write_arrays(cache_dir() / "a.npz", {})
    done = call("run", "-t", "digits", "-m", "teacher", "-e", "ode[solver=euler,steps=1]", "--dry-run")
    assert done.exit_code == 0, done.output


def test_a_working_directory_that_was_removed_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert "the working directory was removed: change to one" in refused("run", "--dry-run")
