"""What costs, measures and controls mean, in a reader's words."""

from __future__ import annotations

from typing import Final

COSTS: Final[tuple[tuple[str, str], ...]] = (
    (
        "NFE",
        "Evaluations of the network for one sample (forwards), counted by a wrapper around the network. Guidance "
        "that calls two networks counts two. Published NFE are forwards only, which flatters an estimator that "
        "also takes derivatives at every node.",
    ),
    (
        "work",
        "Forwards + vector-Jacobian products + Jacobian-vector products for one sample. Counted and exact: the same "
        "on every machine. The exact trace of a d-dimensional field costs d products at every node.",
    ),
    (
        "forward-equivalents",
        "Measured CPU time (device time on a GPU) of the estimate over that of one forward pass on the same batch, "
        "both timed in turn. It carries over between machines roughly, not exactly.",
    ),
    (
        "ms/sample",
        "Median wall-clock time of repeated rounds after a warm-up, divided by the items of the timed batch. Holds "
        "for the machine and the number of threads named under Environment only.",
    ),
)

MEASURES: Final[tuple[tuple[str, str], ...]] = (
    (
        "bits/dim",
        "−log p / (d ln 2); for images of L grey levels scaled to [−1, 1], log₂(L/2) is added, so that the uniform "
        "density has log₂ L (not for the teacher's own samples, which are continuous). The aim is the reference, not a "
        "low number.",
    ),
    (
        "bias",
        "Mean over the items of estimate minus reference. A constant can have no bias and know nothing.",
    ),
    ("mean |error|", "Mean over the items of the absolute difference, in bits/dim: the number to judge by."),
    ("p95 |error|", "95 % of the items have a smaller absolute error."),
    (
        "Spearman",
        "Rank correlation of estimate and reference over the items; none where the truth is constant.",
    ),
    ("coverage", "Share of items whose reference lies in the 95 % error bar the estimator itself gives."),
    ("invalid", "Share of items without a usable value: not finite, or below 0 bits/dim on discrete data."),
    (
        "mass",
        "Integral of the estimated density, by quadrature on the 2-D grid, above by sampling; it should be 1.",
    ),
    (
        "cycle error",
        "Mean distance between an item and itself after data → noise → data through the same map.",
    ),
    ("Fréchet", "Fréchet distance of feature statistics; an FID only where the extractor is Inception."),
    (
        "precision, recall",
        "Share of samples near real items, and of real items near samples: fidelity and diversity. In the features of "
        "the Fréchet distance, or in data space where a task has no feature network.",
    ),
)

CONTROLS: Final[tuple[tuple[str, str], ...]] = (
    ("control-mean", "gives every item the mean of the reference over the split: an oracle, but a constant"),
    ("control-component", "gives the mean of the reference over the item's true mixture component"),
    (
        "control-gaussian",
        "gives the density of the Gaussian with the data's mean and covariance: no network at all",
    ),
)
