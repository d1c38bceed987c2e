"""Whether what a model answers can be differentiated: a cut graph gives derivatives of zero, and no error.

An answer without a graph to the input is a constant or is cut off (`torch.no_grad`, `torch.inference_mode`,
`.detach()`): the model is asked once more on a few rows with the input moved a little, and where the answer moves too
it is cut. An answer of which a part is cut shows as a missing edge among the shape and element-wise operations that
put it together; a constant leaves the same trace. There a difference along one direction is held against the
vector-Jacobian product, once for every model. These looks are not counted, and a model whose answer has a whole graph
is never asked for one. What is cut behind the last operation that mixes coordinates does not show here.

The error is raised where a derivative is taken through the answer, so that one which nobody needs may be cut.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

ROWS = 8
"""Rows of a look."""

MOVED = 0.05
"""How far an input is moved to see whether the answer moves, relative to 1 + |x|; times, towards 1/2."""

STEPS = (1e-2, 2.5e-3, 6e-4, 1.5e-4)
"""Half-widths of the differences, the same way: the first two that agree count, in fields however stiff."""

AGREE = 0.02
"""Two differences agree where they are so close, relative to their size."""

MISSED = 0.01
"""A product is off where it misses the difference by so much, and by `MARGIN` times what two differences are apart."""

MARGIN = 5.0

TRIES = 3
"""So many evaluations of a call are looked at while some number of the answer does not move; padded ones never do."""

MOST_NODES = 400

Ask = Callable[..., Tensor]
"""One answer of the model at (x, times ...) of some of the rows: ``ask(rows, inputs)``."""

_PASSED = re.compile(
    "Add|Sub|Rsub|Mul|Div|Neg|Where|Cat|Stack|Split|SplitWithSizes|Unbind|Chunk|Slice|Select|Index|IndexSelect|Gather|"
    "View|UnsafeView|ReshapeAlias|Reshape|Expand|Permute|Transpose|T|Squeeze|Unsqueeze|Clone|ToCopy|CopySlices|"
    "CopyBackwards|AsStrided|Alias|ConstantPadNd|Flip|Roll|MaskedFill|MaskedScatter|IndexPut|IndexCopy|IndexAdd|"
    "IndexFill|SliceScatter|SelectScatter|Scatter|ScatterAdd|Lerp|Addcmul|Addcdiv|Unfold|PixelShuffle|PixelUnshuffle|"
    "Repeat|Tanh|Sigmoid|Exp|Relu|Silu|Gelu|Softplus|LeakyRelu|Elu|Clamp|ClampMin|ClampMax|Pow|Sqrt|Rsqrt|Abs|Sin|Cos|"
    "Log|Square|Movedim|Unflatten|Diagonal|Tril|Triu|NanToNum"
)
"""Operations that move numbers about or work on each by itself."""

_KIND = re.compile(r"(?:torch::autograd::)?(\w+?)(?:Backward\d*)?$")


def cut_message(what: str, part: bool = False) -> str:
    """One line that names the method and the cure."""
    which = "part of its answer has no graph" if part else "its answer has no graph"
    return (
        f"the model's {what} cannot be differentiated: {which} to its input, so derivatives would silently be zero; "
        "remove torch.no_grad, torch.inference_mode or .detach() inside it"
    )


class Cut(torch.autograd.Function):
    """Identity of an answer that was cut off its inputs: whoever takes a derivative through it gets the error."""

    @staticmethod
    def forward(ctx: Any, message: str, value: Tensor, *inputs: Tensor) -> Tensor:
        """The value."""
        ctx.message = message
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """ValueError with the message."""
        raise ValueError(ctx.message)


def reaches(value: Tensor, inputs: Sequence[Tensor]) -> bool:
    """Whether the graph of the value leads to one of the inputs."""
    if not value.requires_grad:
        return False
    goals = {id(value.grad_fn) for value in inputs if value.grad_fn is not None}
    leaves = {id(value) for value in inputs if value.grad_fn is None}
    seen: set[Any] = set()
    stack = [value.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        if id(node) in goals or id(getattr(node, "variable", None)) in leaves:
            return True
        seen.add(node)
        stack.extend(after for after, _ in node.next_functions)
    return any(value is one for one in inputs)


def has_missing_edge(value: Tensor) -> bool:
    """Whether an operand without a graph enters before the first operation that mixes coordinates."""
    seen: set[Any] = set()
    alike: list[Tensor] = []
    stack: list[Any] = [value.grad_fn] if value.grad_fn is not None else []
    while stack and len(seen) < MOST_NODES:
        node = stack.pop()
        kind = _KIND.match(node.name())
        if node in seen or kind is None or not _PASSED.fullmatch(kind[1]):
            continue
        seen.add(node)
        after = [found for found, _ in node.next_functions]
        if None in after:
            factor = _is_factor_of_time(kind[1], node, after, value)
            if isinstance(factor, Tensor):
                alike.append(factor.to(value.device))
            elif not factor:
                return True
        stack.extend(found for found in after if found is not None)
    return bool(alike) and not bool(torch.stack(alike).all())  # the host waits once


def _is_factor_of_time(kind: str, node: Any, after: list[Any], value: Tensor) -> bool | Tensor:
    """Whether the operand is a number, the same for all rows, that a graph is multiplied by or divided by.

    A tensor () where that is to be read from the operand's values.
    """
    if kind not in ("Mul", "Div") or len(after) != 2 or (after[0] is None and kind == "Div"):
        return False
    try:
        saved = getattr(node, "_saved_other" if after[1] is None else "_saved_self", None)
    except RuntimeError:  # written to since
        return False
    if not isinstance(saved, Tensor):
        return False
    if saved.numel() == 1 or saved.ndim < value.ndim or saved.shape[0] != value.shape[0]:
        return True
    return (saved == saved[:1]).all() if len(saved) > 1 else False


# --- looks ---


def depends(ask: Ask, inputs: Sequence[Tensor], wanted: Sequence[bool]) -> bool:
    """Whether the answer moves with the inputs that are ``wanted``."""
    with torch.no_grad():
        still = ask([one.detach() for one in inputs])
        ways = _ways(inputs, wanted)
        moved = ask([_shifted(one, way, MOVED) for one, way in zip(inputs, ways, strict=True)])
    return bool(((moved - still).abs() > _rounding(still)).any())


def agrees(ask: Ask, inputs: Sequence[Tensor], wanted: Sequence[bool]) -> tuple[bool, bool]:
    """Whether products are those of the answer's own differences; and whether every number of it moved.

    True where the differences do not say: a field may be too stiff or too rough for them.
    """
    leaves = [one.detach().clone().requires_grad_(want) for one, want in zip(inputs, wanted, strict=True)]
    ways = _ways(inputs, wanted)
    with torch.enable_grad():
        value = ask(leaves)
        weights = _signs(value, 2)
        asked = [leaf for leaf, want in zip(leaves, wanted, strict=True) if want]
        found = torch.autograd.grad(value, asked, weights, allow_unused=True)
    rows = len(value)
    along = torch.zeros(rows, dtype=torch.float64, device=value.device)
    for gradient, way in zip(found, [way for way in ways if way is not None], strict=True):
        if gradient is not None:
            along += (gradient.double() * way.double()).reshape(rows, -1).sum(1)
    last: Tensor | None = None
    moved = torch.zeros_like(value[0], dtype=torch.bool)
    for step in STEPS:
        with torch.no_grad():
            ahead, behind = (
                ask([_shifted(one, way, way_step) for one, way in zip(inputs, ways, strict=True)])
                for way_step in (step, -step)
            )
        difference = (ahead - behind).double()
        moved |= (difference != 0).any(0)
        slope = (difference * weights.double()).reshape(rows, -1).sum(1) / (2 * step)
        noise = _rounding(value) * value[0].numel() ** 0.5 / step
        if last is not None:
            apart, size = (slope - last).abs(), slope.abs()
            known = (apart <= AGREE * size + noise) & torch.isfinite(slope)
            if int(known.sum()) * 2 >= rows:
                off = (along - slope).abs() > MISSED * size + MARGIN * apart + noise
                return not bool(off[known].all()), bool(moved.all())
        last = slope
    return True, False


def _ways(inputs: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    """A direction for every wanted input: signs times 1 + |x| for x; towards 1/2 for times."""
    ways: list[Tensor | None] = []
    for index, (one, want) in enumerate(zip(inputs, wanted, strict=True)):
        if not want:
            ways.append(None)
        elif index == 0:
            ways.append(_signs(one, 1) * (1 + one.detach().abs()))
        else:
            ways.append(0.5 - one.detach())
    return ways


def _shifted(value: Tensor, way: Tensor | None, by: float) -> Tensor:
    value = value.detach()
    return value.clone() if way is None else value + by * way


def _signs(like: Tensor, seed: int) -> Tensor:
    drawn = torch.rand(like.shape, generator=torch.Generator().manual_seed(seed))
    return ((drawn < 0.5).float() * 2 - 1).to(like.device, like.dtype)


def _rounding(value: Tensor) -> float:
    """What two answers may differ by although nothing has moved."""
    return 16 * torch.finfo(value.dtype).eps * float(value.detach().abs().nan_to_num().max())


# --- models that were looked at ---


class Known:
    """Models, and methods of them, in whose answers nothing is cut; none of them is kept alive for it."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, str], tuple[Any, Any]] = {}

    def add(self, model: Any, method: str, what: str) -> None:
        """Note this one, where it can be noted."""
        key = (id(model), what)
        try:
            # gone with the model: another may lie at its address
            one = weakref.ref(model, lambda _: self._known.pop(key, None))
            self._known[key] = (one, weakref.ref(_function(model, method)))
        except TypeError:
            return

    def __contains__(self, key: tuple[Any, str, str]) -> bool:
        model, method, what = key
        found = self._known.get((id(model), what))
        return found is not None and found[0]() is model and found[1]() is _function(model, method)


def _function(model: Any, method: str) -> Any:
    found = getattr(model, method)
    return getattr(found, "__func__", found)


KNOWN = Known()
