"""Cells: one estimator on one model and one set of items, with everything that determines the answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from flowlik.records.columns import SCHEMA_VERSION
from flowlik.records.writing import to_plain

DTYPES = ("float32", "float64")
MOST_TRUNCATION = 10.0
ESTIMATOR_COLUMNS = ("steps", "solver", "rtol", "atol", "trace", "probes", "noise")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a suite sets besides task, model and estimator; every field may stand in its TOML file.

    `n_items` items in batches of `batch_size`, a number or auto (`flowlik.evaluation.batching.batch_size`); `compile`
    the network (`flowlik.evaluation.compilation`); `draws` dequantisation draws of discrete data, with uniform noise
    or, `truncated_normal` above 0, that of a normal cut at so many standard deviations; `density` also evaluates the
    task's 2-D grid; `samples` also draws that many and judges them, in the `features` named here besides
    (`flowlik.evaluation.samples.extractors`; ValueError without samples); `likelihood` false leaves out everything but
    the samples, whose cost is then the cell's (ValueError with `density`, `uses` or several `draws`); `uses` names what
    the likelihood is tried at besides (`flowlik.uses`); `rounds` of timing on `timing_batch` items (0: no timing).
    """

    split: str = "test"
    n_items: int = 1000
    batch_size: int | str = 1000
    dtype: str = "float32"
    seed: int = 0
    repeat: int = 0
    compile: bool = False
    draws: int = 1
    truncated_normal: float = 0.0
    density: bool = False
    samples: int = 0
    features: tuple[str, ...] = ()
    likelihood: bool = True
    uses: tuple[str, ...] = ()
    rounds: int = 3
    timing_batch: int = 128

    def __post_init__(self) -> None:
        """Refuse options without effect; raises ValueError in one line."""
        if self.features and self.samples < 1:
            raise ValueError("features has no effect without samples: it is they that are judged")
        check_truncation(self.truncated_normal)
        if self.truncated_normal and self.uses:
            raise ValueError(
                "truncated_normal has no effect on uses, whose noise is uniform: leave out one of them"
            )
        if self.likelihood:
            return
        if self.samples < 1:
            raise ValueError("likelihood = false: expected samples, there is nothing else to judge")
        for name in ("density", "uses", "draws", "truncated_normal"):
            if getattr(self, name) != getattr(Options, name):
                raise ValueError(
                    f"{name} has no effect with likelihood = false, which leaves the samples alone"
                )


def check_truncation(tau: float) -> None:
    """Raise ValueError where this is no place to cut a normal at, nor 0, which is uniform noise."""
    if not 0.0 <= tau <= MOST_TRUNCATION:
        raise ValueError(
            f"truncated_normal = {tau}: expected 0 (uniform noise) or standard deviations up to {MOST_TRUNCATION:g}"
        )


# What belongs to how a cell is timed or named, not to its answer.
_NOT_IN_THE_ANSWER = ("rounds", "timing_batch")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One row to be: `estimator` is an estimator object, or the name of a control.

    `task` is the task's id; `task_file` the file that holds it, where it is one's own (no record names it).
    """

    task: str
    model: str
    estimator: Any
    options: Options = Options()
    device: str = "cpu"
    task_file: str | None = None

    @property
    def is_control(self) -> bool:
        """True where no estimator runs."""
        return isinstance(self.estimator, str) and is_control(self.estimator)

    @property
    def label(self) -> str:
        """The estimator's canonical spelling."""
        return self.estimator if isinstance(self.estimator, str) else str(self.estimator.label)

    @property
    def title(self) -> str:
        """One line for people."""
        split = "" if self.options.split == "test" else f" ({self.options.split})"
        return f"{self.task}{split} · {self.model} · {self.label}"

    def with_options(self, **changes: Any) -> Cell:
        """The same cell with some options changed.

        >>> Cell(task="gmm-2d", model="closed-form", estimator="control-mean").with_options(n_items=5).options.n_items
        5
        """
        return replace(self, options=replace(self.options, **changes))


def cell_id(cell: Cell, model_hash: str, data_hash: str, reference: str, extractor: str = "") -> str:
    """Sixteen hexadecimal digits of everything that determines the answer: estimator and its version, model, data and
    reference hashes, split, number of items, batch size, dtype, kind of device, seed, repeat, what is evaluated, and
    the feature network of the samples where that is not the task's own.
    """
    options = {name: value for name, value in asdict(cell.options).items() if name not in _NOT_IN_THE_ANSWER}
    if not options["compile"]:
        del options["compile"]  # as it was before there was that option
    if not options["features"]:
        del options["features"]  # likewise
    if not options["truncated_normal"]:
        del options["truncated_normal"]
    parts = {
        "schema": SCHEMA_VERSION,
        "task": cell.task,
        "model": cell.model,
        "estimator": cell.label,
        "estimator_version": getattr(cell.estimator, "version", 1),
        "device": cell.device.split(":")[0],
        "hashes": [model_hash, data_hash, reference],
        **options,
        **({"extractor": extractor} if extractor else {}),
    }
    text = json.dumps(to_plain(parts), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def estimator_columns(estimator: Any) -> dict[str, Any]:
    """The columns of a record that describe the estimator, from its parameters."""
    if isinstance(estimator, str):
        return {
            "estimator": estimator,
            "estimator_label": estimator,
            "family": "control",
            "params": {},
            "estimator_version": 1,
        }
    params: Mapping[str, Any] = estimator.params()
    columns = {name: params.get(name) for name in ESTIMATOR_COLUMNS}
    if columns["steps"] is None and "segments" in params:
        columns["steps"] = params["segments"]
    return columns | {
        "estimator": estimator.name,
        "estimator_label": estimator.label,
        "family": estimator.family,
        "params": dict(params),
        "estimator_version": estimator.version,
    }


CONTROLS = ("control-mean", "control-median", "control-component", "control-gaussian")


def is_control(name: str) -> bool:
    """True for the names of control rows."""
    return name in CONTROLS
