"""Downloads go on where they stopped, are checked, and never leave half a file under its name."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import multiprocessing
import random
import re
import tarfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import image_files
import pytest
from file_systems import killed_while_writing, without_locks
from sizes import figure, size
from typer.testing import CliRunner

from flowlik.cli import app
from flowlik_models.images import CATALOG, DataError, DataSet, open_images
from flowlik_models.images import download as downloads
from flowlik_models.images.catalog import Download


class Server(ThreadingHTTPServer):
    """Serves ``files``; counts requests; may cut a first answer short or ignore ranges."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.ranges: list[str | None] = []
        self.cut: int | None = None
        self.ranged = True

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.ranges.append(asked)
        content = self.server.files.get(self.path[1:])
        if content is None:
            self.send_error(404)
            return
        first = int(re.sub(r"\D", "", asked)) if asked and self.server.ranged else 0
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        body = content[first:]
        cut, self.server.cut = self.server.cut, None
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:cut])

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as serving:
        thread = threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield serving
        serving.shutdown()
        thread.join()


@pytest.fixture
def cifar(server: Server, tmp_path: Path) -> DataSet:
    """A tiny CIFAR-10 whose archive the server has."""
    data_set = image_files.write_cifar(tmp_path / "source")
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        tar.add(tmp_path / "source" / "cifar-10-batches-py", arcname="../cifar-10-batches-py")
    server.files["cifar.tar.gz"] = packed.getvalue()
    return published(data_set, server, packed.getvalue())


def published(data_set: DataSet, server: Server, content: bytes) -> DataSet:
    wanted = Download(
        addresses=(server.address + "gone/cifar.tar.gz", server.address + "cifar.tar.gz"),
        digest="md5:" + hashlib.md5(content, usedforsecurity=False).hexdigest(),
        size=len(content),
        folder="cifar-10-batches-py",
        members=data_set.releases[0].files,
    )
    return dataclasses.replace(data_set, downloads=(wanted,))


def test_an_archive_is_fetched_checked_and_unpacked_and_then_left_alone(
    cifar: DataSet, server: Server, tmp_path: Path
) -> None:
    seen: list[tuple[str, int, int]] = []
    files = downloads.fetch(cifar, tmp_path, progress=lambda *now: seen.append(now))
    assert len(open_images(cifar, "train", tmp_path)) == 50
    assert sorted(path.name for path in (tmp_path / "cifar-10-batches-py").iterdir()) == sorted(
        p.name for p in files
    )
    assert seen[-1] == ("cifar.tar.gz", cifar.downloads[0].size, cifar.downloads[0].size)
    asked = len(server.ranges)
    downloads.fetch(cifar, tmp_path)
    assert len(server.ranges) == asked


def test_an_interrupted_download_goes_on_where_it_stopped(
    cifar: DataSet, server: Server, tmp_path: Path
) -> None:
    address = (server.address + "cifar.tar.gz",)
    cifar = dataclasses.replace(
        cifar, downloads=(dataclasses.replace(cifar.downloads[0], addresses=address),)
    )
    server.cut = 1000
    with pytest.raises(DataError, match=r"cifar\.tar\.gz: could not be fetched .* the same command goes on"):
        downloads.fetch(cifar, tmp_path)
    part = tmp_path / "cifar-10-batches-py" / "cifar.tar.gz.part"
    assert part.stat().st_size == 1000
    assert [path.name for path in part.parent.iterdir()] == [part.name]
    downloads.fetch(cifar, tmp_path)
    assert server.ranges == [None, "bytes=1000-"]
    assert len(open_images(cifar, "test", tmp_path)) == 20


@pytest.mark.parametrize("ranged", [True, False])
def test_a_beginning_of_something_else_is_fetched_again_from_nothing(
    cifar: DataSet, server: Server, tmp_path: Path, ranged: bool
) -> None:
    part = tmp_path / "cifar-10-batches-py" / "cifar.tar.gz.part"
    part.parent.mkdir()
    part.write_bytes(b"something else")
    server.ranged = ranged
    downloads.fetch(cifar, tmp_path)
    assert not part.exists()
    assert len(open_images(cifar, "test", tmp_path)) == 20


def test_a_file_with_another_checksum_is_not_kept(cifar: DataSet, server: Server, tmp_path: Path) -> None:
    server.files["cifar.tar.gz"] = server.files["cifar.tar.gz"][:-1] + b"x"
    with pytest.raises(DataError, match=r"expected MD5 \w+, found MD5 \w+ .* it came from http"):
        downloads.fetch(cifar, tmp_path)
    assert not list((tmp_path / "cifar-10-batches-py").iterdir())


def one_address(data_set: DataSet, server: Server) -> DataSet:
    (wanted,) = data_set.downloads
    return dataclasses.replace(
        data_set, downloads=(dataclasses.replace(wanted, addresses=(server.address + "cifar.tar.gz",)),)
    )


