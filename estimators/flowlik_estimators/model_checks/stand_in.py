"""A stand-in of a model for one call: every module in eval mode, parameters without gradients, the model untouched.

Nothing of the model is switched and switched back: another thread may train it, or differentiate through it, at the
same time. The stand-in is made of shallow copies of the modules and of whatever leads to them (plain objects, lists,
tuples, dicts, partials, bound methods, functions that close over a module); parameters share their memory, and all
else is shared as it is. What a copy has written to its own attributes is written to the model when the call ends.

Compiled and scripted modules, and networks that only a global variable holds, cannot be stood in for. They are called
as they are, and where one is in training mode it is held in eval mode for the time of the call. So is all of a model in
which a hook of such a module writes to what would be copied.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from operator import is_
from types import CellType, FunctionType, MethodType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

DEEPEST = 12
"""Plain objects are followed so far: a network lies near the model's surface."""

LONGEST = 1_000
"""A longer list or dict is a record of something, not a collection of networks."""

_ATOMS = (str, bytes, int, float, complex, bool, type(None), type, torch.dtype, torch.device)
_OF_MODULES = ("training", "_parameters", "_buffers", "_modules")
_TENSORS = ("_parameters", "_buffers")
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_FOREIGN = frozenset({"torch", "numpy", "scipy", "pandas", "sklearn"})


@dataclass
class StandIn:
    """``model``, the stand-in; and of the model itself its ``modules``, their ``tensors``, and the ``objects`` copied.

    ``shared``: the modules that are called as they are; ``containers`` and ``functions``: the lists, dicts, cells and
    functions that were looked into; ``methods``: class and name of those that were bound to a copy; ``globals``: where
    a global variable holds a module.
    """

    model: Any = None
    modules: list[nn.Module] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    objects: list[Any] = field(default_factory=list)
    shared: list[nn.Module] = field(default_factory=list)
    containers: list[Any] = field(default_factory=list)
    functions: list[FunctionType] = field(default_factory=list)
    methods: list[tuple[type, str]] = field(default_factory=list)
    globals: list[tuple[dict[str, Any], str]] = field(default_factory=list)
    copies: list[tuple[Any, Any, dict[str, Any]]] = field(default_factory=list)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters of all modules."""
        return [tensor for tensor in self.tensors if isinstance(tensor, nn.Parameter)]

    def write_back(self) -> None:
        """Give the model what its copies have written to attributes of their own."""
        originals = {id(copy): original for original, copy, _ in self.copies}
        for original, copy, before in self.copies:
            for name, value in vars(copy).items():
                if name not in _OF_MODULES and value is not before.get(name, _OF_MODULES):
                    original.__dict__[name] = originals.get(id(value), value)
            for name, value in vars(copy).get("_buffers", {}).items():
                if value is not before["_buffers"].get(name):
                    original._buffers[name] = value


def of(model: Any) -> StandIn:
    """The stand-in of a model."""
    copier = _Copier()
    copier.made.model = copier.of(model, 0)
    if not copier.tied:
        return copier.made
    modules = copier.made.modules
    return StandIn(model, modules, copier.made.tensors, shared=modules)


def found(model: Any) -> StandIn:
    """What the model is made of; nobody is to call the stand-in's model."""
    return _itself(model) or of(model)


@contextmanager
def held(model: Any, *, differentiable: bool, differentiated: bool = True) -> Iterator[StandIn]:
    """The stand-in for the time of a call; where gradients are wanted the model itself takes its place.

    ``differentiated``: whether the call takes derivatives of its own. Where it does not, a network of the suite in
    eval mode is its own stand-in: copying a U-Net takes longer than evaluating it at one point.
    """
    if not differentiable and not differentiated and (itself := _itself(model)) is not None:
        yield itself
        return
    made = of(model)
    if differentiable:
        made.model = model
        yield made
        return
    with evaluating(made.shared):
        try:
            yield made
        finally:
            made.write_back()


