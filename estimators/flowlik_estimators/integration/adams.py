r"""Adams' predictor and corrector of variable step with one evaluation a step (PEC).

    y*_{k+1} = y_k + int_{t_k}^{t_{k+1}} P(t) dt,   f_{k+1} = f(y*_{k+1}, t_{k+1}),   y_{k+1} = y_k + int P*(t) dt,

P the polynomial through the last three values of f (Bashforth, order 3), P* the one through these and f_{k+1} (Moulton,
order 4). The corrected state is not evaluated again: the next step begins with the f of the predicted one. So N steps
take N + 1 evaluations, and an integral of f that does not feed back is integrated at fourth order by values on both
sides of a step. Steps of any lengths: the weights are those of the interpolation on the nodes at hand.

The first steps have fewer values behind them: the very first is Heun's, whose error, of third order, is all that is
left on fine grids. A grid should therefore begin with small steps, as `ramped` of `flowlik_estimators.grids` does at
the data.

References: Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, sections III.1 and III.5; for
sampling from diffusion models a corrector without further evaluations is UniPC's (Zhao et al. 2023, arXiv 2302.04867).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

PAST = 3
"""Values of f behind a step that the predictor sees."""

State = tuple[Tensor, ...]


def adams_pec(evaluate: Callable[[Tensor, State], State], state: State, times: Tensor) -> Iterator[State]:
    """The states at the times (steps + 1,) float64 on the CPU, monotone, one after the other, from that at the first.

    ``evaluate(t, state)`` gives the derivatives, of the state's shapes.
    """
    yield state
    ends = times.tolist()
    nodes, values = [ends[0]], [evaluate(times[0], state)]
    for k, (here, there) in enumerate(pairwise(ends), 1):
        predicted = _advanced(state, values, weights(nodes, here, there))
        nodes, values = [*nodes, there], [*values, evaluate(times[k], predicted)]
        state = _advanced(state, values, weights(nodes, here, there))
        nodes, values = nodes[-PAST:], values[-PAST:]
        yield state


def weights(nodes: Sequence[float], start: float, end: float) -> list[float]:
    """w with sum_j w_j f(nodes[j]) = int_start^end f, for polynomials f of a degree below the number of nodes.

    >>> [round(w, 4) for w in weights([0.0, 1.0], 1.0, 2.0)]  # Adams and Bashforth's second order
    [-0.5, 1.5]
    """
    # in units of the step, where the system of monomials is well conditioned for the few nodes of a step
    at = (torch.tensor(nodes, dtype=torch.float64) - start) / (end - start)
    powers = torch.arange(len(at), dtype=torch.float64)
    moments = 1.0 / (powers + 1.0)
    solution: list[float] = torch.linalg.solve(at[None, :] ** powers[:, None], moments).tolist()
    return [(end - start) * w for w in solution]


def _advanced(state: State, values: Sequence[State], by: Sequence[float]) -> State:
    moves = (sum(w * v for w, v in zip(by, parts, strict=True)) for parts in zip(*values, strict=True))
    return tuple(part + move for part, move in zip(state, moves, strict=True))
