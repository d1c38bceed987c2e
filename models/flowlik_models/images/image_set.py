"""Images of one split, by index, and how they become continuous."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowlik_models.images.catalog import CATALOG, DataSet, Release
from flowlik_models.images.checksums import verify
from flowlik_models.images.errors import DataError, MissingDataError
from flowlik_models.images.folders import DATA_VARIABLE, data_root
from flowlik_models.images.formats.readers import Part, Pixels, read
from flowlik_models.images.pixels import dequantise
from flowlik_models.numerics import random
from flowlik_models.numerics.streams import FLIP_STREAM

_HASHED = 4096


@dataclass(frozen=True, eq=False)
class ImageSet:
    """The images of a split in the order of the official files."""

    data_set: DataSet
    split: str
    release: str
    parts: tuple[Part, ...]

    def __len__(self) -> int:
        return sum(len(part.labels) for part in self.parts)

    @property
    def event_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return self.data_set.event_shape

    @property
    def labels(self) -> Tensor:
        """Classes from 0, (n,) int64."""
        return torch.from_numpy(np.concatenate([part.labels for part in self.parts]))

    def pixels(self, index: Tensor | NDArray[np.int64] | Sequence[int]) -> Tensor:
        """Levels 0..255 of the images at these places, (k, *event) uint8; only these are read.

        Raises:
            IndexError: there is no such place.
        """
        places = np.asarray(index, dtype=np.int64)
        if places.size and (places.min() < 0 or places.max() >= len(self)):
            raise IndexError(f"{self.data_set.id} {self.split} has images 0..{len(self) - 1}")
        found = np.empty((len(places), *self.event_shape), dtype=np.uint8)
        start = 0
        for part in self.parts:
            here = np.flatnonzero((places >= start) & (places < start + len(part.labels)))
            if len(here):
                found[here] = part.pixels()[places[here] - start]
            start += len(part.labels)
        return torch.from_numpy(found)

    def chunks(self, size: int) -> Iterator[Pixels]:
        """All images in order, in arrays of at most ``size``."""
        for part in self.parts:
            pixels = part.pixels()
            for at in range(0, len(pixels), size):
                yield np.ascontiguousarray(pixels[at : at + size])

    def batch(
        self,
        index: Tensor,
        *,
        key: int,
        draw: int = 0,
        items: Tensor | None = None,
        flips: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """The images at ``index`` (k,), dequantised: ``z = 2 (k + U)/256 - 1``, (k, *event).

        Args:
            index: places in this split.
            key: key of the noise, which depends on it, the item and the draw alone.
            draw: number of the dequantisation draw; in training, of the epoch.
            items: what the noise is keyed by, default ``index``.
            flips: mirror each image with probability one half, keyed alike (training, where
                ``data_set.flips``).
            dtype: float32 or float64.
        """
        items = index if items is None else items
        levels = self.pixels(index)
        if flips:
            coin = random.rademacher(key, items, (1,), stream=FLIP_STREAM + draw)[:, 0] > 0
            levels = torch.where(coin[:, None, None, None], levels.flip(-1), levels)
        noise = random.uniform(key, items, self.event_shape, stream=draw, dtype=torch.float64)
        return dequantise(levels, self.data_set.levels, noise).to(dtype).clamp_(max=_below_one(dtype))

    @property
    def identity(self) -> str:
        """Twelve hexadecimal digits of images and labels; the same for every release that holds the same images."""
        return _identity(self)


def _below_one(dtype: torch.dtype) -> float:
    """The largest value below 1: rounding must not leave the half-open interval."""
    return 1.0 - torch.finfo(dtype).eps / 2


@lru_cache(maxsize=8)
def _identity(images: ImageSet) -> str:
    state = hashlib.sha256(f"{images.data_set.id} {images.split} {len(images)}".encode())
    state.update(np.concatenate([part.labels for part in images.parts]).astype("<i8").tobytes())
    if all(part.identity is not None for part in images.parts):
        state.update(" ".join(str(part.identity) for part in images.parts).encode())
    else:
        for pixels in images.chunks(_HASHED):
            state.update(pixels.tobytes())
    return state.hexdigest()[:12]


# --- opening ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """A release of which at least one file lies in the data folder."""

    release: Release
    there: dict[str, Path]
    missing: tuple[str, ...]


def look(data_set: DataSet, root: Path, splits: Sequence[str] = ("train", "test")) -> list[Found]:
    """Which releases lie below ``root``, those with the fewest missing files of ``splits`` first."""
    found = []
    for release in data_set.releases:
        there, missing = {}, []
        for name in itertools.chain.from_iterable(release.splits[split] for split in splits):
            lies = [root / folder / name for folder in release.folders if (root / folder / name).is_file()]
            if lies:
                there[name] = lies[0]
            else:
                missing.append(name)
        if there:
            found.append(Found(release, there, tuple(missing)))
    return sorted(found, key=lambda one: len(one.missing))


def missing_line(data_set: DataSet, root: Path | None, split: str) -> str:
    """One line for a data set that is not there, with the cure."""
    cure = f"set {DATA_VARIABLE} or give --data-dir, and get it with: flowlik data get {data_set.id}"
    if root is None:
        return f"no data folder for {data_set.id}: {cure}"
    folder, first = data_set.releases[-1].folders[0], data_set.releases[-1].splits[split][0]
    if found := look(data_set, root, (split,)):
        folder, first = found[0].release.folders[0], found[0].missing[0]
    return f"{data_set.id} is not there: expected {root / folder / first}; get it with: flowlik data get {data_set.id}"


def open_images(data_set: str | DataSet, split: str, root: Path | None = None) -> ImageSet:
    """The images of a split, from the first official release that is there whole, its files verified.

    Args:
        data_set: an id of the `CATALOG`, or a data set of one's own (`DataSet.with_digests`).
        split: "train" or "test".
        root: the data folder, default `data_root`.

    Raises:
        MissingDataError: it is not there; the line ends with the cure. DataError: a file is truncated, altered or of
            another kind; the line names it. ValueError: unknown data set or split.
    """
    if isinstance(data_set, str):
        if data_set not in CATALOG:
            raise ValueError(f"unknown data set {data_set!r} (valid: {', '.join(CATALOG)})")
        data_set = CATALOG[data_set]
    if split not in data_set.sizes:
        raise ValueError(f"unknown split {split!r} of {data_set.id} (valid: {', '.join(data_set.sizes)})")
    root = root or data_root()
    whole = [] if root is None else [one for one in look(data_set, root, (split,)) if not one.missing]
    if not whole:
        raise MissingDataError(missing_line(data_set, root, split))
    release, there = whole[0].release, whole[0].there
    files = tuple(there[name] for name in release.splits[split])
    stats = tuple(file.stat() for file in files)
    return _opened(data_set, split, release, files, tuple((stat.st_size, stat.st_mtime_ns) for stat in stats))


@lru_cache(maxsize=4)
def _opened(
    data_set: DataSet,
    split: str,
    release: Release,
    files: tuple[Path, ...],
    stamps: tuple[tuple[int, int], ...],
) -> ImageSet:
    """The images, verified and read; kept as long as size and time of change of the files are the same."""
    for file in files:
        if file.name in release.digests:
            verify(file, release.digests[file.name])
    images = ImageSet(data_set, split, release.name, tuple(read(release.format, files, data_set)))
    if len(images) != data_set.sizes[split]:
        raise DataError(
            f"{files[0].parent}: expected {data_set.sizes[split]} images of {data_set.id} {split}, found {len(images)}"
        )
    return images


def evaluation_order(n: int) -> NDArray[np.int64]:
    """The order in which images are judged, a fixed permutation: the first few are then like all of them."""
    return np.random.default_rng(0).permutation(n)
