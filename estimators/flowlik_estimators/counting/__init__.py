"""Counting network evaluations from outside: no estimator counts for itself.

`counted` wraps a model in a stand-in whose evaluating methods (`METHODS`) count, in rows, the evaluations of its
networks and the derivative products through them, however these are taken (`flowlik_estimators.counting.taps`). A
cost per sample is rows over batch. What `policy` returns is network-free and counted apart: its evaluations are
`policy_calls`.

What counts. Below a call of an evaluating method, modules with parameters are called, directly or by ``.forward``,
whether the model holds them, a list of it, or a function that it calls; and further models by their own evaluating
methods.

- Networks are given the point; layers work on one another's answers. So where no module is given what another one has
  answered, each call counts that is given a tensor made from the point: guidance calls one network twice, or two. A
  network that is given its own answer, as in a step of a solver, counts each time; what is called by an evaluating
  method is a model, whatever it is given, and its answer no layer's.
- Where one module is given the answer of another, they are the layers of one network: the call of the method counts
  once. There only calls by evaluating methods count apart, and those of a part with at least half of the parameters
  that is called more than once and never on its own answers, as where guidance shares an embedding.
- Modules that see no point (embeddings of time or labels) and modules without parameters do not count.
- The same is asked of each network in turn, so that composites of composites count what they call.
- Where nothing is found the call of the method counts once: closed forms, and networks that are the model itself.
  Methods of a model that call each other count once.

A model that names its networks in ``networks`` (attributes, or a collection of networks) has the calls of these
counted, and its own methods that call none of them; ``networks = ()`` says that it is one network itself. That helps
where the rule is wrong: two layers that both are given the point and no third, say, or one network behind another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from flowlik_estimators.counting.cost import Cost as Cost
from flowlik_estimators.counting.cost import Counts as Counts
from flowlik_estimators.counting.evaluations import Evaluations
from flowlik_estimators.counting.networks import METHODS as METHODS
from flowlik_estimators.counting.networks import inner_networks as inner_networks
from flowlik_models.interfaces import CAPABILITIES

POLICY_METHODS = (*CAPABILITIES["velocity"].attributes, *CAPABILITIES["divergence"].attributes)


def offered(model: Any) -> Iterable[str]:
    """Names among which are all evaluating methods of a model: a module that has none of a name takes long to say so.

    >>> from flowlik_models.synthetic import closed_form
    >>> "velocity" in offered(counted(closed_form("gmm-2d"), Counts()))
    True
    """
    if isinstance(model, _Counted):
        return [name for name in METHODS if name in model.__dict__]
    if getattr(type(model), "__getattr__", None) is not nn.Module.__getattr__:
        return METHODS
    kind, own = type(model), model.__dict__
    held = own.keys() | own["_modules"].keys() | own["_parameters"].keys() | own["_buffers"].keys()
    return [name for name in METHODS if name in held or hasattr(kind, name)]


def counted(model: Any, counts: Counts, *, original: Any = None) -> Any:
    """A stand-in for ``model`` that adds its evaluations to ``counts`` and forwards every other attribute.

    ``original``: the model that this one is a copy of, by which what is known of it from earlier calls is found.

    >>> import torch
    >>> from flowlik_models.synthetic import closed_form
    >>> counts = Counts()
    >>> model = counted(closed_form("gmm-2d"), counts)
    >>> model.velocity(torch.zeros(5, 2), torch.full((5,), 0.5)).shape
    torch.Size([5, 2])
    >>> counts.forwards
    5
    """
    return _Counted(model, counts, model if original is None else original)


class _Counted:
    """The stand-in; the networks that a model names in ``networks`` are counted in themselves."""

    def __init__(self, model: Any, counts: Counts, original: Any) -> None:
        self._model, self._counts = model, counts
        evaluations = Evaluations(model, counts, original)
        self._evaluations = evaluations
        for name in offered(model):
            if hasattr(model, name):
                setattr(self, name, _counting(name, getattr(model, name), evaluations))

    def __getattr__(self, name: str) -> Any:
        if name == "_model":  # not yet there while unpickling or copying
            raise AttributeError(name)
        value = getattr(self._model, name)
        return counted(value, self._counts) if name in inner_networks(self._model) else value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._evaluations.call("forward", self._model, args, kwargs)


def _counting(name: str, method: Callable[..., Any], evaluations: Evaluations) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        answer = evaluations.call(name, method, args, kwargs)
        return _CountedPolicy(answer, evaluations.counts) if name == "policy" else answer

    return call


class _CountedPolicy:
    """A policy whose evaluations are counted in rows."""

    def __init__(self, policy: Any, counts: Counts) -> None:
        self._policy = policy
        self._counts = counts

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._policy, name)
        return self._counting(found) if name in POLICY_METHODS else found

    def _counting(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(x: Tensor, t: Tensor) -> Any:
            self._counts.policy_calls += x.shape[0]
            return method(x, t)

        return call
