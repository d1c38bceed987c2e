"""What `flowlik list` prints, without loading torch: `listing.json` holds what the registries say.

`python -m flowlik.commands.listing` writes the file anew; a test says when that is due. Where a source file is newer
than it, a module of estimators has come or gone, or another package adds something by an entry point, the registries
themselves are asked.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import flowlik_models

INDEX = Path(__file__).with_name("listing.json")
SUITES = Path(__file__).resolve().parents[1] / "suites"
GROUPS = ("flowlik.estimators", "flowlik.tasks")
TO_TRAIN = "to train: "
FRESH_SECONDS = 60.0  # a checkout or an installation writes its files within this, in any order


def listed(kind: str) -> dict[str, str]:
    """Names of a kind (estimators, tasks, models, suites) with one line each."""
    if kind == "suites":
        return {name: _description(path) for name, path in sorted(_suites().items())}
    found = _stored() or registries()
    if kind == "models":
        own = found["loaded by their task"]
        return {task: _models(task, models, own.get(task, ())) for task, models in found["models"].items()}
    return dict(found[kind])


def _suites() -> dict[str, Path]:
    """The files of the suites; the planner, which loads much, is asked only where other packages add some."""
    if not entry_points(group="flowlik.suites"):
        return {path.stem: path for path in SUITES.glob("*.toml")}
    from flowlik.planning.suites import files

    return files()


def _description(suite: Path) -> str:
    return str(tomllib.loads(suite.read_text(encoding="utf-8")).get("description", ""))


def registries() -> dict[str, dict[str, Any]]:
    """What the registries say; this loads everything."""
    import flowlik_estimators
    from flowlik.tasks.registry import registry
    from flowlik_models.zoo import TASK_MODELS

    own = {name: [] if name in TASK_MODELS else list(task.models) for name, task in registry().items()}
    return {
        "estimators": {name: _first_line(kind) for name, kind in flowlik_estimators.available().items()},
        "tasks": {name: task.description for name, task in registry().items()},
        "models": {name: list(task.models) for name, task in registry().items()},
        "loaded by their task": {name: models for name, models in own.items() if models},
        "modules of estimators": dict.fromkeys(_estimator_modules(), ""),
    }


def _first_line(kind: type) -> str:
    hints = get_type_hints(kind)
    parameters = ", ".join(_spelled(field, hints[field.name]) for field in fields(kind))
    words = (kind.__doc__ or "").strip().partition("\n")[0]  # a plug-in may come without
    return f"{words} Parameters: {parameters}".lstrip()


def one_alone(kind: str, name: str) -> dict[str, str]:
    """One entry of a list: an estimator with its options, a task with its models, a line each.

    Raises:
        ValueError: there is none of this name.
    """
    from flowlik_models.names import unknown

    if kind == "estimators":
        return options_of(name)
    entries = listed(kind)
    if name not in entries:
        raise ValueError(unknown("suite" if kind == "suites" else "task", name, entries))
    if kind != "models":
        return {name: entries[name]}
    there, _, missing = entries[name].partition(TO_TRAIN)
    return dict.fromkeys(there.rstrip("; ").split(", "), "") | {
        model: f"to train: flowlik train {name} {model}" for model in filter(None, missing.split(", "))
    }


def options_of(name: str) -> dict[str, str]:
    """An estimator in a line, then a line for each option: the values it may take, and its default.

    Raises:
        ValueError: no such estimator.
    """
    from flowlik_estimators import available
    from flowlik_models.names import unknown

    kinds = available()
    if name not in kinds:
        raise ValueError(unknown("estimator", name, kinds))
    kind = kinds[name]
    hints = get_type_hints(kind)
    about = {name: (kind.__doc__ or "").strip().partition("\n")[0]}
    return about | {
        f"  {field.name}": _values_and_default(field, hints[field.name]) for field in fields(kind)
    }


def _values_and_default(field: Field[Any], hint: Any) -> str:
    named = "|".join(str(value) for value in _values(hint))
    named += "|none" if named and type(None) in get_args(hint) else ""
    kind = named or getattr(hint, "__name__", str(hint)).replace("NoneType", "none").replace("None", "none")
    default = field.default if field.default is not None else "none"
    if field.default is MISSING:
        return kind
    return f"{kind}  (default: {str(default).lower() if isinstance(default, bool) else default})"


def _spelled(field: Field[Any], hint: Any) -> str:
    """A parameter with the values it may take, or its default."""
    named = [str(value) for value in _values(hint)]
    if named:
        return f"{field.name}={'|'.join(named)}"
    simple = isinstance(field.default, int | float) and not isinstance(field.default, bool)
    return f"{field.name}={field.default}" if simple else field.name


def _values(hint: Any) -> list[Any]:
    """The values of a Literal, alone or in a union."""
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    return [value for part in get_args(hint) for value in _values(part)]


def _stored() -> Mapping[str, dict[str, Any]] | None:
    """The index, None where it may be out of date."""
    if any(entry_points(group=group) for group in GROUPS):
        return None
    try:
        written = INDEX.stat().st_mtime
        if any(path.stat().st_mtime > written + FRESH_SECONDS for path in _sources()):
            return None
        index: dict[str, dict[str, Any]] = json.loads(INDEX.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return index if list(index.get("modules of estimators", ())) == _estimator_modules() else None


def _estimator_modules() -> list[str]:
    """Names of the public modules, without importing them."""
    return sorted(path.stem for path in _estimators().glob("*.py") if not path.stem.startswith("_"))


def _estimators() -> Path:
    from importlib.util import find_spec

    package = find_spec("flowlik_estimators")
    assert package is not None
    assert package.origin is not None
    return Path(package.origin).parent


def _sources() -> list[Path]:
    folders = (_estimators(), Path(flowlik_models.__path__[0]))
    here = Path(__file__).parent
    return [
        *(here.parent / "tasks").glob("*.py"),
        *(path for folder in folders for path in folder.rglob("*.py")),
    ]


def _models(task: str, models: Sequence[str], own: Sequence[str]) -> str:
    """Models that can be run, then those that can be trained first; a plug-in's task loads its `own`."""
    if not models:
        return "none yet"
    places = [Path(flowlik_models.__path__[0]) / "checkpoints"]
    if folder := os.environ.get("FLOWLIK_CHECKPOINTS"):
        places.append(Path(folder))

    def there(model: str) -> bool:
        return (
            model == "closed-form"
            or model in own
            or any((place / task / f"{model}.safetensors").is_file() for place in places)
        )

    missing = [model for model in models if not there(model)]
    parts = [", ".join(filter(there, models)), f"{TO_TRAIN}{', '.join(missing)}" if missing else ""]
    return "; ".join(filter(None, parts))


if __name__ == "__main__":
    from flowlik_models.files import write_atomically

    write_atomically(INDEX, (json.dumps(registries(), indent=1) + "\n").encode())
