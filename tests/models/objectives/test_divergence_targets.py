"""Estimates of the divergence that heads are taught: unbiased, and exact where they claim to be."""

from __future__ import annotations

import pytest
import torch
from toy_flows import Linear

from flowlik_models.closed_forms.catalogue import closed_form
from flowlik_models.objectives.divergence_target import DivergenceTarget

MATRIX = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)) / 8
FLOW = Linear(MATRIX, (1, 8, 8))
X = torch.randn(400, 1, 8, 8, generator=torch.Generator().manual_seed(2))


def estimates(target: DivergenceTarget, model: object = FLOW, x: torch.Tensor = X) -> torch.Tensor:
    return target(model, x, torch.full((len(x),), 0.3, dtype=x.dtype), torch.Generator().manual_seed(3))[1]


def test_exact_trace_of_a_linear_field() -> None:
    found = estimates(DivergenceTarget(trace="exact"))
    torch.testing.assert_close(found, MATRIX.trace().expand(400), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("basis", ["pixel", "dct"])
def test_hutchinson_is_unbiased_with_the_variance_of_its_basis(basis: str) -> None:
    found = estimates(DivergenceTarget(basis=basis))  # type: ignore[arg-type]
    assert abs(float(found.mean() - MATRIX.trace())) < 4 * float(found.std()) / 20
    symmetric = (MATRIX + MATRIX.T) / 2
    if basis == "dct":
        from scipy.fft import dctn

        rows = dctn(symmetric.numpy().reshape(64, 8, 8), axes=(1, 2), norm="ortho").reshape(64, 64)
        symmetric = torch.from_numpy(
            dctn(rows.T.reshape(64, 8, 8), axes=(1, 2), norm="ortho").reshape(64, 64)
        )
    variance = 2 * (symmetric.square().sum() - symmetric.diagonal().square().sum())
    assert float(found.var()) == pytest.approx(float(variance), rel=0.3)


def test_probes_are_averaged() -> None:
    one, sixteen = (estimates(DivergenceTarget(probes=k)).var() for k in (1, 16))
    assert float(one / sixteen) == pytest.approx(16, rel=0.4)


def test_gaussian_control_is_exact_on_a_gaussian() -> None:
    gaussian = closed_form("gaussian-2d")
    x = torch.randn(50, 2, dtype=torch.float64)
    found = estimates(DivergenceTarget(control="gaussian"), gaussian, x)
    expected = gaussian.divergence(x, torch.full((50,), 0.3, dtype=torch.float64))
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
    plain = estimates(DivergenceTarget(), gaussian, x)
    assert float((plain - expected).abs().mean()) > 1e-3


def test_fewer_than_one_probe_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one probe"):
        DivergenceTarget(probes=0)
