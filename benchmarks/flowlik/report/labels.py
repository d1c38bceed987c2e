"""Methods as a reader tells them apart: labels, colours, markers, names of splits and distances."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Final

import pandas as pd


@dataclass(frozen=True)
class Method:
    """One way of getting a likelihood as a reader tells them apart: a label, a colour (safe for the common
    colour vision deficiencies: Okabe-Ito and Tol), a marker, and a line saying what it is."""

    label: str
    colour: str
    marker: str
    about: str
    line: str = ""
    """Line style; empty: by the kind of model."""


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
    "energy": Method("Scalar network", "#332288", "d", "one scalar network that regresses the log-density"),
    "exact-flow": Method("Exact flow", "#117733", "s", "an invertible network's own change of variables"),
    "elbo": Method("Diffusion bound", "#AA4499", "h", "simulation-free, the bound of the diffusion"),
    "pi-flow": Method("pi-Flow", "#882255", "p", "policy flow, network-free substeps"),
    "generator": Method("One-step generator", "#44AA99", "*", "square one-step generator"),
    "peer-flow-matching": Method(
        "flow_matching", "#882255", "<", "the flow_matching package's own likelihood"
    ),
    "peer-zuko": Method("zuko", "#A68A00", ">", "the zuko package's own free-form Jacobian"),
    "peer-torchode": Method("torchode", "#5E4FA2", "d", "the torchode package on an augmented field"),
    "peer-diffrax": Method("diffrax", "#D55E00", "H", "the diffrax package (JAX), compiled"),
    "control": Method("Control", "#767676", "_", "no estimator at all: what an error must beat"),
}

OTHER: Final = Method("", "#5E4FA2", "d", "registered by a plugin")
MARKERS: Final = frozenset("os^v<>dDpPXxh+*H8")
"""What `look` may name."""

SPLIT_ORDER: Final = ("test", "teacher-samples", "train")


def as_dicts(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows of a frame as dicts with text keys."""
    return [{str(key): value for key, value in row.items()} for row in frame.to_dict("records")]


def brief(label: str) -> str:
    """A label without how an exact trace was taken: the same values at other costs."""
    return label.replace(", closed trace", "").replace(", exact trace", "")


def method_of(row: dict[str, Any]) -> str:
    """Key of METHODS for a record; the estimator's own name where no entry fits (a plugin)."""
    if row["family"] == "control" or row["estimator"].startswith("control-"):
        return "control"
    if row["estimator"] == "ode":
        if math.isnan(row["steps"]):
            return "ode-adaptive"
        return "ode-euler" if row["solver"] == "euler" else "ode-fixed"
    return str(row["estimator"])


def method_named(method: str) -> Method:
    """Label, colour, marker and line of a method; of a plug-in's estimator those of its `look`, or neutral ones."""
    return METHODS.get(method) or _plugged_in(method)


@cache
def _plugged_in(method: str) -> Method:
    """What an estimator class says of itself in `look`, a dict with any of label, colour, marker and line."""
    from flowlik_estimators import available  # loads torch, which the suite's own methods need not

    neutral = Method(method, OTHER.colour, OTHER.marker, OTHER.about)
    try:
        kind = available().get(method)
    except ValueError:  # of two plug-ins with one name; drawing says nothing of it
        return neutral
    look = {key: str(value) for key, value in dict(getattr(kind, "look", {})).items()}
    if not re.fullmatch(r"#[0-9a-fA-F]{6}", look.get("colour", OTHER.colour)):
        look.pop("colour")
    valid = {"marker": MARKERS, "line": ("-", "--", ":", "-.")}
    kept = {key: value for key, value in look.items() if key not in valid or value in valid[key]}
    known = {key: kept[key] for key in ("label", "colour", "marker", "line", "about") if kept.get(key)}
    return replace(neutral, **known)


def parse_label(label: str) -> dict[str, str]:
    """`ode[solver=euler,steps=8]` -> {"solver": "euler", "steps": "8"}; nothing for a bare name.

    >>> parse_label("ode[solver=euler,steps=8]")
    {'solver': 'euler', 'steps': '8'}
    """
    inside = re.search(r"\[(.*)\]\s*$", label)
    pairs = (part.partition("=") for part in inside.group(1).split(",")) if inside else ()
    return {key.strip(): value.strip() for key, sign, value in pairs if sign}


def without_segments(model: str) -> str:
    """The name that policy flows of different numbers of segments share: `pi-flow-2-small-k`, `pi-flow-small-k`."""
    return re.sub(r"^(pi-flow(?:-anchored)?)-\d+", r"\1", model)


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


def distance_name(extractor: str) -> str:
    """What a Fréchet distance may be called: FID only where the features are those of the Inception network."""
    return "FID" if "inception" in extractor.lower() else "Fréchet distance"


def distance_names(frame: pd.DataFrame) -> str:
    """The name that fits every Fréchet distance of a frame."""
    names = {distance_name(extractor) for extractor in frame["extractor"] if extractor}
    return names.pop() if len(names) == 1 else "Fréchet distance"


def slug(text: str) -> str:
    """A file name made of a task or split: letters, digits, dots, dashes and underscores only.

    >>> slug("my task/v2")
    'my_task_v2'
    """
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
    name = method_named(method).label
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
