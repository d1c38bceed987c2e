"""Rows that judge samples, and the likelihoods that belong to them."""

from __future__ import annotations

from typing import Final

import pandas as pd

from flowlik.report.labels import without_segments
from flowlik.report.numbers import from_extra


def samples_measured(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with `distance` (Frechet, or energy where there is no feature network) and `samples_bpd`, each with
    `_lo` and `_hi` of a 95 % interval, those of `precision` and `recall`, and `sample_nfe`, the cost of a sample.
    """
    found = frame.copy()
    energy, error = (from_extra(frame, name) for name in ("energy_distance", "energy_distance_se"))
    known = frame["frechet"].notna()
    found["distance"] = frame["frechet"].where(known, energy)
    found["distance_lo"] = from_extra(frame, "frechet_lo").where(known, energy - 1.96 * error)
    found["distance_hi"] = from_extra(frame, "frechet_hi").where(known, energy + 1.96 * error)
    if "n_seeds" in frame:  # the interval is that of the first seed, the value the mean over all
        half = (found["distance_hi"] - found["distance_lo"]) / 2
        several = frame["n_seeds"] > 1
        found["distance_lo"] = found["distance_lo"].mask(several, found["distance"] - half)
        found["distance_hi"] = found["distance_hi"].mask(several, found["distance"] + half)
    found["samples_bpd"] = from_extra(frame, "samples_bpd")
    for name in ("samples_bpd", "precision", "recall"):
        half = 1.96 * from_extra(frame, f"{name}_se")
        found[f"{name}_lo"], found[f"{name}_hi"] = found[name] - half, found[name] + half
    found["sample_nfe"] = from_extra(frame, "sample_nfe")
    return found


FEW_STEPS: Final = ("f2d2", "meanflow", "pi-flow", "generator")
"""Estimators of models that were trained to be asked a few times."""


def few_steps(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows of few-step models where policies or one-step generators stand beside other rows; none elsewhere."""
    shown = frame[frame["method"].isin(FEW_STEPS) & (frame["model"] != "closed-form")]
    return shown if shown["method"].isin(["pi-flow", "generator"]).any() else shown.head(0)


def answered(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with no error where an estimator had an answer for less than half of the items: what is left of them
    says nothing about the others. The tables give the share."""
    mostly_not = frame["invalid_share"] > 0.5
    errors = ("bpd_mae_all", "bpd_mae_all_lo", "bpd_mae_all_hi")
    return frame.assign(**{name: frame[name].mask(mostly_not) for name in errors})


def likelihood_of_samples(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows, but of a one-step generator one a model: inversion where that judges points, otherwise another route,
    with the model's samples, which are the same by every route.
    """
    draws = [name for name in ("distance", "precision", "recall") if name in frame]
    names = [*(f"{name}{end}" for name in draws for end in ("", "_lo", "_hi")), "sample_nfe", "extractor"]
    key = ["task", "split", "model"]
    of_generator = frame["method"] == "generator"
    ours = frame[of_generator]
    drawn = ours[names].where(ours["distance"].notna())
    ours = ours.assign(**drawn.groupby([ours[name] for name in key]).transform("first"))
    other_route = ours["estimator_label"].str.contains("route")  # inversion is the default
    judging = ours.loc[other_route.sort_values(kind="stable").index].query("bpd_mae_all > 0")
    return pd.concat([frame[~of_generator], judging.drop_duplicates(key)])


def one_a_sampler(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows whose samples differ: a policy flow read in two ways, or a generator by several routes, draws the same ones.

    Policy flows of several segments share a model, and what costs one evaluation is one step.
    """
    frame = frame.assign(model=[without_segments(model) for model in frame["model"]])
    once = frame["steps"].isna() & (from_extra(frame, "sample_nfe") == 1)
    frame = frame.assign(steps=frame["steps"].mask(once, 1.0))
    few = frame["method"].isin(["pi-flow", "generator"])
    again = few & frame.duplicated(["task", "split", "method", "model", "steps", "n_samples", "extractor"])
    return frame[~again]
