"""Every command that writes, killed at random moments and two at a time: nothing lost, doubled or torn."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from fake_run import write_fake_run
from finished_runs import assert_same_run, lines
from matplotlib.figure import Figure
from own_files import write_task
from safetensors.torch import load_file
from sizes import figure, size
from typer.testing import CliRunner

from flowlik.cli import app
from flowlik.records.writing import read_arrays
from flowlik.report import gallery
from flowlik.report.figures import kinds
from flowlik.running import registry
from flowlik.running.inline import Inline
from flowlik.tasks.own import task_file
from flowlik_models.training import trainer

KILLS = size(1, 100)
PAIRS = size(1, 20)
FIGURES = ("bpd", "error", "scatter")
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["flowlik.cli", "flowlik_models.training.trainer", "flowlik.report.figures.kinds"]
)
SUITE = """
[defaults]
n_items = 16
batch_size = 16
rounds = 0
[[cells]]
tasks = ["gaussian-2d"]
models = ["closed-form"]
estimators = ["f2d2[steps=1|2|3|4|5|6]"]
"""


def small_figures(*_: object) -> list[tuple[str, Figure]]:
    return [(f"thin-2d--{name}", Figure(figsize=(1, 1))) for name in FIGURES]


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What commands start from, and `prepared` for those in this process."""
    for module, name in ((registry, "EXECUTORS"), (kinds, "_figures"), (trainer, "_SAVE_EVERY")):
        monkeypatch.setattr(module, name, getattr(module, name))  # put back afterwards
    prepared()
    task_file.forget()
    (tmp_path / "tree" / gallery.FIGURES).mkdir(parents=True)
    (tmp_path / "suite.toml").write_text(SUITE)
    write_task(tmp_path / "user", "kills")
    run = write_fake_run(tmp_path / "finished", tasks=("thin-2d",), n=8, steps=(1, 2))
    argv = ["flowlik", "run", "quick"]
    environment = {"env_id": "abc123", "commit": "a" * 40, "dirty": False, "argv": argv}
    (run / "environments.jsonl").write_text(json.dumps(environment) + "\n")
    note = {"argv": argv, "suite": "quick", "finished": "2026-11-20T10:00:00Z"}
    (run / "run.json").write_text(json.dumps(note))
    published = shutil.copytree(run, tmp_path / "published") / "figures"
    published.mkdir()
    (published / "thin-2d--bpd.png").write_bytes(b"\x89PNG a picture")


def prepared() -> None:
    """Cells in the commands' own process, small figures, states that are saved at every step."""
    registry.EXECUTORS = {"serial": lambda setup, address: Inline(setup)}
    kinds._figures = small_figures  # type: ignore[assignment]
    trainer._SAVE_EVERY = 0.0


def run(words: tuple[str, ...], tree: Path) -> None:
    """A command, prepared; `tree`: where a gallery writes."""
    prepared()
    gallery.need_tree = lambda: tree
    done = CliRunner().invoke(app, [*words])
    os._exit(done.exit_code if done.exception is None or isinstance(done.exception, SystemExit) else 99)


def started(words: tuple[str, ...], tree: Path) -> multiprocessing.process.BaseProcess:
    """A command in a process of its own, forked from one that has the libraries and has differentiated nothing yet:
    of a process whose autograd has threads torch allows no fork."""
    process = SERVER.Process(target=run, args=(words, tree))
    process.start()
    return process


def status(process: multiprocessing.process.BaseProcess) -> int | None:
    process.join()
    return process.exitcode


# --- what a command makes, and what is right ----------------------------------------------------------------


def same_tensors(out: Path, whole: Path) -> None:
    (name,) = [path.relative_to(whole) for path in whole.rglob("teacher.safetensors")]
    found, expected = load_file(out / name), load_file(whole / name)
    assert found.keys() == expected.keys()
    assert all(bool((found[each] == expected[each]).all()) for each in expected)
    json.loads((out / name).with_suffix(".json").read_text())


def same_arrays(*names: str) -> Callable[[Path, Path], None]:
    def same(out: Path, whole: Path) -> None:
        (file,) = [path.relative_to(whole) for path in whole.glob("*.npz")]
        found, expected = read_arrays(out / file), read_arrays(whole / file)
        assert found.keys() == expected.keys()
        for name in names or expected:
            assert np.array_equal(found[name], expected[name], equal_nan=True), name
        json.loads((out / file).with_suffix(".json").read_text())

    return same


def same_drawings(out: Path, whole: Path) -> None:
    names = [{path.name for path in (folder / "figures").iterdir()} for folder in (out, whole)]
    assert names[0] == names[1]
    assert all(path.read_bytes()[-8:-4] == b"IEND" for path in (out / "figures").glob("thin*error.png"))


def same_report(out: Path, whole: Path) -> None:
    same_drawings(out, whole)
    pages = [(folder / "report.html").read_text(encoding="utf-8") for folder in (out, whole)]
    assert pages[0].rstrip().endswith("</html>")
    assert pages[0].count("data:image/") == pages[1].count("data:image/") == len(FIGURES)


def same_merged(out: Path, whole: Path) -> None:
    assert lines(out) == lines(whole)
    for file in (whole / "items").iterdir():
        assert read_arrays(out / "items" / file.name).keys() == read_arrays(file).keys()


