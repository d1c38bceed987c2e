"""The report of a run: one HTML file that holds its figures, tables, statuses and environment and needs no network.

Everything shown comes from the run's folder; nothing is measured or drawn anew, except that figures are drawn where
the folder has none. Every text that stems from a record is escaped by the template.
"""

from __future__ import annotations

import base64
import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from flowlik import view
from flowlik.published import beside_published
from flowlik.records import run_note
from flowlik.table import MASS_WITHIN, Cell, Table, by_steps, in_detail, mass_cell
from flowlik.use_tables import use_tables

BUDGETS: Final[tuple[tuple[str, float], ...]] = (("1 NFE", 1.0), ("≤ 8 NFE", 8.0), ("any NFE", math.inf))
PIXEL: Final = 0.78
"""CSS pixels a pixel of a figure is shown at, at most."""

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


@dataclass(frozen=True)
class Picture:
    """A figure as it stands in the page: the PNG inlined, its words, its size in CSS pixels."""

    title: str
    how: str
    alt: str
    source: str
    width: int
    height: int


@dataclass(frozen=True)
class Section:
    """Everything the page says about one task."""

    anchor: str
    task: str
    about: str
    facts: tuple[tuple[str, str], ...]
    pictures: tuple[Picture, ...]
    tables: tuple[Table, ...]
    masses: Table | None


