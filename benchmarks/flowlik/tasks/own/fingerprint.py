"""What names a model of one's own: its numbers, how it is put together, and the source text it comes from.

A model that answers otherwise must have another name, else a run would go on with another model's results. So whatever
hangs on the model is taken in: tensors, arrays and numbers, the classes and functions by name with what they enclose;
and the text of the files that are the user's own: the task's file, the modules of the model's classes, and what these
import from the same folder. Comments and layout do not count.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import sys
import sysconfig
import types
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import flowlik_models

_SKIPPED = ("training", "moments", "_is_full_backward_hook", "_version", "__weakref__")
_INSTALLED = ("site-packages", "dist-packages")


def fingerprint(*things: Any, source: Path | None = None) -> str:
    """Twelve hexadecimal digits of everything that hangs on these things, and of the user's own source text.

    >>> fingerprint(torch.ones(2)) == fingerprint(torch.ones(2)), fingerprint(1.0) == fingerprint(2.0)
    (True, False)
    """
    walk = _Walk()
    for thing in things:
        walk.visit(thing)
    for text in _texts({*walk.files, *([source.resolve()] if source else [])}):
        walk.add(text)
    return walk.state.hexdigest()[:12]


class _Walk:
    """Adds to a hash whatever is reached from a value; `files` are the user's own modules that it met."""

    def __init__(self) -> None:
        self.state = hashlib.sha256()
        self.files: set[Path] = set()
        self._seen: dict[int, tuple[int, Any]] = {}

    def add(self, text: str) -> None:
        self.state.update(text.encode(errors="surrogatepass") + b"\0")

    def visit(self, value: Any) -> None:
        """Take in a value and all that hangs on it; what was met before is named by its place."""
        if value is None or isinstance(value, bool | int | float | complex | str | bytes):
            self.add(repr(value))
            return
        if id(value) in self._seen:
            self.add(f"as {self._seen[id(value)][0]}")
            return
        self._seen[id(value)] = (len(self._seen), value)  # held, so that no other object takes its place
        if isinstance(value, Tensor | np.ndarray | np.generic):
            self._numbers(value)
        elif isinstance(value, Mapping):
            self._all((item for pair in value.items() for item in pair), f"mapping {len(value)}")
        elif isinstance(value, list | tuple):
            self._all(value, f"sequence {len(value)}")
        elif isinstance(value, set | frozenset):
            self._all(sorted(value, key=repr), f"set {len(value)}")
        elif isinstance(value, type | types.FunctionType | types.MethodType | functools.partial):
            self._callable(value)
        elif isinstance(value, Path):
            self.add(value.name)
        elif isinstance(value, torch.dtype | torch.device):
            self.add(str(value))
        elif not isinstance(value, types.ModuleType):
            self._object(value)

    def _all(self, values: Iterable[Any], what: str) -> None:
        self.add(what)
        for each in values:
            self.visit(each)

    def _numbers(self, value: Any) -> None:
        if isinstance(value, Tensor):
            value = value.detach().cpu().contiguous()
            self.add(f"{value.dtype} {tuple(value.shape)}")
            value = value.flatten().view(torch.uint8).numpy() if value.numel() else np.empty(0)
        else:
            self.add(f"{value.dtype} {value.shape}")
        self.state.update(np.ascontiguousarray(value).tobytes())

    def _callable(self, value: Any) -> None:
        if isinstance(value, functools.partial):
            self._all((value.func, value.args, value.keywords), "partial")
            return
        if isinstance(value, types.MethodType):
            self._all((value.__self__, value.__func__), "method")
            return
        self.add(f"{value.__module__}.{value.__qualname__}")
        file = _own_file(value.__module__)
        if file is not None:
            self.files.add(file)
        if isinstance(value, type):
            if file is None and value.__module__ == "__main__":
                self._all((m for _, m in sorted(vars(value).items()) if inspect.isfunction(m)), "methods")
            return
        enclosed = [_content(cell) for cell in value.__closure__ or ()]
        self._all((enclosed, value.__defaults__, value.__kwdefaults__), "function")
        if file is None and not _is_installed(value.__module__):
            self._code(value.__code__)

    def _code(self, code: types.CodeType) -> None:
        self.state.update(code.co_code)
        self.add(" ".join(code.co_names))
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._code(constant)
            else:
                self.visit(constant)

    def _object(self, value: Any) -> None:
        self._callable(type(value))
        slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
        held = dict(getattr(value, "__dict__", {})) | {
            s: getattr(value, s) for s in slots if hasattr(value, s)
        }
        for name in sorted(map(str, held)):
            if name not in _SKIPPED and not name.endswith("_hooks") and "_hooks_" not in name:
                self.add(name)
                self.visit(held[name])


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


# --- source text --------------------------------------------------------------------------------------------
def _is_installed(module: str) -> bool:
    found = getattr(sys.modules.get(module), "__file__", None)
    return module == "builtins" or (found is not None and _own_file(module) is None)


@functools.cache
def _installed_folders() -> tuple[Path, ...]:
    here = Path(__file__).resolve().parents[2]
    models = Path(flowlik_models.__path__[0]).resolve()
    paths = (sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"))
    return (here, models, models.parents[1] / "estimators", *(Path(path).resolve() for path in paths))


def _own_file(module: str) -> Path | None:
    """The file of a module that is the user's own; None for what is installed."""
    name = getattr(sys.modules.get(module), "__file__", None)
    if not name or not str(name).endswith(".py"):
        return None
    file = Path(name).resolve()
    installed = any(part in _INSTALLED for part in file.parts)
    return None if installed or any(file.is_relative_to(f) for f in _installed_folders()) else file


def _texts(files: set[Path]) -> Iterator[str]:
    """The syntax trees of the files and of what they import from their own folders, in an order by content."""
    found: dict[Path, str] = {}
    waiting = list(files)
    while waiting:
        file = waiting.pop()
        if file in found:
            continue
        try:
            tree = ast.parse(file.read_bytes())
        except (OSError, SyntaxError, ValueError):
            found[file] = ""
            continue
        found[file] = ast.dump(tree)
        waiting += _beside(file, tree)
    yield from sorted(found.values())


def _beside(file: Path, tree: ast.AST) -> Iterator[Path]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            names = [base, *(f"{base}.{alias.name}".strip(".") for alias in node.names)]
        else:
            continue
        level = node.level if isinstance(node, ast.ImportFrom) else 0
        folder = file.parents[max(level, 1) - 1]
        for name in filter(None, names):
            path = folder.joinpath(*name.split("."))
            yield from (p.resolve() for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file())
