"""The one table of columns: what a record holds, and how each of it is read, printed, drawn, compared and explained.

Rows of records, the kinds that the reader accepts, frames, tables, axes, the report's glossary, comparisons and the
columns in docs/records.md all derive from it. A new column is one row at the end of its group; it never raises
`SCHEMA_VERSION`, which the ids of cells hash, and what a column means never changes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass, replace
from typing import Literal

Kind = Literal["text", "number", "flag", "nested"]
Better = Literal["less", "more", "zero", "one", "none"]
Form = Literal["number", "fixed", "count"]

SCHEMA_VERSION = 1

LAST = 99
"""The place of a column that no other has to follow."""


@dataclass(frozen=True)
class Column:
    """One column of the records, or one key of their `extra`."""

    name: str
    meaning: str
    """One line or a few, for the glossary and docs/records.md; neighbours with the same words stand there together."""
    _: KW_ONLY
    group: str = "extra"
    kind: Kind = "number"
    required: bool = False
    """A row without it is no record."""
    unit: str = ""
    better: Better = "none"
    low: float | None = None
    high: float | None = None
    """What the values can be at least and at most, as limits of an axis; None: open."""
    label: str = ""
    """Along an axis."""
    head: str = ""
    """Over a column of the tables and in the report's glossary; empty: in neither."""
    place: int | None = LAST
    """Where it stands in the table of accuracy and cost; None: not there."""
    main: bool = False
    """Stands in that table by itself; the others wait behind a switch, and in LaTeX for `--columns`."""
    form: Form = "number"
    digits: int = 3
    """Significant digits, of the form `fixed` decimals."""
    csv: int | None = None
    """Where it stands in the CSV; what else the table of accuracy and cost shows stands at its end."""
    same_cell: bool = False
    """Rows of two runs that agree in all such columns are the same cell."""
    measured: Literal["", "counted", "timed", "items", "density", "samples"] = ""
    """Of what it is measured: evaluations counted one by one, a clock, the judged items, the whole density, samples."""
    over_seeds: bool = False
    """Its standard deviation over seeds stands beside the mean."""
    compared: str = ""
    """Its name in what `flowlik compare` gives; empty: not there."""
    tolerance: float | None = None
    """A smaller relative difference is rounding, not a finding; None: a difference is no finding by itself."""


def _group(name: str, *columns: Column) -> tuple[Column, ...]:
    return tuple(replace(column, group=name) for column in columns)


_IDENTITY = _group(
    "identity",
    Column("schema_version", "Version of the meaning of the columns, part of every `cell_id`."),
    Column("run_id", "The run that wrote the row.", kind="text"),
    Column(
        "cell_id",
        "Hash of everything that determines the answer; a resumed run skips finished ones.",
        kind="text",
        required=True,
        csv=52,
    ),
    Column("created_utc", "When the row was begun.", kind="text"),
    Column("repeat", "Number of the repeat of the same cell.", same_cell=True, csv=49),
)

_ESTIMATOR = _group(
    "estimator",
    Column("estimator", "Registry name, or `control-mean` and its like.", kind="text", csv=3),
    Column(
        "estimator_label",
        "Name with the parameters that differ from the defaults.",
        kind="text",
        same_cell=True,
        csv=4,
    ),
    Column("family", "Family of estimators.", kind="text"),
    Column("params", "All parameters.", kind="nested"),
    Column("steps", "Fixed steps; none where the steps are adaptive.", csv=6),
    Column("solver", "Solver of the ODE.", kind="text"),
    Column("rtol", "Tolerance of an adaptive solver, relative and absolute."),
    Column("atol", "Tolerance of an adaptive solver, relative and absolute."),
    Column("trace", "How the divergence is taken.", kind="text"),
    Column("probes", "Probes of Hutchinson's trace estimator."),
    Column("noise", "Law of the probes.", kind="text"),
)

