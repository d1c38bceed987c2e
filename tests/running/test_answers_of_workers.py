"""Answers of workers: read as plain values and arrays, and nothing that they name is called."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flowlik.running.workers.answers import TOKEN, Answers, ForeignBytesError, send

TOKEN_BYTES = b"t" * TOKEN


def through(data: bytes | None, answer: Any = None) -> Any:
    """What comes of an answer, or of a pickle behind the token, at the other end of a pipe."""
    read, write = os.pipe()
    try:
        if data is None:
            send(write, TOKEN_BYTES, answer)
        else:
            os.write(write, TOKEN_BYTES + len(data).to_bytes(8, "little") + data)
        answers = Answers(TOKEN_BYTES)
        answers.read_from(read)
        return answers.take()
    finally:
        os.close(read)
        os.close(write)


class Calls:
    """Its pickle calls a function with a path."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_what_a_pickle_names_is_not_called(tmp_path: Path) -> None:
    data = pickle.dumps((True, Calls(tmp_path / "made")))
    with pytest.raises(ValueError, match=r"holds a posix\.mkdir; records hold plain values"):
        through(data)
    assert not (tmp_path / "made").exists()
    objects = pickle.dumps((True, np.array([Calls(tmp_path / "made")], dtype=object)))
    with pytest.raises(ValueError, match=r"posix\.mkdir"):
        through(objects)
    assert not (tmp_path / "made").exists()


def test_rows_and_arrays_come_as_they_went() -> None:
    row = {
        "bpd": 0.1,
        "nfe": float("nan"),
        "reason": None,
        "ok": True,
        "extra": {"roots": [1, 2], "at": (3.0,)},
    }
    arrays = {"x": np.arange(6.0).reshape(2, 3), "known": np.array([True]), "name": np.array(["a"])}
    arrays |= {"big": np.zeros(300), "turned": np.arange(6).reshape(2, 3).T}
    understood, (back, found) = through(None, (True, (row, arrays)))
    assert understood is True
    assert repr(back) == repr(row)
    assert found.keys() == arrays.keys()
    for name, value in arrays.items():
        np.testing.assert_array_equal(found[name], value, strict=True)


def test_other_numbers_and_objects_come_as_records_write_them() -> None:
    row = {"a": np.float32(0.5), "b": torch.tensor(2.5), "c": torch.ones(2), "d": Path("here"), 1: 2}
    _, back = through(None, (True, row))
    assert back == {"a": 0.5, "b": 2.5, "c": [1.0, 1.0], "d": "here", "1": 2}


def test_what_stands_in_the_pipe_without_the_token_is_foreign() -> None:
    answers = Answers(TOKEN_BYTES)
    read, write = os.pipe()
    os.write(write, b"hello, I am a cell")
    answers.read_from(read)
    with pytest.raises(ForeignBytesError):
        answers.take()
    os.close(read)
    os.close(write)
