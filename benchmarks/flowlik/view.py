"""How records are shown to a person: methods and their looks, labels, order, numbers, and the items beside a record.

Figures, tables and the report read records through this module only, so that a method has one name, one colour
and one place in every one of them. Nothing here computes a measure and nothing imports matplotlib.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from flowlik.records import read_arrays, read_records


@dataclass(frozen=True)
class Method:
    """One way of getting a likelihood as a reader tells them apart: a label, a colour (safe for the common
    colour vision deficiencies: Okabe-Ito and Tol), a marker, and a line saying what it is."""

    label: str
    colour: str
    marker: str
    about: str


METHODS: Final[dict[str, Method]] = {
    "ode-adaptive": Method("ODE", "#000000", "s", "probability-flow ODE, adaptive steps"),
    "ode-fixed": Method(
        "ODE, fixed steps", "#009E73", "^", "the same ODE, fixed steps of a higher-order rule"
    ),
    "ode-euler": Method("ODE, Euler", "#E69F00", "v", "the same ODE, fixed Euler steps"),
    "whitened-ode": Method("Whitened ODE", "#CC79A7", "D", "the ODE in moment-whitened coordinates"),
    "meanflow": Method(
        "Plain map", "#D55E00", "X", "few-step map, trace of the Jacobian of its average velocity (invalid)"
    ),
    "flow-map-exact": Method(
        "Exact map", "#A68A00", "h", "few-step map, exact change of variables of every discrete step"
    ),
    "f2d2": Method("F2D2", "#0072B2", "o", "joint flow map: average velocity and average divergence"),
    "self-guidance": Method(
        "Self-guided F2D2", "#661100", "o", "F2D2 sampling from noise moved by its own likelihood"
    ),
    "f2d2-corrected": Method("F2D2 corrected", "#56B4E9", "P", "F2D2 with a control-variate correction"),
    "pi-flow": Method("pi-Flow", "#882255", "p", "policy flow, network-free substeps"),
    "generator": Method("One-step generator", "#44AA99", "*", "square one-step generator"),
    "peer-flow-matching": Method(
        "flow_matching", "#882255", "<", "the flow_matching package's own likelihood"
    ),
    "peer-zuko": Method("zuko", "#A68A00", ">", "the zuko package's own free-form Jacobian"),
    "peer-torchode": Method("torchode", "#5E4FA2", "d", "the torchode package on an augmented field"),
    "control": Method("Control", "#767676", "_", "no estimator at all: what an error must beat"),
}
OTHER: Final = Method("", "#5E4FA2", "d", "registered by a plugin")

NUMERIC: Final[tuple[str, ...]] = (
    *("steps", "rtol", "atol", "probes", "n_items", "dim", "batch_size", "seed", "repeat", "eps"),
    *("nfe_mean", "nfe_max", "vjp_mean", "jvp_mean", "work", "wall_s_median", "wall_s_iqr", "cpu_s_median"),
    *("rounds", "forward_equivalents", "items_per_s", "peak_bytes"),
    *("bpd", "bpd_se", "bpd_ref", "ref_se", "bpd_error", "bpd_error_lo", "bpd_error_hi"),
    *(
        "bpd_mae",
        "bpd_mae_lo",
        "bpd_mae_hi",
        "bpd_rmse",
        "bpd_err_p95",
        "spearman",
        "stderr_mean",
        "coverage95",
    ),
    *("invalid_share", "mass", "mass_se", "cycle_error", "dequant_draws"),
    *("frechet", "frechet_se", "n_samples", "kid", "precision", "recall"),
)
TEXT: Final[tuple[str, ...]] = (
    *("schema_version", "run_id", "cell_id", "created_utc", "estimator", "estimator_label", "family"),
    *("solver", "trace", "noise", "task", "model", "model_hash", "data_hash", "split", "dtype", "device"),
    *("compiled", "estimator_version", "status", "reason", "ref_id", "extractor", "env_id"),
)
CELL: Final[tuple[str, ...]] = (
    "task",
    "split",
    "model",
    "estimator_label",
    "dtype",
    "device",
    "batch_size",
    "n_items",
    "hardware",
    "extractor",
    "n_samples",
)
"""What makes two rows the same cell but for seed and repeat; times of different hardware are never averaged, nor what
different feature networks or numbers of samples say."""

SPREAD: Final = ("bpd", "frechet", "kid", "precision", "recall")
"""Columns whose standard deviation over seeds `averaged` keeps beside their mean, as `<name>_sd`."""
SPREAD_EXTRA: Final = ("energy_distance", "samples_bpd")
"""The same of numbers in `extra`, where mean and `<name>_sd` then stand too."""

SPLIT_ORDER: Final = ("test", "teacher-samples", "train")


def load(run_dir: Path) -> pd.DataFrame:
    """Records of a run, prepared; an empty frame with all columns where there are none yet."""
    path = run_dir / "records.jsonl"
    return prepare(read_records(run_dir) if path.exists() and path.stat().st_size else pd.DataFrame())


def prepare(records: pd.DataFrame) -> pd.DataFrame:
    """Records with every column present, numbers as float64, the latest row of each cell, and columns of labels.

    `method` is a key of METHODS or the estimator's name, `series` a legend label (all but the swept parameters), `row`
    a table label (all parameters), `brief` the same without how an exact trace was taken. Sorted by task, split,
    method, model, steps, NFE.
    """
    frame = records.copy()
    for name in NUMERIC:
        frame[name] = pd.to_numeric(frame[name], errors="coerce") if name in frame else np.nan
        frame[name] = frame[name].astype("float64")
    for name in TEXT:
        column = frame[name] if name in frame else pd.Series([None] * len(frame), index=frame.index)
        frame[name] = [("" if _missing(v) else str(v)) for v in column]
    for name in ("params", "extra"):
        column = frame[name] if name in frame else pd.Series([None] * len(frame), index=frame.index)
        frame[name] = pd.Series(
            [v if isinstance(v, dict) else {} for v in column], index=frame.index, dtype=object
        )
    frame["estimator_label"] = frame["estimator_label"].where(
        frame["estimator_label"] != "", frame["estimator"]
    )
    named = frame["cell_id"] != ""
    frame = pd.concat(
        [frame[named].drop_duplicates(["cell_id", "seed", "repeat"], keep="last"), frame[~named]]
    )
    frame = frame.sort_index()
    frame["hardware"] = [
        "" if math.isnan(seconds) else str(extra.get("hardware") or "")
        for seconds, extra in zip(frame["wall_s_median"], frame["extra"], strict=True)
    ]
    mixed = [name for name in ("dtype", "device") if len(set(frame[name])) > 1]
    mixed += ["hardware"] if len(machines(frame)) > 1 else []
    mixed += ["extractor"] if _several_extractors(frame) else []
    rows = as_dicts(frame)
    frame["method"] = pd.Series([method_of(row) for row in rows], index=frame.index, dtype=object)
    frame["series"] = pd.Series(
        [_label(row, mixed, swept=True) for row in rows], index=frame.index, dtype=object
    )
    frame["row"] = pd.Series(
        [_label(row, mixed, swept=False) for row in rows], index=frame.index, dtype=object
    )
    frame["brief"] = [brief(label) for label in frame["row"]]
    return _sorted(frame)


def _several_extractors(frame: pd.DataFrame) -> bool:
    return any(len(set(part["extractor"]) - {""}) > 1 for _, part in frame.groupby("task"))


def brief(label: str) -> str:
    """A label without how an exact trace was taken: the same values at other costs."""
    return label.replace(", closed trace", "").replace(", exact trace", "")


def as_dicts(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows of a frame as dicts with text keys."""
    return [{str(key): value for key, value in row.items()} for row in frame.to_dict("records")]