_TASK = _group(
    "task",
    Column("task", "Task that the cell is judged on.", kind="text", same_cell=True, csv=1),
    Column("model", "Model that was evaluated; empty for a control.", kind="text", same_cell=True, csv=5),
    Column("model_hash", "Hash of the model's weights or constants.", kind="text", csv=50),
    Column("data_hash", "Hash of the split's data.", kind="text", csv=51),
    Column("split", "`test`, `train` or `teacher-samples`.", kind="text", same_cell=True, csv=2),
    Column("n_items", "Items judged.", head="items", place=7, form="count", same_cell=True, csv=9),
    Column("dim", "Dimensions of one item.", csv=10),
    Column("batch_size", "Items in a batch.", same_cell=True, csv=47),
    Column("dtype", "Number format of the evaluation.", kind="text", same_cell=True, csv=45),
    Column("device", "Device of the evaluation.", kind="text", same_cell=True, csv=46),
    Column("seed", "Seed of probes and samples.", same_cell=True, csv=48),
    Column("compiled", "Whether the network was compiled.", kind="flag"),
    Column("estimator_version", "Version of the estimator's answers."),
)

_STATUS = _group(
    "status",
    Column("status", "What became of the cell, see below.", kind="text", required=True, csv=7),
    Column("reason", "Why there is no result, or a note on one.", kind="text", csv=8),
)

_COST = _group(
    "cost",
    Column(
        "nfe_mean",
        "Evaluations of the network for one sample (forwards), counted by a wrapper around the network. Guidance "
        "that calls two networks counts two. Published NFE are forwards only, which flatters an estimator that "
        "also takes derivatives at every node.",
        unit="forwards per sample",
        better="less",
        low=0,
        label="NFE",
        head="NFE",
        place=1,
        main=True,
        form="count",
        csv=12,
        measured="counted",
        compared="nfe",
    ),
    Column(
        "nfe_max",
        "The largest number of forwards of any sample.",
        unit="forwards per sample",
        better="less",
        low=0,
        label="largest NFE",
        measured="counted",
    ),
    Column(
        "vjp_mean",
        "Vector-Jacobian products for one sample.",
        unit="per sample",
        better="less",
        low=0,
        label="vector-Jacobian products",
        csv=13,
        measured="counted",
    ),
    Column(
        "jvp_mean",
        "Jacobian-vector products for one sample.",
        unit="per sample",
        better="less",
        low=0,
        label="Jacobian-vector products",
        csv=14,
        measured="counted",
    ),
    Column(
        "work",
        "Forwards + vector-Jacobian products + Jacobian-vector products for one sample. Counted and exact: the same "
        "on every machine. The exact trace of a d-dimensional field costs d products at every node.",
        unit="per sample",
        better="less",
        low=0,
        label="forwards + products",
        head="work",
        place=2,
        main=True,
        form="count",
        csv=15,
        measured="counted",
        compared="work",
    ),
    Column(
        "wall_s_median",
        "Median wall-clock time of a round over the timed batch, after a warm-up.",
        unit="s",
        better="less",
        low=0,
        label="wall-clock",
        csv=18,
        measured="timed",
    ),
    Column(
        "wall_s_iqr",
        "Interquartile range of the rounds' wall-clock times.",
        unit="s",
        better="less",
        low=0,
        csv=19,
        measured="timed",
    ),
    Column(
        "cpu_s_median",
        "Median CPU time of a round over the timed batch.",
        unit="s",
        better="less",
        low=0,
        label="CPU time",
        measured="timed",
    ),
    Column("rounds", "Timed rounds.", measured="timed"),
    Column(
        "forward_equivalents",
        "Measured CPU time (device time on a GPU) of the estimate over that of one forward pass on the same batch, "
        "both timed in turn. It carries over between machines roughly, not exactly.",
        unit="time / one forward",
        better="less",
        low=0,
        label="forward-equivalents",
        head="forward-equivalents",
        place=14,
        csv=16,
        measured="timed",
    ),
    Column(
        "items_per_s",
        "Items of the timed batch over `wall_s_median`.",
        unit="1/s",
        better="more",
        low=0,
        label="items per second",
        csv=17,
        measured="timed",
    ),
    Column(
        "peak_bytes",
        "Peak memory.",
        unit="bytes",
        better="less",
        low=0,
        label="peak memory",
        csv=20,
        measured="timed",
    ),
)

