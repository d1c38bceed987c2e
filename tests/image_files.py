"""Tiny image data sets in the official formats, with the table of digests that stands for the published ones."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowlik_models.images import CATALOG, DataSet

TRAIN, TEST = 50, 20
Levels = NDArray[np.uint8]


def tiny(name: str, files: Mapping[Path, Any]) -> DataSet:
    """The data set of that name as if these files had been published."""
    digests = {path.name: md5(path) for path in files}
    return CATALOG[name].with_digests(digests, {"train": TRAIN, "test": TEST})


def md5(path: Path) -> str:
    return "md5:" + hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def images(n: int, shape: tuple[int, ...], seed: int = 0) -> tuple[Levels, NDArray[np.uint8]]:
    """Smooth-ish random levels and labels that hold every class."""
    generator = np.random.default_rng(seed)
    brightness = generator.integers(40, 200, size=(n, *[1] * len(shape)))
    levels = np.clip(brightness + generator.integers(-40, 40, size=(n, *shape)), 0, 255)
    return levels.astype(np.uint8), (np.arange(n) % 10).astype(np.uint8)


def write_idx(root: Path, name: str = "fashion-mnist", *, packed: bool = True) -> DataSet:
    folder, files = root / name, {}
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, n in (("train", TRAIN), ("t10k", TEST)):
        levels, labels = images(n, (28, 28), seed=n)
        for what, array in (("images-idx3", levels), ("labels-idx1", labels)):
            path = folder / f"{prefix}-{what}-ubyte{'.gz' if packed else ''}"
            content = idx(array)
            path.write_bytes(gzip.compress(content) if packed else content)
            files[path] = array
    return tiny(name, files)


def idx(array: Levels) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_cifar(root: Path, *, binary: bool = False) -> DataSet:
    folder, files = root / ("cifar-10-batches-bin" if binary else "cifar-10-batches-py"), {}
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(6):
        n, stem = (TRAIN // 5, f"data_batch_{number + 1}") if number < 5 else (TEST, "test_batch")
        levels, labels = images(n, (3072,), seed=number)
        path = folder / (f"{stem}.bin" if binary else stem)
        path.write_bytes(
            np.concatenate([labels[:, None], levels], axis=1).tobytes()
            if binary
            else pickle.dumps({b"data": levels, b"labels": [int(k) for k in labels]}, protocol=4)
        )
        files[path] = levels
    return tiny("cifar10", files)


def write_imagenet(root: Path, *, compressed: bool = False) -> DataSet:
    folder = root / "imagenet64"
    folder.mkdir(parents=True, exist_ok=True)
    save = np.savez_compressed if compressed else np.savez
    names = [f"train_data_batch_{number}" for number in range(1, 11)] + ["val_data"]
    for number, name in enumerate(names):
        levels, labels = images(TRAIN // 10 if number < 10 else TEST, (12288,), seed=number)
        save(folder / f"{name}.npz", data=levels, labels=labels.astype(np.int64) + 1)
    return CATALOG["imagenet64"].with_digests({}, {"train": TRAIN, "test": TEST})
