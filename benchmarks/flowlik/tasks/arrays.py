"""A task made of one's own arrays and models.

```python
TASK = flowlik.ArrayTask(id="mine", train="train.npy", test="test.npy", levels=256, models={"net": make})
```
What names the data and the models goes into every record and cell id: a run goes on, and a stored reference is used,
only while both are what they were.
"""

from __future__ import annotations

import copy
import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flowlik.measures.arrays import Array
from flowlik.tasks.own.fingerprint import fingerprint
from flowlik.tasks.own.moments import moments_of_rows
from flowlik.tasks.own.reading import FILE, Rows, as_array, check_rows, label_array, rows
from flowlik.tasks.own.students import STUDENTS, check_student, load_student, student_file
from flowlik.tasks.own.task_file import said, where
from flowlik.tasks.points import Points, chunks, whole
from flowlik.tasks.stored_references import stored_log_prob, stored_samples
from flowlik.tasks.task import (
    DRAW_STRIDE,
    Items,
    Reference,
    Task,
    UnavailableError,
    digest,
    tensor_hash,
    unknown,
)
from flowlik_models.images.pixels import dequantise
from flowlik_models.interfaces import CAPABILITIES, Ability, Moments, can, trial_call
from flowlik_models.numerics.random import uniform

TEACHER_SAMPLES = "teacher-samples"
REFERENCES_VARIABLE = "FLOWLIK_REFERENCES"
"""Folders in which stored references of such tasks are looked for."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")  # of files, which have 255 characters in all
NOISE_KEY, LABELS_KEY = 33_161, 33_261
IN_MEMORY = 1 << 26  # bytes of items that are made at once; more are made batch by batch
TRUTH_ROWS = 4096
MOST_LABELS = 100
"""So many classes are tried on every model before a run."""

Truth = Callable[[Tensor], Tensor]


class ArrayTask(Task):
    """Arrays of one's own, with the models that are judged on them.

    Args:
        id: the task's name in records and file names: letters, digits, dots, dashes and underscores.
        train: rows (n, *event): a tensor or an array; the path of a .npy, .npz or .safetensors file or of a folder of
            images (in a fixed shuffled order); a mapping or a data set with columns (`x`, `image`, `img`, ...). The
            moments that whitening and controls use are those of this split.
        test: likewise, of the same event shape. Runs judge the first n rows in the order given.
        models: name -> a callable that returns the model, or the model itself. A model has ``event_shape`` and a method
            of `flowlik_models.interfaces`, as `velocity(x, t, *, cond=None)`.
        levels: number L of levels of discrete data, whole numbers 0..L-1, which become z = 2 (k + U)/L - 1 with noise
            keyed by row and draw; None: the data are continuous, and taken as they are.
        labels: conditions: {"train": ..., "test": ...} of the rows' lengths, whole numbers or floats; the name of a
            column or of an array in the files; "folder" for folders of images, whose sub-folders are the classes.
        eps: the likelihood is that of p at t = 1 - eps.
        log_prob: the true log-density at t = 1 - eps, (n, *event) float64 -> (n,) nats, where it is known.
        reference_model: the model whose converged likelihood is the reference (`flowlik reference`); default the first.
        description: one line.

    Raises:
        ValueError: anything that is not so; one line that says what came and what would be right.

    >>> from flowlik_models.synthetic import closed_form
    >>> model = closed_form("gaussian-2d")
    >>> x = model.sample(300, generator=torch.Generator().manual_seed(0))
    >>> task = ArrayTask(id="mine", train=x[:200], test=x[200:], models={"exact": model})
    >>> task.models, task.dim, len(task.items("test", 1000).x)
    (('exact',), 2, 100)
    """

    def __init__(
        self,
        *,
        id: str,
        train: Any,
        test: Any,
        models: Mapping[str, Any],
        levels: int | None = None,
        labels: Any = None,
        eps: float = 0.0,
        log_prob: Truth | None = None,
        reference_model: str | None = None,
        description: str = "",
    ) -> None:
        _check_name("id", id)
        if levels is not None and not (type(levels) is int and levels >= 2):
            raise ValueError(f"levels={levels!r}: expected a whole number of at least 2, or None")
        if not 0.0 <= eps < 1.0:
            raise ValueError(f"eps={eps}: expected at least 0 and below 1")
        self._models = _checked_models(models)
        column = labels if isinstance(labels, str) else None
        self._rows = {split: rows(x, split, column) for split, x in (("train", train), ("test", test))}
        if (shapes := [each.event_shape for each in self._rows.values()])[0] != shapes[1]:
            raise ValueError(f"train has rows of shape {shapes[0]}, test of {shapes[1]}: expected the same")
        for each in self._rows.values():
            check_rows(each, levels)
        self._labels = _labels_of(labels, self._rows)
        reference = next(iter(self._models)) if reference_model is None else reference_model
        if reference not in self._models:
            raise ValueError(unknown("reference_model", reference, self._models))
        self._truth = log_prob
        self._hashes: dict[str, str] = {}
        self._moments: list[Moments] = []
        self.source: Path | None = FILE.get()
        shape = shapes[0]
        counts = " and ".join(f"{each.n} {split}" for split, each in self._rows.items())
        super().__init__(
            id=id,
            event_shape=tuple(map(int, shape)),
            description=description or f"arrays of {'x'.join(map(str, shape))} numbers, {counts} rows",
            eps=float(eps),
            levels=levels,
            splits=("test", "train") if log_prob else ("test", "train", TEACHER_SAMPLES),
            reference_model="closed-form" if log_prob else reference,
        )

    # --- data ---

    def items(self, split: str, n: int, draws: int = 1) -> Items:
        """The first n rows of a split, of discrete data ``draws`` dequantisations of each."""
        self.check_split(split)
        if split == TEACHER_SAMPLES:
            found = stored_samples(self, n)
            return Items(x=found.x, ids=found.ids, n=found.n, cond=self.sample_conditions(split, found.ids))
        n, draws = min(n, self._rows[split].n), draws if self.levels else 1
        x = Points(lambda a, b: self._points(split, n, a, b), n * draws, self.event_shape, self._dtype(split))
        ids = torch.cat([torch.arange(n) + draw * DRAW_STRIDE for draw in range(draws)])
        labels = self._labels.get(split)
        cond = None if labels is None else labels[:n].repeat(draws, *[1] * (labels.ndim - 1))
        small = 8 * len(x) * self.dim <= IN_MEMORY
        return Items(x=x.tensor() if small else x, ids=ids, n=n, draws=draws, cond=cond)

    def rows_in(self, split: str) -> int:
        """How many rows a split of the arrays has."""
        return self._rows[split].n

    def raw(self, split: str, n: int) -> Tensor:
        """The first n rows of the arrays as they are, of discrete data whole numbers, (n, *event)."""
        return torch.from_numpy(np.array(self._rows[split].read(0, min(n, self._rows[split].n))))

    def _dtype(self, split: str) -> torch.dtype:
        return torch.float64 if self._rows[split].dtype == np.float64 else torch.float32

    def _points(self, split: str, n: int, start: int, stop: int) -> Tensor:
        """Rows start .. stop of n rows, draw after draw."""
        found = [torch.empty(0, *self.event_shape, dtype=self._dtype(split))]
        for draw in range(start // n, -(-stop // n)):
            first, last = max(start, draw * n) - draw * n, min(stop, (draw + 1) * n) - draw * n
            part = torch.from_numpy(np.array(self._rows[split].read(first, last)))
            found.append(part if self.levels is None else self._dequantised(part, split, first, draw))
        return torch.cat([part.to(found[0].dtype) for part in found])

    def _dequantised(self, part: Tensor, split: str, first: int, draw: int) -> Tensor:
        assert self.levels is not None
        ids = torch.arange(first, first + len(part))
        key = NOISE_KEY + self.splits.index(split)
        noise = uniform(key, ids, self.event_shape, stream=draw, dtype=torch.float64)
        return dequantise(part, self.levels, noise)

    def data_hash(self, split: str) -> str:
        """Names the values, their order, the labels and the dequantisation noise; of the teacher's samples, these."""
        self.check_split(split)
        if split == TEACHER_SAMPLES:
            items = self.items(split, 10**9)
            return digest(tensor_hash(whole(items.x)), self._labels_hash("train"))
        if split not in self._hashes:
            state = hashlib.sha256()
            for _, part in self._rows[split].chunks():
                state.update(np.ascontiguousarray(part).tobytes())
            found = self._rows[split]
            parts = (
                state.hexdigest(),
                found.n,
                found.event_shape,
                str(found.dtype),
                self._labels_hash(split),
            )
            self._hashes[split] = digest(*parts, self.levels, NOISE_KEY, split)
        return self._hashes[split]

    def _labels_hash(self, split: str) -> str:
        return tensor_hash(self._labels[split]) if self._labels else "none"

    def sample_conditions(self, split: str, ids: Tensor) -> Tensor | None:
        """Labels for samples with these ids, drawn from the labels of the split (of the teacher's samples, train)."""
        labels = self._labels.get("train" if split == TEACHER_SAMPLES else split)
        if labels is None:
            return None
        draw = uniform(LABELS_KEY, ids, (), dtype=torch.float64)
        return labels[(draw * len(labels)).long()]

    def data_moments(self) -> Moments:
        """Moments of the training rows, of low rank where these are few or above 3,072 dimensions."""
        if not self._moments:
            self._moments.append(moments_of_rows(self._rows["train"], self.levels, self.data_hash("train")))
        return self._moments[0]

    def moments(self) -> tuple[Array, Array]:
        """The same as mean (d,) and covariance (d, d), at t = 1 - eps."""
        found, t = self.data_moments(), 1.0 - self.eps
        rest, vectors = found.rest or 0.0, found.eigenvectors
        covariance = vectors * (found.eigenvalues - rest) @ vectors.T + rest * np.eye(self.dim)
        return t * found.mean, t**2 * covariance + (1 - t) ** 2 * np.eye(self.dim)

    # --- truth ---

    def reference(self, split: str, items: Items, t: float) -> Reference:
        """The truth where it is known, else the stored converged likelihoods of the reference model."""
        self.check_split(split)
        if self._truth is None:
            return stored_log_prob(self, split, items, t)
        values = self.log_density(items.x, t)
        if values is None:
            raise UnavailableError(f"the truth of {self.id} is that of t = {1.0 - self.eps}, not {t}")
        name = self.own_model_hash("closed-form")
        return Reference(
            log_prob=values.reshape(items.draws, items.n), ref_id="closed-form", error=0.0, digest=name
        )

    def log_density(self, x: Tensor | Points, t: float) -> Array | None:
        """The truth at any x, (batch,) nats; None where it is not known, or not for this t."""
        if self._truth is None or abs(t - (1.0 - self.eps)) > 1e-9:
            return None
        with torch.no_grad():
            parts = [self._true(part.double().cpu()) for part in chunks(x, TRUTH_ROWS)]
        return np.concatenate(parts)

    def _true(self, x: Tensor) -> Array:
        assert self._truth is not None
        values = self._truth(x.clone())
        values = values if isinstance(values, Tensor) else torch.from_numpy(as_array(values, "log_prob"))
        if not values.is_floating_point():
            raise ValueError(f"log_prob gives {values.dtype}, expected real floating-point numbers, nats")
        if bool((values.isnan() | values.isposinf()).any()):
            raise ValueError("log_prob gives NaN or infinity, expected the log-density of every row, nats")
        if values.shape != (len(x),):
            raise ValueError(
                f"log_prob gives shape {tuple(values.shape)}, expected ({len(x)},), one value a row"
            )
        return np.asarray(values.double().cpu().numpy())

    @property
    def reference_folders(self) -> tuple[Path, ...]:
        """Where stored references are looked for besides: `flowlik reference` writes into the last by default."""
        named = filter(None, os.environ.get(REFERENCES_VARIABLE, "").split(os.pathsep))
        return (*map(Path, named), Path("runs/references"))

    @property
    def reference_command(self) -> str:
        """The command that makes the stored reference."""
        return f"flowlik reference {self.name}"

    # --- models ---

    @property
    def name(self) -> str:
        """What a person calls it by: its file, without the folder, or its id."""
        return self.id if self.source is None else self.source.name

    @property
    def given_models(self) -> tuple[str, ...]:
        """Names of the models that were given."""
        return tuple(self._models)

    @property
    def taught(self) -> str:
        """The model that students are distilled from: that of the reference, or the first."""
        return self.reference_model if self.reference_model in self._models else self.given_models[0]

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models: those given, and the students of one of them that `flowlik train` has made."""
        return (*self._models, *(name for name in STUDENTS if self._is_there(name)))

    def refused_students(self) -> list[str]:
        """A line for each student that is there and cannot be used."""
        there = [name for name in STUDENTS if student_file(self.id, name) and not self._is_there(name)]
        return [self.no_such_model(name) for name in there if name not in self._models]

    def no_such_model(self, model: str) -> str:
        """One line for a name that is no model's; of a student, how to make it."""
        if model not in STUDENTS:
            return super().no_such_model(model)
        cure = f"make it with: flowlik train {self.name} {model}"
        try:
            self._student_file(model)
        except ValueError as error:
            return f"{error}; {cure}"
        return f"{self.name}: no student {model} yet; {cure}"

    def _is_there(self, student: str) -> bool:
        try:
            return student not in self._models and self._student_file(student) is not None
        except ValueError:
            return False

    def _student_file(self, student: str) -> Path | None:
        """The checkpoint of a student of the teacher that is here; None: there is none.

        Raises:
            ValueError: it is damaged, or another teacher's.
        """
        file = student_file(self.id, student)
        if file is not None:
            if "teacher" not in self._hashes:
                self._hashes["teacher"] = fingerprint(self._built(self.taught))
            check_student(file, self.id, student, self._hashes["teacher"])
        return file

    def _student(self, student: str) -> Any:
        file = self._student_file(student)
        if file is None:
            raise ValueError(self.no_such_model(student))
        self._hashes[f"model {student}"] = hashlib.sha256(file.read_bytes()).hexdigest()[:12]
        return load_student(file, self._built(self.taught))

    def load_model(self, model: str, device: str) -> tuple[Any, str]:
        """A model on a device in evaluation mode, and twelve digits that name its weights and its source text.

        Raises:
            ValueError: an unknown name, or it cannot be made; the line names the file and the cure.
        """
        of_student = model not in self._models and model in STUDENTS
        built = self._student(model) if of_student else self._built(model)
        name = self._hashed(model, built)
        try:
            built = built.to(device) if hasattr(built, "to") else built
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"{self.name}: model {model!r}: {said(error)}") from None
        return (built.eval() if hasattr(built, "eval") else built), name

    def own_model_hash(self, model: str) -> str:
        """The digits that `load_model` gives, or those of the truth."""
        if model == "closed-form" and self._truth is not None:
            return fingerprint(self._truth, source=self.source)
        return self._hashes.get(f"model {model}") or self._hashed(model, self._built(model))

    def _hashed(self, model: str, built: Any) -> str:
        if f"model {model}" not in self._hashes:
            given = self._models[model]
            parts = (built, given if _is_maker(given) else None, self.eps)
            self._hashes[f"model {model}"] = fingerprint(*parts, source=self.source)
        return self._hashes[f"model {model}"]

    def _built(self, model: str) -> Any:
        if model not in self._models:
            raise ValueError(self.no_such_model(model))
        given = self._models[model]
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)  # weights that were forgotten to be loaded are at least the same ones
                built = given() if _is_maker(given) else copy.deepcopy(given)
        except UnavailableError:
            raise
        except Exception as error:
            place = self.name if self.source is None else where(error, self.source, self.name)
            raise ValueError(f"{place}: model {model!r}: {said(error)}") from error
        self._check_built(model, built)
        if self.eps and not hasattr(built, "eps"):
            built.eps = self.eps
        return built

    def _check_built(self, model: str, built: Any) -> None:
        shape = getattr(built, "event_shape", None)
        if shape is None or not _abilities(built):
            raise ValueError(
                f"{self.name}: model {model!r} is of type {type(built).__name__}, without event_shape or without a "
                f"method as velocity(x, t): wrap it, flowlik.wrap(net, event_shape={self.event_shape}, predicts=...)"
            )
        if tuple(shape) != self.event_shape:
            raise ValueError(
                f"{self.name}: model {model!r} has event_shape {tuple(shape)}, the data {self.event_shape}"
            )

    def check(self, models: Sequence[str], device: str) -> None:
        """Raise ValueError where one of the models cannot be made or evaluated; the line names the file."""
        for model in models:
            built, _ = self.load_model(model, device)
            items = self.items("test", 2)
            x = whole(items.x).to(device=device, dtype=torch.float32)
            cond = None if items.cond is None else items.cond.to(device)
            ability = next((a for a in _abilities(built) if CAPABILITIES[a].trial_times), None)
            try:
                if ability is not None:
                    with torch.no_grad():
                        trial_call(built, x, ability, cond=cond)()
            except Exception as error:
                self._check_labels(model, built, x[:1], ability)
                place = self.name if self.source is None else where(error, self.source, self.name)
                raise ValueError(f"{place}: model {model!r} on 2 test rows: {said(error)}") from error
            self._check_labels(model, built, x[:1], ability)

    def _check_labels(self, name: str, model: Any, x: Tensor, ability: Ability | None) -> None:
        """Raise ValueError where the model knows some classes of the test rows, and others not; x is one row."""
        labels = self._labels.get("test")
        if ability is None or labels is None or labels.ndim != 1 or labels.is_floating_point():
            return
        outside: dict[int, Exception] = {}
        classes = np.unique(labels.numpy())[:MOST_LABELS].tolist()
        for label in classes:
            try:
                with torch.no_grad():
                    trial_call(model, x, ability, cond=torch.tensor([label], device=x.device))()
            except Exception as error:
                outside[label] = error
        if outside and len(outside) < len(classes):
            label, why = next(iter(outside.items()))
            line = f"{self.name}: model {name!r} knows no class {label}, a label of test: {said(why)}"
            raise ValueError(line) from why