_ACCURACY = _group(
    "accuracy",
    Column("eps", "The data end lies at t = 1 − eps.", csv=11),
    Column(
        "bpd",
        "−log p / (d ln 2); for images of L grey levels scaled to [−1, 1], log₂(L/2) is added, so that the uniform "
        "density has log₂ L (not for the teacher's own samples, which are continuous). The aim is the reference, not a "
        "low number.",
        unit="bits/dim",
        label="bits/dim",
        head="bits/dim",
        place=8,
        form="fixed",
        csv=21,
        measured="items",
        over_seeds=True,
        compared="bpd",
        tolerance=1e-3,
    ),
    Column(
        "bpd_se",
        "Standard error of `bpd` over the items.",
        unit="bits/dim",
        better="less",
        low=0,
        label="standard error of bits/dim",
        csv=22,
        measured="items",
    ),
    Column(
        "bpd_ref",
        "Mean of the reference over the items; of images over the dequantisations that have one, to which the errors "
        "and the rank correlation belong.",
        unit="bits/dim",
        label="reference",
        csv=23,
        measured="items",
    ),
    Column("ref_id", "Which reference.", kind="text", csv=24),
    Column(
        "ref_se",
        "The reference's own error.",
        unit="bits/dim",
        better="less",
        low=0,
        label="error of the reference",
        csv=25,
        measured="items",
    ),
    Column(
        "bpd_error",
        "Mean over the items of estimate minus reference. A constant can have no bias and know nothing.",
        unit="bits/dim",
        better="zero",
        label="bias",
        head="bias",
        place=4,
        main=True,
        digits=2,
        csv=26,
        measured="items",
    ),
    Column(
        "bpd_error_lo",
        "95 % interval of the bias by the studentised bootstrap; none below 20 items.",
        unit="bits/dim",
        csv=27,
        measured="items",
    ),
    Column(
        "bpd_error_hi",
        "95 % interval of the bias by the studentised bootstrap; none below 20 items.",
        unit="bits/dim",
        csv=28,
        measured="items",
    ),
    Column(
        "bpd_mae",
        "Mean over the answered items of the absolute difference, in bits/dim: with `bpd_mae_all` the number to judge "
        "by.",
        unit="bits/dim",
        better="less",
        low=0,
        label="mean |error|",
        head="mean |error|",
        place=3,
        main=True,
        digits=2,
        csv=29,
        measured="items",
        compared="mae",
        tolerance=1e-3,
    ),
    Column(
        "bpd_mae_lo",
        "95 % interval of it by the studentised bootstrap; none below 20 items.",
        unit="bits/dim",
        low=0,
        csv=30,
        measured="items",
    ),
    Column(
        "bpd_mae_hi",
        "95 % interval of it by the studentised bootstrap; none below 20 items.",
        unit="bits/dim",
        low=0,
        csv=31,
        measured="items",
    ),
    Column(
        "bpd_rmse",
        "Root of the mean squared difference.",
        unit="bits/dim",
        better="less",
        low=0,
        label="root mean squared error",
        csv=32,
        measured="items",
    ),
    Column(
        "bpd_err_p95",
        "95 % of the items have a smaller absolute error.",
        unit="bits/dim",
        better="less",
        low=0,
        label="95th percentile of |error|",
        head="p95 |error|",
        place=9,
        digits=2,
        csv=33,
        measured="items",
    ),
    Column(
        "spearman",
        "Rank correlation of estimate and reference over the items; none where the truth is constant.",
        better="more",
        low=-1,
        high=1,
        label="Spearman ρ",
        head="Spearman",
        place=5,
        main=True,
        form="fixed",
        csv=34,
        measured="items",
    ),
    Column(
        "stderr_mean",
        "Mean of the standard error that the estimator itself gives.",
        unit="bits/dim",
        better="less",
        low=0,
        label="own standard error",
        csv=35,
        measured="items",
    ),
    Column(
        "coverage95",
        "Share of items whose reference lies in the 95 % error bar the estimator itself gives.",
        unit="share",
        low=0,
        high=1,
        label="coverage of 95 % error bars",
        head="coverage",
        place=10,
        form="fixed",
        digits=2,
        csv=36,
        measured="items",
    ),
    Column(
        "invalid_share",
        "Share of items without a usable value: not finite, or below 0 bits/dim on discrete data.",
        unit="share",
        better="less",
        low=0,
        high=1,
        label="share of invalid values",
        head="invalid",
        place=11,
        digits=2,
        csv=37,
        measured="items",
    ),
    Column(
        "mass",
        "Integral of the estimated density, by quadrature on the 2-D grid, above by sampling; it should be 1.",
        better="one",
        low=0,
        label="mass",
        head="mass",
        place=12,
        digits=4,
        csv=38,
        measured="density",
    ),
    Column("mass_se", "Standard error of a mass that was sampled.", better="less", low=0, measured="density"),
    Column(
        "cycle_error",
        "Mean distance between an item and itself after data → noise → data through the same map.",
        unit="data units",
        better="less",
        low=0,
        label="cycle error",
        head="cycle error",
        place=16,
        digits=2,
        csv=39,
        measured="items",
    ),
    Column(
        "bpd_mae_all",
        "Mean |error| with an item without an answer counted at the largest mean |error| of the task's controls, so "
        "that answering only what is easy does not pay; where all are answered it is `bpd_mae`. Tables, figures and "
        "the progress line show it.",
        unit="bits/dim",
        better="less",
        low=0,
        label="mean |error|",
        measured="items",
    ),
    Column(
        "bpd_mae_all_lo",
        "95 % interval of `bpd_mae_all`.",
        unit="bits/dim",
        low=0,
        measured="items",
    ),
    Column(
        "bpd_mae_all_hi",
        "95 % interval of `bpd_mae_all`.",
        unit="bits/dim",
        low=0,
        measured="items",
    ),
    Column("dequant_draws", "Dequantisations of each item of discrete data, of which `bpd` is a bound."),
    Column(
        "dequant_noise",
        "Their noise, where it is not uniform: `truncated normal` and the standard deviations at which a cell ends. "
        "Its density is taken off the estimate and the reference.",
        kind="text",
        same_cell=True,
    ),
)

