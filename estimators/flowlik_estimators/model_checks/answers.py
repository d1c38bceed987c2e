"""The kinds of what comes in and what a model answers: anything else is named beside what was expected."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

NOUNS = {
    "velocity": "velocity",
    "divergence": "divergence",
    "log_density": "log-density",
    "average_velocity": "average velocity",
    "joint": "average velocity",
    "generate": "generate",
    "from_noise": "from_noise",
}
"""What the first answer of a method is called."""

PAIRS = {
    "joint": ("average velocity", "average divergence"),
    "velocity_and_divergence": ("velocity", "divergence"),
    "inverse": ("noise", "log-determinant"),
}
"""Methods that answer with a pair."""

SCALARS = frozenset(
    {"divergence", "average divergence", "policy's divergence", "log-density", "log-determinant"}
)


def checked(method: str, answer: Any, x: Tensor) -> Any:
    """The answer of a model's method at x (batch, *event), inference tensors made ordinary.

    Raises:
        ValueError: it is no real tensor of x's rows, or no pair of them; the message says what it is.
    """
    if method not in PAIRS:
        return tensor(NOUNS.get(method, method), answer, x)
    if not isinstance(answer, tuple | list) or len(answer) != 2:
        raise ValueError(
            f"the model's {method} answered {described(answer)}, expected a pair of tensors, "
            f"{' and '.join(PAIRS[method])}"
        )
    first, second = (tensor(noun, part, x) for noun, part in zip(PAIRS[method], answer, strict=True))
    return first, second


def tensor(noun: str, value: Any, x: Tensor) -> Tensor:
    """A real floating-point tensor on x's device, of x's shape or, where it is one number a row, of its rows."""
    expected = x.shape[:1] if noun in SCALARS else x.shape
    if (
        isinstance(value, Tensor)
        and value.shape == expected
        and value.is_floating_point()
        and value.device == x.device
    ):
        return value.clone() if value.is_inference() else value
    shape = tuple(expected)
    what = f"the {noun}" if noun.startswith("policy's") else f"the model's {noun}"
    if not isinstance(value, Tensor):
        raise ValueError(f"{what} answered {described(value)}, expected a tensor of shape {shape}")
    if not value.is_floating_point():
        raise ValueError(
            f"{what} answered {described(value)}, expected real floating-point numbers of shape {shape}"
        )
    if tuple(value.shape) != shape:
        raise ValueError(f"{what} has shape {tuple(value.shape)}, expected {shape}")
    raise ValueError(f"{what} is on {value.device}, expected it on {x.device} as x is")


def policy(answer: Any) -> Any:
    """What `policy` answered; ValueError where it cannot be followed."""
    if not all(callable(getattr(answer, name, None)) for name in ("velocity", "divergence")):
        raise ValueError(
            f"the model's policy answered {described(answer)}, expected an object with the methods velocity and "
            "divergence"
        )
    return answer


def described(value: Any) -> str:
    """What a value is, in a few words, with the cure where there is a usual one.

    >>> described((1, 2))
    'a tuple of 2'
    """
    if value is None:
        return "None"
    if isinstance(value, Tensor):
        return f"a tensor of {str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} of {', '.join(map(str, list(value)[:4])) or 'nothing'}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    for name in ("sample", "velocity", "prediction", "logits", "last_hidden_state"):
        if isinstance(getattr(value, name, None), Tensor):
            return f"an object of {type(value).__name__} (return its .{name})"
    return f"an object of {type(value).__name__}"


# --- what comes in ---


def check_event_shape(shape: Any) -> None:
    """ValueError unless the shape of events is a sequence of whole numbers of at least 1, and has any."""
    sizes = list(shape) if isinstance(shape, Sequence) and not isinstance(shape, str | bytes) else []
    whole = all(
        isinstance(size, Integral) and not isinstance(size, bool) and int(size) >= 1 for size in sizes
    )
    if not (sizes and whole):
        raise ValueError(
            "the model's event_shape must be a tuple of positive whole numbers, such as (2,) or (3, 32, 32), "
            f"got {shape!r}"
        )


def check_cond(cond: Any, batch: int) -> None:
    """ValueError unless the condition is None, a tensor or a dict of tensors, each of ``batch`` rows."""
    if cond is None:
        return
    if isinstance(cond, Mapping):
        for name, value in cond.items():
            _check_rows(f"cond[{name!r}]", value, batch, "a tensor")
    else:
        _check_rows("cond", cond, batch, "a tensor or a dict of tensors")


def _check_rows(name: str, value: Any, batch: int, wanted: str) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is {described(value)}, expected {wanted} with {batch} rows, one a row of x")
    if value.ndim == 0:
        raise ValueError(f"{name} has no rows, x has {batch}")
    if len(value) != batch:
        raise ValueError(f"{name} has {len(value)} rows, x has {batch}")


def mapped(cond: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A condition with every tensor of it changed; None stays None."""
    if cond is None:
        return None
    if isinstance(cond, Mapping):
        return {name: change(value) for name, value in cond.items()}
    return change(cond)


def is_floating(value: object) -> bool:
    """Whether it is a tensor of real numbers with rows: x, t or s, not labels."""
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim > 0
