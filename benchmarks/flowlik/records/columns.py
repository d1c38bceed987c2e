"""The table of columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One measured column: its unit, whether less or more is better, and the limits of its axis (None: open)."""

    name: str
    label: str
    unit: str
    direction: Literal["less", "more", "zero", "one", "none"]
    low: float | None = None
    high: float | None = None


def _table(*measures: Measure) -> dict[str, Measure]:
    return {measure.name: measure for measure in measures}


# The one table: records, printed tables and axes take name, unit, direction and limits from here.
MEASURES: dict[str, Measure] = _table(
    Measure(name="bpd", label="bits/dim", unit="bits/dim", direction="none"),
    Measure(name="bpd_se", label="standard error of bits/dim", unit="bits/dim", direction="less", low=0),
    Measure(name="bpd_ref", label="reference bits/dim", unit="bits/dim", direction="none"),
    Measure(name="ref_se", label="error of the reference", unit="bits/dim", direction="less", low=0),
    Measure(name="bpd_error", label="bias", unit="bits/dim", direction="zero"),
    Measure(name="bpd_mae", label="mean |error|", unit="bits/dim", direction="less", low=0),
    Measure(name="bpd_rmse", label="root mean squared error", unit="bits/dim", direction="less", low=0),
    Measure(name="bpd_err_p95", label="95th percentile of |error|", unit="bits/dim", direction="less", low=0),
    Measure(name="spearman", label="rank correlation", unit="", direction="more", low=-1, high=1),
    Measure(name="stderr_mean", label="own standard error", unit="bits/dim", direction="less", low=0),
    Measure(
        name="coverage95", label="coverage of 95 % error bars", unit="share", direction="none", low=0, high=1
    ),
    Measure(
        name="invalid_share", label="share of invalid values", unit="share", direction="less", low=0, high=1
    ),
    Measure(name="mass", label="mass", unit="", direction="one", low=0),
    Measure(name="cycle_error", label="cycle error", unit="data units", direction="less", low=0),
    Measure(name="frechet", label="Frechet distance", unit="", direction="less", low=0),
    Measure(name="nfe_mean", label="network evaluations", unit="NFE / sample", direction="less", low=0),
    Measure(
        name="nfe_max", label="largest number of evaluations", unit="NFE / sample", direction="less", low=0
    ),
    Measure(name="vjp_mean", label="vector-Jacobian products", unit="per sample", direction="less", low=0),
    Measure(name="jvp_mean", label="Jacobian-vector products", unit="per sample", direction="less", low=0),
    Measure(name="work", label="forwards + products", unit="per sample", direction="less", low=0),
    Measure(name="wall_s_median", label="wall-clock", unit="s", direction="less", low=0),
    Measure(name="cpu_s_median", label="CPU time", unit="s", direction="less", low=0),
    Measure(name="forward_equivalents", label="cost in forwards", unit="forwards", direction="less", low=0),
    Measure(name="items_per_s", label="items per second", unit="1/s", direction="more", low=0),
    Measure(name="peak_bytes", label="peak memory", unit="bytes", direction="less", low=0),
)

SCHEMA_VERSION = 1

COLUMN_GROUPS: dict[str, tuple[str, ...]] = {
    "identity": ("schema_version", "run_id", "cell_id", "created_utc", "repeat"),
    "estimator": (
        *("estimator", "estimator_label", "family", "params", "steps", "solver", "rtol", "atol"),
        *("trace", "probes", "noise"),
    ),
    "task": (
        *("task", "model", "model_hash", "data_hash", "split", "n_items", "dim", "batch_size", "dtype"),
        *("device", "seed", "compiled", "estimator_version"),
    ),
    "status": ("status", "reason"),
    "cost": (
        *(
            "nfe_mean",
            "nfe_max",
            "vjp_mean",
            "jvp_mean",
            "work",
            "wall_s_median",
            "wall_s_iqr",
            "cpu_s_median",
        ),
        *("rounds", "forward_equivalents", "items_per_s", "peak_bytes"),
    ),
    "accuracy": (
        *("eps", "bpd", "bpd_se", "bpd_ref", "ref_id", "ref_se", "bpd_error", "bpd_error_lo", "bpd_error_hi"),
        *("bpd_mae", "bpd_mae_lo", "bpd_mae_hi", "bpd_rmse", "bpd_err_p95", "spearman", "stderr_mean"),
        *("coverage95", "invalid_share", "mass", "mass_se", "cycle_error", "dequant_draws"),
    ),
    "samples": ("frechet", "frechet_se", "extractor", "n_samples", "kid", "precision", "recall"),
    "extra": ("extra",),
    "environment": ("env_id",),
}

COLUMNS: tuple[str, ...] = tuple(name for group in COLUMN_GROUPS.values() for name in group)
NESTED = ("params", "extra")

TEXT = frozenset(
    (
        *(
            "run_id",
            "cell_id",
            "created_utc",
            "estimator",
            "estimator_label",
            "family",
            "solver",
            "trace",
            "noise",
        ),
        *(
            "task",
            "model",
            "model_hash",
            "data_hash",
            "split",
            "dtype",
            "device",
            "status",
            "reason",
            "ref_id",
        ),
        *("extractor", "env_id"),
    )
)

FINISHED = frozenset(("ok", "refused", "diverged"))
"""Statuses that another attempt would only repeat: `--resume` leaves these cells alone and tries the others again."""

FAILED = frozenset(("refused", "timeout", "oom", "diverged", "error"))
"""Statuses of a cell that failed: they make the exit status 1."""