_NEAR = (
    "Share of samples near real items, and of real items near samples: fidelity and diversity. In the features of "
    "the Fréchet distance, or in data space where a task has no feature network."
)

_SAMPLES = _group(
    "samples",
    Column(
        "frechet",
        "Fréchet distance of feature statistics; an FID only where the extractor is Inception.",
        better="less",
        low=0,
        label="Fréchet distance",
        head="Fréchet",
        place=13,
        csv=40,
        measured="samples",
        over_seeds=True,
        compared="frechet",
    ),
    Column(
        "frechet_se",
        "Standard error of the distance over draws of the samples.",
        better="less",
        low=0,
        csv=41,
        measured="samples",
    ),
    Column(
        "extractor",
        "The feature network; `inception-2015-12-05` makes `frechet` an FID and `kid` a KID.",
        kind="text",
        csv=42,
    ),
    Column("n_samples", "Samples drawn.", csv=43),
    Column(
        "kid",
        "Kernel distance of the features.",
        better="less",
        label="kernel distance",
        measured="samples",
        over_seeds=True,
    ),
    Column(
        "precision",
        _NEAR,
        unit="share",
        better="more",
        low=0,
        high=1,
        label="precision",
        head="precision",
        place=None,
        measured="samples",
        over_seeds=True,
    ),
    Column(
        "recall",
        _NEAR,
        unit="share",
        better="more",
        low=0,
        high=1,
        label="recall",
        head="recall",
        place=None,
        measured="samples",
        over_seeds=True,
    ),
)

TABLE: tuple[Column, ...] = (
    *(*_IDENTITY, *_ESTIMATOR, *_TASK, *_STATUS, *_COST, *_ACCURACY, *_SAMPLES),
    Column("extra", "One dict with what follows.", kind="nested"),
    Column("env_id", "Row of `environments.jsonl`.", group="environment", kind="text"),
)
"""The columns of a record, in its order."""

