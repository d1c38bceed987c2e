"""What every network of images has to keep, whatever its backbone: one test module a backbone calls these."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flowlik_models.closed_forms.gaussian import Gaussian
from flowlik_models.networks.images import cosine_basis
from flowlik_models.networks.policy import PolicyHead, PolicyImages

SHAPES = ((1, 28, 28), (3, 32, 32))
BATCH = 3
Moments = tuple[Tensor, Tensor, Tensor]


def moments_of(shape: tuple[int, ...]) -> Moments:
    """A Gaussian with the spectrum of images along cosines."""
    dim = torch.Size(shape).numel()
    generator = torch.Generator().manual_seed(0)
    mean = 0.3 * torch.randn(dim, generator=generator)
    values = 10.0 * (1 + torch.arange(dim)) ** -1.5 + 5e-6
    return mean, values, cosine_basis(shape).float()


def points(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, *shape, generator=generator)
    return x, torch.tensor([0.2, 0.7, 1.0]), torch.tensor([0.9, 0.1, 0.0])


def stirred(network: nn.Module) -> nn.Module:
    """The network off its zero initialisation."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


def check_shapes(field: Any, joint: Any) -> None:
    """Velocity shaped like x; u like x and D one number an image; the diagonal is the velocity."""
    for shape in SHAPES:
        x, t, s = points(shape)
        with torch.no_grad():
            assert stirred(field(shape)).velocity(x, t).shape == x.shape
            network = stirred(joint(shape))
            u, divergence = network.joint(x, t, s)
            assert u.shape == x.shape
            assert divergence.shape == (BATCH,)
            torch.testing.assert_close(u, network.average_velocity(x, t, s))
            torch.testing.assert_close(network.velocity(x, t), network.joint(x, t, t)[0])


def check_untrained_is_gaussian(joint: Any) -> None:
    """Zero-initialised heads leave the exact joint map of the Gaussian with the data's moments."""
    for shape in SHAPES:
        moments = moments_of(shape)
        exact = Gaussian.from_eigen(*moments)
        x, t, s = points(shape)
        with torch.no_grad():
            u, divergence = joint(shape, moments=moments).joint(x, t, s)
            expected = exact.joint(x.flatten(1), t, s)
        torch.testing.assert_close(u.flatten(1), expected[0], atol=2e-3, rtol=1e-3)
        torch.testing.assert_close(divergence, expected[1], atol=1e-2, rtol=1e-4)


def check_head_share(network: Any) -> None:
    """The divergence head has at most a twentieth of the backbone's parameters."""
    head = sum(parameter.numel() for parameter in network.divergence_head())
    backbone = sum(parameter.numel() for parameter in network.parameters()) - head
    assert 0 < head <= 0.05 * backbone


def check_layouts(joint: Any) -> None:
    """Channels-last gives the same values; bfloat16 runs, forward and backward, and stays near them."""
    shape = SHAPES[0]
    network = stirred(joint(shape, moments=moments_of(shape)))
    x, t, s = points(shape)
    expected = [part.detach() for part in network.joint(x, t, s)]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = network.joint(x, t, s)
        torch.autograd.backward(mixed[0].square().mean() + mixed[1].mean())
    assert all(bool(torch.isfinite(p.grad).all()) for p in network.parameters() if p.grad is not None)
    network = network.to(memory_format=torch.channels_last)
    with torch.no_grad():
        for found, rough, value in zip(network.joint(x, t, s), mixed, expected, strict=True):
            scale = float(value.abs().mean())
            torch.testing.assert_close(found, value, atol=1e-4 * scale, rtol=1e-4)
            assert float((rough.float() - value).abs().mean()) < 0.05 * scale


def check_forward_mode(joint: Any) -> None:
    """The derivative along the path in forward mode is that of differences."""
    shape = SHAPES[0]
    network = stirred(joint(shape)).double().to(memory_format=torch.channels_last)
    x, t, s = (part.double() for part in points(shape))
    t = 0.8 * t
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        tangents = (v, torch.ones_like(t))
        slopes = torch.func.jvp(lambda x, t: network.joint(x, t, s), (x, t), tangents)[1]
        h = 1e-5
        ahead, behind = (network.joint(x + k * v, t + k, s) for k in (h, -h))
        for slope, a, b in zip(slopes, ahead, behind, strict=True):
            torch.testing.assert_close(
                slope, (a - b) / (2 * h), rtol=1e-4, atol=1e-5 * float(slope.abs().max())
            )


def check_policy(kind: str, field: Any, options: dict[str, Any]) -> None:
    """A mixture a pixel, from a network that starts from a velocity field's weights and at its guess of the image."""
    for shape in SHAPES:
        moments = moments_of(shape)
        teacher = stirred(field(shape, moments=moments))
        head = PolicyHead(components=4, layout="position")
        network = PolicyImages(shape, head=head, segments=(2,), kind=kind, moments=moments, **options)
        network.load_state_dict({**network.state_dict(), **network.adopted(teacher.state_dict())})
        x, t, s = points(shape)
        policy = network.eval().policy(x, t, s)
        assert policy.log_weights.shape == (BATCH, shape[1] * shape[2], 4)
        velocity, divergence = policy.velocity_and_divergence(x, 0.9 * t)
        assert velocity.shape == x.shape
        assert divergence.shape == (BATCH,)