def method_of(row: dict[str, Any]) -> str:
    """Key of METHODS for a record; the estimator's own name where no entry fits (a plugin)."""
    if row["family"] == "control" or row["estimator"].startswith("control-"):
        return "control"
    if row["estimator"] == "ode":
        if math.isnan(row["steps"]):
            return "ode-adaptive"
        return "ode-euler" if row["solver"] == "euler" else "ode-fixed"
    return str(row["estimator"])


def look(method: str) -> Method:
    """The look of a method; a plugin's estimator gets a neutral one under its own name."""
    return METHODS.get(method) or Method(method, OTHER.colour, OTHER.marker, OTHER.about)


def parse_label(label: str) -> dict[str, str]:
    """`ode[solver=euler,steps=8]` -> {"solver": "euler", "steps": "8"}; nothing for a bare name."""
    inside = re.search(r"\[(.*)\]\s*$", label)
    pairs = (part.partition("=") for part in inside.group(1).split(",")) if inside else ()
    return {key.strip(): value.strip() for key, sign, value in pairs if sign}


def items(run_dir: Path, cell_id: str) -> dict[str, NDArray[Any]]:
    """Arrays kept beside a record (`items/<cell_id>.npz`); empty where they are missing or unreadable."""
    path = run_dir / "items" / f"{cell_id}.npz"
    if not cell_id or Path(cell_id).name != cell_id or not path.is_file():
        return {}
    try:
        return read_arrays(path)
    except ValueError:
        return {}


