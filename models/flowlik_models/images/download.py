"""Official files from their official addresses: resumed where they stopped, checked, then moved into place.

A download grows as ``NAME.part`` beside its target. It is continued by a range request where the server allows one,
begun anew where it does not or where the finished file has another checksum, and renamed once the checksum is right, so
that a file of the right name is whole. Of an archive the members that are needed are unpacked in the same way. One
process at a time writes into a folder; another one waits and finds the files there.
"""

from __future__ import annotations

import http.client
import shutil
import tarfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from flowlik_models.files import LockError, no_room, one_at_a_time, remove_leftovers, whole_file
from flowlik_models.images.catalog import DataSet, Download
from flowlik_models.images.checksums import digest_of, verify
from flowlik_models.images.errors import DataError

Progress = Callable[[str, int, int], None]
"""(file name, bytes there, bytes in all)."""

TIMEOUT = 30.0
_PIECE = 2**18
_AGENT = {"User-Agent": "flowlik"}


def fetch(data_set: DataSet, root: Path, *, progress: Progress = lambda *_: None) -> list[Path]:
    """Fetch what of a data set is not below ``root`` yet; the files it now consists of.

    Args:
        data_set: an entry of the catalogue, or one with other addresses and digests.
        root: the data folder.
        progress: called as bytes arrive.

    Raises:
        DataError: no address answers, a file is not as published after a second attempt, there is no room, or the
            folder's file system has no locks; the line names file and address.
    """
    digests = {name: digest for release in data_set.releases for name, digest in release.digests.items()}
    files = []
    for wanted in data_set.downloads:
        folder = root / wanted.folder
        targets = [folder / name for name in wanted.members or (wanted.name,)]
        sums = [digests.get(target.name) for target in targets]
        if not all(map(_is_there, targets, sums)):
            with _alone(root, folder):
                if not all(map(_is_there, targets, sums)):
                    _fetch_and_unpack(wanted, targets, digests, progress)
        files += targets
    return files


@contextmanager
def _alone(root: Path, folder: Path) -> Iterator[None]:
    """Make the folder and be the only process that writes into it; what killed ones left is removed."""
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with one_at_a_time(root / f".{'-'.join(folder.relative_to(root).parts)}.lock"):
            remove_leftovers(folder)
            yield


def _fetch_and_unpack(
    wanted: Download, targets: list[Path], digests: Mapping[str, str], progress: Progress
) -> None:
    archive = _fetch_one(wanted, targets[0].parent, progress)
    if wanted.members:
        _unpack(archive, targets, digests)
        archive.unlink()


def _is_there(target: Path, digest: str | None) -> bool:
    """Whole already; what is there under the name and is something else is fetched anew."""
    return target.is_file() and (digest is None or digest_of(target, digest.partition(":")[0]) == digest)


def _fetch_one(wanted: Download, folder: Path, progress: Progress) -> Path:
    """One file in place, verified."""
    target, part = folder / wanted.name, folder / f"{wanted.name}.part"
    if _is_there(target, wanted.digest):
        return target
    if part.is_file() and part.stat().st_size > wanted.size:
        part.unlink()
    _check_room(folder, wanted, part.stat().st_size if part.is_file() else 0)
    resumed = part.is_file() and part.stat().st_size > 0
    _from_any_address(wanted, part, progress)
    if resumed and digest_of(part, wanted.digest.partition(":")[0]) != wanted.digest:
        part.unlink()  # the beginning was of something else: once more from nothing
        _from_any_address(wanted, part, progress)
    try:
        verify(part, wanted.digest)
    except DataError as error:
        part.unlink()
        raise DataError(f"{error}; it came from {' or '.join(wanted.addresses)} and was removed") from None
    part.replace(target)
    return target


def _check_room(folder: Path, wanted: Download, have: int) -> None:
    needs, free = wanted.size - have, shutil.disk_usage(folder).free
    if needs > free:
        raise DataError(
            f"{folder / wanted.name}: no space left on the device: needs {needs / 1e6:,.1f} MB, "
            f"{free / 1e6:,.1f} MB are free; free some room or give another --data-dir"
        )


def _from_any_address(wanted: Download, part: Path, progress: Progress) -> None:
    failed = []
    for address in wanted.addresses:
        try:
            _from(address, wanted, part, progress)
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            failed.append(f"{address} ({getattr(error, 'reason', None) or error or type(error).__name__})")
        else:
            return
    raise DataError(
        f"{wanted.name}: could not be fetched from {'; '.join(failed)}; what has come is kept, "
        "the same command goes on from there"
    )


def _from(address: str, wanted: Download, part: Path, progress: Progress) -> None:
    """Append what is missing, or write all of it where the server does not continue."""
    have = part.stat().st_size if part.is_file() else 0
    if have == wanted.size:
        return
    headers = _AGENT | ({"Range": f"bytes={have}-"} if have else {})
    request = urllib.request.Request(address, headers=headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        goes_on = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(
            f"bytes {have}-"
        )
        have = have if goes_on else 0
        with _writing(part, wanted.size - have), part.open("ab" if goes_on else "wb") as out:
            while piece := answer.read(min(_PIECE, wanted.size - have + 1)):
                if have + len(piece) > wanted.size:
                    out.truncate(0)
                    raise ConnectionError(f"more came than the {wanted.size} bytes of the published file")
                out.write(piece)
                have += len(piece)
                progress(wanted.name, have, wanted.size)
    if have < wanted.size:
        raise ConnectionError(f"the connection ended after {have} of {wanted.size} bytes")


@contextmanager
def _writing(path: Path, size: int | None = None) -> Iterator[None]:
    """What goes wrong with a local file, in one line; what goes wrong with the network passes."""
    try:
        yield
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        raise
    except LockError as error:
        raise DataError(str(error)) from None
    except OSError as error:
        raise DataError(no_room(path, error, size)) from None


# --- archives -----------------------------------------------------------------------------------------------


def _unpack(archive: Path, targets: list[Path], digests: Mapping[str, str]) -> None:
    """The members of these names, wherever they lie in the archive; nothing else of it is written."""
    found = _members(archive)
    try:
        with found as members:
            for target in targets:
                if target.name not in members:
                    raise DataError(f"{archive}: expected a member {target.name}, found none")
                _place(members[target.name], target, digests.get(target.name))
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise DataError(f"{archive}: expected a complete archive ({error})") from None


def _place(opened: Callable[[], IO[bytes]], target: Path, digest: str | None) -> None:
    with _writing(target), whole_file(target) as out:
        with opened() as source:
            shutil.copyfileobj(source, out, _PIECE)
        if digest is not None:
            out.flush()
            try:
                verify(Path(out.name), digest)
            except DataError as error:  # which names the temporary file
                raise DataError(str(error).replace(out.name, str(target))) from None


@contextmanager
def _members(archive: Path) -> Iterator[dict[str, Callable[[], IO[bytes]]]]:
    """How to open each regular file of an archive, by its name without folders."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as zipped:
            yield {
                Path(info.filename).name: lambda info=info: zipped.open(info)  # type: ignore[misc]
                for info in zipped.infolist()
                if not info.is_dir()
            }
        return
    with tarfile.open(archive) as tar:
        yield {
            Path(entry.name).name: lambda entry=entry: tar.extractfile(entry)  # type: ignore[misc]
            for entry in tar
            if entry.isfile()
        }
