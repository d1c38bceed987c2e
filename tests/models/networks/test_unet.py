"""The U-Net of images as a field, a joint map and a policy."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from network_checks import (
    check_forward_mode,
    check_head_share,
    check_layouts,
    check_policy,
    check_shapes,
    check_untrained_is_gaussian,
    stirred,
)

from flowlik_models.networks.images import cosine_basis
from flowlik_models.networks.policy import PolicyImages
from flowlik_models.networks.unet import AttentionBlock, JointFlowMapUNet, UNet
from flowlik_models.recipes.table import RECIPES
from flowlik_models.zoo import build

TINY = {"widths": (8, 8, 16), "embed": 16, "dropout": 0.0}
field, joint = functools.partial(UNet, **TINY), functools.partial(JointFlowMapUNet, **TINY)


def test_outputs_have_the_shape_of_what_they_are() -> None:
    check_shapes(field, joint)


def test_untrained_map_is_the_gaussian_one() -> None:
    check_untrained_is_gaussian(joint)


@pytest.mark.parametrize("task", ["digits", "fashion-mnist", "cifar10"])
def test_divergence_head_is_a_twentieth_at_most(task: str) -> None:
    check_head_share(build(task, RECIPES[task]["meanflow-f2d2"]))


def test_layouts_and_precisions_agree() -> None:
    check_layouts(functools.partial(joint, attention=(7,)))


def test_forward_mode_passes_attention() -> None:
    check_forward_mode(functools.partial(joint, attention=(14, 7), head=8))


def test_policy_starts_from_a_field() -> None:
    check_policy("unet", field, TINY)


def test_attention_starts_as_the_identity_and_knows_no_places() -> None:
    block = AttentionBlock(8, head=4)
    h = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(block(h), h)
    stirred(block)
    with torch.no_grad():
        turned = block(h.flip(2, 3)).flip(2, 3)
        torch.testing.assert_close(turned, block(h))
        assert float((block(h) - h).abs().max()) > 0.01


def test_images_that_cannot_be_halved_or_attended_to_are_refused() -> None:
    with pytest.raises(ValueError, match="30x30 image cannot be halved 2 times"):
        field((1, 30, 30))
    with pytest.raises(
        ValueError, match=r"no resolution of height 10 for attention \(valid: \[28, 14, 7\]\)"
    ):
        field((1, 28, 28), attention=(10,))


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 6, 10), (3, 4, 12), (3, 16, 8)])
def test_cosines_axis_by_axis_are_the_dense_basis(shape: tuple[int, int, int]) -> None:
    dim = math.prod(shape)
    generator = torch.Generator().manual_seed(0)
    spectrum = 10 * torch.arange(1, dim + 1) ** -1.5 + 5e-6
    moments = torch.randn(dim, generator=generator), spectrum, cosine_basis(shape)
    quick, dense = (
        JointFlowMapUNet(shape, widths=(4, 8), moments=moments, basis=basis) for basis in ("cosine", "stored")
    )
    assert set(dense.state_dict()) - set(quick.state_dict()) == {"eigenvectors"}
    quick.load_state_dict({n: v for n, v in dense.state_dict().items() if n != "eigenvectors"})
    point = torch.randn(5, *shape, generator=generator)
    times = torch.tensor([[0.0, 0.3, 0.9, 1.0, 1.0], [0.4, 0.3, 1.0, 0.0, 0.99]])
    for dtype in (torch.float32, torch.float64):
        parts = []
        for network in (quick, dense):
            network.to(dtype)
            parts.append((*network._gaussian(point.to(dtype), *times.to(dtype)), network.variance))
        for ours, expected in zip(*parts, strict=True):
            assert ours.shape == expected.shape
            assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()


def test_small_models_of_colour_images_build_on_each_other() -> None:
    small = {model: recipe for model, recipe in RECIPES["cifar10"].items() if model.endswith("-small")}
    assert len(small) == 7
    for model, recipe in small.items():
        if recipe.start_from is None:
            assert model == "teacher-small"
            continue
        assert recipe.teacher == "teacher-small"
        network, start = build("cifar10", recipe), build("cifar10", small[recipe.start_from])
        tensors = start.state_dict()
        if isinstance(network, PolicyImages):
            tensors = network.adopted(tensors)
        missing, unexpected = network.load_state_dict(tensors, strict=False)
        assert not unexpected
        assert len(missing) < len(tensors)
