"""What is published of finished runs: figures and the page that shows them, records and the page of answers.

`results/figures/made.json` holds, for each picture, the run it was taken from and the hash of its bytes;
`docs/gallery.md` is made from it alone. A picture that is not the one noted there is shown as "run not recorded".
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from flowlik.records import journal
from flowlik.records.paths import source_root
from flowlik.records.reading import read_rows, run_note
from flowlik.records.writing import to_line
from flowlik.report import recommend
from flowlik_models.files import alone_in, remove_leftovers, write_atomically
from flowlik_models.names import unknown

FIGURES = Path("results/figures")
PAGE = Path("docs/gallery.md")
CHOOSE = Path("docs/choose.md")
RECORDS = Path("results/records")
STATE = "made.json"

ANSWERS: Final = ("quick", "fashion-mnist")
"""Suites whose records come with the package: `flowlik recommend` reads them."""

HEAD = (
    "# Gallery\n\n"
    "The figures in `results/figures`, none of them drawn for this page: `flowlik gallery RUN` copies them from the "
    "folder of a finished run and notes the command, the commit and the day its records tell. "
    "[How to read them](reading-the-results.md).\n"
)


CHOOSE_HEAD = (
    "# Which estimator\n\n"
    "What `flowlik recommend TASK --nfe N` says of the records that come with the package, for one evaluation, for "
    "eight and for any number. Only what a trained network can use is named: no trace in closed form. A *network "
    "trained for it* is a joint map or a scalar network, a *velocity field alone* any flow or diffusion model. In "
    "brackets stands the 95 % interval of the mean |error| per sample. Two methods are told apart where the test of "
    "the difference of their means says so. A budget may also count products (`--work`) or time (`--ms`); `--in RUN` "
    "reads a run of your own. [How to read the measures](reading-the-results.md).\n"
)


@dataclass(frozen=True)
class Shown:
    """A figure to publish: the suite that draws it, its name there, its caption, its name here where that differs."""

    suite: str
    drawn: str
    caption: str
    published: str = ""

    @property
    def name(self) -> str:
        """Its name in `results/figures`, without the ending."""
        return self.published or self.drawn


SHOWN: Final = (
    Shown("quick", "overview", "Per-sample error of every method on every task"),
    Shown("quick", "gmm-64d--error", "A mixture in 64 dimensions: per-sample error against three costs"),
    Shown(
        "quick",
        "digits--error",
        "Digits: per-sample error against three costs, reference the converged teacher",
    ),
    Shown("quick", "gmm-2d--density", "Log-densities of the ring of eight modes, and their masses"),
    Shown("quick", "thin-2d--bpd", "A thin density: bits/dim against network evaluations"),
    Shown(
        "family", "gmm-64d--joint-maps", "Ways to train a joint map: bias, rank correlation, per-sample error"
    ),
    Shown("family", "gmm-2d--training-cost", "The ring: error against training time"),
    Shown("family", "gmm-64d--training-cost", "A mixture in 64 dimensions: error against training time"),
    Shown(
        *("faults", "gmm-64d--joint-maps", "What each fault of the released recipe costs"),
        published="faults--gmm-64d--joint-maps",
    ),
    Shown("rules", "digits--rules", "Solvers that need no training, on the digits teacher at equal forwards"),
    Shown("probes", "digits--probes", "Noise of the trace estimators on the digits teacher"),
    Shown("scaling", "scaling", "Cost against dimension, batch, probes and steps"),
    Shown(
        *("peers", "gmm-64d--error", "Error against cost of ours and of public libraries"),
        published="peers--gmm-64d--error",
    ),
    Shown(
        "fashion-mnist",
        "fashion-mnist--error",
        "Fashion-MNIST: per-sample error against three costs, reference the converged teacher",
    ),
    Shown(
        "cifar10-small", "cifar10--error", "CIFAR-10: per-sample error against three costs, 3,072 dimensions"
    ),
    Shown("few-steps", "gmm-2d--few-steps", "Few-step likelihoods of every kind against three costs"),
    Shown(
        "few-steps",
        "digits--samples-and-error",
        "Digits of one evaluation, and the error of their likelihood",
    ),
    Shown("few-steps", "digits--real-data", "One-step digits distilled with and without real data"),
    Shown("uses", "gmm-2d--comparison", "Ranking models by their estimated likelihoods"),
    Shown("uses", "digits--outliers", "Out-of-distribution detection on digits"),
    Shown("uses", "gmm-2d--importance", "Rare events by importance sampling"),
    Shown("uses", "gmm-2d--gradient", "Gradients of the estimates, in points and in weights"),
    Shown("features", "digits--extractors", "Digits: distances in three feature networks"),
    Shown(
        "guidance", "digits--guidance", "Self-guided few-step samples beside their controls and the teacher"
    ),
)

PLACES: Final = {"--out": "", "--checkpoints": "DIR", "--data-dir": "DIR", "--address": "ADDRESS"}
"""Options whose value is a place of one machine, with what stands for it; "" leaves the option out."""

WITHOUT_EFFECT = {"--resume", "--no-report"}


def publish(runs: Sequence[Path], root: Path) -> list[str]:
    """Take the published figures from `runs` into the source tree `root` and write its page; their names.

    Where several runs have a figure the last one named is taken. Pictures that no run has stay, with what is noted of
    them. Without a run the page alone is written.

    Raises:
        FileNotFoundError: a folder holds no records or no figures.
        ValueError: a run is not finished, or its suite has no published figure.
    """
    taken = [found for run in runs for found in _of_run(run)]
    with alone_in(root / FIGURES):  # what is noted is read and written again
        _write(runs, taken, root)
    return [shown.name for shown, _, _ in taken]


def _write(runs: Sequence[Path], taken: Sequence[tuple[Shown, Path, dict[str, Any]]], root: Path) -> None:
    for folder in (FIGURES, PAGE.parent):
        remove_leftovers(root / folder)
    made = noted(root)
    for shown, picture, entry in taken:
        data = picture.read_bytes()
        write_atomically(root / FIGURES / f"{shown.name}.png", data)
        made[shown.name] = {**entry, "sha256": hashlib.sha256(data).hexdigest()}
    if taken:
        text = json.dumps(made, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        write_atomically(root / FIGURES / STATE, text.encode())
    for run in runs:
        if (suite := _note(run)["suite"]) in ANSWERS:
            write_atomically(root / RECORDS / f"{suite}.jsonl", _numbers(run))
    write_atomically(root / PAGE, page(root).encode())
    if any((root / RECORDS).glob("*.jsonl")):
        write_atomically(root / CHOOSE, choose_page(root).encode())


def need_tree() -> Path:
    """The source tree that is written into; ValueError where there is none."""
    root = source_root()
    if root is None:
        raise ValueError("the gallery is a page of the source tree; this is an installed package")
    return root


def noted(root: Path) -> dict[str, dict[str, Any]]:
    """What is known of the published figures, by name."""
    file = root / FIGURES / STATE
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def page(root: Path) -> str:
    """The page of all pictures in the source tree's `results/figures`."""
    made = noted(root)
    table = {shown.name: shown for shown in SHOWN}
    there = {picture.stem: picture for picture in sorted((root / FIGURES).glob("*.png"))}
    order = [name for name in table if name in there] + [name for name in there if name not in table]
    parts = [_section(there[name], table.get(name), made.get(name)) for name in order]
    return "\n".join([HEAD, *parts])


