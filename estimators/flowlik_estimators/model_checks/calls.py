"""A model as an estimator sees it: every call of an evaluating method is looked at on its way in and out.

- What it answers is of the right kind and shape (`answers`), and can be differentiated where that is needed (`graph`).
- Its inputs are as they were: a model that writes into them is an error, before anything of the call is used.
- A model with ``scalar_time = True`` is asked one time a call: rows of several times are put to it in parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from flowlik_estimators.counting import Counts, counted, inner_networks, offered
from flowlik_estimators.model_checks import answers, graph
from flowlik_estimators.model_checks.guards import own_copy
from flowlik_estimators.model_checks.stand_in import StandIn
from flowlik_models.interfaces import attribute

INPUTS = ("x", "z", "t", "s")
_IN_PLACE = ("in-place operation", "modified inplace", "in-place", "inplace operation")


def checked_model(seen: Any, original: Any, stand_in: Any, counts: Counts, *, scalar_time: bool) -> Any:
    """A stand-in for ``seen``, a counted model, whose calls are looked at.

    ``original`` is the caller's model, by which it is known again; ``stand_in`` what looks ask, uncounted.
    """
    return _Checked(seen, original, stand_in, counts, scalar_time)


def checked_part(model: Any, name: str, counts: Counts) -> Any:
    """A model of the model, ``fake`` or ``teacher``, counted once and looked at in the same way."""
    part = getattr(model, name)
    seen = part if name in inner_networks(model) else counted(part, counts)
    return checked_model(seen, part, part, counts, scalar_time=getattr(model, "_scalar_time", False))


def asks_one_time(model: Any, found: StandIn) -> bool:
    """Whether the model, or one of the networks in it, wants one time a call."""
    if any(attribute(one, "scalar_time") is True for one in (model, *found.objects)):
        return True
    modules = found.modules
    if any(
        hasattr(kind, "scalar_time") or getattr(kind, "__getattr__", None) is not nn.Module.__getattr__
        for kind in set(map(type, modules))
    ):
        return any(attribute(one, "scalar_time") is True for one in modules)
    return True in [one.__dict__.get("scalar_time") is True for one in modules]


class _Checked:
    def __init__(self, seen: Any, original: Any, stand_in: Any, counts: Counts, scalar_time: bool) -> None:
        self._model, self._scalar_time = seen, scalar_time
        self._calls: list[_Call] = []
        for name in offered(seen):
            if hasattr(seen, name):
                call = _Call(name, getattr(seen, name), original, stand_in, counts)
                self._calls.append(call)
                setattr(self, name, _in_parts(call) if scalar_time else call)

    def begin(self) -> None:
        """From now on look as closely as at the first call."""
        for call in self._calls:
            call.begin()

    def __getattr__(self, name: str) -> Any:
        if name == "_model":  # not yet there while unpickling or copying
            raise AttributeError(name)
        return getattr(self._model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._model(*args, **kwargs)


class _Call:
    """One method."""

    def __init__(
        self, name: str, method: Callable[..., Any], original: Any, stand_in: Any, counts: Counts
    ) -> None:
        self.__name__ = name
        self.name, self.method, self.original, self.stand_in = name, method, original, stand_in
        self.counts = counts
        self.begin()

    def begin(self) -> None:
        """Look as closely as at the first call."""
        self.first = True
        self.looked: set[str] = set()
        self.tries = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
            return self.method(*args, **kwargs)
        values = [*args, *(kwargs[name] for name in INPUTS if name in kwargs)]
        inputs = [value for value in values if answers.is_floating(value)]
        answer = self._unchanged(inputs, kwargs.get("cond"), lambda: self.method(*args, **kwargs))
        if self.name == "policy":
            answer = answers.policy(answer)
        else:
            answer = answers.checked(self.name, answer, inputs[0])
        if torch.is_grad_enabled() and any(value.requires_grad for value in inputs):
            return self._differentiable(answer, inputs, kwargs.get("cond"))
        return answer

    # --- inputs ---

    def _unchanged(self, inputs: list[Tensor], cond: Any, call: Callable[[], Any]) -> Any:
        """The answer; ValueError where an input is no longer what it was."""
        watched = [*inputs, *_tensors(cond)]
        versions = [value._version for value in watched]
        # the first time by value: `.data` and numpy leave no trace
        before = [own_copy(value) for value in watched] if self.first else []
        try:
            answer = call()
        except RuntimeError as error:
            if any(value.requires_grad for value in inputs) and _is_about_in_place(error):
                raise self._changed() from error
            raise
        if versions != [value._version for value in watched]:
            raise self._changed()
        if before and not _all_equal(before, watched):
            raise self._changed()
        self.first = False
        return answer

    def _changed(self) -> ValueError:
        return ValueError(
            f"the model's {self.name} changes its input in place: work on a copy (x = x - 0.1, not x -= 0.1)"
        )

    # --- graph ---

    def _differentiable(self, answer: Any, inputs: list[Tensor], cond: Any) -> Any:
        if self.name == "policy":
            self._look_at_policy(answer, inputs, cond)
            return answer
        if not isinstance(answer, tuple):
            return self._looked_at(answer, inputs, cond, None)
        return tuple(self._looked_at(part, inputs, cond, index) for index, part in enumerate(answer))

    def _looked_at(self, value: Tensor, inputs: list[Tensor], cond: Any, index: int | None) -> Tensor:
        """The value, which raises where a derivative is taken through it that would silently be zero."""
        what = self.name if index is None else f"{self.name} ({answers.PAIRS[self.name][index]})"
        needed = [one for one in inputs if one.requires_grad]
        look = _Look(self, inputs, cond, lambda found: found if index is None else found[index])
        if not value.requires_grad or (what not in self.looked and not graph.reaches(value, needed)):
            message = graph.cut_message(what) if look.depends(value) else None
        elif self._has_a_gap(value, look, what):
            message = graph.cut_message(what, part=True)
        else:
            return value
        if message is None:
            return value
        cut: Tensor = graph.Cut.apply(message, value, *needed)  # type: ignore[no-untyped-call]
        return cut

    def _has_a_gap(self, value: Tensor, look: _Look, what: str) -> bool:
        """Whether a part of the value is cut off."""
        if what in self.looked:
            return False
        whole, moved = True, True
        if (self.original, self.name, what) not in graph.KNOWN and graph.has_missing_edge(value):
            whole, moved = look.agrees()
            if whole and moved:
                graph.KNOWN.add(self.original, self.name, what)
        self.tries += 1
        if moved or self.tries >= graph.TRIES:
            self.looked.add(what)
        return not whole

    def _look_at_policy(self, policy: Any, inputs: list[Tensor], cond: Any) -> None:
        """ValueError where the policy depends on the point that it was made at, and its graph does not say so."""
        if "policy" in self.looked or (self.original, "policy", "policy") in graph.KNOWN:
            return
        x, t, s = (value.detach() for value in inputs)
        middle = (t + s) / 2
        with self.counts.kept():
            value = policy.velocity(x, middle)
        look = _Look(
            self, inputs, cond, lambda found, rows: found.velocity(x[rows], middle[rows]), by_rows=True
        )
        needed = [one for one in inputs if one.requires_grad]
        if graph.reaches(value, needed):
            if self._has_a_gap(value, look, "policy"):
                raise ValueError(graph.cut_message("policy", part=True))
        elif look.depends(value):
            raise ValueError(graph.cut_message("policy"))
        self.looked.add("policy")


class _Look:
    """A few rows of one call, put to the model once more; the counts are left as they were."""

    def __init__(
        self,
        call: _Call,
        inputs: list[Tensor],
        cond: Any,
        pick: Callable[..., Tensor],
        *,
        by_rows: bool = False,
    ) -> None:
        self.call, self.inputs, self.whole_cond, self.pick, self.by_rows = call, inputs, cond, pick, by_rows
        self.wanted = [value.requires_grad for value in inputs]

    @cached_property
    def rows(self) -> Tensor:
        """The first rows that have the times of row 0; most answers are never looked at."""
        return _rows_of_one_time(self.inputs)

    @cached_property
    def some(self) -> list[Tensor]:
        """Those rows of the inputs."""
        return [value[self.rows] for value in self.inputs]

    @cached_property
    def cond(self) -> Any:
        """Those rows of the condition."""
        return answers.mapped(self.whole_cond, lambda value: value[self.rows])

    def depends(self, value: Tensor) -> bool:
        """Whether the answer moves with the inputs whose gradient is wanted."""
        with self.call.counts.kept():
            try:
                return graph.depends(self._ask, self.some, self.wanted)
            except Exception:  # a network of one fixed batch size, say: then rows of one time are compared
                some = value.detach()[self.rows]
                return not bool(_equal(some, some[:1]).all())

    def agrees(self) -> tuple[bool, bool]:
        """Whether products are the answer's own differences, and whether every number of it moved."""
        with self.call.counts.kept():
            try:
                return graph.agrees(self._ask, self.some, self.wanted)
            except Exception:  # as above
                return True, False

    def _ask(self, inputs: Sequence[Tensor]) -> Tensor:
        answer = getattr(self.call.stand_in, self.call.name)(*inputs, cond=self.cond)
        found = self.pick(answer, self.rows) if self.by_rows else self.pick(answer)
        return found.clone() if found.is_inference() else found


