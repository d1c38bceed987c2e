"""Students of a teacher of one's own: their names, where they lie, and whether they are this teacher's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flowlik_models.checkpoints import CheckpointError, check_origin, fill, read_checkpoint
from flowlik_models.distillation.recipes import OBJECTIVES, recipe_of
from flowlik_models.distillation.students import student_of
from flowlik_models.distillation.teacher import Teacher
from flowlik_models.zoo import CHECKPOINTS_VARIABLE

NAMES = {each: f"{each}-f2d2" for each in OBJECTIVES} | {"calibration": "direct-f2d2-calibrated"}
"""Objective -> the name of what it makes, as in the tables of the built-in tasks."""

STUDENTS = tuple(NAMES.values())
STUDENTS_VARIABLE = "FLOWLIK_STUDENTS"
"""The folder that `flowlik train mine.py` writes into by default, for processes that work in another folder."""


def folders() -> Iterator[Path]:
    """Where students are looked for: the folder of ``--checkpoints`` first, then that which `train` writes into."""
    named = (os.environ.get(name) for name in (CHECKPOINTS_VARIABLE, STUDENTS_VARIABLE))
    yield from (Path(folder) for folder in named if folder)
    yield Path("runs/train")


def student_file(task: str, student: str) -> Path | None:
    """The finished checkpoint of a student of a task; None: there is none."""
    files = (folder / task / f"{student}.safetensors" for folder in folders())
    return next((f for f in files if f.is_file() and not f.with_suffix(".state.safetensors").is_file()), None)


def check_student(file: Path, task: str, student: str, teacher: str) -> None:
    """Hold a student's card against its name and the teacher that is there.

    Raises:
        CheckpointError: it is damaged, of another name or task, or another teacher's.
    """
    _, card = read_checkpoint(file)
    check_origin(file, card, task=task, model=student)
    if (told := card.get("teacher")) != teacher:
        whose = "a teacher that its card does not name" if told is None else f"another teacher, {told}"
        raise CheckpointError(f"{file}: a student of {whose}, expected {teacher}")


def load_student(path: str | Path, model: Any, network: nn.Module | None = None) -> Any:
    """A student as `distill` or `flowlik train mine.py` wrote it, in evaluation mode, with its ``card``.

    Args:
        path: the checkpoint.
        model: its teacher, whose ends and source are the student's.
        network: a network of one's own, made as it was for `distill`.

    Raises:
        CheckpointError: it is missing, damaged or does not fit.

    >>> import tempfile, flowlik
    >>> from flowlik_models.synthetic import closed_form
    >>> teacher = closed_form("gaussian-2d")
    >>> x = teacher.sample(400, generator=torch.Generator().manual_seed(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = flowlik.distill(teacher, x, steps=2, pool=64, out=folder, say=lambda line: None)
    ...     student = load_student(f"{folder}/direct-f2d2.safetensors", teacher)
    >>> student.event_shape
    (2,)
    """
    tensors, card = read_checkpoint(Path(path))
    if "objective" not in card:
        raise CheckpointError(f"{path}: expected a student and its card, found no objective on it")
    shape, told = tuple(model.event_shape), card["recipe"]
    recipe = recipe_of("direct", shape, network=told["network"], delta=told["delta"])
    example = torch.randn(64, *shape, generator=torch.Generator().manual_seed(0))
    student = student_of(Teacher.of(model), example, recipe, network)  # the moments are the checkpoint's
    fill(student, tensors, Path(path))
    return with_card(student, card)


def with_card(student: nn.Module, card: dict[str, Any]) -> nn.Module:
    """The student in evaluation mode, with what stands on its card."""
    student.__dict__["card"] = card
    return student.eval().requires_grad_(True)
