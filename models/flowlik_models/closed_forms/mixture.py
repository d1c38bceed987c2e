"""Gaussian mixtures with full covariances under the straight path: field, divergence and density in closed form.

Component k at time t is N(t m_k, R_k diag(w_k) R_k^T) with w_k = (1 - t)^2 + t^2 stds_k^2. The mixture's velocity is
the responsibility-weighted mean of the components' (docs/math.md section 1), and its divergence follows from
grad r_k = r_k (g_k - sum_j r_j g_j), g_k the component's score. Cost: three products of a (d, K d) matrix a sample.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flowlik_models.closed_forms.policies import FieldPolicy
from flowlik_models.numerics.standard_normal import LOG_2PI


class GaussianMixture(nn.Module):
    """A mixture of K Gaussians in d dimensions, standard deviations given along each component's own axes.

    ``weights`` (K,), ``means`` (K, d), ``stds`` (K, d), ``rotations`` (K, d, d) whose columns are the axes, all kept in
    float64. Raises ValueError where shapes differ, a weight or a standard deviation is not positive, or the weights do
    not sum to one.

    >>> half, means = torch.full((2,), 0.5), torch.tensor([[-3.0], [3.0]])
    >>> model = GaussianMixture(half, means, torch.ones(2, 1), torch.ones(2, 1, 1))
    >>> model.responsibilities(torch.tensor([[0.0]])).tolist()
    [[0.5, 0.5]]
    >>> [round(value, 3) for value in model.log_prob(torch.tensor([[3.0]])).tolist()]
    [-1.612]
    """

    weights: Tensor
    means: Tensor
    stds: Tensor
    rotations: Tensor

    def __init__(self, weights: Tensor, means: Tensor, stds: Tensor, rotations: Tensor) -> None:
        super().__init__()
        k, d = means.shape
        if weights.shape != (k,) or stds.shape != (k, d) or rotations.shape != (k, d, d):
            raise ValueError("weights, means, stds and rotations must be (K,), (K, d), (K, d) and (K, d, d)")
        if not bool((weights > 0).all()) or not bool((stds > 0).all()):
            raise ValueError("weights and standard deviations must be positive")
        if abs(float(weights.sum()) - 1.0) > 1e-9:
            raise ValueError(f"the weights sum to {float(weights.sum())}, not to 1")
        self.event_shape: tuple[int, ...] = (d,)
        self.eps = 0.0
        self.register_buffer("weights", weights.double())
        self.register_buffer("means", means.double())
        self.register_buffer("stds", stds.double())
        self.register_buffer("rotations", rotations.double())

    def _components(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Coordinates along each component's axes and their variances (batch, K, d); log w_k N_k (batch, K)."""
        k, d = self.means.shape
        rotations, means = self.rotations.to(x), self.means.to(x)
        time = t[:, None, None]
        basis = rotations.permute(1, 0, 2).reshape(d, k * d)
        centre = torch.einsum("kde,kd->ke", rotations, means)
        y = (x @ basis).reshape(-1, k, d) - time * centre
        w = (1 - time).square() + time.square() * self.stds.to(x).square()
        log_joint = self.weights.to(x).log() - 0.5 * (y.square() / w + w.log()).sum(2) - 0.5 * d * LOG_2PI
        return y, w, log_joint

    def _to_ambient(self, y: Tensor) -> Tensor:
        """sum_k R_k y_k, (batch, d)."""
        k, d = self.means.shape
        return y.reshape(-1, k * d) @ self.rotations.to(y).permute(0, 2, 1).reshape(k * d, d)

    def velocity(self, x: Tensor, t: Tensor, *, cond: Tensor | None = None) -> Tensor:
        """The marginal velocity, (batch, d)."""
        y, w, log_joint = self._components(x, t)
        r = _shares(log_joint)
        rate = (t[:, None, None] * self.stds.to(x).square() - (1 - t[:, None, None])) / w
        return r @ self.means.to(x) + self._to_ambient(r[:, :, None] * rate * y)

    def velocity_and_divergence(
        self, x: Tensor, t: Tensor, *, cond: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The marginal velocity (batch, d) and its divergence (batch,)."""
        y, w, log_joint = self._components(x, t)
        r = _shares(log_joint)
        rate = (t[:, None, None] * self.stds.to(x).square() - (1 - t[:, None, None])) / w
        means, rotations = self.means.to(x), self.rotations.to(x)
        velocity = r @ means + self._to_ambient(r[:, :, None] * rate * y)
        score = -y / w
        own = (score * (torch.einsum("kde,kd->ke", rotations, means) + rate * y)).sum(2)
        mean_score = self._to_ambient(r[:, :, None] * score)
        divergence = (r * (rate.sum(2) + own)).sum(1) - (mean_score * velocity).sum(1)
        return velocity, divergence

    def divergence(self, x: Tensor, t: Tensor, *, cond: Tensor | None = None) -> Tensor:
        """Divergence of the marginal velocity, (batch,)."""
        return self.velocity_and_divergence(x, t, cond=cond)[1]

    def policy(self, x: Tensor, t: Tensor, s: Tensor, *, cond: Tensor | None = None) -> FieldPolicy:
        """The exact field as the policy of any segment."""
        return FieldPolicy(self)

    def log_prob(self, x: Tensor, t: float | Tensor = 1.0) -> Tensor:
        """Exact log p_t(x) in nats, (batch,)."""
        time = torch.as_tensor(t, dtype=x.dtype, device=x.device).expand(x.shape[0])
        return self._components(x, time)[2].logsumexp(1)

    def responsibilities(self, x: Tensor, t: float | Tensor = 1.0) -> Tensor:
        """Posterior probability of each component given x_t = x, (batch, K)."""
        time = torch.as_tensor(t, dtype=x.dtype, device=x.device).expand(x.shape[0])
        return _shares(self._components(x, time)[2])

    def sample_with_component(
        self, n: int, *, generator: torch.Generator, t: float = 1.0, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """``n`` draws of p_t (n, d) and the component each came from (n,)."""
        device = self.means.device
        component = torch.multinomial(
            self.weights.to(generator.device), n, replacement=True, generator=generator
        )
        noise = torch.randn(
            (n, *self.event_shape), generator=generator, dtype=torch.float64, device=generator.device
        )
        component, noise = component.to(device), noise.to(device)
        scale = ((1 - t) ** 2 + t**2 * self.stds.square()).sqrt()
        # one component at a time: gathering (n, d, d) rotations would take gigabytes at d = 64
        x = torch.empty_like(noise)
        for k in range(len(self.weights)):
            chosen = component == k
            x[chosen] = t * self.means[k] + (noise[chosen] * scale[k]) @ self.rotations[k].T
        return x.to(dtype), component

    def sample(
        self, n: int, *, generator: torch.Generator, t: float = 1.0, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """``n`` draws of p_t, (n, d)."""
        return self.sample_with_component(n, generator=generator, t=t, dtype=dtype)[0]

    def mean_and_covariance(self) -> tuple[Tensor, Tensor]:
        """Exact moments of the data, (d,) and (d, d), float64."""
        mean = self.weights @ self.means
        axes = self.rotations * self.stds[:, None, :]
        offset = self.means - mean
        within = torch.einsum("k,kde,kfe->df", self.weights, axes, axes)
        return mean, within + torch.einsum("k,kd,ke->de", self.weights, offset, offset)


def _shares(log_joint: Tensor) -> Tensor:
    """Softmax of (batch, K) over the components, none below exp(-80).

    Smaller ones are denormal numbers in float32 near the data, with which a CPU takes twice as long over everything.
    """
    log_shares = (log_joint - log_joint.detach().amax(1, keepdim=True)).clamp(min=-80.0)
    shares = log_shares.exp()
    return shares / shares.sum(1, keepdim=True)