EXTRA: tuple[Column, ...] = (
    Column(
        "options", "The options of the cell, from which `flowlik reproduce` builds it again.", kind="nested"
    ),
    Column("hardware", "What the cell was timed on.", kind="text"),
    Column("cell_s", "Time from preparing the cell to its row.", unit="s", measured="timed"),
    Column("batch_size_asked", "What was asked for where that was `auto`.", kind="text"),
    Column("batch_size_used", "Items in a batch where memory ran out and it was halved."),
    Column(
        "examination",
        "What the examination of the model found, one line a finding; absent where it found nothing.",
        kind="text",
    ),
    Column("not_compiled", "Why the network was not compiled.", kind="text"),
    Column("timing_batch", "Items timed at once.", measured="timed"),
    Column("workers_lost", "Processes or machines that vanished over the cell."),
    Column(
        "abs_nats_median", "Absolute error of an item.", unit="nats", better="less", low=0, measured="items"
    ),
    Column(
        "abs_nats_mean", "Absolute error of an item.", unit="nats", better="less", low=0, measured="items"
    ),
    Column("abs_nats_max", "Absolute error of an item.", unit="nats", better="less", low=0, measured="items"),
    Column("interior_bias", "On the checkerboard: of points at least 0.1 from an edge.", unit="bits/dim"),
    Column("interior_mae", "On the checkerboard: of points at least 0.1 from an edge.", unit="bits/dim"),
    Column("outside_share", "On the checkerboard: points off the support that are seen to be.", unit="share"),
    Column("mass_on", "`items` where a mass was sampled on the reference's own draws alone.", kind="text"),
    Column("density_invalid_share", "Points of the grid without a value.", unit="share", measured="density"),
    Column(
        "agreement_mae",
        "Where densities are drawn: how far apart the likelihood found while sampling and that of the same points on "
        "the way back are.",
        unit="bits/dim",
    ),
    Column(
        "ode_gap",
        "Of the bound of a diffusion, where the reference is the likelihood of the same network's ODE: their mean "
        "difference, its standard error, and its spread over the items without the noise of the draws. Zero for the "
        "true field; of a trained one they are two numbers.",
        unit="bits/dim",
        measured="items",
    ),
    Column("ode_gap_se", "See `ode_gap`.", unit="bits/dim", measured="items"),
    Column("ode_gap_sd", "See `ode_gap`.", unit="bits/dim", measured="items"),
    Column(
        "bpd_iw",
        "Of discrete data with several dequantisations: −log₂ P / d with the mass P of the item's cell by the mean of "
        "the draws' densities (importance-weighted over `dequant_draws`); `bpd`, the mean of their logarithms, is its "
        "upper bound.",
        unit="bits/dim",
        label="importance-weighted bits/dim",
        head="bits/dim, importance-weighted, K draws",
        main=True,
        form="fixed",
        measured="items",
    ),
    Column(
        "bpd_iw_error",
        "Error of `bpd_iw` by too few draws: standard error and bias by the jackknife.",
        unit="bits/dim",
        better="less",
        low=0,
        measured="items",
    ),
    Column(
        "iw_one_draw_share",
        "Items whose cell is decided by one draw: their effective number of draws is below 2.",
        unit="share",
        better="less",
        low=0,
        high=1,
        measured="items",
    ),
    Column(
        "cells_above_one",
        "Items whose cell holds more than mass 1 by more than its error, of 8 draws and more: no likelihood, whatever "
        "its mean.",
        unit="share",
        better="zero",
        low=0,
        high=1,
        measured="items",
    ),
    Column("sample_nfe", "Forwards of a sample.", unit="forwards per sample", measured="counted"),
    Column("frechet_lo", "95 % interval of the distance.", measured="samples"),
    Column("frechet_hi", "95 % interval of the distance.", measured="samples"),
    Column("frechet_resampled", "Bootstrap values of the distance.", kind="nested", measured="samples"),
    Column("real_images", "Real images that samples were held against."),
    Column(
        "energy_distance",
        "Energy distance of samples to data, where there is no feature network.",
        better="less",
        label="energy distance",
        measured="samples",
        over_seeds=True,
    ),
    Column("energy_distance_se", "Its standard error.", measured="samples"),
    Column(
        "samples_bpd",
        "Bits/dim of the samples as continuous data, under the exact density or the converged teacher.",
        unit="bits/dim",
        label="bits/dim of the samples",
        measured="samples",
        over_seeds=True,
    ),
    Column("samples_bpd_se", "Its standard error.", measured="samples"),
    Column("precision_se", "Standard error of the share.", measured="samples"),
    Column("recall_se", "Standard error of the share.", measured="samples"),
    Column("least_mode", "Least covered mode of a mixture.", label="least covered mode", measured="samples"),
    *(
        Column(name, "A dict for each of the [uses](uses.md) that were asked for.", kind="nested")
        for name in ("comparison", "outliers", "importance", "gradient", "routes", "training")
    ),
    Column(
        "classes",
        "Where items have labels, up to 100 of them: lists over the classes, `label`, `items`, and `bpd` and `mae` "
        "(mean |error|, bits/dim) with the ends `_lo` and `_hi` of their 95 % bootstrap intervals. The array `label` "
        "says the class of each item.",
        kind="nested",
    ),
)
"""Keys of `extra`; besides them a task's own measures and what an estimator reports of its items."""