def same_gallery(out: Path, whole: Path) -> None:
    names = [sorted(path.name for path in (folder / gallery.FIGURES).glob("*.*")) for folder in (out, whole)]
    assert names[0] == names[1]
    for file in (gallery.PAGE, gallery.FIGURES / gallery.STATE):
        assert (out / file).read_bytes() == (whole / file).read_bytes()


@dataclass(frozen=True)
class Command:
    """A command whose `OUT` is the folder that it writes into; `copied`: of which it needs a copy there first."""

    words: tuple[str, ...]
    same: Callable[[Path, Path], None]
    again: tuple[str, ...] = ()
    copied: str = ""

    def at(self, out: Path, here: Path, *, again: bool = False) -> tuple[str, ...]:
        words = (*self.words, *(self.again if again else ()))
        return tuple(word.replace("OUT", str(out)).replace("HERE", str(here)) for word in words)


COMMANDS = {
    "run": Command(
        ("run", "HERE/suite.toml", "--no-report", "--out", "OUT"), assert_same_run, again=("--resume",)
    ),
    "train": Command(("train", "gmm-2d", "teacher", "--steps", "8", "--out", "OUT"), same_tensors),
    "reference": Command(("reference", "HERE/user/mine.py", "--limit", "12", "--out", "OUT"), same_arrays()),
    "score": Command(
        ("score", "HERE/user/mine.py", "--limit", "12", "--accuracy", "0.5", "--out", "OUT"),
        same_arrays("bpd"),
    ),
    "report": Command(("report", "OUT"), same_report, copied="finished"),
    "figures": Command(("figures", "OUT"), same_drawings, copied="finished"),
    "merge": Command(("merge", "HERE/finished", "--out", "OUT"), same_merged),
    "gallery": Command(("gallery", "HERE/published"), same_gallery, copied="tree"),
}


def folder_of(command: Command, here: Path, name: str) -> Path:
    out = here / name
    if command.copied:
        shutil.copytree(here / command.copied, out)
    return out


def whole_of(command: Command, here: Path) -> tuple[Path, float]:
    """The folder of a call that nothing interrupted, and how long it took."""
    whole = folder_of(command, here, "whole")
    begun = time.monotonic()
    assert status(started(command.at(whole, here), whole)) == 0
    return whole, time.monotonic() - begun


@pytest.mark.parametrize("name", COMMANDS)
def test_killed_at_random_moments_the_next_call_makes_what_was_to_be_made(tmp_path: Path, name: str) -> None:
    command, moments, cut_short = COMMANDS[name], random.Random(0), 0
    whole, duration = whole_of(command, tmp_path)
    for number in range(KILLS):
        out = folder_of(command, tmp_path, str(number))
        process = started(command.at(out, tmp_path), out)
        process.join(moments.uniform(0.0, duration))
        process.kill()
        cut_short += status(process) != 0
        ended = status(started(command.at(out, tmp_path, again=True), out))
        assert ended == 0 or (name == "merge" and ended == 2)  # which had been through, and says so
        command.same(out, whole)
        assert not list(out.rglob(".flowlik-*"))
    figure(
        f"{name} killed and called again", f"{KILLS} ({cut_short} before their end): 0 lost, 0 torn", "100"
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_two_of_a_command_in_one_folder_are_both_right(tmp_path: Path, name: str) -> None:
    command = COMMANDS[name]
    whole, _ = whole_of(command, tmp_path)
    for number in range(PAIRS):
        out = folder_of(command, tmp_path, str(number))
        # whichever is there first, the other one goes on with it
        both = [started(command.at(out, tmp_path, again=True), out) for _ in range(2)]
        ended = [status(process) for process in both]
        assert ended == [0, 0] or (name == "merge" and sorted(ended) == [0, 2])
        command.same(out, whole)
        assert not list(out.rglob(".flowlik-*"))
    figure(f"pairs of {name}", f"{PAIRS}: both right", "20")


SHARING = [*combinations(("run", "report", "figures", "table", "compare", "merge"), 2)][:: size(6, 1)]


@pytest.mark.parametrize("pair", SHARING)
def test_commands_that_share_a_run_do_not_disturb_each_other(tmp_path: Path, pair: tuple[str, str]) -> None:
    words = {"table": ("table", "OUT"), "compare": ("compare", "OUT", "HERE/finished")}
    words["merge"] = ("merge", "OUT", "--out", "OUT-merged")
    for number in range(PAIRS):
        out = tmp_path / f"run-{number}"
        shutil.copytree(tmp_path / "finished", out)
        before = lines(out)
        calls = []
        for name in pair:
            given = words[name] if name in words else (*COMMANDS[name].words, *COMMANDS[name].again)
            calls.append(Command(given, same_drawings).at(out, tmp_path))
        both = [started(call, out) for call in calls]
        assert [status(process) for process in both] == [0, 0]
        rows = lines(out)
        assert rows[: len(before)] == before
        assert len(rows) - len(before) == (9 if "run" in pair else 0)
        assert len({row["cell_id"] for row in rows}) == len(rows)
        assert not list(out.rglob(".flowlik-*"))
