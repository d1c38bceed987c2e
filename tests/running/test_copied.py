"""A worker that is a copy of the command's process."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys

import pytest

from flowlik.running.workers.copied import Copy, loading, nothing_was_computed


def test_a_copy_says_how_it_ended() -> None:
    assert Copy(lambda: os._exit(3)).wait() == 3
    assert Copy(lambda: None).wait() == 1  # a worker serves until its pipe is closed
    assert Copy(lambda: os.kill(os.getpid(), signal.SIGKILL)).wait(10.0) == -signal.SIGKILL


def test_a_copy_that_goes_on_is_waited_for_no_longer_than_asked() -> None:
    copy = Copy(signal.pause)
    assert copy.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        copy.wait(0.02)
    os.kill(copy.pid, signal.SIGTERM)
    assert copy.wait() == copy.poll() == -signal.SIGTERM  # a handler of this process is not the copy's


def test_a_copy_is_on_its_own() -> None:
    def look() -> None:
        alone = os.getsid(0) == os.getpid() and os.read(0, 1) == b""
        os._exit(0 if alone and signal.getsignal(signal.SIGINT) is signal.default_int_handler else 1)

    assert Copy(look).wait() == 0


def test_an_error_of_a_copy_is_told_and_ends_it(capfd: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise ValueError("of the copy")

    print("once")
    assert Copy(fail).wait() == 1
    out, told = capfd.readouterr()
    assert out.count("once") == 1
    assert "ValueError: of the copy" in told


def test_where_torch_is_loaded_a_process_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", sys)
    assert not nothing_was_computed()


def test_what_is_loaded_is_not_looked_through_for_garbage() -> None:
    before = gc.get_freeze_count()
    with loading():
        assert not gc.isenabled()
        loaded: list[object] = []
    assert gc.isenabled()
    assert gc.get_freeze_count() > before
    assert not any(each is loaded for each in gc.get_objects())


def test_garbage_is_collected_again_where_nothing_could_be_loaded() -> None:
    with pytest.raises(ImportError), loading():
        raise ImportError
    assert gc.isenabled()