def choose_page(root: Path) -> str:
    """The page that answers which estimator to use, from the records in the source tree."""
    frame = recommend.load(sorted((root / RECORDS).glob("*.jsonl")))
    parts = [CHOOSE_HEAD]
    for task in sorted(set(frame["task"])):
        answers = [recommend.recommend(frame, task, budget).lines() for budget in (1, 8, math.inf)]
        parts.append(
            f"## {task}\n\n```\n" + "\n".join(line for lines in answers for line in lines) + "\n```\n"
        )
    return "\n".join(parts)


def _numbers(run: Path) -> bytes:
    """The rows of a run as lines, without what is no number of a table."""
    kept = {"timing_batch", "hardware"}
    rows = [{**row, "extra": {k: v for k, v in row["extra"].items() if k in kept}} for row in read_rows(run)]
    return b"".join(map(to_line, rows))


def _section(picture: Path, shown: Shown | None, entry: Mapping[str, Any] | None) -> str:
    caption = shown.caption if shown else picture.stem
    if entry is None or entry["sha256"] != hashlib.sha256(picture.read_bytes()).hexdigest():
        commands, provenance = ([f"flowlik run {shown.suite}"] if shown else []), "Run not recorded."
    else:
        commands, provenance = entry["commands"], _provenance(entry)
    block = "```\n" + "\n".join(commands) + "\n```\n\n" if commands else ""
    return f"## {caption}\n\n![{caption}](../{FIGURES.as_posix()}/{picture.name})\n\n{block}{provenance}\n"


