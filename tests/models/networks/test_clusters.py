"""The mixture base: exact where it claims to be, and never needed to know the true number of components."""

from __future__ import annotations

import torch

from flowlik_models.closed_forms.catalogue import closed_form
from flowlik_models.closed_forms.gaussian import Gaussian
from flowlik_models.networks.clusters import ClusterMap
from flowlik_models.networks.vector import VectorFlowMap


def filled(task: str) -> ClusterMap:
    """A base with the true components of a task's mixture."""
    truth = closed_form(task)
    made = ClusterMap(*truth.means.shape).double()
    made.weights.copy_(truth.weights)
    made.means.copy_(truth.means)
    made.eigenvalues.copy_(truth.stds.square())
    made.eigenvectors.copy_(truth.rotations)
    return made


def test_velocity_of_the_true_mixture_is_exact_on_the_diagonal() -> None:
    truth = closed_form("gmm-2d")
    x = truth.sample(200, generator=torch.Generator().manual_seed(0), t=0.6, dtype=torch.float64)
    t = torch.full((200,), 0.6, dtype=torch.float64)
    u, _, share = filled("gmm-2d")(x, t, t)
    torch.testing.assert_close(u, truth.velocity(x, t))
    torch.testing.assert_close(share, truth.responsibilities(x, 0.6))


def test_one_cluster_is_the_gaussian_map() -> None:
    cov = torch.tensor([[1.3, 0.4], [0.4, 0.3]], dtype=torch.float64)
    mean = torch.tensor([0.5, -1.0], dtype=torch.float64)
    exact = Gaussian(mean, cov)
    base = ClusterMap(1, 2).double()
    base.means.copy_(mean)
    base.eigenvalues.copy_(exact.eigenvalues)
    base.eigenvectors.copy_(exact.eigenvectors)
    x, t, s = torch.randn(50, 2, dtype=torch.float64), torch.rand(50).double(), torch.rand(50).double()
    for found, expected in zip(base(x, t, s)[:2], exact.joint(x, t, s), strict=True):
        torch.testing.assert_close(found, expected)


def test_untrained_network_on_clusters_is_their_map() -> None:
    truth = closed_form("gmm-2d")
    mean, covariance = truth.mean_and_covariance()
    values, vectors = torch.linalg.eigh(covariance)
    network = VectorFlowMap(mean, values, vectors, hidden=8, depth=2, gate_rank=2, clusters=3)
    assert network.clusters is not None
    samples = truth.sample(2000, generator=torch.Generator().manual_seed(0))
    network.clusters.fit(samples)
    assert abs(float(network.clusters.weights.sum()) - 1) < 1e-5
    x, t, s = samples[:50], torch.rand(50), torch.rand(50)
    for found, expected in zip(network.joint(x, t, s), network.clusters(x, t, s)[:2], strict=True):
        torch.testing.assert_close(found, expected)
    again = ClusterMap(3, 2)
    again.fit(samples)
    assert torch.equal(again.means, network.clusters.means)
