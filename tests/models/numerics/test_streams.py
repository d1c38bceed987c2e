"""Streams of draws under one key stay apart, and keep the values that records rest on."""

from __future__ import annotations

from itertools import combinations

import pytest

from flowlik_estimators.integration import clenshaw_curtis
from flowlik_models.numerics import streams
from flowlik_models.numerics.streams import RANGES


@pytest.mark.parametrize("drawer", list(RANGES))
def test_streams_under_one_key_do_not_meet(drawer: str) -> None:
    for (what, one), (other, another) in combinations(RANGES[drawer].items(), 2):
        assert one.stop <= another.start or another.stop <= one.start, (what, other)


def test_the_range_of_the_nodes_holds_the_finest_rule() -> None:
    nodes = RANGES["a solve"]["probes of nodes"]
    assert (nodes.start, len(nodes)) == (streams.NODE_STREAM, clenshaw_curtis.FINEST)


def test_values_of_streams_are_those_of_all_records() -> None:
    values = {name: value for name, value in vars(streams).items() if name.endswith(("_STREAM", "_STREAMS"))}
    assert values == {
        "SAMPLE_STREAM": 0,
        "PROBE_STREAM": 1,
        "BANK_STREAM": 2,
        "DIRECTION_STREAM": 3,
        "LEVEL_STREAM": 4,
        "EXAMINATION_STREAMS": (901, 902, 903),
        "NODE_STREAM": 65_536,
        "PILOT_STREAM": 131_072,
        "STAGE_STREAM": 262_144,
        "TIME_STREAM": 1_048_576,
        "OPPOSED_STREAM": 1_048_576,
        "ORDER_STREAM": 1_048_576,
        "FLIP_STREAM": 2_097_152,
        "ROUND_STREAMS": 4096,
    }
    assert streams.DRAW_STRIDE == 1_048_576