@pytest.mark.parametrize("begun", [0, 100])
def test_no_more_is_taken_than_was_published(
    cifar: DataSet, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: int
) -> None:
    cifar = one_address(cifar, server)
    size, content = cifar.downloads[0].size, server.files["cifar.tar.gz"]
    server.files["cifar.tar.gz"] = content + bytes(10 * size)
    part = tmp_path / "cifar-10-batches-py" / "cifar.tar.gz.part"
    part.parent.mkdir()
    part.write_bytes(content[:begun])
    monkeypatch.setattr(downloads, "_PIECE", 1000)
    seen: list[int] = []
    with pytest.raises(DataError, match=rf"more came than the {size} bytes"):
        downloads.fetch(cifar, tmp_path, progress=lambda _, have, __: seen.append(have))
    assert max(seen) <= size
    assert part.stat().st_size == 0
    server.files["cifar.tar.gz"] = content
    downloads.fetch(cifar, tmp_path)
    assert len(open_images(cifar, "test", tmp_path)) == 20


def test_two_at_once_fetch_once_and_both_are_right(cifar: DataSet, server: Server, tmp_path: Path) -> None:
    cifar = one_address(cifar, server)
    fetching = multiprocessing.get_context("fork")
    both = [fetching.Process(target=downloads.fetch, args=(cifar, tmp_path)) for _ in range(4)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0] * 4
    assert server.ranges == [None]
    assert len(open_images(cifar, "train", tmp_path)) == 50
    there = sorted(path.name for path in (tmp_path / "cifar-10-batches-py").iterdir())
    assert there == sorted(cifar.downloads[0].members)


def test_killed_at_random_moments_the_next_fetch_has_every_file(
    cifar: DataSet, server: Server, tmp_path: Path
) -> None:
    cifar, moments, cut_short = one_address(cifar, server), random.Random(0), 0
    fetching = multiprocessing.get_context("fork")
    begun = time.monotonic()
    downloads.fetch(cifar, tmp_path / "whole")
    duration = time.monotonic() - begun
    there = sorted(path.name for path in (tmp_path / "whole" / "cifar-10-batches-py").iterdir())
    for number in range(size(3, 100)):
        process = fetching.Process(target=downloads.fetch, args=(cifar, tmp_path / str(number)))
        process.start()
        process.join(moments.uniform(0.0, 2 * duration))
        process.kill()
        process.join()
        cut_short += process.exitcode != 0
        downloads.fetch(cifar, tmp_path / str(number))
        assert len(open_images(cifar, "train", tmp_path / str(number))) == 50
        left = sorted(path.name for path in (tmp_path / str(number) / "cifar-10-batches-py").iterdir())
        assert left == there
    told = f"{size(3, 100)} ({cut_short} before their end): every file there, nothing else"
    figure("data get killed and called again", told, "100")


def test_what_a_killed_fetch_left_is_removed_and_without_locks_the_cure_is_said(
    cifar: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_while_writing(tmp_path / "cifar-10-batches-py")
    with monkeypatch.context() as patch:
        without_locks(patch)
        with pytest.raises(DataError, match=r"no file locks .* local disk"):
            downloads.fetch(cifar, tmp_path)
    downloads.fetch(cifar, tmp_path)
    assert not list(tmp_path.rglob(".flowlik-*"))


def test_no_room_is_said_before_anything_is_fetched(
    cifar: DataSet, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DataError, match=r"cifar\.tar\.gz: no space left on the device: needs .* MB"):
        downloads.fetch(cifar, tmp_path)
    assert server.ranges == []


def test_room_that_runs_out_on_the_way_is_said_and_what_came_is_kept(
    cifar: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match=r"\.part: no space left on the device"):
        downloads.fetch(cifar, tmp_path, progress=full)
    assert (tmp_path / "cifar-10-batches-py" / "cifar.tar.gz.part").exists()


def test_the_command_gets_a_data_set_and_lists_it(
    cifar: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CATALOG, "cifar10", cifar)
    call = ["data", "get", "cifar10", "--data-dir", str(tmp_path / "new")]
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 0, result.output
    assert "cifar.tar.gz: " in result.output
    listed = CliRunner().invoke(app, ["data", "--data-dir", str(tmp_path / "new")])
    assert re.search(r"cifar10 +verified +cifar-10-batches-py/", listed.output)
    assert re.search(r"mnist +missing", listed.output)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["get", "cifar", "--data-dir", "."], "unknown data set 'cifar'; did you mean 'cifar10'?"),
        (["get"], "needs a name"),
        (["got", "mnist"], "unknown action 'got'"),
        (["get", "mnist"], "no data folder: give --data-dir or set FLOWLIK_DATA"),
    ],
)
def test_bad_usage_is_one_line(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLOWLIK_DATA", raising=False)
    result = CliRunner().invoke(app, ["data", *arguments])
    assert result.exit_code == 2
    assert message in result.output


def test_a_damaged_member_of_an_archive_is_named_by_its_own_name(tmp_path: Path) -> None:
    target = tmp_path / "data_batch_1"
    with pytest.raises(DataError, match=r"data_batch_1: expected MD5 00, found") as caught:
        downloads._place(lambda: io.BytesIO(b"other"), target, "md5:00")
    assert ".tmp" not in str(caught.value)
    assert not list(tmp_path.iterdir())
