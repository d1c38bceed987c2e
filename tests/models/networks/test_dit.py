"""The transformer of images as a field, a joint map and a policy."""

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
    points,
    stirred,
)

from flowlik_models.networks.attention import fuse_attention
from flowlik_models.networks.dit import DiT, JointFlowMapDiT

TINY = {"width": 16, "depth": 2, "heads": 2, "patch": 4, "hidden": 4, "embed": 16}
field, joint = functools.partial(DiT, **TINY), functools.partial(JointFlowMapDiT, **TINY)


def test_outputs_have_the_shape_of_what_they_are() -> None:
    check_shapes(field, joint)


def test_untrained_map_is_the_gaussian_one() -> None:
    check_untrained_is_gaussian(joint)


def test_divergence_head_is_a_twentieth_at_most() -> None:
    check_head_share(JointFlowMapDiT((1, 28, 28)))


def test_layouts_and_precisions_agree() -> None:
    check_layouts(joint)


def test_forward_mode_passes_attention() -> None:
    check_forward_mode(joint)


def test_policy_starts_from_a_field() -> None:
    check_policy("dit", field, TINY)


def test_fused_attention_gives_the_same_values() -> None:
    network = stirred(field((1, 28, 28)))
    x, t, _ = points((1, 28, 28))
    with torch.no_grad():
        written_out = network.velocity(x, t)
        fuse_attention(network, True)
        torch.testing.assert_close(network.velocity(x, t), written_out, atol=1e-5, rtol=1e-4)


def test_patches_that_do_not_tile_and_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="patches of 4x4 do not tile a 30x30 image"):
        field((1, 30, 30))
    with pytest.raises(ValueError, match="3 heads do not divide a width of 16"):
        field((1, 28, 28), heads=3)
