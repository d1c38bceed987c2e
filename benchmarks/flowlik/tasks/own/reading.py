"""A user's arrays as rows: tensors, arrays, .npy, .npz and .safetensors files, folders of images, and mappings.

Files are read without running anything that stands in them: arrays of Python objects (pickle) are refused.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flowlik_models.images import evaluation_order

FILE: ContextVar[Path | None] = ContextVar("FILE", default=None)
"""The task's file while it is being loaded: paths in it are those from its folder."""

CHUNK_BYTES = 1 << 24
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
COLUMNS = ("x", "image", "img", "images", "data", "pixel_values")
"""Names under which a file or a mapping may hold the data, where it holds more than one array."""


@dataclass(frozen=True)
class Rows:
    """Rows of one shape and type that are read when they are asked for: ``read(start, stop)`` (stop - start, *event).

    ``name`` says in messages what they are; ``labels`` are those that a folder or a mapping holds, (n,), or None.
    """

    name: str
    n: int
    event_shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[int, int], NDArray[Any]]
    labels: NDArray[Any] | None = None

    def chunks(self) -> Iterator[tuple[int, NDArray[Any]]]:
        """The rows in order, a few megabytes at a time, each with the number of its first."""
        size = max(1, CHUNK_BYTES // max(1, 8 * math.prod(self.event_shape)))
        for start in range(0, self.n, size):
            yield start, self.read(start, min(self.n, start + size))


def rows(source: Any, name: str, labels: str | None = None) -> Rows:
    """The rows of a source.

    Args:
        source: a tensor or an array (n, *event), the path of a .npy, .npz or .safetensors file or of a folder of
            images, or a mapping or data set with columns.
        name: what to call it in messages: "train".
        labels: the column that holds the labels; of a folder of images, "folder": the sub-folder is the class.

    Raises:
        ValueError: no such file, no array, or one of Python objects; the line says what was expected.
    """
    if isinstance(source, str | Path):
        return _from_path(_found(Path(source), name), name, labels)
    if isinstance(source, Mapping) or hasattr(source, "column_names"):
        return _from_columns(source, name, labels)
    if labels is not None:
        raise ValueError(
            f"labels={labels!r}: {name} is an array and has no columns; give the labels as arrays"
        )
    return _from_array(source, name)


def _found(path: Path, name: str) -> Path:
    """The path as it is meant in the task's file: from that file's folder, else from the present one."""
    path = path.expanduser()
    file = FILE.get()
    for place in (*([file.parent / path] if file else []), path):
        if place.is_file() or place.is_dir():  # no pipe, from which nothing may ever come
            return place.resolve()
    raise ValueError(
        f"{name}: {path}: no such file or folder; paths are those from the folder of the task's file, "
        "or from the present one"
    )


def _from_path(path: Path, name: str, labels: str | None) -> Rows:
    if path.is_dir():
        return _from_folder(path, name, labels)
    try:
        if path.suffix == ".npy":
            if labels is not None:
                raise ValueError(
                    f"labels={labels!r}: a .npy file holds one array; give the labels as a file, too"
                )
            return _from_array(_loaded(path), name)
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return _from_columns(_Columns(tuple(file.files), file.__getitem__), name, labels)
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return _from_columns(_Columns(tuple(file.keys()), file.get_tensor), name, labels)
    except (OSError, EOFError, KeyError, SafetensorError, zipfile.BadZipFile) as error:
        raise ValueError(f"{name}: {path.name}: cannot be read ({_line(error)})") from None
    except ValueError as error:
        raise ValueError(f"{name}: {path.name}: {_line(error)}") from None
    raise ValueError(
        f"{name}: {path.name}: expected a .npy, .npz or .safetensors file or a folder of images, got {path.suffix!r}; "
        "read it yourself and give the array"
    )


def _loaded(path: Path) -> NDArray[Any]:
    """The array of a .npy file, read from the disk when it is used."""
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        return array
    except ValueError as error:
        raise ValueError(f"{_line(error)} Save plain numbers: pickled objects are not read") from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# --- arrays -------------------------------------------------------------------------------------------------
def _from_array(source: Any, name: str, labels: NDArray[Any] | None = None) -> Rows:
    array = as_array(source, name)
    if array.ndim < 2:
        raise ValueError(f"{name}: shape {array.shape}, expected (n, *event): add a dimension, x[:, None]")
    if 0 in array.shape[1:]:
        raise ValueError(f"{name}: rows of shape {array.shape[1:]} hold no numbers")
    kind = _torch_kind(array.dtype)
    return Rows(
        name, len(array), array.shape[1:], kind, lambda a, b: np.asarray(array[a:b], dtype=kind), labels
    )


def label_array(source: Any, name: str) -> NDArray[Any]:
    """Labels (n, ...): an array, or the path of a .npy file. Raises ValueError for anything else."""
    if not isinstance(source, str | Path):
        return _labels(source, name)
    path = _found(Path(source), name)
    if path.suffix != ".npy":
        raise ValueError(f"{name}: {path.name}: expected an array or a .npy file")
    try:
        return _labels(_loaded(path), name)
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"{name}: {path.name}: {_line(error)}") from None


