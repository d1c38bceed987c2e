"""The streams of keyed random draws (`flowlik_models.numerics.random`), in one table.

What an item gets depends on (key, stream, item). Draws under one key therefore need streams that do not meet; those
that share a key are listed together in `RANGES`, and a test holds them apart. Values never change: every number of
every record with probes depends on them.
"""

from __future__ import annotations

# one call of an estimator, whose key is drawn from its generator
SAMPLE_STREAM = 0  # starting points
PROBE_STREAM = 1  # probes that are fixed along a path
BANK_STREAM = 2  # starts of Newton's method, for a generator's roots
DIRECTION_STREAM = 3  # random directions of self-guidance
LEVEL_STREAM = 4  # noise levels of elbo
NODE_STREAM = 2**16  # fresh probes of a node: this plus its index in the finest rule
PILOT_STREAM = 2**17  # probes of a pilot, whose key is 0
STAGE_STREAM = 2**18  # probes drawn anew for every evaluation of a solve: this plus the evaluation's number
TIME_STREAM = 2**20  # random times of f2d2-corrected; those of its probes follow, one a step
OPPOSED_STREAM = 2**20  # added to the stream of those probes: which of their signs the next one turns round
ORDER_STREAM = (
    2**20
)  # added to the stream of orthogonal probes: the order in which an item takes their columns

# an examination of a model, whose key is 0
EXAMINATION_STREAMS = (901, 902, 903)  # noise, a direction, other rows

# images of a data set, whose key is that of the dequantisation
FLIP_STREAM = 2**21  # added to the number of the draw: whether an image is mirrored

# rounds of a pooled reference, whose key is its own
ROUND_STREAMS = 4096  # streams of a round: its nodes

DRAW_STRIDE = 2**20
"""Item ids, not streams: those of different dequantisation draws of an image are so far apart and never meet."""

_FINEST_RULE = 129  # nodes
_STAGES = 2**18  # more evaluations than any solve takes
_STEPS = 2**20  # more than any solve takes
_ROUNDS = 2**16  # more than any reference takes
_DRAWS = 2**21  # dequantisation draws, in training epochs


def _ordered(streams: range) -> range:
    return range(streams.start + ORDER_STREAM, streams.stop + ORDER_STREAM)


_SAMPLE, _PROBE = range(SAMPLE_STREAM, SAMPLE_STREAM + 1), range(PROBE_STREAM, PROBE_STREAM + 1)
_STEP_PROBES = range(TIME_STREAM + 1, TIME_STREAM + 1 + _STEPS)
_NODES = range(NODE_STREAM, NODE_STREAM + _FINEST_RULE)
_EVALUATIONS = range(STAGE_STREAM, STAGE_STREAM + _STAGES)

RANGES: dict[str, dict[str, range]] = {
    "a solve": {
        "starting points": _SAMPLE,
        "probes of a path": _PROBE,
        "probes of nodes": _NODES,
        "pilot": range(PILOT_STREAM, PILOT_STREAM + 1),
        "probes of evaluations": _EVALUATIONS,
        "columns of a path": _ordered(_PROBE),
        "columns of nodes": _ordered(_NODES),
        "columns of evaluations": _ordered(_EVALUATIONS),
    },
    "a corrected map": {
        "starting points": _SAMPLE,
        "times": range(TIME_STREAM, TIME_STREAM + 1),
        "probes of steps": _STEP_PROBES,
        "signs turned round": range(_STEP_PROBES.start + OPPOSED_STREAM, _STEP_PROBES.stop + OPPOSED_STREAM),
    },
    "a generator": {"starting points": _SAMPLE, "bank": range(BANK_STREAM, BANK_STREAM + 1)},
    "a bound": {"noise": _PROBE, "noise levels": range(LEVEL_STREAM, LEVEL_STREAM + 1)},
    "self-guidance": {
        "starting points": _SAMPLE,
        "directions": range(DIRECTION_STREAM, DIRECTION_STREAM + 1),
    },
    "an examination": {
        "noise, direction, other rows": range(EXAMINATION_STREAMS[0], EXAMINATION_STREAMS[-1] + 1)
    },
    "images": {"noise": range(_DRAWS), "flips": range(FLIP_STREAM, FLIP_STREAM + _DRAWS)},
    "a pooled reference": {
        f"round {number}": range(1 + number * ROUND_STREAMS, 1 + (number + 1) * ROUND_STREAMS)
        for number in (0, 1, 2, _ROUNDS)
    },
}
"""Who draws under one key -> what for -> its streams."""
