"""Options of a recipe, grouped by what they decide. Every group checks itself; `Recipe` checks what crosses groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from flowlik_models.checkpoints import Stored
from flowlik_models.names import unknown

Middle = Literal["half", "random"]
AlteredLaw = Literal["uniform", "along"]
Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class Optimiser:
    """Adam with warm-up and cosine decay, and the moving average of the weights.

    ``steps``, ``batch``: number of steps and rows of each. ``learning_rate``: its peak. ``weight_decay``: decoupled.
    ``ema``: decay of the exponential moving average. ``clip``: largest norm of the gradient. ``betas``: of Adam.
    ``accumulate``: parts of a batch that a process takes one after the other; like the number of processes it changes
    the trajectory by rounding alone. ``snapshots``: shares of the steps after which the average is saved as well.

    Raises:
        ValueError: an option out of range, in one line; so do the other groups.
    """

    steps: int = 10_000
    batch: int = 256
    learning_rate: float = 4e-3
    weight_decay: float = 0.0
    ema: float = 0.999
    clip: float = 10.0
    betas: tuple[float, float] = (0.9, 0.99)
    accumulate: int = 1
    snapshots: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Check the ranges."""
        _numbers_from_one(self, "steps", "batch")
        _positive(self, "learning_rate", "clip")
        _shares(self, "ema")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must not be negative, got {self.weight_decay}")
        if self.accumulate < 1 or self.batch % self.accumulate:
            raise ValueError(f"a batch of {self.batch} cannot be taken in {self.accumulate} equal parts")


@dataclass(frozen=True, kw_only=True)
class Times:
    """The law of the times t and s of a batch.

    ``stretched``, ``diagonal``, ``ends``: shares of times drawn near the data, of s = t, and of s at an end.
    ``dyadic``: steps of lengths 2^-k, down to 1/128, that start at multiples of their length, as Shortcut was
    published, instead of any pair of times; ``middle``: where such a condition cuts a step. ``delta``: smallest 1 - t
    that the reparametrised time resolves.
    """

    stretched: float = 0.5
    diagonal: float = 0.25
    ends: float = 0.0
    dyadic: bool = False
    middle: Middle = "random"
    delta: float = 5e-3

    def __post_init__(self) -> None:
        """Check the ranges."""
        _shares(self, "stretched", "diagonal", "ends")
        _one_of(self, "middle", get_args(Middle))
        _positive(self, "delta")


@dataclass(frozen=True, kw_only=True)
class Points:
    """Where a batch's points lie about the path of the data.

    ``altered``: share of points moved, off the path by noise of a scale uniform up to ``altered_scale``, or ``along``
    it (``altered_law``): the path's own noise times a factor log-uniform up to the scale, which is where trajectories
    that miss the data pass. ``shift``: share of the training images moved by a pixel.
    """

    altered: float = 0.25
    altered_scale: float = 2.0
    altered_law: AlteredLaw = "uniform"
    shift: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        _shares(self, "altered", "shift")
        _positive(self, "altered_scale")
        _one_of(self, "altered_law", get_args(AlteredLaw))


@dataclass(frozen=True, kw_only=True)
class Weights:
    """How squared errors are weighed against each other.

    ``weight_c``: constants of the adaptive weights of velocity and divergence; None weighs all alike.
    ``divergence_scale``: the divergence is fitted in units of this (None: of the number of dimensions). ``relative``:
    targets larger than this are fitted to relative instead of absolute accuracy; needed where the field is singular
    off the data. ``round_trip``: weight of the loss that asks a map to come back (`objectives.round_trip`); 0 without.
    """

    weight_c: tuple[float | None, float | None] = (1.0, 1.0)
    divergence_scale: float | None = None
    relative: float | None = None
    round_trip: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not self.round_trip >= 0:
            raise ValueError(f"round_trip is a weight of at least 0, got {self.round_trip}")
        for name in ("divergence_scale", "relative"):
            if getattr(self, name) is not None:
                _positive(self, name)
        if any(c is not None and not c > 0 for c in self.weight_c):
            raise ValueError(f"weight_c are positive constants or None, got {self.weight_c}")


@dataclass(frozen=True, kw_only=True)
class Trajectories:
    """The pool of the teacher's trajectories, solved beforehand, and its use.

    ``pool``: their number (0: none are solved). ``pool_data``: share of them that begin at training images, moved as
    `Points.shift` says, instead of at noise. ``pool_probes``: probes of each of their divergences near the data.
    ``pool_share``: share of the data that are the teacher's own samples. ``direct``: share of a batch whose targets are
    averages read off the trajectories; the other rows of objective ``direct`` lie on the diagonal. Of those averages
    that are steps of a few-step grid ``one_step`` is the share of the whole way in one; ``to_noise``: share of
    the averages that lead from the data towards the noise, as a likelihood is computed (None: as they come).
    """

    pool: int = 0
    pool_data: float = 1 / 3
    pool_share: float = 0.0
    pool_probes: int = 1
    direct: float = 0.0
    one_step: float = 0.1
    to_noise: float | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        _shares(self, "one_step", *(["to_noise"] if self.to_noise is not None else []))
        if self.pool < 0:
            raise ValueError(f"pool is a number of trajectories, got {self.pool}")
        _shares(self, "pool_data", "pool_share")
        _numbers_from_one(self, "pool_probes")
        if not 0 <= self.direct <= 1 or (self.direct and not self.pool):
            raise ValueError("direct is a share of the batch and needs a pool of solved trajectories")


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How the same mathematics is computed and stored.

    ``precision``: of the network's forward and backward. ``channels_last``, ``fused``, ``compile``: memory format,
    optimiser in one kernel, compiled backbone. ``stored``: type of the weights in the checkpoint.
    """

    precision: Precision = "float32"
    channels_last: bool = False
    fused: bool = False
    compile: bool = False
    stored: Stored = "float32"

    def __post_init__(self) -> None:
        """Check the names."""
        _one_of(self, "precision", get_args(Precision))
        _one_of(self, "stored", get_args(Stored))


def _shares(group: Any, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(group, name) <= 1:
            raise ValueError(f"{name} must be a share from 0 to 1, got {getattr(group, name)}")


def _positive(group: Any, *names: str) -> None:
    for name in names:
        if not getattr(group, name) > 0:
            raise ValueError(f"{name} must be positive, got {getattr(group, name)}")


def _numbers_from_one(group: Any, *names: str) -> None:
    for name in names:
        if getattr(group, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(group, name)}")


def _one_of(group: Any, name: str, valid: tuple[str, ...]) -> None:
    if getattr(group, name) not in valid:
        raise ValueError(unknown(name, getattr(group, name), valid))