def _itself(model: Any) -> StandIn | None:
    """A tree of the suite's own networks, all in eval mode, which hold no others in places of their own."""
    if not isinstance(model, nn.Module):
        return None
    modules: dict[int, nn.Module] = {}
    tensors: list[Tensor] = []
    left = [model]
    while left:
        module = left.pop()
        if id(module) in modules:
            continue
        state = module.__dict__
        if state["training"] or not is_plain(type(module)):
            return None
        modules[id(module)] = module
        for part in _TENSORS:
            if held := state[part]:
                tensors += [tensor for tensor in held.values() if tensor is not None]
        if held := state["_modules"]:
            left += [child for child in reversed(held.values()) if child is not None]
    return StandIn(model, list(modules.values()), tensors)


def is_plain(kind: type, *, torch_only: bool = False) -> bool:
    """Whether a class of modules is one of the suite's networks, or a layer of torch's."""
    return _is_in(kind.__module__, torch_only)


@lru_cache(maxsize=1024)
def _is_in(home: str, torch_only: bool) -> bool:
    homes = ("torch.nn.modules.",) if torch_only else ("flowlik_models.networks.", "torch.nn.modules.")
    return home.startswith(homes)


def active_in_training(modules: Iterable[nn.Module]) -> list[str]:
    """Kinds of the modules that answer otherwise in training mode than in eval mode, and are in training mode."""
    return sorted(
        {type(module).__name__ for module in modules if module.training and _depends_on_mode(module)}
    )


def _depends_on_mode(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.RReLU):
        return True
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return bool(module.track_running_stats)
    rates = (vars(module).get(name) for name in ("p", "dropout", "drop_prob", "drop_rate", "p_dropout"))
    return any(isinstance(rate, float) and rate > 0.0 for rate in rates)


