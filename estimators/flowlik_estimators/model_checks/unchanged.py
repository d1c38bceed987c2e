"""Whether a model is still what it was: its modules, their modes and classes, its tensors and what was written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from types import CellType
from typing import Any

import torch
from torch import Tensor, nn

from flowlik_estimators.counting import METHODS
from flowlik_estimators.model_checks.stand_in import StandIn, is_plain, same, slots, written_in
from flowlik_models.interfaces import CAPABILITIES

_INSIDE = ("_modules", "_parameters", "_buffers")

_ASKED = sorted(
    {name.partition(".")[0] for capability in CAPABILITIES.values() for name in capability.attributes}
    | {"event_shape", "networks", "scalar_time"}
)
"""What an estimator asks a model for; it may lie in the model's class."""


class Unchanged:
    """A model at one time, which `check` compares with what it is now.

    Torch counts what is written into a tensor; writing through ``.data`` or numpy leaves no trace, and is answered for:
    a stand-in shares its memory. So is what it looks up as it is called: functions and properties of classes, global
    variables, hooks of torch's, sets, deques and objects with slots. Where the model is its own stand-in, so are
    attributes of torch's own layers; of these no tensors are compared, as old parametrisations make them at every call.
    """

    def __init__(self, model: Any, found: StandIn, estimated: Any) -> None:
        self._modules = list({id(module): module for module in found.modules}.values())
        self._tensors = list({id(tensor): tensor for tensor in found.tensors}.values())
        self._counting = [tensor for tensor in self._tensors if not tensor.is_inference()]
        self._layers = [] if found.model is model else [vars(one) for one in self._modules if _is_layer(one)]
        self._states = list(self._places(model, found))
        self._containers = list({id(one): one for one in found.containers}.values())
        self._functions = list({id(one): one for one in found.functions}.values())
        self._owners = [model, estimated, *found.objects, *self._modules]
        kinds = [
            kind for kind in set(map(type, self._owners)) if any(hasattr(kind, name) for name in METHODS)
        ]
        in_slots = [(one, name) for one in (model, estimated) for name in slots(type(one)) if name in _ASKED]
        self._globals = found.globals
        self._looked_up = [*((kind, name) for kind in kinds for name in _ASKED), *found.methods, *in_slots]
        self.take()

    def _places(self, model: Any, found: StandIn) -> Iterator[dict[str, Any]]:
        for module in self._modules:
            yield from (vars(module)[name] for name in _INSIDE)
        for one in {id(one): one for one in (model, *found.objects, *self._modules)}.values():
            if hasattr(one, "__dict__") and not _is_layer(one):
                yield vars(one)

    def take(self) -> None:
        """From now on compare with what the model is now."""
        self._modes = self._training()
        self._held = self._contents()
        self._kept = self._code()
        self._where = self._memory()
        self._kinds = _kinds(self._tensors)
        self._versions = self._written()

    def check(self) -> None:
        """Raise ValueError, in one line with the cure, where the model has changed."""
        if what := self._what():
            raise ValueError(
                f"the model was changed after it was bound ({what}): bind it again, estimator.bind(model)"
            )

    def _what(self) -> str | None:
        if self._training() != self._modes:
            return "its mode, train or eval"
        if self._written() != self._versions:
            return "its weights"
        held = self._contents()
        if not same(held, self._held):
            return _moved(_kinds(self._held), _kinds(held)) or "a part or an attribute of it is another"
        if not same(self._code(), self._kept):
            return "a class, a function or a global network of it is another"
        if self._memory() != self._where:
            return _moved(self._kinds, _kinds(self._tensors)) or "its weights lie elsewhere"
        return None

    def _training(self) -> list[bool]:
        return [module.__dict__["training"] for module in self._modules]

    def _contents(self) -> list[Any]:
        settings = (v for state in self._layers for v in state.values() if not isinstance(v, Tensor))
        states = chain.from_iterable(map(dict.values, self._states))
        if not self._layers and not self._containers:
            return list(states)
        return list(chain(states, settings, *map(_held_in, self._containers)))

    def _code(self) -> list[Any]:
        """Classes, what of them is kept from call to call, and what is written in functions."""
        looked_up = [getattr(one, name, None) for one, name in self._looked_up]
        globals_ = [variables.get(name) for variables, name in self._globals]
        return [*map(type, self._owners), *looked_up, *globals_, *written_in(self._functions)]

    def _memory(self) -> list[int]:
        return [tensor.data_ptr() for tensor in self._tensors]

    def _written(self) -> list[int]:
        return [tensor._version for tensor in self._counting]


def _is_layer(one: Any) -> bool:
    return isinstance(one, nn.Module) and is_plain(type(one), torch_only=True)


def _held_in(container: Any) -> Iterable[Any]:
    """What is in a list, a dict or the cell of a closure."""
    if isinstance(container, CellType):
        try:
            return (container.cell_contents,)
        except ValueError:  # not yet filled
            return ()
    return container.values() if isinstance(container, dict) else container


def _kinds(values: list[Any]) -> list[tuple[torch.device, torch.dtype]]:
    return [(value.device, value.dtype) for value in values if isinstance(value, Tensor)]


def _moved(
    before: list[tuple[torch.device, torch.dtype]], now: list[tuple[torch.device, torch.dtype]]
) -> str | None:
    """Whether tensors are on another device or of another type."""
    if before == now or len(before) != len(now):
        return None
    devices = [[device for device, _ in kinds] for kinds in (before, now)]
    return "its device" if devices[0] != devices[1] else "its type"
