"""Group norm with SiLU: the path for bfloat16 on a CPU against torch's own layers, values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flowlik_models.networks import norm
from flowlik_models.networks.norm import GroupNorm, group_norm


def layer(channels: int) -> GroupNorm:
    generator = torch.Generator().manual_seed(1)
    found = group_norm(channels)
    with torch.no_grad():
        found.weight.copy_(1 + 0.3 * torch.randn(channels, generator=generator))
        found.bias.copy_(0.3 * torch.randn(channels, generator=generator))
    return found


def written_out(found: GroupNorm, x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    y = F.group_norm(x, found.num_groups, found.weight.to(x), found.bias.to(x), found.eps)
    if scale is not None and shift is not None:
        y = y * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    return F.silu(y)


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("channels", [24, 32])
def test_the_written_function_and_its_gradients(
    channels: int, modulated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, where nothing hides behind rounding."""
    monkeypatch.setattr(norm, "_is_slow", lambda x: True)
    generator = torch.Generator().manual_seed(0)
    found = layer(channels)
    x = 2 + 3 * torch.randn(4, channels, 6, 5, generator=generator)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    change = [torch.randn(4, channels, generator=generator, requires_grad=True) for _ in range(2)]
    scale, shift = change if modulated else (None, None)
    g = torch.randn(x.shape, generator=generator)
    inputs = [x, found.weight, found.bias, *(change if modulated else [])]
    got, wanted = found.activated(x, scale, shift), written_out(found, x, scale, shift)
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got, wanted, atol=2e-6, rtol=1e-5)
    pairs = zip(torch.autograd.grad(got, inputs, g), torch.autograd.grad(wanted, inputs, g), strict=True)
    for ours, theirs in pairs:
        assert (ours - theirs).abs().max() < 3e-6 * theirs.abs().max()


def test_in_bfloat16_it_is_as_near_the_truth_as_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    found = layer(32)
    exact = torch.randn(8, 32, 14, 14, generator=generator).to(memory_format=torch.channels_last)
    scale, shift = 0.3 * torch.randn(2, 8, 32, generator=generator)
    x, half = exact.bfloat16(), torch.bfloat16
    assert norm._is_slow(x)
    truth = written_out(found, x.float(), scale, shift)
    ours = found.activated(x, scale.to(half), shift.to(half)).float()
    theirs = written_out(found, x, scale.to(half), shift.to(half)).float()
    assert (ours - truth).square().mean() < (theirs - truth).square().mean()


def test_other_layouts_types_and_forward_mode_take_torchs_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm._NormSiLU, "apply", lambda *_: pytest.fail("not there"))
    found, x = layer(32).bfloat16(), torch.randn(2, 32, 4, 4)
    layer(32).activated(x.to(memory_format=torch.channels_last))
    found.activated(x.bfloat16())
    y = x.bfloat16().to(memory_format=torch.channels_last)
    _, slope = torch.func.jvp(found.activated, (y,), (torch.ones_like(y),))
    assert slope.isfinite().all()
