"""Pickles that hold arrays and plain containers, and nothing that could run.

CIFAR-10's python release is pickled. `load` admits the two functions that rebuild a numpy array and refuses every other
name before it is looked up, so that a file can at worst be wrong.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from flowlik_models.images.errors import DataError

_RECONSTRUCT: Any = np.zeros(0).__reduce__()[0]

_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"expected arrays and plain containers only, found {module}.{name}")
        return _ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("expected arrays and plain containers only, found a persistent id")


def load(path: Path) -> Any:
    """What a pickle holds; text of Python 2 comes as bytes.

    Raises:
        DataError: the pickle is broken, or names anything but numpy arrays; the line names the file.
    """
    try:
        with path.open("rb") as file:
            return _ArraysOnly(file, encoding="bytes").load()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception as error:  # a broken pickle may raise nearly anything
        said = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: not a pickle of arrays: {said}") from None