def estimate_and_reference(
    stored: dict[str, NDArray[Any]],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """log-densities and their references in nats, both (draws, n); NaN where invalid or not known, (1, 0) without any.

    `stored` holds the arrays of `items`; where it keeps every dequantisation draw, those are taken.
    """
    nothing = np.empty((1, 0))
    estimate, ref = stored.get("log_prob_draws"), stored.get("ref_draws")
    if estimate is None or ref is None:
        estimate, ref = stored.get("log_prob"), stored.get("ref")
    if estimate is None or ref is None or estimate.shape != ref.shape or estimate.ndim not in (1, 2):
        return nothing, nothing
    valid = stored.get("valid", np.ones(estimate.shape[-1], dtype=bool))
    usable = np.isfinite(estimate) & (valid if valid.shape == estimate.shape[-1:] else True)
    estimate = np.where(usable, estimate, np.nan).astype(np.float64)
    return np.atleast_2d(estimate), np.atleast_2d(np.where(np.isfinite(ref), ref, np.nan).astype(np.float64))


def averaged(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per cell: numbers averaged over seeds and repeats, everything else from the first row.

    The column `n_seeds` counts the rows behind each, and those of `SPREAD` have their standard deviation over them
    beside, NaN for a single row, which stays as it is.
    """
    frame = frame.assign(n_seeds=1.0, **{f"{name}_sd": math.nan for name in SPREAD})
    doubled = frame.duplicated(list(CELL), keep=False)
    if not doubled.any():
        return frame
    parts = [frame[~doubled]]
    for _, group in frame[doubled].groupby(list(CELL), dropna=False, sort=False):
        row = group.head(1).copy()
        row[list(NUMERIC)] = group[list(NUMERIC)].mean().to_numpy()
        row["n_seeds"] = float(len(group))
        for name in SPREAD:
            row[f"{name}_sd"] = float(group[name].std(ddof=1))
        row["extra"] = pd.Series([_extra_over_seeds(list(group["extra"]))], index=row.index, dtype=object)
        parts.append(row)
    return _sorted(pd.concat(parts))


def _extra_over_seeds(extras: list[dict[str, Any]]) -> dict[str, Any]:
    """The first row's `extra` with mean and standard deviation of the numbers that all rows have."""
    found = dict(extras[0])
    for name in SPREAD_EXTRA:
        values = [value for extra in extras if isinstance(value := extra.get(name), int | float)]
        if len(values) == len(extras):
            found[name], found[f"{name}_sd"] = float(np.mean(values)), float(np.std(values, ddof=1))
    return found


def from_extra(frame: pd.DataFrame, *path: str) -> pd.Series[float]:
    """A number out of each row's `extra`, by its path of keys; NaN where there is none."""

    def value(extra: Any) -> float:
        for key in path:
            extra = extra.get(key) if isinstance(extra, dict) else None
        return float(extra) if isinstance(extra, int | float) else math.nan

    return pd.Series([value(extra) for extra in frame["extra"]], index=frame.index, dtype="float64")


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
    errors = ("bpd_mae", "bpd_mae_lo", "bpd_mae_hi")
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
    judging = ours.loc[other_route.sort_values(kind="stable").index].query("bpd_mae > 0")
    return pd.concat([frame[~of_generator], judging.drop_duplicates(key)])


def without_segments(model: str) -> str:
    """The name that policy flows of different numbers of segments share: `pi-flow-2-small-k`, `pi-flow-small-k`."""
    return re.sub(r"^(pi-flow(?:-anchored)?)-\d+", r"\1", model)


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


def machines(frame: pd.DataFrame) -> list[str]:
    """The hardware that the timed rows of a frame were made on."""
    return sorted(set(frame["hardware"]) - {""})


def of_machine(frame: pd.DataFrame, machine: str) -> pd.DataFrame:
    """The rows that were timed on this hardware, and those that were not timed."""
    return frame[frame["hardware"].isin(["", machine])]


def usable(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows that hold a result."""
    return frame[frame["status"] == "ok"]


def splits(frame: pd.DataFrame) -> list[str]:
    """Splits present, the held-out one first."""
    known = {name: k for k, name in enumerate(SPLIT_ORDER)}
    return sorted(frame["split"].unique(), key=lambda name: (known.get(name, len(known)), name))


def reference(frame: pd.DataFrame) -> dict[str, Any] | None:
    """The row whose reference stands for a split: of those that know one, the one judged on the most items."""
    known = frame[frame["bpd_ref"].notna()].sort_values("n_items", kind="stable")
    return as_dicts(known.tail(1))[0] if len(known) else None


def eps_words(frame: pd.DataFrame) -> str:
    """The eps of what is estimated, as words: `0.001`, or `0, 0.001` where cells differ; empty where unknown."""
    return ", ".join(sorted({f"{eps:.4g}" for eps in frame["eps"].dropna()}))


def split_title(split: str) -> str:
    """A split in words."""
    words = {"test": "test data", "train": "training data", "teacher-samples": "the teacher's own samples"}
    return words.get(split, split or "all data")


def number(value: float, digits: int = 3) -> str:
    """A number for a reader: `digits` significant ones, no exponent between 0.0001 and 99,999, a dash for none."""
    if value is None or not isinstance(value, int | float | np.number) or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if size < -4 or size >= 5:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        text = f"{mantissa}e{int(exponent)}"
    else:
        text = f"{value:.{max(digits - 1 - size, 0)}f}"
    return text.replace("-", "−")


def with_spread(text: str, spread: Any) -> str:
    """A number's text with its standard deviation over seeds, where there are several."""
    return text if spread is None or math.isnan(spread) else f"{text} ± {number(float(spread), 2)}"


def distance_name(extractor: str) -> str:
    """What a Fréchet distance may be called: FID only where the features are those of the Inception network."""
    return "FID" if "inception" in extractor.lower() else "Fréchet distance"


def distance_names(frame: pd.DataFrame) -> str:
    """The name that fits every Fréchet distance of a frame."""
    names = {distance_name(extractor) for extractor in frame["extractor"] if extractor}
    return names.pop() if len(names) == 1 else "Fréchet distance"


def fixed(value: float, places: int = 3) -> str:
    """A number with fixed decimals (columns that are compared down the page), a dash for none."""
    if value is None or not math.isfinite(value):
        return number(value)
    return f"{value:.{places}f}".replace("-", "−")


def slug(text: str) -> str:
    """A file name made of a task or split: letters, digits, dots, dashes and underscores only."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", text).strip("_")[:80] or "unnamed"


def _missing(value: object) -> bool:
    return value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))


def _label(row: dict[str, Any], mixed: list[str], *, swept: bool) -> str:
    """Words for a record: method, the parameters that tell it apart, and (`swept` False) steps and tolerances."""
    method = method_of(row)
    if method == "control":
        return str(row["estimator"])
    params = parse_label(row["estimator_label"])
    solver = params.pop("solver", "") or row["solver"]
    name = look(method).label
    if method in ("ode-adaptive", "ode-fixed"):
        name = f"ODE {solver}".strip()
    elif solver and "solver" in parse_label(row["estimator_label"]) and method != "ode-euler":
        name = f"{name} {solver}"
    steps, rtol, atol = params.pop("steps", None), params.pop("rtol", None), params.pop("atol", None)
    params.pop("segments", None)  # of a policy flow: its steps
    if method == "generator":
        params = {"route": "invert"} | params
    trace = params.pop("trace", None)
    words = [_trace_words(trace, params.pop("probes", "1"))] if trace else []
    words += [f"{value} grid" if key == "grid" else f"{key} {value}" for key, value in params.items()]
    if not swept:
        if steps is not None or not math.isnan(row["steps"]):
            count = int(row["steps"]) if not math.isnan(row["steps"]) else steps
            words.insert(0, f"{count} step{'' if str(count) == '1' else 's'}")
        elif rtol or atol or not math.isnan(row["rtol"]):
            words.insert(0, f"tol {float(rtol) if rtol else row['rtol']:.0e}".replace("e-0", "e-"))
    words += [row[name] for name in mixed if row[name]]
    return ", ".join([name, *[w for w in words if w]])


def without_probes(row: dict[str, Any]) -> str:
    """A row's label without its number of probes."""
    return re.sub(r" ×\d+", "", str(row["row"]))


def _trace_words(trace: str, probes: str) -> str:
    return f"Hutchinson ×{probes}" if trace == "hutchinson" else f"{trace} trace"


def _sorted(frame: pd.DataFrame) -> pd.DataFrame:
    rank = {name: k for k, name in enumerate(METHODS)}
    known = {name: k for k, name in enumerate(SPLIT_ORDER)}
    keys = pd.DataFrame(
        {
            "task": frame["task"],
            "split": [(known.get(s, len(known))) for s in frame["split"]],
            "method": [rank.get(m, len(rank) - 1.5) for m in frame["method"]],
            "model": frame["model"],
            "series": frame["series"],
            "steps": frame["steps"].fillna(np.inf),
            "nfe": frame["nfe_mean"].fillna(np.inf),
        },
        index=frame.index,
    )
    order = keys.sort_values(list(keys.columns), kind="stable").index
    return frame.loc[order].reset_index(drop=True)
