"""Nothing lost, nothing doubled: runs that are killed, crowded, interrupted or out of disk."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from finished_runs import assert_same_run, lines, table
from hostile import Hostile
from sizes import figure, size

from flowlik.cells import Cell, Options
from flowlik.commands.interruption import resume_command
from flowlik.records import journal
from flowlik.records.claims import Claims
from flowlik.records.journal import StorageError
from flowlik.records.writing import append_line
from flowlik.running.run import run_cells

KILLS = size(5, 100)
COMMAND_KILLS = size(1, 5)


def cells(count: int = 12, **options: Any) -> list[Cell]:
    chosen = Options(**({"n_items": 16, "batch_size": 16, "rounds": 0} | options))
    estimator = Hostile(act="pause", amount=20)
    return [
        Cell(task="gaussian-2d", model="closed-form", estimator=estimator, options=chosen).with_options(
            seed=seed
        )
        for seed in range(count)
    ]


def in_a_process(out: Path, chosen: list[Cell]) -> multiprocessing.process.BaseProcess:
    """A run in a process of its own, forked so that it has its libraries."""

    def run() -> None:
        list(run_cells(chosen, out, resume=True))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def test_killed_at_random_moments_and_resumed_nothing_is_lost_or_doubled(tmp_path: Path) -> None:
    chosen = cells(6)
    begun = time.monotonic()
    in_a_process(tmp_path / "whole", chosen).join()
    duration = time.monotonic() - begun
    assert len(table(tmp_path / "whole")) == len(chosen)
    moments = random.Random(0)
    cut_short = 0
    for number in range(KILLS):
        out = tmp_path / str(number)
        process = in_a_process(out, chosen)
        process.join(moments.uniform(0.0, duration))
        process.kill()
        process.join()
        cut_short += process.exitcode != 0
        resumed = in_a_process(out, chosen)
        resumed.join()
        assert resumed.exitcode == 0
        assert_same_run(out, tmp_path / "whole")
    figure("runs killed and resumed", f"{KILLS} ({cut_short} before their end): 0 lost, 0 doubled")


SUITE = """
[defaults]
n_items = 16
batch_size = 16
rounds = 1
timing_batch = 8
[[cells]]
tasks = ["gaussian-2d"]
models = ["closed-form"]
estimators = ["f2d2[steps=1|2|3|4|5|6|7|8]"]
"""


def command(suite: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "flowlik", "run", str(suite), "--no-report", "--out", str(out), *more]


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    (tmp_path / "suite.toml").write_text(SUITE)
    return tmp_path / "suite.toml"


def started(arguments: list[str]) -> subprocess.Popen[str]:
    """A process that Ctrl-C reaches, also where these tests run in the background of a shell."""
    return subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for_records(out: Path, count: int) -> None:
    end = time.monotonic() + 300
    while time.monotonic() < end:
        file = out / "records.jsonl"
        if file.exists() and file.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.01)
    raise AssertionError("no records")


def children(pid: int) -> list[int]:
    found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [*found, *(grandchild for child in found for grandchild in children(child))]


def gone(pids: list[int]) -> bool:
    def running(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    end = time.monotonic() + 10
    while any(running(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(running(pid) for pid in pids)


def test_the_command_killed_and_resumed_and_its_worker_with_it(suite: Path, tmp_path: Path) -> None:
    moments = random.Random(1)
    whole = tmp_path / "whole"
    assert subprocess.run(command(suite, whole), capture_output=True, check=False).returncode == 0
    for number in range(COMMAND_KILLS):
        out = tmp_path / str(number)
        process = started(command(suite, out))
        wait_for_records(out, moments.randrange(1, 8))
        time.sleep(moments.uniform(0.0, 0.05))
        workers = children(process.pid)
        process.kill()
        process.communicate()
        assert gone(workers)
        again = subprocess.run(command(suite, out, "--resume"), capture_output=True, text=True, check=False)
        assert again.returncode == 0, again.stderr
        assert "done before" in again.stdout
        assert_same_run(out, whole)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_hand_it_ends_and_says_how_to_go_on(
    suite: Path, tmp_path: Path, how: signal.Signals
) -> None:
    out = tmp_path / "out"
    suite.write_text(SUITE.replace("1|2|3|4|5|6|7|8", "1|2|3000000"))
    process = started(command(suite, out))
    wait_for_records(out, 2)
    time.sleep(0.3)
    workers = children(process.pid)
    assert workers
    begun = time.monotonic()
    process.send_signal(how)
    process.wait()
    seconds = time.monotonic() - begun
    assert process.returncode == 130
    assert gone(workers)
    assert len(lines(out)) == 2
    assert process.stderr is not None
    (line,) = process.stderr.read().strip().splitlines()
    found = re.search(r"go on with: (flowlik run .*)", line)
    assert found is not None
    assert shlex.split(found[1]) == ["flowlik", *command(suite, out)[3:6], "--out", str(out), "--resume"]
    figure(f"seconds from {how.name} to the end", f"{seconds:.2f}", "1")


def test_the_command_that_goes_on_is_the_one_that_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "run", "-e", "f2d2[steps=1|2]", "--out=a b", "--resume"])
    expected = "flowlik run -e 'f2d2[steps=1|2]' --out 'a b' --resume"
    assert resume_command(Path("a b")) == expected


def test_two_runs_share_a_folder_and_no_cell_is_run_twice(tmp_path: Path) -> None:
    chosen = cells(12)
    both = [in_a_process(tmp_path / "both", chosen) for _ in range(2)]
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    in_a_process(tmp_path / "one", chosen).join()
    assert_same_run(tmp_path / "both", tmp_path / "one")
    runs = Counter(line["run_id"] for line in lines(tmp_path / "both"))
    assert len(runs) == 2, "one run did everything"


def test_a_cell_that_another_run_holds_is_waited_for(tmp_path: Path) -> None:
    claims = Claims(tmp_path)
    assert claims.take("0123456789abcdef")
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        other = Claims(tmp_path)
        taken = other.take("0123456789abcdef"), other.take("fedcba9876543210")
        os.write(write, repr(taken).encode())
        os._exit(0 if other.take("0123456789abcdef", wait=True) else 1)
    assert os.read(read, 99) == b"(False, True)"
    claims.drop("0123456789abcdef")
    assert os.waitpid(child, 0)[1] == 0
    claims.close()


# --- a full disk --------------------------------------------------------------------------------------------


def test_a_row_that_the_disk_takes_in_part_is_taken_out_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "records.jsonl"
    append_line(file, {"cell_id": "a"})
    before = file.read_bytes()
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[: len(data) // 2]))
    with pytest.raises(StorageError, match="the disk is full; what is recorded is safe"):
        append_line(file, {"cell_id": "b"})
    monkeypatch.undo()
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["records.jsonl"]


@pytest.mark.parametrize("room", [900, 3000, 6000])
def test_a_run_on_a_disk_that_fills_ends_with_one_line_and_goes_on_later(tmp_path: Path, room: int) -> None:
    """The kernel refuses to let files grow beyond a limit, in the middle of a write."""
    chosen = cells(6)
    read, write = os.pipe()
    if os.fork() == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        try:
            list(run_cells(chosen, tmp_path / "out"))
        except StorageError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    message = b"".join(iter(lambda: os.read(read, 4096), b"")).decode()
    os.wait()
    assert message.count("\n") == 0
    assert "the disk is full" in message
    file = tmp_path / "out" / "records.jsonl"
    assert not file.exists() or not file.read_bytes() or lines(tmp_path / "out")
    list(run_cells(chosen, tmp_path / "out", resume=True))
    list(run_cells(chosen, tmp_path / "whole"))
    assert_same_run(tmp_path / "out", tmp_path / "whole")


def test_a_full_disk_is_one_line_for_the_user(
    suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from flowlik import cli
    from flowlik.running import inline, registry, run_folder

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(run_folder, "write_arrays", full)
    monkeypatch.setattr(registry, "EXECUTORS", {"serial": lambda setup, address: inline.Inline(setup)})
    result = CliRunner().invoke(cli.app, command(suite, tmp_path / "out")[3:])
    assert result.exit_code == 1
    assert result.stderr.strip().endswith("free some space and go on with --resume")
    assert len(result.stderr.strip().splitlines()) == 1


# --- torn lines ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 10, 70_000])
def test_a_torn_line_is_set_aside_on_reading_and_only_once(tmp_path: Path, cut: int) -> None:
    file = tmp_path / "a.jsonl"
    append_line(file, {"a": "x" * 100_000})
    whole = file.read_bytes()
    file.write_bytes(whole + whole[:cut])
    with pytest.warns(UserWarning, match="set aside in a.jsonl.torn"):
        rows, end = journal.read(file)
    assert (len(rows), end) == (1, len(whole))
    assert file.read_bytes() == whole
    assert (tmp_path / "a.jsonl.torn").read_bytes() == whole[:cut] + b"\n"
    assert journal.read(file, end) == ([], end)
    append_line(file, {"b": 1})
    assert journal.read(file, end)[0] == [{"b": 1}]
