"""Arrays of npz files without reading them whole.

A member that is stored as it is can be mapped where it lies. One that is compressed is unpacked once, into a plain npy
file in the cache folder, and that is mapped. Either way its CRC-32 is checked first.
"""

from __future__ import annotations

import io
import shutil
import zipfile
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from flowlik_models.files import no_room, whole_file
from flowlik_models.images.errors import DataError
from flowlik_models.images.folders import cache_dir

_PIECE = 2**22
_LOCAL_HEADER = 30  # bytes before the name of a zip member, where the lengths of name and extra field stand


@dataclass(frozen=True)
class Member:
    """An array in an npz file: shape and type, CRC-32 of its npy file, and whether it is compressed."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    header: int
    size: int
    crc: int
    compressed: bool


def member(file: Path, name: str) -> Member:
    """What the npz file says of one of its arrays, from its directory and the array's header alone.

    Raises:
        DataError: no npz file, cut off, without that array, or one of objects or in column order.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            info = archive.getinfo(f"{name}.npy")
            with archive.open(info) as stream:
                shape, dtype, header = _header(stream)
    except KeyError:
        raise DataError(f"{file}: expected an array {name!r}, found none") from None
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{file}: expected a complete npz file of plain arrays ({error})") from None
    compressed = info.compress_type != zipfile.ZIP_STORED
    return Member(file, name, shape, dtype, header, info.file_size, info.CRC, compressed)


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    version = npy.read_magic(stream)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, columns_first, dtype = read(stream)
    if columns_first or dtype.hasobject:
        raise ValueError("found an array of objects or in column order")
    return shape, dtype, stream.tell()


def small_array(file: Path, name: str) -> NDArray[Any]:
    """An array read whole.

    Raises:
        DataError: as `member`, or its bytes are not those of its checksum.
    """
    found = member(file, name)
    try:
        with zipfile.ZipFile(file) as archive:
            content = archive.read(f"{name}.npy")
        array: NDArray[Any] = np.load(io.BytesIO(content), allow_pickle=False)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{file}: array {name!r} is damaged ({error})") from None
    return array.reshape(found.shape)


@lru_cache(maxsize=16)
def mapped(found: Member) -> NDArray[Any]:
    """The array as a read-only map, its CRC-32 checked.

    Raises:
        DataError: the bytes are not those of the checksum, or there is no room for the unpacked file.
    """
    if found.compressed:
        array: NDArray[Any] = np.load(_unpacked(found), mmap_mode="r", allow_pickle=False)
        return array
    start = _offset(found)
    whole = np.memmap(found.file, np.uint8, "r", offset=start, shape=(found.size,))
    crc = 0
    for at in range(0, found.size, _PIECE):
        crc = zlib.crc32(whole[at : at + _PIECE].data, crc)
    if crc != found.crc:
        raise DataError(
            f"{found.file}: array {found.name!r} is damaged: expected CRC-32 {found.crc:08x}, found {crc:08x}"
        )
    return np.memmap(found.file, found.dtype, "r", offset=start + found.header, shape=found.shape)


def _offset(found: Member) -> int:
    """Where the bytes of a stored member begin."""
    with zipfile.ZipFile(found.file) as archive:
        start = archive.getinfo(f"{found.name}.npy").header_offset
    with found.file.open("rb") as file:
        file.seek(start)
        local = file.read(_LOCAL_HEADER)
    lengths = np.frombuffer(local, "<u2", count=2, offset=26)
    return start + _LOCAL_HEADER + int(lengths.sum())


def _unpacked(found: Member) -> Path:
    target = cache_dir() / "npz" / f"{found.file.stem}-{found.name}-{found.size}-{found.crc:08x}.npy"
    if target.is_file() and target.stat().st_size == found.size:
        return target
    try:
        _unpack(found, target)
    except (EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{found.file}: array {found.name!r} is damaged ({error})") from None
    except OSError as error:
        raise DataError(no_room(target, error, found.size)) from None
    return target


def _unpack(found: Member, target: Path) -> None:
    with (
        whole_file(target) as out,
        zipfile.ZipFile(found.file) as archive,
        archive.open(f"{found.name}.npy") as stream,
    ):
        shutil.copyfileobj(stream, out, _PIECE)  # zipfile checks the CRC at the end