class _Copier:
    """Copies what leads to a module, once each; `made` notes what was found."""

    def __init__(self, opened: set[int] | None = None) -> None:
        self.made = StandIn()
        self.opened = set[int]() if opened is None else opened
        self.done: dict[int, Any] = {}
        self.holding: dict[type, list[tuple[str, FunctionType]]] = {}
        self.alive: list[Any] = []
        self.tied = False
        """Whether a module that is not copied has a hook which leads to what is."""

    def of(self, value: Any, depth: int) -> Any:
        """The value itself, or its copy where a module or a tensor with gradients lies in it."""
        if isinstance(value, _ATOMS):
            return value
        if id(value) not in self.done:
            self.alive.append(value)
            self.done[id(value)] = value
            self.done[id(value)] = self._copied(value, depth)
        return self.done[id(value)]

    def _copied(self, value: Any, depth: int) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, nn.Module):
            return self._module(value, depth)
        if depth > DEEPEST:
            return value
        for kind, copy in _COPIES.items():
            if isinstance(value, kind):
                return copy(self, value, depth + 1)
        if _may_be_copied(value):
            return self._object(value, depth + 1)
        for name in slots(type(value)):
            self._share_within(getattr(value, name, None))
        return value

    def _tensor(self, tensor: Tensor) -> Tensor:
        self.made.tensors.append(tensor)
        if not tensor.requires_grad:
            return tensor
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(tensor.detach(), requires_grad=False)
        return tensor.detach()

    def _module(self, module: nn.Module, depth: int) -> nn.Module:
        if _is_opaque(module):
            self._share(module.modules())
            return module
        copy = object.__new__(type(module))
        self.done[id(module)] = copy
        self.made.modules.append(module)
        state = dict(vars(module))
        own = {
            name: value
            for name, value in state.items()
            if name not in _OF_MODULES and not ("hooks" in name and value == {})
        }
        kept = {name: dict(state[name]) for name in ("_parameters", "_buffers", "_modules")}
        for part in kept.values():
            part.update({name: self.of(value, depth) for name, value in part.items()})
        copied = {name: self.of(value, depth + 1) for name, value in own.items()}
        copy.__dict__.update(
            {**state, **copied, **kept, "training": False}, **self._methods(module, copy, depth)
        )
        before = {**vars(copy), "_buffers": dict(kept["_buffers"])}
        self.made.copies.append((module, copy, before))
        return copy

    def _object(self, value: Any, depth: int) -> Any:
        kind = type(value)
        copy = SimpleNamespace() if kind is SimpleNamespace else object.__new__(kind)
        self.done[id(value)] = copy
        self.made.objects.append(value)
        state = dict(vars(value))
        copied = {name: self.of(held, depth) for name, held in state.items()}
        methods = self._methods(value, copy, depth)
        if not methods and all(copied[name] is held for name, held in state.items()):
            return value
        copy.__dict__.update(copied, **methods)
        self.made.copies.append((value, copy, dict(vars(copy))))
        return copy

    def _methods(self, value: Any, copy: Any, depth: int) -> dict[str, MethodType]:
        """Methods of the class that hold on to a module, bound to the copy."""
        methods, kind = {}, type(value)
        if kind not in self.holding:
            self.holding[kind] = _holding(kind)
        for name, function in self.holding[kind]:
            found = self.of(function, depth + 1)
            if name.startswith("__"):  # looked up in the class
                self._share_within(function)
            elif found is not function:
                methods[name] = MethodType(found, copy)
                self.made.methods.append((kind, name))
        for base in kind.__mro__:
            for held in vars(base).values():
                if isinstance(held, nn.Module):
                    self._share(held.modules())
        return methods

    def _share(self, modules: Iterable[nn.Module]) -> None:
        for module in modules:
            self.made.shared.append(module)
            self.made.modules.append(module)
            self.made.tensors.extend([*module.parameters(recurse=False), *module.buffers(recurse=False)])
            for hooks in (vars(module).get(name) for name in _HOOKS):
                self.tied |= bool(hooks) and self.of(hooks, 0) is not hooks

    def _share_within(self, value: Any) -> None:
        """Note the modules in what is not copied; it may lead back to itself."""
        if id(value) not in self.opened:
            self.opened.add(id(value))
            self.alive.append(value)
            inner = _Copier(self.opened)
            inner.of(value, 0)
            self.alive.extend(inner.alive)
            self._share(inner.made.modules)

    def _function(self, function: FunctionType, depth: int) -> FunctionType:
        compiled = getattr(function, "_torchdynamo_orig_callable", None)
        if compiled is not None:
            self._share_within(compiled)
            return function
        for name in function.__code__.co_names:
            if isinstance(module := function.__globals__.get(name), nn.Module):
                self.made.globals.append((function.__globals__, name))
                self._share(module.modules())
        self.made.functions.append(function)
        self.made.containers.append(vars(function))
        cells = tuple(self._cell(cell, depth) for cell in function.__closure__ or ())
        defaults = self.of(function.__defaults__, depth)
        keywords = self.of(function.__kwdefaults__, depth)
        same = all(new is old for new, old in zip(cells, function.__closure__ or (), strict=True))
        if same and defaults is function.__defaults__ and keywords is function.__kwdefaults__:
            return function
        copy = FunctionType(function.__code__, function.__globals__, function.__name__, defaults, cells)
        copy.__kwdefaults__ = keywords
        copy.__dict__.update(vars(function))
        return copy

    def _cell(self, cell: CellType, depth: int) -> CellType:
        self.made.containers.append(cell)
        try:
            content = cell.cell_contents
        except ValueError:  # not yet filled
            return cell
        copy = self.of(content, depth)
        return cell if copy is content else CellType(copy)

    def _method(self, method: MethodType, depth: int) -> MethodType:
        function, owner = self.of(method.__func__, depth), self.of(method.__self__, depth)
        if function is method.__func__ and owner is method.__self__:
            return method
        return MethodType(function, owner)

    def _partial(self, call: partial[Any], depth: int) -> partial[Any]:
        parts = (call.func, call.args, call.keywords)
        self.made.containers.append(call.keywords)
        function, args, keywords = (self.of(part, depth) for part in parts)
        if function is call.func and args is call.args and keywords is call.keywords:
            return call
        return partial(function, *args, **keywords)

    def _dict(self, value: dict[Any, Any], depth: int) -> dict[Any, Any]:
        if type(value) not in (dict, OrderedDict) or len(value) > LONGEST:
            return value
        self.made.containers.append(value)
        items = dict(value)  # another thread may write to it
        copied = {name: self.of(held, depth) for name, held in items.items()}
        if all(copied[name] is held for name, held in items.items()):
            return value
        return type(value)(copied)

    def _sequence(self, value: Any, depth: int) -> Any:
        named = hasattr(value, "_fields")
        if not (named or type(value) in (list, tuple)) or len(value) > LONGEST:
            return value
        if type(value) is list:
            self.made.containers.append(value)
        items = list(value)  # another thread may write to it
        copied = [self.of(held, depth) for held in items]
        if all(new is old for new, old in zip(copied, items, strict=True)):
            return value
        return type(value)(*copied) if named else type(value)(copied)


