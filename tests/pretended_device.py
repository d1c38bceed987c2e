"""A device that a CPU pretends to be: its tensors hold CPU data, refuse to meet other devices as CUDA's do, and say
where the host waited for them.

torch's PrivateUse1 backend is a place for devices of one's own, with dispatch, autograd, functorch and factories as for
any other. `PRETENDED` is one: each of its tensors wraps a CPU tensor, and every operation is done there.

- An operation on tensors of this device and of the CPU raises, except where CUDA allows it: a single number on the CPU
  in pointwise operations, indices on the CPU, copies.
- `host_synchronisations` counts what makes the host wait for a CUDA device: numbers and arrays read from it, copies to
  and from it, results whose size depends on values. They are counted by the line that caused them, the innermost that
  is not torch's own; `own` keeps the lines of this project.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from weakref import WeakSet

import pytest
import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_map

import flowlik
import flowlik_estimators
import flowlik_models

NAME = "pretended"
PRETENDED = f"{NAME}:0"

aten = torch.ops.aten
PACKAGES = (flowlik, flowlik_estimators, flowlik_models)
OWN = {str(Path(str(package.__file__)).parent): package.__name__ for package in PACKAGES}
TORCH = str(Path(torch.__file__).parent) + "/"

SIZE_BY_VALUE = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.bincount.default,
    aten.equal.default,
    aten._linalg_check_errors.default,
    aten._linalg_eigh.default,
    aten._linalg_svd.default,
}
"""Operations whose result, its size or whether it succeeded, the host has to know."""

_counters: list[Counter[str]] = []


class MixedDevicesError(RuntimeError):
    """Tensors of two devices met."""


@contextmanager
def host_synchronisations() -> Iterator[Counter[str]]:
    """Counts what makes the host wait inside, by the file and line that caused it."""
    counter: Counter[str] = Counter()
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters.remove(counter)


def own(counter: Counter[str]) -> Counter[str]:
    """Those of this project's lines."""
    return Counter({line: count for line, count in counter.items() if line.split("/")[0] in OWN.values()})


def to_pretended(value: Any) -> Any:
    """A tensor, a module or a tree of tensors on the device; pytest skips where torch cannot pretend one."""
    _register()
    if isinstance(value, torch.nn.Module):
        return value.to(PRETENDED)
    return tree_map(lambda leaf: leaf.to(PRETENDED) if isinstance(leaf, Tensor) else leaf, value)


class DeviceGenerator(torch.Generator):
    """A generator of the device."""

    made: ClassVar[WeakSet[DeviceGenerator]] = WeakSet()

    def __init__(self, device: object = None) -> None:
        DeviceGenerator.made.add(self)

    def __new__(cls, device: object = None) -> DeviceGenerator:
        return super().__new__(cls)

    device = property(lambda self: torch.device(PRETENDED))  # type: ignore[assignment]


class _OnDevice(Tensor):
    """A tensor of the device around the CPU tensor that has its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> _OnDevice:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(PRETENDED),
        )
        made.held = held
        return made  # type: ignore[no-any-return]

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _operation(func, args, kwargs or {})

    def tolist(self) -> Any:
        """All numbers, for which the host waits."""
        _waited()
        return _cpu(self).tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """Refused, as by CUDA."""
        raise TypeError(f"can't convert {PRETENDED} device type tensor to numpy. Use Tensor.cpu() first.")

    def __array__(self, dtype: Any = None) -> Any:
        """Refused, as by CUDA."""
        return self.numpy()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"<{tuple(self.shape)} {self.dtype} on {PRETENDED}>"

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.ndim == 0 else repr(self)


def _cpu(tensor: Tensor) -> Tensor:
    """The values; a tensor inside a transformation has none of its own."""
    with torch.no_grad():
        return tensor.detach().cpu() if not hasattr(tensor, "held") else tensor.held


def _waited() -> None:
    """Count one wait of the host, for the innermost line that is not torch's."""
    if not _counters:
        return
    frame = sys._getframe(1)
    while frame.f_back is not None and (
        frame.f_code.co_filename == __file__ or frame.f_code.co_filename.startswith((TORCH, "<"))
    ):
        frame = frame.f_back
    path = frame.f_code.co_filename
    for folder, package in OWN.items():
        if path.startswith(folder + "/"):
            path = f"{package}/{path[len(folder) + 1 :]}"
    for counter in _counters:
        counter[f"{path}:{frame.f_lineno}"] += 1


