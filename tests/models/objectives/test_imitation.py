"""Imitation distillation: what the loss compares, where its points come from, and that it learns policies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from interruption import train_interrupted
from torch import Tensor, nn

from flowlik_estimators import get
from flowlik_models.checkpoints import read_checkpoint
from flowlik_models.closed_forms.catalogue import closed_form
from flowlik_models.closed_forms.policies import MixturePolicy, Positions
from flowlik_models.images import CATALOG
from flowlik_models.networks.policy import PolicyHead, PolicyImages, VectorPolicy
from flowlik_models.objectives.imitation import Imitation, imitation_loss, segment_ends
from flowlik_models.recipes.recipe import Recipe
from flowlik_models.recipes.table import RECIPES
from flowlik_models.training import preparation
from flowlik_models.training.trainer import train
from flowlik_models.zoo import build, load_model, recipe_for

TRUTH = closed_form("gmm-2d")


class Posterior(nn.Module):
    """The true posterior as policy, its log-variance off by ``wrong``; notes where it is asked."""

    def __init__(self, wrong: float = 0.0) -> None:
        super().__init__()
        self.event_shape = (2,)
        self.wrong = nn.Parameter(torch.tensor(wrong, dtype=torch.float64))
        self.asked: list[tuple[Tensor, Tensor, Tensor]] = []

    def policy(self, x: Tensor, t: Tensor, s: Tensor, *, cond: Tensor | None = None) -> MixturePolicy:
        self.asked.append((x, t, s))
        variances = TRUTH.stds[:, 0].square() * self.wrong.exp()
        return MixturePolicy(
            Positions((2,), "whole"),
            TRUTH.weights.log().expand(len(x), 1, -1),
            TRUTH.means.expand(len(x), 1, -1, -1),
            variances.expand(len(x), 1, -1),
        )


def loss_of(network: Any, n: int = 64, seed: int = 0, **options: Any) -> Tensor:
    imitation = Imitation(**{"dropout": 0.0, "noise_end": 0.5, **options})
    generator = torch.Generator().manual_seed(seed)
    t, s = (ends.double() for ends in segment_ends(n, 1.0, imitation, generator))
    x = t[:, None] * TRUTH.sample(n, generator=generator, dtype=torch.float64)
    x = x + (1 - t[:, None]) * torch.randn(n, 2, generator=generator, dtype=torch.float64)
    return imitation_loss(network, x, t, s, TRUTH.velocity_and_divergence, imitation, generator)


@pytest.mark.parametrize("data_free", [False, True])
def test_true_posterior_has_no_loss_and_a_wrong_one_has(data_free: bool) -> None:
    options: dict[str, Any] = {"data_free": data_free, "divergence": 1.0, "segments": (1, 2)}
    assert float(loss_of(Posterior(), **options).detach()) < 1e-20
    assert float(loss_of(Posterior(0.5), **options).detach()) > 1e-4


def test_divergence_is_matched_only_where_it_has_a_weight() -> None:
    without, with_it = (loss_of(Posterior(0.5), divergence=weight) for weight in (0.0, 1.0))
    assert float(with_it.detach()) > float(without.detach())


def test_gradient_does_not_pass_through_the_path_of_the_policy() -> None:
    """The gradient is the slope of the loss when only the compared velocity moves and the path stays."""
    network, step = Posterior(0.5), 1e-5
    (found,) = torch.autograd.grad(loss_of(network, spread=0.0), network.wrong)
    ahead, behind = (loss_of(_Halves(0.5 + h), spread=0.0).detach() for h in (step, -step))
    assert float(found) == pytest.approx(float(ahead - behind) / (2 * step), rel=1e-4)


class _Halves(Posterior):
    """The path follows the policy at 0.5, the velocity that is compared the one at ``wrong``."""

    def policy(self, x: Tensor, t: Tensor, s: Tensor, *, cond: Tensor | None = None) -> Any:
        return _Split(Posterior(0.5).policy(x, t, s), super().policy(x, t, s))


class _Split:
    """A policy whose path and whose compared velocity belong to different parameters."""

    def __init__(self, path: MixturePolicy, compared: MixturePolicy) -> None:
        self.path, self.compared = path, compared

    def thinned(self, share: float, generator: torch.Generator) -> _Split:
        return self

    def detached(self) -> MixturePolicy:
        return self.path.detached()

    def rows(self, index: Tensor) -> MixturePolicy:
        return self.compared.rows(index)


def test_segments_are_anchored_at_either_end_and_meet() -> None:
    imitation = Imitation(segments=(1, 4), noise_end=0.25)
    t, s = segment_ends(4000, 1.0, imitation, torch.Generator().manual_seed(0))
    assert float((t < s).float().mean()) == pytest.approx(0.25, abs=0.03)
    lengths = (t - s).abs() / 0.999
    assert {round(float(length), 4) for length in lengths.unique()} == {1.0, 0.25}
    edges = {round(float(v) / 0.999, 4) for v in torch.cat((t, s)).unique()}
    assert edges == {0.0, 0.25, 0.5, 0.75, 1.0}


def test_data_free_anchors_come_from_the_noise_by_the_policies_themselves() -> None:
    network = Posterior()
    with torch.no_grad():
        loss_of(network, n=2000, data_free=True, segments=(2,))
    x, t, _ = network.asked[-1]
    for time in t.unique():
        here = x[t == time]
        expected = TRUTH.sample(2000, generator=torch.Generator().manual_seed(1), t=float(time))
        assert float((here.norm(dim=1).mean() - expected.norm(dim=1).mean()).abs()) < 0.08


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segments": ()}, "segments must be numbers"),
        ({"matches": 0}, "at least 1"),
        ({"dropout": 1.0}, "dropout is a share below 1"),
        ({"head": PolicyHead(kind="predictions", components=4), "divergence": 1.0}, "only mixtures"),
    ],
)
def test_options_that_do_not_fit_are_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Imitation(**options)
    with pytest.raises(ValueError, match="need each other"):
        Recipe(objective="imitation")
    with pytest.raises(ValueError, match="divergence must say"):
        Recipe(objective="imitation", imitation=Imitation(divergence=1.0))


# --- networks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["whole", "position"])
@pytest.mark.parametrize("variance", ["component", "shared"])
@pytest.mark.parametrize("anchored", [False, True])
def test_untrained_network_gives_policies_that_can_be_followed(
    layout: str, variance: str, anchored: bool
) -> None:
    head = PolicyHead(components=5, layout=layout, variance=variance, anchored=anchored)  # type: ignore[arg-type]
    made = VectorPolicy(
        torch.zeros(3), torch.tensor([0.5, 1.0, 2.0]), torch.eye(3), head=head, segments=(1, 2)
    )
    x = torch.randn(20, 3)
    for segments in (1, 2):
        out = get("pi-flow", segments=segments).log_prob(made, x)
        assert out.status == "ok"
        assert bool(out.valid.all())


def test_images_have_policies_that_start_from_a_field(tmp_path: Path) -> None:
    recipe = recipe_for("digits", "pi-flow-4")
    network = build("digits", recipe)
    assert isinstance(network, PolicyImages)
    preparation._start(network, "digits", recipe, tmp_path)
    teacher = load_model("digits", "teacher")
    x, t = torch.randn(3, 1, 8, 8), torch.full((3,), 0.5)
    found = network.backbone.velocity(x, t)
    torch.testing.assert_close(found, teacher.velocity(x, t), rtol=1e-4, atol=1e-4)  # type: ignore[operator]
    out = get("pi-flow", segments=4).log_prob(network, x)
    assert (out.status, out.cost.forwards) == ("ok", 4)


def test_interrupted_training_of_policies_resumes_to_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_for("gmm-2d", "pi-flow").with_options(batch=16)
    monkeypatch.setitem(RECIPES["gmm-2d"], "pi-flow", recipe)
    whole = train("gmm-2d", "pi-flow", out=tmp_path / "whole", steps=8)
    cut = tmp_path / "cut"
    resumed = train_interrupted("gmm-2d", "pi-flow", cut, steps=8, after=5, monkeypatch=monkeypatch)
    expected, found = (read_checkpoint(path)[0] for path in (whole, resumed))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    back = load_model("gmm-2d", "pi-flow", path=resumed)
    assert get("pi-flow").log_prob(back, torch.randn(4, 2)).status == "ok"


def test_every_recipe_of_policies_takes_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for task, models in RECIPES.items():
        for model, recipe in models.items():
            if recipe.imitation is not None and task not in CATALOG:  # those of files: test_image_training
                small = recipe.with_options(batch=8, pool=0, pool_share=0.0)
                monkeypatch.setitem(models, model, small)
                made = train(task, model, out=tmp_path, steps=1)
                assert all(bool(torch.isfinite(v).all()) for v in read_checkpoint(made)[0].values()), model
