"""Moments of a training split: right, refused where they cannot be, and the same after a trip to disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from toy_flows import Field, points, spd

from flowlik_models.checkpoints import CheckpointError, save_tensors
from flowlik_models.interfaces import HasMoments, Moments
from flowlik_models.moments.moments import FULL_LIMIT, attach, check, estimate, from_covariance, load, save


def covariance(moments: Moments) -> np.ndarray:
    vectors = moments.eigenvectors
    rest = 0.0 if moments.rest is None else moments.rest
    outside = np.eye(len(vectors)) - vectors @ vectors.T
    return (vectors * moments.eigenvalues) @ vectors.T + rest * outside


def skewed(n: int, d: int) -> Tensor:
    """Rows with a steep spectrum and a mean."""
    return points(n, d) * torch.logspace(1, -1, d, dtype=torch.float64) + torch.arange(d)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_moments_are_those_of_numpy(dtype: torch.dtype) -> None:
    x = skewed(200, 6).to(dtype)
    found = estimate(x.view(200, 1, 2, 3), "abc")
    np.testing.assert_allclose(found.mean, x.double().numpy().mean(0))
    np.testing.assert_allclose(covariance(found), np.cov(x.double().numpy(), rowvar=False, ddof=0), atol=1e-9)
    assert (found.data_hash, found.rest, found.mean.dtype) == ("abc", None, np.float64)
    check(found, (1, 2, 3), "abc")


@pytest.mark.parametrize("rank", [1, 3, 8, 11, 12])
def test_low_rank_keeps_the_largest_pairs_and_the_trace(rank: int) -> None:
    """Ranks on both sides of half the dimensions, where the way of computing changes."""
    x = skewed(300, 12)
    full = estimate(x, "abc")
    found = estimate(x, "abc", rank)
    np.testing.assert_allclose(found.eigenvalues, full.eigenvalues[12 - rank :])
    assert np.trace(covariance(found)) == pytest.approx(np.trace(covariance(full)))
    assert (found.rest is None) == (rank == 12)
    if found.rest is not None:
        assert found.rest == pytest.approx(full.eigenvalues[: 12 - rank].mean())
        kept = full.eigenvectors[:, 12 - rank :]
        np.testing.assert_allclose(np.abs((found.eigenvectors * kept).sum(0)), 1.0)
    same = from_covariance(full.mean, covariance(full), "abc", rank)
    np.testing.assert_allclose(covariance(same), covariance(found), atol=1e-9)


def test_singular_covariance_needs_a_floor() -> None:
    flat = points(40, 2) @ points(2, 5, seed=2)
    for rank in (None, 2):
        with pytest.raises(ValueError, match=r"singular covariance.*give a floor"):
            estimate(flat, "abc", rank)
        floored = estimate(flat, "abc", rank, floor=1e-3)
        held = [*floored.eigenvalues, *([] if rank is None else [floored.rest])]
        assert min(held) == 1e-3
        assert max(held) == pytest.approx(np.linalg.eigvalsh(np.cov(flat.numpy(), rowvar=False, ddof=0))[-1])
    with pytest.raises(ValueError, match="floor must be positive"):
        estimate(flat, "abc", floor=0.0)


@pytest.mark.parametrize(
    ("mean", "cov", "words"),
    [
        (
            torch.zeros(2),
            torch.diag(torch.tensor([1.0, -0.5])),
            "no covariance: its smallest eigenvalue is -0.5",
        ),
        (torch.zeros(2), torch.tensor([[1.0, 0.5], [0.2, 1.0]]), "not symmetric"),
        (torch.zeros(2), torch.eye(3), r"mean must be \(d,\) and cov \(d, d\)"),
        (torch.zeros(2), torch.tensor([[1.0, 0.0], [0.0, torch.nan]]), "must be finite"),
    ],
)
def test_what_is_no_covariance_is_refused(mean: Tensor, cov: Tensor, words: str) -> None:
    for floor in (None, 0.1):
        with pytest.raises(ValueError, match=words):
            from_covariance(mean, cov, "abc", floor=floor)


def test_data_that_have_no_moments_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 rows, got 1"):
        estimate(points(1, 3), "abc")
    with pytest.raises(ValueError, match="NaN or infinity"):
        estimate(torch.full((3, 2), torch.inf), "abc")
    with pytest.raises(ValueError, match="rank must be between 1 and 3, got 4"):
        estimate(points(9, 3), "abc", 4)
    with pytest.raises(ValueError, match=f"up to {FULL_LIMIT} dimensions, got {FULL_LIMIT + 1}: give a rank"):
        estimate(np.ones((2, FULL_LIMIT + 1)), "abc")


@pytest.mark.parametrize("rank", [None, 2])
def test_file_gives_the_same_moments_back(tmp_path: Path, rank: int | None) -> None:
    moments = estimate(points(20, 4), "abc", rank)
    path = tmp_path / "moments.safetensors"
    save(path, moments)
    again = load(path, (2, 2), "abc")
    for name in ("mean", "eigenvalues", "eigenvectors"):
        np.testing.assert_array_equal(getattr(again, name), getattr(moments, name))
    assert (again.data_hash, again.rest) == ("abc", moments.rest)
    with pytest.raises(
        CheckpointError, match=r"moments\.safetensors: moments of data abc, expected .* data xyz"
    ):
        load(path, data_hash="xyz")
    with pytest.raises(CheckpointError, match=r"moments\.safetensors: moments of 4 dimensions, expected 5"):
        load(path, (5,))


def test_file_that_is_damaged_or_of_something_else_is_named(tmp_path: Path) -> None:
    path = tmp_path / "moments.safetensors"
    with pytest.raises(CheckpointError, match=r"moments\.safetensors: no such checkpoint"):
        load(path)
    save(path, estimate(points(20, 4), "abc"))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"moments\.safetensors: expected a complete safetensors file"):
        load(path)
    save_tensors(path, {"weight": torch.zeros(2)})
    with pytest.raises(
        CheckpointError, match=r"moments\.safetensors: expected a file of moments, found no tensor"
    ):
        load(path)
    arrays = estimate(points(20, 4), "abc")
    save_tensors(
        path,
        {name: torch.from_numpy(getattr(arrays, name)) for name in ("mean", "eigenvalues", "eigenvectors")},
    )
    with pytest.raises(CheckpointError, match="found no data hash"):
        load(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"eigenvalues": np.array([0.0, 1.0])}, "singular covariance: its smallest eigenvalue is 0"),
        ({"eigenvalues": np.array([1.0])}, "mean .d,., eigenvalues .k,. and eigenvectors"),
        ({"eigenvectors": np.array([[1.0, 1.0], [0.0, 1.0]])}, "not orthonormal"),
        ({"mean": np.array([0.0, np.nan])}, "NaN or infinity"),
        ({"rest": 0.5}, "2 of 2 eigenvectors have no rest variance"),
        (
            {"eigenvalues": np.ones(1), "eigenvectors": np.eye(2)[:, :1]},
            "1 of 2 eigenvectors need rest variance",
        ),
    ],
)
def test_moments_that_are_none_are_found_out(change: dict[str, Any], words: str) -> None:
    moments = replace(from_covariance(torch.zeros(2), torch.eye(2), "abc"), **change)
    with pytest.raises(ValueError, match=words):
        check(moments)


def test_moments_are_attached_to_a_model_of_their_shape() -> None:
    model = Field(lambda x, t: x, d=3)
    moments = from_covariance(torch.zeros(3), spd(3), "abc")
    assert attach(model, moments) is model
    assert isinstance(model, HasMoments)
    assert model.moments is moments
    with pytest.raises(ValueError, match="moments of 3 dimensions, expected 2"):
        attach(Field(lambda x, t: x, d=2), moments)


def test_file_that_was_altered_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "moments.safetensors"
    save(path, estimate(points(20, 4), "abc"))
    content = path.read_bytes()
    path.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
    with pytest.raises(CheckpointError, match=r"moments\.safetensors: altered since it was written"):
        load(path)
