"""Keyed draws: nothing but key, stream, item and position matters."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowlik_models.numerics import random

LAWS = (random.uniform, random.gaussian, random.rademacher)


@pytest.mark.parametrize("law", LAWS)
@settings(max_examples=25, deadline=None)
@given(
    items=st.lists(st.integers(0, 10_000), min_size=1, max_size=30),
    shape=st.lists(st.integers(1, 5), min_size=0, max_size=3).map(tuple),
    key=st.integers(0, 2**62 - 1),
)
def test_draws_do_not_depend_on_the_batch(law, items, shape, key) -> None:  # type: ignore[no-untyped-def]
    ids = torch.tensor(items)
    together = law(key, ids, shape, stream=3)
    alone = torch.cat([law(key, ids[i : i + 1], shape, stream=3) for i in range(len(items))])
    assert together.shape == (len(items), *shape)
    assert torch.equal(together, alone)


@pytest.mark.parametrize("law", LAWS)
def test_keys_streams_and_items_differ(law) -> None:  # type: ignore[no-untyped-def]
    ids = torch.arange(4)
    base = law(1, ids, (64,))
    assert not torch.equal(base, law(2, ids, (64,)))
    assert not torch.equal(base, law(1, ids, (64,), stream=1))
    assert not torch.equal(base[0], base[1])


def test_laws_have_their_moments() -> None:
    ids = torch.arange(20_000)
    unit = random.uniform(5, ids, (8,), dtype=torch.float64)
    assert 0 <= float(unit.min()) < float(unit.max()) < 1
    assert float(unit.mean()) == pytest.approx(0.5, abs=0.005)
    normal = random.gaussian(5, ids, (8,), dtype=torch.float64)
    assert float(normal.mean()) == pytest.approx(0, abs=0.01)
    assert float(normal.pow(4).mean()) == pytest.approx(3, abs=0.1)
    signs = random.rademacher(5, ids, (8,))
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert float(signs.mean()) == pytest.approx(0, abs=0.01)


def test_single_precision_uniforms_stay_below_one() -> None:
    assert float(random.uniform(0, torch.arange(200_000), (8,)).max()) < 1


def test_negative_and_misshapen_items_are_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        random.uniform(0, torch.tensor([-1]), (2,))
    with pytest.raises(ValueError, match="one id a sample"):
        random.uniform(0, torch.zeros(2, 2, dtype=torch.long), (2,))
