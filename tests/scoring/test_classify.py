"""The class by Bayes' rule, on a conditional mixture whose posterior is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import flowlik
from flowlik_models.closed_forms.mixture import GaussianMixture


class Conditional(nn.Module):
    """Class c is a mixture of two Gaussians of its own."""

    event_shape = (2,)

    def __init__(self) -> None:
        super().__init__()
        half, stds, axes = torch.full((2,), 0.5), torch.full((2, 2), 0.7), torch.eye(2).expand(2, 2, 2)
        means = 1.5 * torch.tensor(
            [[[-1.0, 0.0], [1.0, 0.0]], [[0.0, -1.0], [0.0, 1.0]], [[1.0, 1.0], [2.0, 2.0]]]
        )
        self.classes = nn.ModuleList(GaussianMixture(half, each, stds, axes) for each in means)

    def velocity(self, x: Tensor, t: Tensor, *, cond: Tensor) -> Tensor:
        every = torch.stack([each.velocity(x, t) for each in self.classes])
        return every[cond, torch.arange(len(x))]

    def posterior(self, x: Tensor, prior: Tensor) -> Tensor:
        joint = torch.stack([each.log_prob(x) for each in self.classes], 1)
        return (joint + prior.log()).softmax(1)


MODEL = Conditional()
X = torch.cat(
    [each.sample(40, generator=torch.Generator().manual_seed(k)) for k, each in enumerate(MODEL.classes)]
)


@pytest.mark.parametrize("prior", [None, (1.0, 2.0, 5.0)])
def test_the_posterior_is_that_of_the_closed_form(prior: tuple[float, ...] | None) -> None:
    found = flowlik.classify(MODEL, X.double(), [0, 1, 2], estimator="ode[solver=rk4,steps=24]", prior=prior)
    truth = MODEL.posterior(X.double(), torch.tensor(prior or (1.0, 1.0, 1.0)).double()).numpy()
    assert np.abs(found.posterior - truth).max() < 1e-3
    assert (found.label == truth.argmax(1)).mean() > 0.99
    assert found.nfe == 3 * (3 * 4 * 24)  # three classes, and three networks in every evaluation
    assert found.valid.all()


def test_batches_change_nothing_and_classes_share_their_probes() -> None:
    spec = "ode[solver=euler,steps=4,trace=hutchinson]"
    one = flowlik.classify(MODEL, X, [2, 0], estimator=spec)
    other = flowlik.classify(MODEL, X, [0, 2], estimator=spec, batch_size=7)
    np.testing.assert_allclose(one.log_prob, other.log_prob[:, ::-1], atol=1e-4)
    again = flowlik.classify(MODEL, X, [2, 0], estimator=spec, seed=1)
    assert np.abs(one.log_prob - again.log_prob).max() > 1e-2


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "outside": (lambda: flowlik.classify(MODEL, X, [0, 3]), "knows no class 3"),
    "empty": (lambda: flowlik.classify(MODEL, X[:0], [0, 1]), "x has no rows"),
    "floats": (lambda: flowlik.classify(MODEL, X, [0.5, 1.5]), "expected whole numbers"),  # type: ignore[list-item]
    "words": (lambda: flowlik.classify(MODEL, X, ["0", "1"]), "expected whole numbers"),  # type: ignore[list-item]
    "one": (lambda: flowlik.classify(MODEL, X, [1]), "two or more different labels"),
    "prior": (lambda: flowlik.classify(MODEL, X, [0, 1], prior=[1.0, 0.0]), "2 numbers above 0"),
    "refused": (lambda: flowlik.classify(MODEL, X, [0, 1], estimator="f2d2"), "joint flow map"),
    "several": (lambda: flowlik.classify(MODEL, X, [0, 1], estimator="f2d2[steps=1|2]"), "names 2"),
    "name": (lambda: flowlik.classify(MODEL, X, [0, 1], estimator="odd"), "unknown estimator 'odd'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case: str) -> None:
    call, words = BAD[case]
    with pytest.raises(ValueError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_an_item_without_a_value_has_no_class() -> None:
    class Broken(Conditional):
        def velocity(self, x: Tensor, t: Tensor, *, cond: Tensor) -> Tensor:
            return super().velocity(x, t, cond=cond) / (x[:, :1] < 1e3)

    x = X[:3].clone()
    x[1] = 1e4
    found = flowlik.classify(Broken(), x, [0, 1], estimator="ode[solver=euler,steps=2]")
    assert found.valid.tolist() == [True, False, True]
    assert (found.label[1], np.isnan(found.posterior[1]).all()) == (-1, True)


def test_a_model_that_makes_no_use_of_its_condition_is_named_and_gives_no_classes() -> None:
    mixture = MODEL.classes[0]
    with pytest.raises(ValueError, match="answers every class alike"):
        flowlik.classify(mixture, X[:2], [0, 1], estimator="ode[solver=euler,steps=1]")


@pytest.mark.parametrize(
    ("given", "said"),
    [({"batch_size": 0}, "batch_size=0"), ({"prior": {0: 1}}, "prior="), ({"classes": 3}, "classes=3")],
)
def test_misuse_of_classes_batches_and_priors_is_named(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"classify: {said}.*expected"):
        flowlik.classify(MODEL, X[:2], **{"classes": [0, 1], **given})