DERIVED: tuple[Column, ...] = (
    Column(
        "ms_per_sample",
        "Median wall-clock time of repeated rounds after a warm-up, divided by the items of the timed batch. Holds "
        "for the machine and the number of threads named under Environment only.",
        group="cost",
        unit="ms per sample",
        better="less",
        low=0,
        label="wall-clock",
        head="ms/sample",
        place=15,
    ),
    Column(
        "cpu_ms_per_sample",
        "The same of CPU time.",
        group="cost",
        unit="ms per sample",
        better="less",
        low=0,
        label="CPU time",
    ),
    Column(
        "flags",
        "What to beware of in a row: an error larger than that of a constant, a mass away from 1, error bars that "
        "cover too few items, items without an answer, few items.",
        group="accuracy",
        kind="text",
        head="flags",
        place=6,
        main=True,
    ),
)
"""What frames add for tables and figures; no record holds it."""

FINISHED = frozenset(("ok", "refused", "diverged"))
"""Statuses that another attempt would only repeat: `--resume` leaves these cells alone and tries the others again."""

FAILED = frozenset(("refused", "timeout", "oom", "diverged", "error"))
"""Statuses of a cell that failed: they make the exit status 1."""


# -------------------------------------------------------------------------------------------------------- what derives
def named(columns: Iterable[Column], *kinds: Kind) -> tuple[str, ...]:
    """Names of columns, of these kinds where any is given."""
    return tuple(column.name for column in columns if not kinds or column.kind in kinds)


BY_NAME: dict[str, Column] = {column.name: column for column in (*EXTRA, *DERIVED, *TABLE)}
COLUMNS: tuple[str, ...] = named(TABLE)
COLUMN_GROUPS: dict[str, tuple[str, ...]] = {
    group: named(column for column in TABLE if column.group == group)
    for group in dict.fromkeys(column.group for column in TABLE)
}
NESTED: tuple[str, ...] = named(TABLE, "nested")
MEASURES: dict[str, Column] = {column.name: column for column in TABLE if column.measured}
COUNTED: tuple[str, ...] = named(column for column in TABLE if column.measured == "counted")
SAME_CELL: tuple[str, ...] = named(column for column in TABLE if column.same_cell)


def axis_label(name: str, separator: str = " ") -> str:
    """What stands along an axis: label and unit.

    >>> axis_label("bpd_mae")
    'mean |error| (bits/dim)'
    """
    column = BY_NAME[name]
    return (
        column.label if column.label.startswith(column.unit) else f"{column.label}{separator}({column.unit})"
    )


def head(name: str) -> str:
    """What stands over a column of a table."""
    column = BY_NAME[name]
    return column.head or column.label