_COPIES: dict[Any, Any] = {
    FunctionType: _Copier._function,
    MethodType: _Copier._method,
    partial: _Copier._partial,
    dict: _Copier._dict,
    (list, tuple): _Copier._sequence,
}


def _may_be_copied(value: Any) -> bool:
    """An instance of somebody's own plain class, not of a library's that may hold on to a system's resource."""
    kind = type(value)
    if kind is SimpleNamespace:
        return True
    if not hasattr(value, "__dict__") or not _is_own(kind) or slots(kind):
        return False
    return not any("__new__" in vars(base) for base in kind.__mro__ if base is not object)


def _is_own(kind: type) -> bool:
    root = _root(kind)
    return root == "__main__" or (root not in _FOREIGN and root not in sys.stdlib_module_names)


def slots(kind: type) -> tuple[str, ...]:
    """Names of the slots of somebody's own class, () elsewhere."""
    if not _is_own(kind):
        return ()
    found = (vars(base).get("__slots__", ()) for base in kind.__mro__)
    names = [name for slots in found for name in ((slots,) if isinstance(slots, str) else slots)]
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))


_HOLDING: weakref.WeakKeyDictionary[type, tuple[list[Any], list[tuple[str, FunctionType]]]] = (
    weakref.WeakKeyDictionary()
)


def _holding(kind: type) -> list[tuple[str, FunctionType]]:
    """The functions of somebody's own class that may hold on to a module: by a closure, a default or a global."""
    bases = [base for base in reversed(kind.__mro__) if _is_own(base)]
    functions = {n: f for base in bases for n, f in vars(base).items() if isinstance(f, FunctionType)}
    now = written_in(functions.values())
    before, found = _HOLDING.get(kind, ([], []))
    if not same(before, now):  # the class has other functions than when it was last looked at
        found = [(name, f) for name, f in functions.items() if _may_hold(f)]
        _HOLDING[kind] = now, found
    return found


def written_in(functions: Iterable[FunctionType]) -> list[Any]:
    """The functions, and what may be written into them."""
    return [part for f in functions for part in (f, f.__code__, f.__defaults__, f.__kwdefaults__)]


def same(before: list[Any], now: list[Any]) -> bool:
    """Whether both hold the same objects in the same order."""
    return len(before) == len(now) and all(map(is_, before, now))


def _may_hold(function: FunctionType) -> bool:
    enclosed = set(function.__code__.co_freevars) - {"__class__"}
    defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    names = (function.__globals__.get(name) for name in function.__code__.co_names)
    return (
        bool(enclosed)
        or not all(isinstance(default, _ATOMS) for default in defaults)
        or any(isinstance(value, nn.Module) for value in names)
    )


def _root(kind: type) -> str:
    return kind.__module__.partition(".")[0]


def _is_opaque(module: nn.Module) -> bool:
    """Compiled and scripted modules run what they were made of, whatever a copy of them holds."""
    if isinstance(module, torch.jit.ScriptModule) or "_torchdynamo_orig_callable" in vars(module):
        return True
    return type(module).__name__ == "OptimizedModule" and hasattr(module, "_orig_mod")


_LOCK = threading.Lock()
_HELD: dict[int, tuple[nn.Module, int]] = {}
"""Modules in training mode that calls hold in eval mode, and how many calls."""


@contextmanager
def evaluating(modules: list[nn.Module]) -> Iterator[None]:
    """Modules in eval mode until the last of the calls that hold them has ended."""
    if not modules:
        yield
        return
    with _LOCK:
        ours = [module for module in modules if module.training or id(module) in _HELD]
        for module in ours:
            _HELD[id(module)] = (module, _HELD.get(id(module), (module, 0))[1] + 1)
            module.training = False
    try:
        yield
    finally:
        with _LOCK:
            for held_one in ours:
                module, calls = _HELD.pop(id(held_one))
                if calls > 1:
                    _HELD[id(module)] = (module, calls - 1)
                else:
                    module.training = True
