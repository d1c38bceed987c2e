"""The U-Net of images as a field, a joint map and a policy."""

from __future__ import annotations

import functools

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