def _labels(source: Any, name: str) -> NDArray[Any]:
    array = as_array(
        source,
        name,
        "whole numbers or floats; names become whole ones by np.unique(labels, return_inverse=True)[1]",
    )
    if array.dtype.kind == "u" and array.size and int(array.max()) > np.iinfo(np.int64).max:
        raise ValueError(f"{name}: {array.max()} is beyond int64")
    return np.asarray(array, dtype=_torch_kind(array.dtype))


def as_array(source: Any, name: str, expected: str = "floats, or whole numbers with levels=") -> NDArray[Any]:
    """A tensor, an array or nested lists as an array of numbers. Raises ValueError for anything else."""
    try:
        if isinstance(source, Tensor):
            source = source.detach().cpu().resolve_neg()
            source = (source.float() if source.dtype in (torch.bfloat16, torch.float16) else source).numpy()
        array = np.asarray(source)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{name}: expected an array ({_line(error)})") from None
    if np.ma.is_masked(source):
        raise ValueError(f"{name}: masked values, expected numbers; leave such rows out")
    if array.dtype.kind not in "iuf":
        raise ValueError(f"{name}: {array.dtype} values, expected {expected}")
    return array


def _torch_kind(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The type under which torch knows and can use such numbers: of this machine's byte order, none beyond 64 bits."""
    if dtype.kind == "u" and dtype.itemsize > 1:
        return np.dtype(np.int64)
    return np.dtype(np.float64) if dtype.kind == "f" and dtype.itemsize > 8 else dtype.newbyteorder("=")


# --- columns ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Columns:
    """What a file holds, by name."""

    column_names: tuple[str, ...]
    column: Callable[[str], Any]

    def __getitem__(self, name: str) -> Any:
        return self.column(name)


def _from_columns(source: Any, name: str, labels: str | None) -> Rows:
    names = [str(each) for each in getattr(source, "column_names", source)]
    if labels is not None and labels not in names:
        raise ValueError(f"labels={labels!r}: {name} has no such column (it has: {', '.join(names)})")
    others = [each for each in names if each != labels]
    known = others if len(others) == 1 else [each for each in COLUMNS if each in others]
    if not known:
        raise ValueError(
            f"{name}: columns {', '.join(names) or 'none'}: expected one named {', '.join(COLUMNS)}; "
            "give the array itself"
        )
    found = None if labels is None else as_array(source[labels], f"labels of {name}")
    return _from_array(_stacked(source[known[0]], name), name, found)


def _stacked(column: Any, name: str) -> Any:
    """A column that is an array, or a list of pictures or arrays of one shape."""
    if isinstance(column, Tensor | np.ndarray):
        return column
    parts = [_pixels(each) if hasattr(each, "getbands") else as_array(each, name) for each in column]
    shapes = {part.shape for part in parts}
    if len(shapes) != 1:
        raise ValueError(
            f"{name}: items of shapes {', '.join(map(str, sorted(shapes)[:3]))}: expected one shape"
        )
    return np.stack(parts)


# --- images -------------------------------------------------------------------------------------------------
def _from_folder(folder: Path, name: str, labels: str | None) -> Rows:
    """Pictures of one size in a fixed shuffled order, (channels, height, width) uint8."""
    from PIL import Image

    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGES and path.is_file())
    if not files:
        raise ValueError(f"{name}: {folder.name}: no image in it ({', '.join(IMAGES)})")
    if labels not in (None, "folder"):
        raise ValueError(
            f"labels={labels!r}: of a folder of images expected 'folder', the sub-folder as the class"
        )
    files = [files[k] for k in evaluation_order(len(files))]
    sizes: dict[tuple[int, int, bool], Path] = {}
    for file in files:
        try:
            with Image.open(file) as image:
                if image.mode.startswith(("I", "F")):
                    raise ValueError(
                        f"{name}: {file.name}: more than 8 bits a pixel; read it yourself and give the array"
                    )
                sizes.setdefault((image.height, image.width, image.mode == "L"), file)
        except OSError as error:
            raise ValueError(f"{name}: {file.name}: cannot be read ({_line(error)})") from None
    if len({key[:2] for key in sizes}) > 1:
        different = " and ".join(f"{file.name} of {w}x{h}" for (h, w, _), file in list(sizes.items())[:2])
        raise ValueError(f"{name}: {folder.name}: {different}: expected images of one size")
    mode = "L" if all(grey for *_, grey in sizes) else "RGB"
    (height, width, _), *_ = sizes

    def read(start: int, stop: int) -> NDArray[Any]:
        found = [np.empty((0, 1 if mode == "L" else 3, height, width), np.uint8)]
        for file in files[start:stop]:
            with Image.open(file) as image:
                found.append(_channels_first(image.convert(mode))[None])
        return np.concatenate(found)

    classes = _classes(files, folder) if labels else None
    shape = (1 if mode == "L" else 3, height, width)
    return Rows(name, len(files), shape, np.dtype(np.uint8), read, classes)