def _abilities(model: object) -> list[Ability]:
    return [
        each for each, found in CAPABILITIES.items() if found.trial_times is not None and can(model, each)
    ]


def _is_maker(given: Any) -> bool:
    """Whether this is called for a model; a model itself may be callable, too."""
    is_model = isinstance(given, nn.Module) or hasattr(given, "event_shape") or bool(_abilities(given))
    return callable(given) and (isinstance(given, type) or not is_model)


def _check_name(what: str, name: Any) -> None:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(
            f"{what} {name!r}: expected letters, digits, dots, dashes and underscores, at most 100"
        )


def _checked_models(models: Any) -> dict[str, Any]:
    if not isinstance(models, Mapping) or not models:
        raise ValueError(f"models={models!r}"[:80] + ': expected at least one, {"net": make}')
    for name, given in models.items():
        _check_name("model", name)
        if isinstance(given, str | Path) or given is None:
            raise ValueError(f"model {name!r}: {given!r}, expected a model or a function that returns it")
    return dict(models)


def _labels_of(labels: Any, found: Mapping[str, Rows]) -> dict[str, Tensor]:
    """Conditions by split, int64 or float32; none where there are no labels."""
    if labels is None:
        return {}
    if isinstance(labels, str):
        labels = {split: each.labels for split, each in found.items()}
    if not isinstance(labels, Mapping) or set(labels) != set(found):
        raise ValueError('labels: expected {"train": ..., "test": ...}, or the name of a column')
    return {split: _condition(labels[split], split, each.n) for split, each in found.items()}


def _condition(labels: Any, split: str, n: int) -> Tensor:
    array: NDArray[Any] = label_array(labels, f"labels of {split}")
    if array.ndim < 1 or len(array) != n:
        raise ValueError(f"labels of {split}: {len(array) if array.ndim else 1} of them for {n} rows")
    if not np.isfinite(array).all():
        raise ValueError(f"labels of {split} hold NaN or infinity")
    return torch.from_numpy(np.array(array)).to(torch.float32 if array.dtype.kind == "f" else torch.int64)
