"""The quick look for NaN and infinity sees what a look number by number sees."""

from __future__ import annotations

import pytest
import torch

from flowlik_models.numerics.finite import all_finite

NUMBERS = [0.0, 1.0, -3e38, 3e38, torch.nan, torch.inf, -torch.inf]


@pytest.mark.parametrize("first", NUMBERS)
@pytest.mark.parametrize("second", NUMBERS)
@pytest.mark.parametrize("size", [2, 3, 1000])
def test_it_is_so_where_every_number_is_also_where_the_sum_overflows(
    first: float, second: float, size: int
) -> None:
    x = torch.zeros(size)
    x[0], x[-1] = first, second
    assert all_finite(x) == bool(torch.isfinite(x).all())
