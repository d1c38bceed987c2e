"""Probe laws, bases and the Gaussian control, against matrices and Gaussians that are known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_flows import Field, Linear, moments_of, points, spd, stable_matrix, with_moments

from flowlik_estimators import get, parse_spec
from flowlik_estimators.divergence.probes import Rotation, coordinates, rotation
from flowlik_models.closed_forms.gaussian import Gaussian
from flowlik_models.numerics.cosine_transform import cosines

CPU, F64 = torch.device("cpu"), torch.float64


def draw(noise: Any, count: int, size: int, items: Tensor, key: int = 3) -> Tensor:
    return coordinates(noise, key, items, count, size, stream=1, dtype=F64, device=CPU)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 4, 6), (1, 5, 3), (3, 7, 1)])
def test_dct_of_any_image_is_orthogonal_and_starts_with_the_constant(shape: tuple[int, ...]) -> None:
    d = math.prod(shape)
    basis = rotation("dct", shape, None, F64, CPU)
    matrix = basis.apply(torch.eye(d, dtype=F64))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(d, dtype=F64), rtol=0, atol=1e-12)
    torch.testing.assert_close(matrix[0], torch.full((d,), d**-0.5, dtype=F64))


def test_dct_probe_has_no_noise_where_the_jacobian_is_diagonal_in_cosines() -> None:
    rates = points(16)
    transform = torch.kron(cosines(4), cosines(4))
    model = Linear(transform.T @ torch.diag(rates) @ transform, (1, 4, 4))
    x = points(5, 1, 4, 4)
    spec = "ode[solver=rk4,steps=4,trace=hutchinson,basis={}]"
    exactly = get("ode", solver="rk4", steps=4).log_prob(model, x).log_prob
    errors = [
        (parse_spec(spec.format(b))[0].log_prob(model, x).log_prob - exactly).abs().max()
        for b in ("dct", "pixel")
    ]
    assert errors[0] < 1e-9
    assert errors[1] > 0.1


@pytest.mark.parametrize("rank", [4, 2])
def test_eigenvector_signs_have_unit_covariance_also_with_few_eigenvectors(rank: int) -> None:
    basis = rotation("pca", (4,), moments_of(spd(4), rank), F64, CPU)
    assert basis.size == (4 if rank == 4 else 6)
    probes = basis.apply(draw("rademacher", 1, basis.size, torch.arange(40_000)))[:, 0]
    second = probes.T @ probes / len(probes)
    torch.testing.assert_close(second, torch.eye(4, dtype=F64), rtol=0, atol=0.03)


@pytest.mark.parametrize("d", [1, 2, 5, 6, 8, 12])
def test_orthogonal_probes_are_orthogonal_and_give_the_trace_at_k_equal_d(d: int) -> None:
    matrix = stable_matrix(d)
    probes = draw("orthogonal", d, d, torch.arange(3))
    torch.testing.assert_close(
        probes @ probes.mT, d * torch.eye(d, dtype=F64).expand(3, d, d), rtol=0, atol=1e-10
    )
    forms = torch.einsum("bki,ij,bkj->bk", probes, matrix, probes)
    torch.testing.assert_close(forms.mean(1), matrix.trace().expand(3))


@pytest.mark.parametrize("d", [6, 8])
def test_each_orthogonal_probe_has_unit_covariance(d: int) -> None:
    probes = draw("orthogonal", 2, d, torch.arange(40_000))
    for k in range(2):
        second = probes[:, k].T @ probes[:, k] / len(probes)
        torch.testing.assert_close(second, torch.eye(d, dtype=F64), rtol=0, atol=0.04)


def test_orthogonal_estimate_is_unbiased_and_its_error_bar_is_that_of_sampling_without_replacement() -> None:
    matrix, n = stable_matrix(6), 8000
    model = Linear(matrix)
    x = torch.zeros(n, 6, dtype=F64)
    spec = "ode[solver=euler,steps=1,trace=hutchinson,probes=4,noise={}]"
    error, stderr = {}, {}
    for noise in ("orthogonal", "rademacher"):
        out = parse_spec(spec.format(noise))[0].log_prob(model, x)
        assert out.stderr is not None
        error[noise] = out.log_prob - (-3 * math.log(2 * math.pi) - matrix.trace().detach())
        stderr[noise] = out.stderr
        mean_square = error[noise].square().mean()
        assert abs(error[noise].mean()) < 5 * (mean_square / n).sqrt()
        torch.testing.assert_close(stderr[noise].square().mean(), mean_square, rtol=0.06, atol=0)
    # a finite population leaves (d - k)/(d - 1) = 2/5 of the variance where probes are flat; here they nearly are
    assert error["orthogonal"].var() < 0.55 * error["rademacher"].var()


def test_all_orthogonal_probes_are_the_exact_trace_with_error_bar_zero() -> None:
    model = Gaussian(points(4, seed=3), spd(4))
    x = points(6, 4)
    out = get("ode", solver="rk4", steps=8, trace="hutchinson", probes=4, noise="orthogonal").log_prob(
        model, x
    )
    exactly = get("ode", solver="rk4", steps=8).log_prob(model, x)
    torch.testing.assert_close(out.log_prob, exactly.log_prob, rtol=0, atol=1e-10)
    assert out.stderr is not None
    assert not out.stderr.any()


@pytest.mark.parametrize("noise", ["rademacher", "gaussian", "orthogonal"])
def test_coordinates_are_keyed_by_item(noise: str) -> None:
    items = torch.tensor([4, 900, 17])
    together = draw(noise, 3, 6, items)
    alone = torch.cat([draw(noise, 3, 6, item[None]) for item in items])
    assert torch.equal(together, alone)
    assert not torch.equal(together, draw(noise, 3, 6, items, key=4))


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("divergence", ["augmented", "quadrature"])
def test_gaussian_control_leaves_no_noise_on_a_gaussian(rank: int | None, divergence: str) -> None:
    """With a spiked covariance the two eigenvectors and one rest are the whole matrix."""
    axes = torch.linalg.qr(points(5, 5, seed=8))[0]
    covariance = axes @ torch.diag(torch.tensor([0.3, 0.3, 0.3, 1.5, 4.0], dtype=F64)) @ axes.T
    model = with_moments(Gaussian(points(5), covariance), moments_of(covariance, rank))
    x = model.sample(20, generator=torch.Generator().manual_seed(0), dtype=F64)
    options: dict[str, Any] = {"trace": "hutchinson", "probes": 3, "divergence": divergence}
    if divergence == "quadrature":
        options["nodes"] = 65
    out = get("ode", rtol=1e-8, atol=1e-8, control="gaussian", **options).log_prob(model, x)
    assert out.stderr is not None
    assert float((out.log_prob - model.log_prob(x)).abs().max()) < 1e-5
    assert float(out.stderr.max()) < 1e-6
    noisy = get("ode", rtol=1e-8, atol=1e-8, **options).log_prob(model, x)
    assert float((noisy.log_prob - model.log_prob(x)).abs().mean()) > 0.05


def test_eigenvector_signs_leave_no_noise_on_a_gaussian() -> None:
    model = with_moments(Gaussian(points(4), spd(4)), moments_of(spd(4)))
    x = points(7, 4)
    out = get("ode", rtol=1e-8, atol=1e-8, trace="hutchinson", basis="pca").log_prob(model, x)
    torch.testing.assert_close(out.log_prob, model.log_prob(x), rtol=0, atol=1e-5)


def test_auto_finds_the_quiet_basis_and_pays_for_the_search() -> None:
    model = with_moments(Gaussian(points(4), spd(4)), moments_of(spd(4)))
    x = points(7, 4)
    for options in ({"basis": "auto"}, {"control": "auto"}):
        for rule in ({}, {"divergence": "quadrature", "nodes": 17, "probes": 2}):
            out = get("ode", rtol=1e-6, atol=1e-6, trace="hutchinson", **options, **rule).log_prob(model, x)
            assert float((out.log_prob - model.log_prob(x)).abs().max()) < 2e-3, (options, rule)
            plain = get("ode", rtol=1e-6, atol=1e-6, trace="hutchinson", **rule, **(
                {"allocation": "uniform"} if rule else {}
            )).log_prob(model, x)  # fmt: skip
            assert out.cost.vjps > plain.cost.vjps


REFUSED = [
    ("basis=dct", None, (4,), "needs images"),
    ("basis=dct", None, (2, 4, 4), "needs images"),
    ("basis=pca", None, (4,), "needs the data's moments"),
    ("control=gaussian", None, (4,), "needs the data's moments"),
    ("basis=pca", moments_of(spd(3)), (4,), "another data set"),
    ("control=gaussian", moments_of(torch.diag(torch.tensor([0.0, 1, 1, 1]).double())), (4,), "singular"),
    ("noise=orthogonal,probes=5", None, (4,), "at most d = 4 probes"),
    ("noise=orthogonal,basis=pca", moments_of(spd(4), 2), (4,), "needs all eigenvectors"),
]


@pytest.mark.parametrize(("options", "moments", "shape", "words"), REFUSED)
def test_law_that_does_not_fit_is_refused_with_the_reason(
    options: str, moments: object, shape: tuple[int, ...], words: str
) -> None:
    model = Field(lambda x, t: x)
    model.event_shape = shape
    if moments is not None:
        with_moments(model, moments)
    (estimator,) = parse_spec(f"ode[trace=hutchinson,{options}]")
    out = estimator.log_prob(model, points(2, *shape))
    assert out.status == "refused"
    assert out.reason is not None
    assert words in out.reason
    assert out.cost.work == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"basis": "dct"}, "has no effect with trace=exact"),
        ({"control": "gaussian"}, "has no effect with trace=exact"),
        ({"trace": "hutchinson", "noise": "gaussian", "basis": "dct"}, "basis has no effect"),
        ({"trace": "hutchinson", "basis": "fourier"}, "unknown basis"),
    ],
)
def test_options_that_do_not_go_together_are_an_error(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        get("ode", **options)


def test_plain_spellings_are_the_default() -> None:
    assert get("ode", trace="hutchinson", basis="pixel", control="none") == get("ode", trace="hutchinson")
    assert parse_spec("ode[trace=hutchinson,control=none]") == [get("ode", trace="hutchinson")]
    assert get("ode", trace="hutchinson").label == "ode[trace=hutchinson]"


def test_rotation_of_pixels_is_the_identity() -> None:
    basis: Rotation = rotation("pixel", (3, 2), None, F64, CPU)
    s = points(4, 6)
    assert torch.equal(basis.apply(s), s)
