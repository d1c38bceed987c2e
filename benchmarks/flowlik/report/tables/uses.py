"""Tables of what is measured beside a likelihood's accuracy: samples, guided or not, and the uses of a likelihood."""

from __future__ import annotations

from typing import Any

import pandas as pd

from flowlik.report.labels import as_dicts
from flowlik.report.numbers import number
from flowlik.report.tables.table import Cell, Table, _cell, _head, _title, _without_empty

FAMILIES = ("rescaled", "displaced", "rounded")


def _routes(frame: pd.DataFrame) -> Table | None:
    """How far the routes to a generator's likelihood agree."""
    rows = _known(frame, "routes")
    names = ("one_root_gap", "one_root_share", "folded_share", "lost_share", "mass", "flow_gap", "flow_bias")
    lines = tuple(
        (*_head(row)[:2], *(_cell(row["extra"]["routes"].get(name)) for name in names)) for row in rows
    )
    heads = (
        *("method", "model", "largest gap to the samples' own density", "samples with one root"),
        *("with roots of both signs", "without a root", "mass", "gap to the fake model's flow", "its mean"),
    )
    note = (
        "In float64; gaps in nats, against own-samples where there is one root, and against fake-flow on the items. "
        "Roots of both signs: the generator folds there."
    )
    title = _title(frame, "routes to a generator's likelihood")
    return _without_empty(Table(title, heads, lines, note=note)) if rows else None


def _training(frame: pd.DataFrame) -> Table | None:
    """Bits/dim along a model's training."""
    lines = []
    for row in _known(frame, "training"):
        curve = row["extra"]["training"]
        for k, step in enumerate(curve["step"]):
            bits, spread = curve["bpd"][k], 1.96 * curve["bpd_se"][k]
            gain = _cell(None)
            if k:
                half = 1.96 * curve["gain_se"][k]
                gain = _cell(curve["gain"][k], curve["gain"][k] - half, curve["gain"][k] + half)
            lines.append(
                (
                    *_head(row)[:2],
                    Cell(f"{step:,}", float(step)),
                    _cell(curve["cpu_hours"][k]),
                    _cell(bits, bits - spread, bits + spread),
                    gain,
                )
            )
    heads = (
        "method",
        "model",
        "steps",
        "processor hours",
        "bits/dim [95 %]",
        "gained since the last, same items [95 %]",
    )
    return Table(_title(frame, "bits/dim along training"), heads, tuple(lines)) if lines else None


def _classes(frame: pd.DataFrame) -> Table | None:
    """Bits/dim and errors of each class, where items have labels."""
    lines = []
    for row in _known(frame, "classes"):
        of = row["extra"]["classes"]
        for k, label in enumerate(of["label"]):
            values = (
                _cell(*(of[f"{name}{end}"][k] for end in ("", "_lo", "_hi"))) for name in ("bpd", "mae")
            )
            count = of["items"][k]
            lines.append(
                (*_head(row)[:2], Cell(str(label), float(label)), Cell(str(count), float(count)), *values)
            )
    heads = ("method", "model", "class", "items", "bits/dim [95 %]", "mean |error| [95 %]")
    return _without_empty(Table(_title(frame, "by class"), heads, tuple(lines), names=3)) if lines else None


def _known(frame: pd.DataFrame, use: str) -> list[dict[str, Any]]:
    return [row for row in as_dicts(frame) if row["extra"].get(use)]


def _comparison(frame: pd.DataFrame) -> Table | None:
    rows = _known(frame, "comparison")
    found = []
    for row in rows:
        for family in FAMILIES:
            of = row["extra"]["comparison"].get(family)
            if of is None:
                continue
            tau = _cell(of.get("kendall"), of.get("kendall_lo"), of.get("kendall_hi"), 2)
            others = (
                _cell(of.get(name), digits=2)
                for name in ("spearman", "regret", "spread", "bias", "bias_spread")
            )
            variants = f"{of['models']:.0f} {family}" if "models" in of else family
            found.append((*_head(row)[:2], Cell(variants), _head(row)[2], tau, *others))
    if not found:
        return None
    heads = (
        *("method", "model", "variants", "NFE", "Kendall's tau", "Spearman", "regret"),
        *("spread of the exact values", "bias", "spread of the bias"),
    )
    note = "Means over the items; regret, spreads and bias in bits/dim. Brackets: 95 % bootstrap intervals over items."
    return Table(_title(frame, "ranking models by their likelihood"), heads, tuple(found), names=3, note=note)


def _outliers(frame: pd.DataFrame) -> Table | None:
    rows = _known(frame, "outliers")
    if not rows:
        return None
    sets = list(dict.fromkeys(name for row in rows for name in row["extra"]["outliers"]))
    measured = [n for n in sets if any("auroc" in row["extra"]["outliers"].get(n, {}) for row in rows)]
    lines = []
    for row in rows:
        of = [row["extra"]["outliers"].get(name, {}) for name in measured]
        lines.append(
            (*_head(row), *(_cell(o.get("auroc"), o.get("auroc_lo"), o.get("auroc_hi"), 2) for o in of))
        )
    missing = [rows[0]["extra"]["outliers"][name]["reason"] for name in sets if name not in measured]
    note = (
        "AUROC of log p, test images against each out-of-distribution set; brackets: 95 % intervals. "
        + " ".join(f"{reason[0].upper()}{reason[1:]}." for reason in missing)
    )
    heads = ("method", "model", "NFE", *measured)
    return Table(_title(frame, "out-of-distribution detection"), heads, tuple(lines), note=note.strip())


def _importance(frame: pd.DataFrame) -> Table | None:
    rows = _known(frame, "importance")
    if not rows:
        return None
    names = ("ess", "mass", "p", "odds", "log_odds_error", "sample_ess", "sample_log_mass")
    lines = tuple(
        (*_head(row), *(_cell(row["extra"]["importance"].get(name)) for name in names)) for row in rows
    )
    one = rows[0]["extra"]["importance"]
    note = (
        f"Exact weights: effective sample size {number(one['ess_exact'])}, P(A) {number(one['p_exact'])}, "
        f"odds {number(one['odds_exact'])}, log odds ± {number(one['log_odds_se'], 2)} from {one['points']} "
        "points. The last two weigh the estimator's own samples with the exact density."
    )
    heads = (
        *("method", "model", "NFE", "effective sample size", "mass", "P(A)", "odds of A and B"),
        *("error of the log odds", "own samples: effective sample size", "own samples: log of mass"),
    )
    return _without_empty(Table(_title(frame, "rare events by importance sampling"), heads, lines, note=note))


def _gradient(frame: pd.DataFrame) -> Table | None:
    rows = _known(frame, "gradient")
    if not rows:
        return None
    names = ("cosine", "cosine_p05", "error", "weight_cosine", "weight_error")
    lines = tuple(
        (*_head(row), *(_cell(row["extra"]["gradient"].get(name)) for name in names)) for row in rows
    )
    heads = (
        *("method", "model", "NFE", "cosine", "its 5th percentile", "relative error"),
        *("cosine in the weights", "relative error in the weights"),
    )
    note = (
        "In x against the exact score, means and medians over the items; in the weights against the converged "
        "likelihood of the network's own field."
    )
    return _without_empty(Table(_title(frame, "gradient of the estimate"), heads, lines, note=note))
