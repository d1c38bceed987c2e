"""Time grids: ends kept, monotone, and the spacing that the formula says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowlik_estimators.grids import GRIDS, LOGSNR_CLIP, time_grid


@settings(max_examples=60, deadline=None)
@given(grid=st.sampled_from(sorted(GRIDS)), steps=st.integers(1, 300), eps=st.floats(0.0, 0.3))
def test_grid_keeps_its_ends_and_is_strictly_monotone_both_ways(grid: str, steps: int, eps: float) -> None:
    for start, end in ((1.0 - eps, 0.0), (0.0, 1.0 - eps)):
        times = time_grid(grid, steps, start, end)
        assert times.shape == (steps + 1,)
        assert times.dtype == torch.float64
        assert (float(times[0]), float(times[-1])) == (start, end)
        assert bool((times.diff() * (end - start) > 0).all())


@pytest.mark.parametrize("grid", sorted(GRIDS))
def test_sampling_visits_the_times_of_the_likelihood_in_reverse(grid: str) -> None:
    forth, back = time_grid(grid, 12, 0.0, 1.0), time_grid(grid, 12, 1.0, 0.0)
    torch.testing.assert_close(forth, back.flip(0), rtol=0, atol=1e-15)


def test_uniform_steps_are_equal() -> None:
    assert time_grid("uniform", 4, 1.0, 0.0).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_cosine_steps_are_equal_in_angle() -> None:
    times = time_grid("cosine", 6, 0.0, 1.0)
    angle = torch.acos(1 - 2 * times)
    torch.testing.assert_close(angle.diff(), angle[-1].expand(6) / 6)


def test_logsnr_steps_are_equal_in_log_snr_inside() -> None:
    times = time_grid("logsnr", 10, 1.0, 0.0)
    snr = torch.logit(times[1:-1]) * 2
    widest = 2 * torch.logit(torch.tensor(1 - LOGSNR_CLIP, dtype=torch.float64))
    torch.testing.assert_close(snr.diff(), (-2 * widest / 10).expand(8))


def test_ramped_steps_grow_from_a_quarter_at_the_data_to_equal_ones() -> None:
    steps = -time_grid("ramped", 8, 1.0, 0.0).diff()
    expected = torch.tensor([0.25, 0.4, 0.64, 1, 1, 1, 1, 1], dtype=torch.float64)
    torch.testing.assert_close(steps / steps[-1], expected)


def test_unknown_grid_and_no_steps_are_refused() -> None:
    with pytest.raises(
        ValueError, match="did you mean 'cosine'\\? \\(valid: uniform, cosine, logsnr, ramped\\)"
    ):
        time_grid("cosin", 4, 1.0, 0.0)
    with pytest.raises(ValueError, match="at least 1 step"):
        time_grid("uniform", 0, 1.0, 0.0)
    with pytest.raises(ValueError, match="no room"):
        time_grid("uniform", 2, 0.5, 0.5)