class _Known(NamedTuple):
    """What is asked of an operation each time."""

    names: tuple[str, ...]
    written: tuple[str, ...]
    returns_written: bool
    returns_many: bool
    changes_shape: bool
    takes_a_number: bool
    indexes: bool
    reads: bool


@cache
def _known(func: Any) -> _Known:
    schema = func._schema
    returns = [r for r in schema.returns if r.alias_info is not None and r.alias_info.is_write]
    return _Known(
        names=tuple(a.name for a in schema.arguments),
        written=tuple(a.name for a in schema.arguments if a.is_write),
        returns_written=bool(returns),
        returns_many=len(schema.returns) > 1,
        changes_shape=torch.Tag.inplace_view in func.tags,
        takes_a_number=torch.Tag.pointwise in func.tags or func.overloadpacket in _TAKES_A_NUMBER,
        indexes=func.overloadpacket in (aten.index, *_INDEX_PUT),
        reads=func is aten._local_scalar_dense.default or func in SIZE_BY_VALUE,
    )


def _operation(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation on tensors of which at least one is the device's."""
    if func in (aten.copy_.default, aten._copy_from.default):
        to, source = (args[0], args[1]) if func is aten.copy_.default else (args[1], args[0])
        return _copied(source, to, *args[2:])
    known, device = _known(func), kwargs.get("device")
    here = device is None or torch.device(device).type == NAME
    if func is aten._to_copy.default and not here and torch.device(device).type == "meta":
        pass  # of zeros that are never made, in forward mode
    elif func is aten._to_copy.default and not (here and isinstance(args[0], _OnDevice)):
        _check_copied(args[0], kwargs.get("non_blocking", False))
    else:
        _check_devices(func, known, args, kwargs)
        if known.reads or (known.indexes and _waits(func, args)):
            _waited()
    held = [_held(arg) for arg in args]
    named = {name: _held(arg) for name, arg in kwargs.items()}
    if device is not None and here:
        named["device"] = "cpu"
    return _returned(func, known, args, kwargs, func(*held, **named), here)


def _held(value: Any) -> Any:
    """An argument with the values in place of what is around them; operations take tensors and lists of them."""
    if type(value) is _OnDevice:
        return value.held
    return [_held(part) for part in value] if isinstance(value, list | tuple) else value


def _wrapped(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _OnDevice(value)
    return type(value)(map(_wrapped, value)) if isinstance(value, list | tuple) else value


def _returned(func: Any, known: _Known, args: Any, kwargs: dict[str, Any], result: Any, here: bool) -> Any:
    """The result on the device; what was written to is itself."""
    if not known.written:
        return _wrapped(result) if here else result
    given = dict(zip(known.names, args, strict=False)) | kwargs
    written = [given[name] for name in known.written if name in given]
    if known.changes_shape:
        with no_dispatch():  # the tensor around the values is given their new shape
            func(*args, **kwargs)
    for target in written:
        if isinstance(target, _OnDevice) and target.shape != target.held.shape:
            raise NotImplementedError(f"{func} gives a tensor another shape")
    if known.returns_written:
        return tuple(written) if known.returns_many else written[0]
    return _wrapped(result) if here else result


def _copied(source: Tensor, to: Tensor, non_blocking: bool = False) -> Tensor:
    if isinstance(source, _OnDevice) != isinstance(to, _OnDevice):
        _check_copied(source, non_blocking)
    _held(to).copy_(_held(source))
    return to


def _check_copied(source: Tensor, non_blocking: bool) -> None:
    """The host waits for what it reads; what it gives away is copied aside first, where it does not ask to wait."""
    if not non_blocking:
        _waited()
    elif isinstance(source, _OnDevice):
        raise RuntimeError(
            "a copy to the CPU that nobody waits for: its values may be read before they are there"
        )


def _check_generator(func: object, generator: torch.Generator | None) -> None:
    if generator is not None and generator._cdata not in {made._cdata for made in DeviceGenerator.made}:  # type: ignore[attr-defined]
        raise MixedDevicesError(f"{func}: a generator of the CPU for a tensor on {PRETENDED}")


def _check_devices(func: Any, known: _Known, args: Any, kwargs: dict[str, Any]) -> None:
    """Raise where CUDA would."""
    others = []
    for arg in (*args, *kwargs.values()):
        for leaf in arg if isinstance(arg, list | tuple) else (arg,):
            if isinstance(leaf, torch.Generator):
                _check_generator(func, leaf)
            elif isinstance(leaf, Tensor) and not isinstance(leaf, _OnDevice):
                others.append(leaf)
    if not others:
        return
    if known.indexes:
        if not isinstance(args[0], _OnDevice):
            raise MixedDevicesError(f"{func}: indices on {PRETENDED} of a tensor on the CPU")
        value = args[2] if len(args) > 2 else None
        others = [value] if isinstance(value, Tensor) and not isinstance(value, _OnDevice) else []
    if any(not (known.takes_a_number and other.ndim == 0) for other in others):
        shapes = ", ".join(str(tuple(other.shape)) for other in others)
        raise MixedDevicesError(f"{func}: expected all tensors on {PRETENDED}, found {shapes} on the CPU")


_INDEX_PUT = (aten.index_put, aten.index_put_, aten._index_put_impl_)
_TAKES_A_NUMBER = (*_INDEX_PUT, aten.masked_fill, aten.masked_fill_, aten.fill_)


def _waits(func: Any, args: Any) -> bool:
    """Whether the host has to count what a mask names; where a single number is put there, it is filled in."""
    filled = func.overloadpacket in _INDEX_PUT and isinstance(args[2], Tensor) and args[2].numel() == 1
    return _by_mask(args[1]) and not filled


def _by_mask(indices: Any) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


class _Backend:
    """What torch asks the module of a device."""

    _is_in_bad_fork = staticmethod(lambda: False)
    is_available = staticmethod(lambda: True)
    is_initialized = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    manual_seed_all = staticmethod(lambda seed: None)
    get_amp_supported_dtype = staticmethod(lambda: [torch.float16, torch.bfloat16])


FACTORIES = (
    *(
        "empty.memory_format",
        "empty_strided",
        "_efficientzerotensor",
        "full",
        "zeros",
        "ones",
        "eye",
        "eye.m",
    ),
    *("arange", "arange.start", "arange.start_step", "linspace", "logspace", "scalar_tensor"),
    *("rand", "randn", "randint", "randint.low", "randperm"),
    *(
        "rand.generator",
        "randn.generator",
        "randint.generator",
        "randint.low_generator",
        "randperm.generator",
    ),
)
"""What makes a tensor out of numbers."""


def _factory(name: str) -> Callable[..., Tensor]:
    """The operation on the CPU, its result put on the device."""
    packet, _, overload = ("zeros" if name == "_efficientzerotensor" else name).partition(".")
    make = getattr(getattr(aten, packet), overload or "default")

    def made(*args: Any, **kwargs: Any) -> Tensor:
        _check_generator(name, kwargs.get("generator"))
        return _OnDevice(make(*args, **{**kwargs, "device": "cpu"}))

    return made


def _copy_from(source: Tensor, to: Tensor, non_blocking: bool = False) -> Tensor:
    return _copied(source, to, non_blocking)


@cache
def _register() -> torch.library.Library:
    """The backend, once a process; kept, since its kernels live as long as what is returned."""
    setup = getattr(backend_registration, "_setup_privateuseone_for_python_backend", None)
    if setup is None:
        pytest.skip("this torch has no backend in Python")
    setup(NAME, backend_module=_Backend)
    library = torch.library.Library("aten", "IMPL")
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    for name in FACTORIES:
        library.impl(name, _factory(name), "PrivateUse1")
    return library


# Before anything is differentiated: the autograd engine counts the devices once a process, at its first pass backward.
if hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
    _register()
