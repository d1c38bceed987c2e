"""Checkpoints: safetensors beside a JSON card. Nothing is ever unpickled, nothing is overwritten in place."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor, nn

from flowlik_models.files import alone_in, write_atomically

Stored = Literal["float32", "float16"]
SHIPPED = Path(__file__).with_name("checkpoints")


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or of another model; the message names the file and what was expected."""


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Save tensors as safetensors, moved into place when complete."""
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_atomically(path, serialise(plain, dict(metadata or {})))


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of names, shapes and bytes, hexadecimal."""
    state = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        state.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        state.update(tensor.detach().cpu().contiguous().numpy().data)
    return state.hexdigest()


def as_stored(tensors: Mapping[str, Tensor], kind: Stored) -> dict[str, Tensor]:
    """Tensors as a checkpoint holds them: in half precision weights and matrices, but not vectors, some of which (the
    variances of images) are smaller than its smallest normal number."""
    half = kind == "float16"
    return {name: t.half() if half and t.ndim > 1 else t for name, t in tensors.items()}


def rounded(module: nn.Module, kind: Stored) -> nn.Module:
    """The module with its tensors as a checkpoint of that kind gives them back, in place."""
    tensors = as_stored(module.state_dict(), kind)
    module.load_state_dict(
        {name: t.float() if t.dtype == torch.float16 else t for name, t in tensors.items()}
    )
    return module


def save_checkpoint(
    path: Path, module: nn.Module, card: Mapping[str, Any], *, stored: Stored = "float32"
) -> None:
    """Save a module's tensors to ``path`` and its card beside it as JSON, which names the tensors by their digest."""
    tensors = as_stored(module.state_dict(), stored)
    told = {**card, "weights": tensors_digest(tensors)[:12]}
    with alone_in(path.parent):  # two trainings at once leave the pair of one
        write_atomically(path.with_suffix(".json"), (json.dumps(told, indent=2) + "\n").encode())
        save_tensors(path, tensors, {"task": str(card["task"]), "model": str(card["model"])})


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and card of a checkpoint; the card is empty where there is none.

    Raises:
        CheckpointError: if the file is missing, truncated or not safetensors, or the card is not JSON, or of other
            weights (cards of earlier versions do not say of which).
    """
    tensors, _ = read_tensors(path)
    card = read_card(path)
    if "weights" in card and card["weights"] != tensors_digest(tensors)[:12]:
        raise CheckpointError(
            f"{path.with_suffix('.json')}: the card of other weights than {path.name}; train it again"
        )
    return tensors, card


def read_card(path: Path) -> dict[str, Any]:
    """The card of a checkpoint alone, without a look at its tensors; empty where there is none.

    Raises:
        CheckpointError: if it is not JSON.
    """
    card_path = path.with_suffix(".json")
    try:
        card = json.loads(card_path.read_text(encoding="utf-8")) if card_path.is_file() else {}
    except (OSError, ValueError, RecursionError):
        card = None
    if not isinstance(card, dict):
        raise CheckpointError(f"{card_path}: expected the checkpoint's card as JSON")
    return card


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of a safetensors file and what it says of itself: both of one file, though another may replace it.

    Raises:
        CheckpointError: if the file is missing, truncated or not safetensors.
    """
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint, expected a safetensors file") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: expected a complete safetensors file ({error})") from None


def check_origin(path: Path, card: Mapping[str, Any], *, task: str, model: str) -> None:
    """Hold what a checkpoint and its card say of themselves, where they do, against what they are taken for.

    Raises:
        CheckpointError: the weights or the card are those of another model.
    """
    with safe_open(path, "pt") as file:
        own = file.metadata() or {}
    for told in (card, own):
        found = told.get("task", task), told.get("model", model)
        if found != (task, model):
            raise CheckpointError(f"{path}: expected {model} on {task}, found {found[1]} on {found[0]}")


def fill(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Load tensors into a module of exactly those names and shapes.

    Raises:
        CheckpointError: names the file and the first tensor that is missing, unexpected or of another shape.
    """
    expected = module.state_dict()
    for name, tensor in expected.items():
        if name not in tensors:
            raise CheckpointError(f"{path}: expected a tensor {name!r} {tuple(tensor.shape)}, found none")
        if tensors[name].shape != tensor.shape:
            raise CheckpointError(
                f"{path}: expected {name!r} of shape {tuple(tensor.shape)}, found {tuple(tensors[name].shape)}"
            )
    for name in tensors:
        if name not in expected:
            raise CheckpointError(f"{path}: unexpected tensor {name!r}; the file is of another model")
    if any(not bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise CheckpointError(f"{path}: expected finite tensors, found NaN or infinity")
    module.load_state_dict(dict(tensors))
