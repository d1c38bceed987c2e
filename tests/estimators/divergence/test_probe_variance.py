"""What a pilot learns from two vector-Jacobian products an item, against matrices whose variances are known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_flows import moments_of, points, spd, stable_matrix

from flowlik_estimators.divergence.probe_variance import Forms, Known, choose, coefficient, less, variance
from flowlik_estimators.divergence.probes import coordinates, rotation

CPU, F64 = torch.device("cpu"), torch.float64
D, ITEMS = 9, 4000


def basis_of(name: Any, rank: int | None = None) -> Any:
    return rotation(name, (1, 3, 3), moments_of(spd(D), rank), F64, CPU)


def forms_of(matrix: Tensor, basis: Any, noise: Any = "rademacher", items: int = ITEMS) -> Forms:
    """Two probes an item on one matrix at a single node."""
    signs = coordinates(noise, 3, torch.arange(items), 2, basis.size, stream=1, dtype=F64, device=CPU)
    probes = basis.apply(signs)
    w = probes @ matrix
    pairs = (w[:, 0] * probes[:, 1]).sum(1) - (w[:, 1] * probes[:, 0]).sum(1)
    return Forms(signs, basis.back(probes), basis.back(w)[None], pairs[None], diagonal=noise != "gaussian")


def exact_variance(matrix: Tensor, basis: Any, noise: str = "rademacher") -> Tensor:
    rows = basis.back(torch.eye(D, dtype=F64)).T
    symmetric = (matrix + matrix.T) / 2
    turned = rows @ symmetric @ rows.T
    along = turned.diagonal().square().sum() if noise != "gaussian" else 0.0
    return 2.0 * (symmetric.square().sum() - along)


@pytest.mark.parametrize(("name", "rank"), [("pixel", None), ("dct", None), ("pca", None), ("pca", 4)])
def test_products_with_the_rows_undo_a_basis(name: str, rank: int | None) -> None:
    basis, v = basis_of(name, rank), points(5, D)
    torch.testing.assert_close(basis.apply(basis.back(v)), v)


@pytest.mark.parametrize(
    ("name", "rank", "noise"),
    [
        ("pixel", None, "gaussian"),
        ("pixel", None, "rademacher"),
        ("dct", None, "rademacher"),
        ("pca", None, "rademacher"),
        ("pca", 4, "rademacher"),
    ],
)
def test_variance_of_a_matrix_is_found_in_any_basis(name: str, rank: int | None, noise: str) -> None:
    matrix, basis = stable_matrix(D), basis_of(name, rank)
    found = variance(forms_of(matrix, basis, noise))
    assert float(found) == pytest.approx(float(exact_variance(matrix, basis, noise)), rel=0.06)


def test_diagonal_matrix_has_no_variance_from_a_single_item() -> None:
    matrix = torch.diag(points(D) * 100)
    assert float(variance(forms_of(matrix, basis_of("pixel"), items=1))) < 1e-9


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("name", ["pixel", "dct"])
def test_control_leaves_the_variance_of_the_difference(name: str, rank: int | None) -> None:
    moments = moments_of(spd(D), rank)
    vectors = torch.from_numpy(moments.eigenvectors)
    spectrum = torch.tensor([[3.0, -1.0, 0.5, 2.0, 0.7]], dtype=F64)
    if rank is None:
        spectrum = torch.linspace(-1, 3, D, dtype=F64)[None]
    rest = spectrum[0, -1] if rank else torch.zeros((), dtype=F64)
    k = vectors.shape[1]
    gaussian = (vectors * (spectrum[0, :k] - rest)) @ vectors.T + rest * torch.eye(D, dtype=F64)
    basis = basis_of(name, rank)
    known = Known(basis.back(vectors.T), spectrum)
    matrix = 0.3 * stable_matrix(D) + 0.6 * gaussian
    forms = forms_of(matrix, basis)
    fitted = coefficient(forms, known)
    assert float(exact_variance(matrix - float(fitted) * gaussian, basis)) < 1.01 * min(
        float(exact_variance(matrix - c * gaussian, basis)) for c in torch.linspace(-1, 2, 61).tolist()
    )
    for by in (torch.ones(1, dtype=F64), fitted):
        left = exact_variance(matrix - float(by) * gaussian, basis)
        assert float(variance(less(forms, known, by))) == pytest.approx(float(left), rel=0.06)


def test_control_that_is_the_jacobian_itself_leaves_nothing_from_a_single_item() -> None:
    covariance = spd(D)
    values, vectors = torch.linalg.eigh(covariance)
    basis = basis_of("pixel")
    known = Known(vectors.T, values[None])
    forms = forms_of(covariance, basis, items=2)
    torch.testing.assert_close(coefficient(forms, known), torch.ones(1, dtype=F64))
    assert float(variance(less(forms, known, torch.ones(1, dtype=F64)))) < 1e-12


def test_statistics_of_a_sum_over_nodes_are_those_of_the_summed_matrix() -> None:
    basis, first, second = basis_of("pixel"), stable_matrix(D, 1), stable_matrix(D, 2)
    apart = [forms_of(matrix, basis) for matrix in (first, second)]
    both = Forms(
        apart[0].signs,
        apart[0].probes,
        torch.cat([f.products for f in apart]),
        torch.cat([f.pairs for f in apart]),
        diagonal=True,
    )
    summed = variance(both.combined(torch.tensor([[0.5, 2.0]])))
    torch.testing.assert_close(summed, variance(forms_of(0.5 * first + 2.0 * second, basis)))


def test_quietest_basis_is_chosen_node_by_node_after_smoothing() -> None:
    variances = torch.tensor([[1.0, 1.0, 9.0, 9.0], [5.0, 5.0, 5.0, 1.0]])
    coefficients = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
    basis, coefficient, left = choose(variances, coefficients)
    assert basis.tolist() == [0, 0, 1, 1]
    assert coefficient.tolist() == [1.0, 2.0, 7.0, 8.0]
    torch.testing.assert_close(left, torch.tensor([1.0, 3.0, 4.0, 2.0]))


@pytest.mark.parametrize("name", ["pixel", "dct", "pca"])
def test_a_control_without_variance_is_left_alone(name: Any) -> None:
    """A multiple of one, and a control whose axes are the basis: any coefficient would be rounding over rounding."""
    basis, moments = basis_of(name), moments_of(spd(D))
    forms = forms_of(stable_matrix(D), basis)
    forms = replace(forms, products=forms.products.float())
    axes = basis.back(torch.from_numpy(moments.eigenvectors.T.copy()).to(F64))
    one = Known(axes, torch.full((1, D), -1.0, dtype=F64))
    assert coefficient(forms, one).tolist() == [0.0]
    if name == "pca":
        assert coefficient(
            forms, Known(axes, torch.from_numpy(moments.eigenvalues)[None].to(F64))
        ).tolist() == [0.0]
