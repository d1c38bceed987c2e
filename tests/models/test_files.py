"""Files are there whole or not at all, killed writers leave nothing, and locks are asked for where there are some."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest
from file_systems import killed_while_writing, without_locks

from flowlik_models import files
from flowlik_models.files import (
    LockError,
    kept_until_done,
    locked,
    locked_for_reading,
    new_folder,
    one_at_a_time,
    remove_leftovers,
    whole_file,
    write_atomically,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


@pytest.fixture(autouse=True)
def _no_folder_was_written_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_swept", set())


def test_a_file_is_there_whole_or_as_it_was(tmp_path: Path) -> None:
    long = tmp_path / "below" / ("x" * 255)  # no name has room for more
    write_atomically(long, b"old")
    with pytest.raises(TypeError), whole_file(long) as file:
        file.write("half of the n")  # type: ignore[arg-type]
    assert long.read_bytes() == b"old"
    assert names(long.parent) == [long.name]
    with whole_file(long) as file:
        file.write(b"new")
        assert Path(file.name).parent == long.parent
    assert long.read_bytes() == b"new"
    assert names(long.parent) == [long.name]
    assert long.stat().st_mode & 0o777 == 0o644


def test_a_folder_under_way_is_gone_after_it(tmp_path: Path) -> None:
    with new_folder(tmp_path / "figures") as made:
        (made / "a.png").write_bytes(b"a")
        assert made.parent == tmp_path
    assert names(tmp_path) == []


def test_what_a_killed_process_left_is_removed_by_the_next_that_writes(tmp_path: Path) -> None:
    (tmp_path / ".flowlik-mine").write_bytes(b"of the user's own")
    killed_while_writing(tmp_path)
    assert len(names(tmp_path)) == 4
    write_atomically(tmp_path / "next", b"")
    assert names(tmp_path) == [".flowlik-mine", "next"]


def test_leftovers_below_a_folder_are_removed_and_what_is_being_written_stays(tmp_path: Path) -> None:
    killed_while_writing(tmp_path / "items")
    with whole_file(tmp_path / "items" / "a") as file, new_folder(tmp_path / "figures") as made:
        (made / "b").write_bytes(b"b")
        remove_leftovers(tmp_path)
        assert made.is_dir()
        assert Path(file.name).is_file()
    assert names(tmp_path) == ["a", "items"]


def test_folders_far_below_are_not_looked_into(tmp_path: Path) -> None:
    for name in ("a/b", "a/b/c"):
        killed_while_writing(tmp_path / name)
    remove_leftovers(tmp_path)
    assert not list((tmp_path / "a" / "b").glob(".flowlik-*"))
    assert len(list((tmp_path / "a" / "b" / "c").glob(".flowlik-*"))) == 2


def test_without_locks_leftovers_of_a_day_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_while_writing(tmp_path)
    without_locks(monkeypatch)
    remove_leftovers(tmp_path)
    assert len(names(tmp_path)) == 3
    for path in tmp_path.iterdir():
        os.utime(path, (0, 0))
    write_atomically(tmp_path / "a", b"a")
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_without_locks_writers_say_the_cure_and_readers_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    without_locks(monkeypatch, number)
    with (tmp_path / "a").open("wb") as file:
        with locked_for_reading(file.fileno()):
            pass
        with pytest.raises(LockError, match=r"no file locks .*local disk"), locked(file.fileno(), tmp_path):
            pass
    with pytest.raises(LockError, match=f"^{tmp_path}: "), one_at_a_time(tmp_path / ".lock"):
        pass


def test_what_is_no_lack_of_locks_is_not_called_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_locks(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="Input/output error"), one_at_a_time(tmp_path / ".lock"):
        pass


def test_one_process_at_a_time(tmp_path: Path) -> None:
    read, write = os.pipe()
    with one_at_a_time(tmp_path / ".lock"):
        if (child := os.fork()) == 0:
            with one_at_a_time(tmp_path / ".lock"):
                os.write(write, b"child ")
            os._exit(0)
        time.sleep(0.1)
        os.write(write, b"parent ")
    os.waitpid(child, 0)
    assert os.read(read, 99) == b"parent child "


def test_a_folder_of_partial_results_is_of_one_process_and_stays_where_the_work_failed(
    tmp_path: Path,
) -> None:
    folder, (read, write) = tmp_path / "new" / "parts", os.pipe()
    with kept_until_done(folder):
        (folder / "1").touch()
        if (child := os.fork()) == 0:
            with kept_until_done(folder):  # removed by the first while this one waits: made anew
                os.write(write, b"child" if not (folder / "1").exists() and folder.is_dir() else b"torn")
            os._exit(0)
        time.sleep(0.1)
        os.write(write, b"parent ")
    os.waitpid(child, 0)
    assert os.read(read, 99) == b"parent child"
    assert not folder.exists()
    with pytest.raises(KeyboardInterrupt), kept_until_done(folder):
        raise KeyboardInterrupt
    assert folder.is_dir()