def _rows_of_one_time(inputs: list[Tensor]) -> Tensor:
    same = torch.ones(len(inputs[0]), dtype=torch.bool, device=inputs[0].device)
    for times in inputs[1:]:
        same &= _equal(times.detach(), times.detach()[0])
    return same.nonzero()[: graph.ROWS, 0]


def _in_parts(call: _Call) -> Callable[..., Any]:
    """The method, asked for the rows of one time after those of another."""

    def parts(x: Tensor, *times: Tensor, cond: Any = None) -> Any:
        if not times or torch._C._are_functorch_transforms_active():
            return call(x, *times, cond=cond)
        _, which = torch.unique(torch.stack([t.detach() for t in times], 1), dim=0, return_inverse=True)
        groups = [(which == k).nonzero()[:, 0] for k in range(int(which.max()) + 1)]
        if len(groups) == 1:
            return call(x, *times, cond=cond)
        if call.name == "policy":
            raise ValueError("a policy is asked for one time a call, since the model has scalar_time = True")
        found = [
            call(x[rows], *(t[rows] for t in times), cond=answers.mapped(cond, itemgetter(rows)))
            for rows in groups
        ]
        order = torch.cat(groups).argsort()
        if isinstance(found[0], tuple):
            return tuple(torch.cat(pieces)[order] for pieces in zip(*found, strict=True))
        return torch.cat(found)[order]

    parts.__name__ = call.name
    return parts


def _tensors(cond: Any) -> list[Tensor]:
    values = cond.values() if isinstance(cond, dict) else [cond]
    return [value for value in values if isinstance(value, Tensor)]


def _all_equal(before: list[Tensor], now: list[Tensor]) -> bool:
    """Whether they are the same, number by number; where numbers lie on a device, the host waits once."""
    pairs = list(zip(before, now, strict=True))
    if all(new.is_cpu and torch.equal(old, new) for old, new in pairs):
        return True
    return bool(torch.stack([_equal(old, new).all() for old, new in pairs]).all())


def _equal(first: Tensor, second: Tensor) -> Tensor:
    """Element by element; what is not a number equals everything."""
    return (first == second) | (first != first)


def _is_about_in_place(error: RuntimeError) -> bool:
    return any(words in str(error) for words in _IN_PLACE)