def write_report(run_dir: Path) -> Path:
    """Write `report.html` of a run into its folder and return its path; a run without records says so.

    Figures are taken from `run_dir/figures` and drawn first where that folder holds none.
    """
    records = view.load(run_dir)
    if len(records) and not any((run_dir / "figures").glob("*.png")):
        from flowlik.figures import draw_all

        draw_all(run_dir)
    usable = view.averaged(view.usable(records))
    template = Environment(
        loader=PackageLoader("flowlik", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("report.html.j2")
    page = template.render(
        run=_run(run_dir, records),
        counts=[(str(status), int(n)) for status, n in records["status"].value_counts().items()],
        total=len(records),
        glance=_glance(usable),
        overview=_overview(run_dir, usable),
        scaling=_scaling(run_dir, usable),
        sections=[_section(run_dir, str(task), usable) for task in sorted(usable["task"].unique())],
        impossible=_impossible(usable),
        failed=_failed(records),
        notes=_notes(usable),
        origins=_origins(usable),
        environments=_environments(run_dir),
        methods=[looks for name, looks in view.METHODS.items() if name in set(records["method"])],
        costs=COSTS,
        measures=MEASURES,
        controls=CONTROLS,
        mass_within=MASS_WITHIN,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    path = run_dir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


# --------------------------------------------------------------------------------------------------------- the run


def _run(run_dir: Path, records: pd.DataFrame) -> dict[str, str]:
    known = run_note(run_dir)
    argv = known.get("argv")
    return {
        "name": run_dir.resolve().name,
        "suite": _words(known.get("suite")),
        "command": " ".join(str(a) for a in argv) if isinstance(argv, list) else _words(argv),
        "started": _words(known.get("started")),
        "finished": _words(known.get("finished")),
        "ids": ", ".join(sorted(set(records["run_id"]) - {""})),
    }


def _environments(run_dir: Path) -> list[list[tuple[str, str]]]:
    """Every environment of the run as name and words, nested ones flattened, each once."""
    try:
        lines = (run_dir / "environments.jsonl").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    found: dict[str, list[tuple[str, str]]] = {}
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            found[str(row.get("env_id", line))] = list(_flat(row))
    return list(found.values())


def _flat(row: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Names and words of an environment; what it does not know is left out."""
    for name, value in row.items():
        if value is None:
            continue
        if isinstance(value, dict):
            yield name, ", ".join(f"{key} {_words(inner)}" for key, inner in value.items())
        elif name.endswith("_bytes") and isinstance(value, int | float):
            yield name.removesuffix("_bytes").replace("_", " "), f"{value / 2**30:.1f} GiB"
        elif name == "argv" and isinstance(value, list):
            yield "command", " ".join(str(a) for a in value)
        else:
            yield name, _words(value)


def _words(value: object) -> str:
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


# -------------------------------------------------------------------------------------------------------- at a glance


def _glance(usable: pd.DataFrame) -> Table | None:
    """Per task and split the reference, the best control and the smallest error within each budget of NFE."""
    rows = []
    for task, split, frame in _parts(usable):
        judged = frame[frame["bpd_mae"].notna()]
        methods, controls = judged[judged["method"] != "control"], judged[judged["method"] == "control"]
        if methods.empty:
            continue
        best = [_best(methods[methods["nfe_mean"] <= budget]) for _, budget in BUDGETS]
        row = view.reference(frame)
        ref = row["bpd_ref"] if row else math.nan
        name = (
            f"{task}, {view.split_title(split)}"
            if len(view.splits(usable[usable["task"] == task])) > 1
            else task
        )
        rows.append((Cell(name), Cell(view.fixed(ref), ref), _best(controls), *best))
    if not rows:
        return None
    heads = ("task", "reference", "best control", *(f"best at {name}" for name, _ in BUDGETS))
    return Table("At a glance", heads, tuple(rows), names=1)


def _best(frame: pd.DataFrame) -> Cell:
    """The smallest error with, on a second line, whose it is."""
    if frame.empty:
        return Cell("–")
    row = frame.sort_values("bpd_mae", kind="stable").iloc[0]
    whose = row["row"] if row["method"] == "control" or not row["model"] else f"{row['row']} · {row['model']}"
    return Cell(f"{view.number(row['bpd_mae'], 2)}\n{whose}", float(row["bpd_mae"]))


def _parts(usable: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    for task in sorted(usable["task"].unique()):
        of_task = usable[usable["task"] == task]
        for split in view.splits(of_task):
            yield str(task), split, of_task[of_task["split"] == split]


# ------------------------------------------------------------------------------------------------------------- tasks


def _section(run_dir: Path, task: str, usable: pd.DataFrame) -> Section:
    frame = usable[usable["task"] == task]
    likelihoods = frame[frame["bpd"].notna()]
    tables = [table for _, _, part in _parts(likelihoods) for table in beside_published(part)]
    tables += [make(part) for _, _, part in _parts(likelihoods) for make in (by_steps, in_detail)]
    tables += [table for _, _, part in _parts(frame) for table in use_tables(part)]
    return Section(
        anchor=f"task-{view.slug(task)}",
        task=task,
        about=_about(task),
        facts=_facts(frame),
        pictures=tuple(_pictures(run_dir, task, frame)),
        tables=tuple(table for table in tables if table.rows),
        masses=_masses(frame),
    )


def _about(task: str) -> str:
    from flowlik.tasks import get_task

    try:
        return get_task(task).description
    except ValueError:
        return ""


def _facts(frame: pd.DataFrame) -> tuple[tuple[str, str], ...]:
    """What a reader needs to know of a task before its numbers."""
    facts = [("dimensions", ", ".join(f"{d:.0f}" for d in sorted(frame["dim"].dropna().unique())))]
    for split in view.splits(frame):
        part = frame[frame["split"] == split]
        words = f"{part['n_items'].max():.0f} items"
        row = view.reference(part)
        if row:
            error = f" ± {view.number(row['ref_se'], 1)}" if row["ref_se"] > 0 else ""
            words += f", reference {view.fixed(row['bpd_ref'])}{error} bits/dim ({row['ref_id']})"
        facts.append((view.split_title(split), words))
    eps = view.eps_words(frame)
    if eps:
        words = "p at t = 1 (eps = 0)" if eps == "0" else f"p at t = 1 − eps, eps = {eps}"
        facts.append(("what is estimated", words))
    return tuple(facts)


def _masses(frame: pd.DataFrame) -> Table | None:
    """Mass of every density that was drawn, with the eps of what is estimated."""
    drawn = frame[frame["mass"].notna()]
    if drawn.empty:
        return None
    rows = []
    for row in view.as_dicts(drawn):
        mass = mass_cell(row, 5)
        eps = Cell("–" if math.isnan(row["eps"]) else f"{row['eps']:.4g}", row["eps"])
        rows.append((Cell(row["row"]), Cell(row["model"]), mass, eps))
    return Table(
        f"{frame['task'].iloc[0]}: mass of every density drawn",
        ("method", "model", "mass", "eps"),
        tuple(rows),
        note="In two dimensions by the midpoint rule on the grid of the maps, whose lines fall on the edges of the "
        "density; above by importance sampling, with its standard error. The mass is that of p at t = 1 − eps.",
    )


def _pictures(run_dir: Path, task: str, frame: pd.DataFrame) -> Iterator[Picture]:
    from flowlik.figures import KINDS

    for kind, what in KINDS.items():
        for split in [None, *view.splits(frame)] if what.by_split else [None]:
            for machine in ["", *view.machines(frame)] if what.timed else [""]:
                tail = "".join(f"--{view.slug(part)}" for part in (split, machine) if part)
                path = run_dir / "figures" / f"{view.slug(task)}--{kind}{tail}.png"
                title = what.title + (f", {view.split_title(split)}" if split else "")
                title += f", times of {machine}" if machine else ""
                picture = _picture(path, title, what.how, f"{title}, task {task}. {_alt(kind, frame, split)}")
                if picture is not None:
                    yield picture


def _overview(run_dir: Path, usable: pd.DataFrame) -> Picture | None:
    how = (
        "Mean absolute error per sample in bits/dim, darker is worse: a row is a method on exact fields or on networks "
        "(the best of several), with its fewest and its most steps; one column per task and split."
    )
    tasks = ", ".join(sorted(usable["task"].unique()))
    alt = f"Heat map of the mean absolute error of every method on {tasks}; the same numbers stand in the tables."
    return _picture(
        run_dir / "figures" / "overview.png", "Per-sample error of every method on every task", how, alt
    )


def _scaling(run_dir: Path, usable: pd.DataFrame) -> list[Picture]:
    how = (
        "CPU seconds of a call against the number of dimensions, items in the batch, probes and steps; in brackets the "
        "fitted slope of each line (1: proportional). The dimensions are those of Gaussians with an image-like "
        "spectrum, whose field costs two d x d products. CPU time varies between machines and hours, slopes less."
    )
    alt = "Four panels of lines on logarithmic axes; the slopes stand in the legends."
    folder, title = run_dir / "figures", "Cost against size"
    found = [_picture(folder / "scaling.png", title, how, alt)]
    for machine in view.machines(usable):
        path = folder / f"scaling--{view.slug(machine)}.png"
        found.append(_picture(path, f"{title}, times of {machine}", how, alt))
    return [picture for picture in found if picture is not None]


def _picture(path: Path, title: str, how: str, alt: str) -> Picture | None:
    try:
        data = path.read_bytes()
    except OSError:
        return None
    if data[:8] != b"\x89PNG\r\n\x1a\n" or len(data) < 24:
        return None
    width, height = struct.unpack(">II", data[16:24])
    source = "data:image/png;base64," + base64.b64encode(data).decode("ascii")
    return Picture(title, how, alt.strip(), source, round(width * PIXEL), round(height * PIXEL))


def _alt(kind: str, frame: pd.DataFrame, split: str | None) -> str:
    """In words what the figure shows; the tables of the section hold every number."""
    part = frame if split is None else frame[frame["split"] == split]
    methods = part[part["method"] != "control"]
    names = ", ".join(dict.fromkeys(methods["series"]))
    if kind in ("bpd", "error", "few-steps") and methods["bpd_mae"].notna().any():
        ranked = methods[methods["bpd_mae"].notna()].sort_values("bpd_mae", kind="stable")
        best, worst = ranked.iloc[0], ranked.iloc[-1]
        return (
            f"Methods: {names}. Reference {view.fixed(methods['bpd_ref'].median())} bits/dim. "
            f"Smallest mean error {view.number(best['bpd_mae'], 2)} ({best['row']}), "
            f"largest {view.number(worst['bpd_mae'], 2)} ({worst['row']})."
        )
    if kind == "density":
        shown = methods[methods["mass"].notna()]
        masses = (f"{row['row']} mass {view.number(row['mass'])}" for row in view.as_dicts(shown))
        return f"Panels: the truth where it is known; {'; '.join(masses)}."
    if kind in ("frechet", "samples"):
        shown = methods[methods["frechet"].notna()]
        values = (f"{row['row']} {view.number(row['frechet'])}" for row in view.as_dicts(shown))
        return f"{view.distance_names(shown)}: {'; '.join(values)}."
    if kind in ("samples-and-error", "real-data"):
        few = view.few_steps(view.samples_measured(methods))
        shown = few[few["distance"].notna() & (few["sample_nfe"] == 1)].drop_duplicates(["method", "model"])
        values = (f"{row['model']} {view.number(row['distance'])}" for row in view.as_dicts(shown))
        return f"Distances of one-evaluation samples: {'; '.join(values)}."
    return f"Methods: {names}."


# -------------------------------------------------------------------------------------------- why and what went wrong


def _impossible(usable: pd.DataFrame) -> Table | None:
    """This run's plain maps and Euler solutions: bits/dim by steps, and N times the distance to the reference."""
    kept = usable[
        usable["method"].isin(["meanflow", "ode-euler"]) & usable["steps"].notna() & usable["bpd"].notna()
    ]
    steps = sorted({int(s) for s in kept["steps"]})
    if not steps:
        return None
    rows = []
    for task, split, frame in _parts(kept):
        for series in dict.fromkeys(zip(frame["series"], frame["model"], strict=True)):
            line = frame[(frame["series"] == series[0]) & (frame["model"] == series[1])]
            values = {int(row["steps"]): row for row in view.as_dicts(line)}
            ref = line["bpd_ref"].median()
            cells = [_at(values.get(n), n) for n in steps]
            rows.append(
                (
                    Cell(f"{task}, {view.split_title(split)}"),
                    Cell(f"{series[0]} · {series[1]}"),
                    Cell(view.fixed(ref), float(ref)),
                    *cells,
                )
            )
    heads = ("task", "method · model", "reference", *(f"N = {n}" for n in steps))
    note = (
        "Cells: bits/dim, and in brackets N times the distance to the reference: constant for an a + b/N law."
    )
    return Table("Plain maps and Euler in this run", heads, tuple(rows), note=note)


def _at(row: dict[str, Any] | None, steps: int) -> Cell:
    if row is None:
        return Cell("–")
    scaled = view.number(steps * row["bpd_error"], 2)
    return Cell(f"{view.fixed(row['bpd'], 2)} ({scaled})", float(row["bpd"]))


def _failed(records: pd.DataFrame) -> Table | None:
    """Every cell without a result; cells that share all but the estimator stand in one line."""
    estimators: dict[tuple[str, ...], list[str]] = {}
    for row in view.as_dicts(records[records["status"] != "ok"]):
        key = tuple(str(row[name]) for name in ("task", "split", "model", "status", "reason"))
        estimators.setdefault(key, []).append(str(row["estimator_label"]))
    rows = [
        (
            *(Cell(word or "–") for word in key[:3]),
            Cell(", ".join(labels)),
            *(Cell(word or "–") for word in key[3:]),
        )
        for key, labels in estimators.items()
    ]
    heads = ("task", "split", "model", "estimators", "status", "reason")
    return Table("Cells without a result", heads, tuple(rows), names=6) if rows else None


def _notes(usable: pd.DataFrame) -> Table | None:
    rows = [
        tuple(Cell(row[name] or "–") for name in ("task", "split", "model", "estimator_label", "reason"))
        for row in view.as_dicts(usable[usable["reason"] != ""])
    ]
    heads = ("task", "split", "model", "estimator", "note")
    return Table("Results with a note", heads, tuple(rows), names=5) if rows else None


def _origins(usable: pd.DataFrame) -> Table | None:
    """Which model, data and reference stand behind the numbers."""
    names = ["task", "split", "model", "model_hash", "data_hash", "ref_id"]
    kept = usable.loc[usable["method"] != "control", names].drop_duplicates()
    rows = tuple(tuple(Cell(row[name] or "–") for name in names) for row in view.as_dicts(kept))
    heads = ("task", "split", "model", "model hash", "data hash", "reference")
    return Table("Models, data and references", heads, rows, names=6) if rows else None
