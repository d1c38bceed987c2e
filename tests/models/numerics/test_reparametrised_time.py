"""The reparametrised time, its inverse and its slope, for numbers, arrays and tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowlik_models.numerics.reparametrised_time import ReparametrisedTime

widths = st.floats(1e-4, 1.0)
times = st.floats(0.0, 1.0)


@settings(deadline=None)
@given(t=times, near_data=widths, near_noise=widths)
def test_the_inverse_gives_the_time_back(t: float, near_data: float, near_noise: float) -> None:
    reparametrised = ReparametrisedTime(near_data, near_noise)
    r = reparametrised.at(t)
    exact = torch.tensor([t], dtype=torch.float64)
    assert float(reparametrised.time(np.array([r]))[0]) == pytest.approx(t, abs=1e-12)
    assert float(reparametrised.at(exact)[0]) == pytest.approx(r, abs=1e-12)
    assert float(reparametrised.time(reparametrised.at(exact))[0]) == pytest.approx(t, abs=1e-12)


@settings(deadline=None)
@given(t=times, near_data=widths, near_noise=widths, rate=st.floats(0.1, 10.0))
def test_both_forms_agree_and_the_slope_is_the_derivative(
    t: float, near_data: float, near_noise: float, rate: float
) -> None:
    reparametrised = ReparametrisedTime(near_data, near_noise)
    r = torch.tensor([reparametrised.at(t)], dtype=torch.float64, requires_grad=True)
    time, slope = reparametrised.time_and_slope(r, rate)
    (derivative,) = torch.autograd.grad(time, r)
    torch.testing.assert_close(slope, rate * derivative, rtol=1e-12, atol=0)
    torch.testing.assert_close(time, reparametrised.time(r), rtol=0, atol=1e-12)
    torch.testing.assert_close(reparametrised.slope(r), derivative, rtol=1e-10, atol=0)
