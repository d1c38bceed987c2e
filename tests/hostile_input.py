"""The grammar of bad input: names, places with their permissions, tokens of records, and what plug-ins may do."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fake_run import record, write_rows
from hypothesis import strategies as st

from flowlik_estimators import Estimate, Estimator, Run, register, standard_normal_log_prob

# --- names --------------------------------------------------------------------------------------------------

WORDS = (
    *(
        "..",
        "../../x",
        "/etc/passwd",
        "a/b",
        "con\x00trol",
        "",
        " ",
        "-e",
        "--out",
        "~",
        "~nobody/x",
        "$HOME",
    ),
    *("`id`", "<script>alert(1)</script>", "'; drop", "\n", "gmm-2d\n", "é" * 40, "[red]", "f2d2["),
    *("f2d2[steps=]", "f2d2[steps=-1]", "f2d2[steps=1e400]", "ode[rtol=nan]", "ode[solver=|]"),
    *("f2d2[steps=" + "9" * 400, "\ud800", "caf\udce9", "n" * 300, "é" * 130, "d/" * 2500, "\u202e", "%s{0}"),
)
NAMES = st.one_of(st.text(max_size=12), st.sampled_from(WORDS))
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**30), 10**30), st.floats(), NAMES, st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)  # fmt: skip

# --- tokens of records --------------------------------------------------------------------------------------

TOKENS = st.one_of(
    LEAVES.map(json.dumps),
    st.sampled_from(
        [
            *("NaN", "Infinity", "-Infinity", "1e308", "-1e308", "1e400", "1e-400", "-0", "9" * 400, "0x1"),
            *('"\\ud800"', '"a\\udfff\\ud800b"', '{"\\udc80": NaN}', "[" * 3000 + "]" * 3000, '{"a":' * 3000),
            *("tru", "'x'", "", '"' + "x" * 5000 + '"'),
        ]
    ),
)


def line_of(row: dict[str, Any], tokens: dict[str, str]) -> bytes:
    """A row as a line of JSON, or of what looks like it, with these tokens in some columns."""
    pairs = [(name, json.dumps(value)) for name, value in row.items() if name not in tokens]
    text = ",".join(f"{json.dumps(name)}:{token}" for name, token in (*pairs, *tokens.items()))
    return f"{{{text}}}\n".encode()


# --- places -------------------------------------------------------------------------------------------------


def _run_folder(place: Path) -> None:
    write_rows(place, [record(cell_id="1", bpd=1.0, bpd_mae=0.1)])
    (place / "items").mkdir()
    (place / "run.json").write_text("{}")


def _with_pipes(place: Path) -> None:
    _run_folder(place)
    for name in ("run.json", "environments.jsonl"):
        (place / name).unlink(missing_ok=True)
        os.mkfifo(place / name)


STRUCTURES: dict[str, Callable[[Path], Any]] = {
    "nothing": lambda place: None,
    "a file": lambda place: place.write_text("x"),
    "a folder": lambda place: place.mkdir(),
    "a run": _run_folder,
    "a run with pipes": _with_pipes,
    "a pipe": os.mkfifo,
    "a link to itself": lambda place: place.symlink_to(place),
    "a link to nowhere": lambda place: place.symlink_to(place.with_name("nowhere")),
}
SPELLINGS = ("plain", "two words", "new\nline", "[red]", "'quoted\"", "caf\udce9", "é" * 100, "-e", "%s{0}")


@dataclass(frozen=True)
class Place:
    """Something below a folder, with permissions of its own, of its parent and of one file in it."""

    name: str
    structure: str
    below: tuple[str, ...]
    mode: int
    parents_mode: int
    files_mode: int

    def make(self, folder: Path) -> Path:
        parent = folder / "parent"
        parent.mkdir()
        place = parent / self.name
        STRUCTURES[self.structure](place)
        if place.is_dir() and (place / "records.jsonl").is_file():
            (place / "records.jsonl").chmod(self.files_mode)
        if not place.is_symlink() and place.exists():
            place.chmod(self.mode)
        parent.chmod(self.parents_mode)
        return place.joinpath(*self.below)


def open_again(folder: Path) -> None:
    """Let everybody, and the tests' cleaning up, into all folders."""
    for where, folders, _ in os.walk(folder):
        for each in folders:
            path = Path(where) / each
            if not path.is_symlink():
                path.chmod(0o755)


MODES = (0o755, 0o755, 0o555, 0o444, 0o000)
PLACES = st.builds(
    Place,
    name=st.sampled_from(SPELLINGS),
    structure=st.sampled_from(sorted(STRUCTURES)),
    below=st.sampled_from([(), (), ("below",), ("n" * 300,), ("d" * 99,) * 50, ("..", "x")]),
    mode=st.sampled_from(MODES),
    parents_mode=st.sampled_from(MODES),
    files_mode=st.sampled_from([0o644, 0o644, 0o000]),
)


