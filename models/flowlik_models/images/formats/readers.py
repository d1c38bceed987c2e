"""The official formats: idx, CIFAR-10's python and binary batches, ImageNet's npz batches.

A reader is given verified files and yields parts: pixels (n, channels, height, width) uint8, memory-mapped where the
format allows it, and labels (n,) int64 from 0. Pixels of an npz batch are touched when they are first asked for.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowlik_models.images.catalog import DataSet
from flowlik_models.images.errors import DataError
from flowlik_models.images.formats import npz, pickles

Pixels = NDArray[np.uint8]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Part:
    """The images of one file: their labels, where their pixels come from, and a name of the content."""

    file: Path
    labels: Labels
    pixels: Callable[[], Pixels]
    identity: str | None = None


def read(format: str, files: Sequence[Path], data_set: DataSet) -> list[Part]:
    """The parts of one split.

    Raises:
        DataError: a file is not of the format, or its images or labels do not fit the data set; the line names it.
    """
    parts = _READERS[format](files, data_set)
    for part in parts:
        _check_labels(part, data_set)
    return parts


def _check_labels(part: Part, data_set: DataSet) -> None:
    labels, first = part.labels, data_set.first_label
    outside = np.flatnonzero((labels < 0) | (labels >= data_set.classes))
    if len(outside):
        where = int(outside[0])
        raise DataError(
            f"{part.file}: expected labels {first}..{first + data_set.classes - 1}, "
            f"found {int(labels[where]) + first} for image {where}"
        )


def _part(
    file: Path, pixels: NDArray[Any], labels: NDArray[Any], data_set: DataSet, labels_file: Path | None = None
) -> Part:
    if len(pixels) != len(labels):
        other = f" in {labels_file.name}" if labels_file else ""
        raise DataError(
            f"{file}: expected a label for each of {len(pixels)} images, found {len(labels)}{other}"
        )
    images = pixels.reshape(-1, *data_set.event_shape)
    return Part(labels_file or file, labels.astype(np.int64) - data_set.first_label, lambda: images)


# --- idx ----------------------------------------------------------------------------------------------------
def _read_idx(files: Sequence[Path], data_set: DataSet) -> list[Part]:
    images, labels = files
    pixels = _idx(images, 3)
    if pixels.shape[1:] != data_set.event_shape[1:]:
        raise DataError(f"{images}: expected images of {data_set.event_shape[1:]}, found {pixels.shape[1:]}")
    return [_part(images, pixels, _idx(labels, 1), data_set, labels)]


def _idx(path: Path, dimensions: int) -> Pixels:
    """An idx array of unsigned bytes: mapped where the file is plain, in memory where it is packed."""
    header = 4 + 4 * dimensions
    packed = path.suffix == ".gz"
    content = _unpacked(path) if packed else np.memmap(path, np.uint8, "r")
    head = bytes(content[:header])
    if len(head) < header or head[:4] != bytes((0, 0, 8, dimensions)):
        raise DataError(
            f"{path}: expected an idx file of bytes in {dimensions} dimensions (0000080{dimensions}), "
            f"found it to begin with {head[:4].hex() or 'nothing'}"
        )
    shape = tuple(int(size) for size in np.frombuffer(head, ">u4", offset=4))
    expected = header + int(np.prod(shape, dtype=np.int64))
    if len(content) != expected:
        raise DataError(f"{path}: expected {expected} bytes for an array of {shape}, found {len(content)}")
    array: Pixels = content[header:].reshape(shape)
    return array


def _unpacked(path: Path) -> Pixels:
    try:
        return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: expected a complete gzip file ({error})") from None


# --- CIFAR-10 -----------------------------------------------------------------------------------------------
def _read_cifar_python(files: Sequence[Path], data_set: DataSet) -> list[Part]:
    return [_cifar_python(file, data_set) for file in files]


def _cifar_python(file: Path, data_set: DataSet) -> Part:
    held = pickles.load(file)
    if not isinstance(held, dict) or not {b"data", b"labels"} <= set(held):
        raise DataError(f"{file}: expected a dictionary with data and labels, found {type(held).__name__}")
    pixels, labels = held[b"data"], held[b"labels"]
    _check_rows(file, pixels, data_set)
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise DataError(f"{file}: expected labels as a list of whole numbers")
    return _part(file, pixels, np.asarray(labels, dtype=np.int64), data_set)


def _read_cifar_binary(files: Sequence[Path], data_set: DataSet) -> list[Part]:
    return [_cifar_binary(file, data_set) for file in files]


def _cifar_binary(file: Path, data_set: DataSet) -> Part:
    record = 1 + int(np.prod(data_set.event_shape))
    size = file.stat().st_size
    if size == 0 or size % record:
        raise DataError(f"{file}: expected a multiple of {record} bytes, found {size}")
    records = np.memmap(file, np.uint8, "r").reshape(-1, record)
    return _part(file, records[:, 1:], np.asarray(records[:, 0]), data_set)


# --- ImageNet -----------------------------------------------------------------------------------------------
def _read_npz(files: Sequence[Path], data_set: DataSet) -> list[Part]:
    return [_npz(file, data_set) for file in files]


def _npz(file: Path, data_set: DataSet) -> Part:
    member = npz.member(file, "data")
    labels = npz.small_array(file, "labels")
    row = int(np.prod(data_set.event_shape))
    if member.dtype != np.uint8 or member.shape[1:] != (row,):
        raise DataError(
            f"{file}: expected data of (n, {row}) uint8, found {member.shape} {member.dtype.name}"
        )
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) != member.shape[0]:
        raise DataError(
            f"{file}: expected a whole number as label of each of {member.shape[0]} images, "
            f"found {labels.shape} {labels.dtype.name}"
        )
    return Part(
        file,
        labels.astype(np.int64) - data_set.first_label,
        partial(_npz_pixels, member, data_set.event_shape),
        f"{member.shape[0]}-{member.crc:08x}",
    )


def _npz_pixels(member: npz.Member, event_shape: tuple[int, int, int]) -> Pixels:
    return npz.mapped(member).reshape(-1, *event_shape)


def _check_rows(file: Path, pixels: object, data_set: DataSet) -> None:
    row = int(np.prod(data_set.event_shape))
    found = f"{pixels.shape} {pixels.dtype.name}" if isinstance(pixels, np.ndarray) else type(pixels).__name__
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (row,):
        raise DataError(f"{file}: expected data of (n, {row}) uint8, found {found}")


_READERS: dict[str, Callable[[Sequence[Path], DataSet], list[Part]]] = {
    "idx": _read_idx,
    "cifar-python": _read_cifar_python,
    "cifar-binary": _read_cifar_binary,
    "npz": _read_npz,
}
