"""A file in place of a task's name: `mine.py`, which holds `TASK = flowlik.ArrayTask(...)`.

Such a file is a Python program and is run: it may do whatever Python may do. It is imported once a process as a module
of its name, with its folder last on the path, so that modules beside it are found and none that is installed is hidden.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
import traceback
from collections.abc import Container
from pathlib import Path
from types import ModuleType

from flowlik.tasks.own import reading
from flowlik.tasks.task import Task

EXAMPLE = "TASK = flowlik.ArrayTask(id=..., train=..., test=..., models=...)"
_loaded: dict[str, tuple[Path, Task]] = {}


def names_a_file(name: str) -> bool:
    """Whether this is the path of a task's file and no task's id."""
    return name.endswith(".py")


def loaded(task: str) -> Task | None:
    """The task of this id that came from a file in this process; None: there is none."""
    return _loaded[task][1] if task in _loaded else None


def file_of(task: str) -> str | None:
    """The file that a task was loaded from; None for a task that goes by its name."""
    return str(_loaded[task][0]) if task in _loaded else None


def forget() -> None:
    """Forget all files: the next call loads them anew. Models in memory are kept by the tasks' ids."""
    for file, _ in _loaded.values():
        for name in [n for n, m in sys.modules.items() if getattr(m, "__file__", None) == str(file)]:
            del sys.modules[name]
    _loaded.clear()


def load_file(name: str, taken: Container[str]) -> Task:
    """The task that a file holds.

    Args:
        name: the file's path.
        taken: ids of the tasks that are there already.

    Raises:
        ValueError: no such file, it raises, it holds no `TASK` or several, or its id is another's; the line names the
            file.
    """
    file = Path(name).expanduser().resolve()
    for known, task in _loaded.values():
        if known == file:
            return task
    if not file.is_file():
        raise ValueError(f"{name}: no such file; expected a Python file that holds {EXAMPLE}")
    task = _task_of(_run(file, name), name)
    if task.id in _loaded:
        raise ValueError(f"{_loaded[task.id][0]} and {file} hold tasks of one id, {task.id!r}: rename one")
    if task.id in taken:
        raise ValueError(f"{name}: id {task.id!r} is that of a built-in or installed task: give another")
    _loaded[task.id] = (file, task)
    return task


def _task_of(module: ModuleType, name: str) -> Task:
    found = vars(module).get("TASK")
    if isinstance(found, Task):
        return found
    if found is not None:
        raise ValueError(f"{name}: TASK is of type {type(found).__name__}, expected one task: {EXAMPLE}")
    others = [each for each, value in vars(module).items() if isinstance(value, Task)]
    hint = f" (a task stands there as {others[0]!r}: name it TASK)" if others else ""
    raise ValueError(f"{name}: no TASK in it{hint}; expected {EXAMPLE}")


def _run(file: Path, name: str) -> ModuleType:
    """The module of the file, run; one that is imported already is taken as it is."""
    _check_text(file, name)
    folder = str(file.parent)
    if folder not in sys.path[1:]:  # the first may be the working directory, which is no worker's
        sys.path.append(folder)
    title = _module_name(file)
    if getattr(sys.modules.get(title), "__file__", None) == str(file):
        return sys.modules[title]
    spec = importlib.util.spec_from_file_location(title, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[title] = module
    reset = reading.FILE.set(file)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[title]
        raise ValueError(f"{where(error, file, name)}: {said(error)}") from error
    except BaseException:
        del sys.modules[title]
        raise
    finally:
        reading.FILE.reset(reset)
    return module


def _check_text(file: Path, name: str) -> None:
    """Raise ValueError where the text is no Python, or sets TASK more than once."""
    try:
        tree = ast.parse(file.read_bytes(), filename=name)
    except SyntaxError as error:
        raise ValueError(f"{name}, line {error.lineno}: no Python ({error.msg})") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: cannot be read ({error})") from None
    except (RecursionError, MemoryError):
        raise ValueError(f"{name}: cannot be read (nested too deeply)") from None
    lines = []
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        lines += [node.lineno for each in targets if isinstance(each, ast.Name) and each.id == "TASK"]
    if len(lines) > 1:
        places = " and ".join(map(str, lines))
        raise ValueError(f"{name}: TASK is set {len(lines)} times (lines {places}): a file holds one task")


def _module_name(file: Path) -> str:
    """The file's own name, so that its classes are found by it; another one where that is taken."""
    if file.stem in sys.modules and getattr(sys.modules[file.stem], "__file__", None) != str(file):
        return f"flowlik_task_{file.stem}"
    try:
        spec = importlib.util.find_spec(file.stem)
    except (ValueError, ImportError):
        spec = None
    own = spec is None or spec.origin is None or Path(spec.origin).resolve() == file
    return file.stem if own and file.stem.isidentifier() else f"flowlik_task_{file.stem}"


def where(error: BaseException, file: Path, name: str) -> str:
    """The file, and the last line in it that an error passed through."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == file]
    return f"{name}, line {lines[-1]}" if lines else name


def said(error: BaseException) -> str:
    """What an error says, in one line, with its cure where that is known; its kind where it is no misuse."""
    text = " ".join(str(error).split())
    if not (isinstance(error, ValueError) and text):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    cure = next((cure for words, cure in _CURES if any(word in text.lower() for word in words)), None)
    return f"{text}; {cure}" if cure else text


_CURES = (
    (
        ("cuda", "no nvidia", "gpu"),
        "there is no such GPU here: make it on the CPU (map_location='cpu'), --device moves it",
    ),
    (
        ("size mismatch", "missing key(s)", "unexpected key(s)", "state_dict"),
        "the weights do not fit the network: make it with the options that it was trained with",
    ),
    (
        ("forward() takes", "forward() missing"),
        "another signature takes call=lambda net, z, u, cond: ... in flowlik.wrap, a conditional network labels=",
    ),
)