def commands(good: Path, at: Path, mine: str) -> dict[str, tuple[str, ...]]:
    """Every command that takes a place, at this one; `good` is a run, `mine` a task's file."""
    few = ("-t", "gaussian-2d", "-e", "f2d2[steps=1]", "--limit", "2", "--no-report")
    given: dict[str, tuple[object, ...]] = {
        "table": ("table", "--", at),
        "figures": ("figures", "--", at),
        "report": ("report", "--", at),
        "compare": ("compare", "--", good, at),
        "merge": ("merge", f"--out={good.parent / 'merged'}", "--", at),
        "merge --out": ("merge", good, f"--out={at}"),
        "recommend": ("recommend", "gmm-2d", f"--in={at}"),
        "reproduce": ("reproduce", "1", f"--in={at}"),
        "gallery": ("gallery", "--", at),
        "run": ("run", "--dry-run", "--", f"{at}.toml"),
        "run --out": ("run", *few, f"--out={at}"),
        "run --resume": ("run", *few, "--resume", f"--out={at}"),
        "run --checkpoints": ("run", *few, "--dry-run", f"--checkpoints={at}"),
        "run --data-dir": ("run", *few, "--dry-run", f"--data-dir={at}"),
        "run --inception": ("run", *few, "--dry-run", f"--inception={at}"),
        "run -t": ("run", f"--task={at}.py", "--dry-run"),
        "list": ("list", "tasks", "--", f"{at}.py"),
        "check": ("check", "--", f"{at}.py"),
        "score": ("score", "--", f"{at}.py"),
        "data": ("data", f"--data-dir={at}"),
        "reference --out": ("reference", "gaussian-2d", f"--out={at}"),
        "score --out": ("score", mine, "--limit", "4", "--accuracy", "1", f"--out={at}"),
        "train --out": ("train", mine, "direct-f2d2", "--steps", "1", f"--out={at}"),
    }
    return {name: tuple(map(str, words)) for name, words in given.items()}


# --- plug-ins -----------------------------------------------------------------------------------------------

LOADS: dict[str, Callable[[], Any]] = {
    "raises": lambda: 1 / 0,
    "raises lines": lambda: _raise(RuntimeError("first\nsecond\n\ud800")),
    "raises silently": lambda: _raise(ValueError()),
    "ends": lambda: sys.exit(0),
    "ends with words": lambda: sys.exit("no\nmore"),
    "no attribute": lambda: _raise(AttributeError("x")),
    "no module": lambda: _raise(ModuleNotFoundError("No module named 'x'")),
    "prints": lambda: print("hello") or object(),
    "recurses": lambda: LOADS["recurses"](),
    "none": lambda: None,
    "a number": lambda: 3,
    "words": lambda: "nothing",
    "a class": lambda: type("T", (), {}),
    "a function that raises": lambda: LOADS["raises"],
    "a path": lambda: Path("/nonexistent/suite.toml"),
}
PLUGINS = st.lists(st.tuples(NAMES, st.sampled_from(sorted(LOADS))), max_size=4)


@dataclass(frozen=True)
class Point:
    """An entry point that does something when it is loaded."""

    name: str
    act: str
    group: str
    value: str = "things:one"
    dist: None = None

    def load(self) -> Any:
        return LOADS[self.act]()


def _raise(error: BaseException) -> Any:
    raise error


ANSWERS: dict[str, Callable[[torch.Tensor], Any]] = {
    "right": standard_normal_log_prob,
    "NaN": lambda x: standard_normal_log_prob(x) * torch.nan,
    "infinite": lambda x: standard_normal_log_prob(x) / 0,
    "one NaN": lambda x: standard_normal_log_prob(x).index_fill(0, torch.tensor([0]), torch.nan),
    "too few": lambda x: standard_normal_log_prob(x)[1:],
    "another shape": lambda x: standard_normal_log_prob(x)[:, None],
    "a number": lambda x: 0.0,
    "nothing": lambda x: None,
    "whole numbers": lambda x: standard_normal_log_prob(x).long(),
    "complex": lambda x: standard_normal_log_prob(x).to(torch.complex64),
    "half": lambda x: standard_normal_log_prob(x).half(),
    "huge": lambda x: standard_normal_log_prob(x) * 1e300,
    "raises": lambda x: 1 / 0,
    "raises lines": lambda x: _raise(RuntimeError("first\nsecond\n\ud800")),
    "recurses": lambda x: ANSWERS["recurses"](x),
    "not enough memory": lambda x: _raise(MemoryError()),
    "warns and prints": lambda x: (print("hello"), standard_normal_log_prob(x))[1],
    "changes the points": lambda x: standard_normal_log_prob(x.mul_(3)),
    "changes the gradient mode": lambda x: (torch.set_grad_enabled(True), standard_normal_log_prob(x))[1],
    "seeds": lambda x: (torch.manual_seed(0), standard_normal_log_prob(x))[1],
}


@register("misbehaving")
@dataclass(frozen=True, kw_only=True)
class Misbehaving(Estimator):
    """Answers as a careless plug-in does."""

    family = "ode"
    act: str = "right"

    def _log_prob(self, model: Any, x: torch.Tensor, run: Run) -> Estimate:
        model.velocity(x, run.at(0.5))
        return Estimate(log_prob=ANSWERS[self.act](x))