def _pixels(picture: Any) -> NDArray[Any]:
    """A picture's channels; what its numbers mean only by a palette or in another space of colours becomes RGB."""
    known = ("L", "RGB", "RGBA", "LA", "I;16", "I", "F")
    return _channels_first(picture if picture.mode in known else picture.convert("RGB"))


def _channels_first(image: Any) -> NDArray[Any]:
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)


def _classes(files: Sequence[Path], folder: Path) -> NDArray[Any]:
    named = [file.relative_to(folder).parts[0] for file in files]
    order = {each: k for k, each in enumerate(sorted(set(named)))}
    return np.asarray([order[each] for each in named], dtype=np.int64)


# --- what is right ------------------------------------------------------------------------------------------
def check_rows(found: Rows, levels: int | None) -> None:
    """Raise ValueError unless the rows are finite floats or, with levels, whole numbers 0..levels - 1."""
    name, whole = found.name, found.dtype.kind in "iu"
    if found.n < 1:
        raise ValueError(f"{name}: no rows")
    if levels is None and whole:
        raise ValueError(
            f"{name}: {found.dtype}, which are levels: say how many there are (levels=256), or give floats"
        )
    if levels is not None and not whole:
        some = np.asarray(next(part for _, part in found.chunks()))
        kind, cure = np.min_scalar_type(levels - 1), "give them as such: x"
        if some.max() <= 1 or (some != some.round()).any():
            cure = f"of values in [0, 1] they are (x * {levels - 1}).round()"
        raise ValueError(
            f"{name}: {found.dtype}, expected whole numbers 0..{levels - 1} with levels={levels}; "
            f"{cure}.astype('{kind}')"
        )
    for start, part in found.chunks():
        flat = part.reshape(len(part), -1)
        bad = ~np.isfinite(flat) if levels is None else (flat < 0) | (flat > levels - 1)
        if bad.any():
            row = start + int(bad.any(1).argmax())
            what = "NaN or infinity" if levels is None else f"{flat[bad][0]}, outside 0..{levels - 1}"
            cure = "leave such rows out" if levels is None else "give the levels there are (levels=)"
            raise ValueError(f"{name}: row {row} holds {what}; {cure}")