def _provenance(entry: Mapping[str, Any]) -> str:
    commits = ", ".join(f"`{commit[:10]}`" for commit in entry["commits"]) or "not known"
    changed = ", with changed files" if entry["changed"] else ""
    return f"Suite `{entry['suite']}`, finished on {entry['finished']}; commit {commits}{changed}."


def _of_run(run: Path) -> list[tuple[Shown, Path, dict[str, Any]]]:
    """The published figures of a run: which, its picture, what is noted of it."""
    rows = read_rows(run)
    note = _note(run)
    wanted = [shown for shown in SHOWN if shown.suite == note["suite"]]
    if not wanted:
        valid = sorted({shown.suite for shown in SHOWN})
        raise ValueError(f"{run}: {unknown('suite with a published figure', note['suite'], valid)}")
    finished = re.match(r"\d{4}-\d\d-\d\d(?=T)", note["finished"])
    if not finished:
        raise ValueError(f"{run} is not finished: `flowlik run {note['suite']} --out {run} --resume` goes on")
    pictures = [(shown, run / "figures" / f"{shown.drawn}.png") for shown in wanted]
    if not any(picture.is_file() for _, picture in pictures):
        raise FileNotFoundError(
            f"{run} has none of its published figures: `flowlik figures {run}` draws them"
        )
    used = {row["env_id"] for row in rows}
    environments = [row for row in journal.read(run / "environments.jsonl")[0] if row.get("env_id") in used]
    commits = [
        row["commit"] for row in environments if re.fullmatch(r"[0-9a-f]{40}", row.get("commit") or "")
    ]
    entry = {
        "suite": note["suite"],
        "commands": _once([plain_command(row["argv"]) for row in environments if row.get("argv")]),
        "commits": _once(commits),
        "changed": any(row.get("dirty") for row in environments),
        "finished": finished[0],
    }
    return [(shown, picture, entry) for shown, picture in pictures if picture.is_file()]


def _note(run: Path) -> dict[str, str]:
    note = run_note(run)
    if not {"suite", "finished"} <= set(note):
        raise ValueError(f"{run / 'run.json'} cannot be read: a run of `flowlik run` has one")
    return {"suite": str(note["suite"]), "finished": str(note["finished"])}


def _once(values: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(values))


def plain_command(argv: Sequence[str]) -> str:
    """A run's command as anyone can give it: without where it wrote and without places of one machine."""
    kept, arguments = ["flowlik"], iter(argv[1:])
    for argument in arguments:
        option, equals, _ = argument.partition("=")
        if option in PLACES:
            if not equals:
                next(arguments, None)
            kept += [option, PLACES[option]] if PLACES[option] else []
        elif argument not in WITHOUT_EFFECT:
            kept.append(_without_folders(argument))
    return " ".join(shlex.join(kept).replace("`", "'").split())


def _without_folders(argument: str) -> str:
    """An argument that names a file becomes the file's name."""
    return re.split(r"[\\/]", argument)[-1] if re.search(r"^[/~.]|\\|\.toml$", argument) else argument
