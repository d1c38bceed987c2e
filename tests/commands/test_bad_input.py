"""Whatever comes in, what comes out is one line: no traceback, no hang, no file outside the output folder."""

from __future__ import annotations

import html
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from bound_by_permissions import bound_by_permissions
from fake_run import record, write_fake_run, write_rows
from hostile_input import (
    ANSWERS,
    LEAVES,
    NAMES,
    PLACES,
    PLUGINS,
    TOKENS,
    Misbehaving,
    Place,
    Point,
    commands,
    line_of,
    open_again,
)
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from own_files import write_task
from sizes import FULL, figure, size
from typer.testing import CliRunner

from flowlik.cells import Cell, Options
from flowlik.cli import app
from flowlik.measures import registry as measures
from flowlik.planning import suites
from flowlik.records.columns import COLUMNS, FAILED
from flowlik.records.writing import to_line
from flowlik.report.figures import kinds
from flowlik.report.page import write
from flowlik.running import registry as executors
from flowlik.running.inline import Inline
from flowlik.running.run import run_cell
from flowlik.tasks.own import task_file
from flowlik.tasks.registry import registry as all_tasks
from flowlik_estimators import get
from flowlik_estimators import registry as estimator_registry
from flowlik_models import plugins
from flowlik_models.checkpoints import CheckpointError, fill, read_checkpoint, save_checkpoint
from flowlik_models.closed_forms.catalogue import closed_form

T = TypeVar("T")
KINDS = 8
EACH = size(26, 126)  # of each kind: 208 inputs in `make test`, 1,008 in `make verify`
bad = settings(
    max_examples=EACH,
    deadline=None,
    derandomize=not FULL,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "EXECUTORS", {"serial": lambda setup, address: Inline(setup)})


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, [*arguments])


def assert_one_line(result: Any, allowed: tuple[int, ...] = (2,)) -> None:
    """An exit status that says what happened, no traceback, and at most one line of complaint."""
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code in allowed, result.output
    assert "Traceback" not in result.output
    if result.exit_code == 2 and result.stderr.startswith("flowlik: "):
        assert len(result.stderr.strip().splitlines()) == 1, result.stderr


@contextmanager
def nothing_outside(folder: Path, *allowed: Path) -> Iterator[None]:
    """No file appears or changes below `folder` except below `allowed`."""

    def state() -> dict[Path, tuple[int, int]]:
        return {
            path: (path.stat().st_mtime_ns, path.stat().st_size)
            for path in folder.rglob("*")
            if path.is_file() and not any(path.is_relative_to(one) for one in allowed)
        }

    before = state()
    yield
    assert state() == before


def attempt(action: Callable[[], T], error: type[Exception]) -> tuple[T | None, str]:
    """What an action gives, or the message of the only kind of exception that it may raise."""
    try:
        return action(), ""
    except error as raised:
        return None, str(raised)


def filled(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    tensors, card = read_checkpoint(path)
    fill(torch.nn.Linear(3, 2), tensors, path)
    return tensors, card


# --- points -------------------------------------------------------------------------------------------------

SPECIAL = (float("nan"), float("inf"), -float("inf"), 1e38, 0.0)
DTYPES = (torch.float32, torch.float64, torch.float16, torch.int64, torch.bool, torch.complex64)


@bad
@given(
    shape=st.lists(st.integers(0, 3), max_size=4),
    dtype=st.sampled_from(DTYPES),
    value=st.one_of(st.none(), st.sampled_from(SPECIAL)),
    spec=st.sampled_from(["f2d2", "ode", "flow-map-exact", "whitened-ode", "meanflow"]),
    items=st.one_of(st.none(), st.integers(0, 4)),
)
def test_points(
    shape: list[int], dtype: torch.dtype, value: float | None, spec: str, items: int | None
) -> None:
    x = torch.zeros(shape, dtype=dtype)
    if value is not None and dtype.is_floating_point and x.numel():
        x.flatten()[0] = value
    ids = None if items is None else torch.arange(items)
    out, message = attempt(lambda: get(spec).log_prob(closed_form("gaussian-2d"), x, items=ids), ValueError)
    if out is None:
        assert message
        assert "\n" not in message
        return
    assert out.log_prob.shape == x.shape[:1]
    assert out.status == "ok" or out.reason
    assert bool(torch.isfinite(out.log_prob[out.valid]).all())


# --- checkpoints --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    save_checkpoint(path, torch.nn.Linear(3, 2), {"task": "t", "model": "m"})
    return path


@bad
@given(
    cut=st.one_of(st.none(), st.floats(0, 1)),
    flips=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6),
    card=st.one_of(st.none(), st.binary(max_size=20)),
)
def test_checkpoints(
    checkpoint: Path, cut: float | None, flips: list[tuple[float, int]], card: bytes | None
) -> None:
    data = bytearray(checkpoint.read_bytes())
    for where, value in flips:
        data[int(where * (len(data) - 1))] = value
    altered = checkpoint.with_name("altered.safetensors")
    altered.write_bytes(data if cut is None else data[: int(cut * len(data))])
    altered.with_suffix(".json").write_bytes(
        checkpoint.with_suffix(".json").read_bytes() if card is None else card
    )
    found, message = attempt(lambda: filled(altered), CheckpointError)
    if found is None:
        assert "altered." in message
        assert "\n" not in message
        return
    tensors, read = found
    assert isinstance(read, dict)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())


# --- records ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_fake_run(folder / "run", tasks=("gmm-2d",), n=20, steps=(1, 2))
    write_fake_run(folder / "other", tasks=("gmm-2d",), n=20, steps=(1, 2), seed=1)
    return folder


@bad
@given(
    tokens=st.dictionaries(st.sampled_from(COLUMNS), TOKENS, max_size=3),
    junk=st.lists(st.binary(max_size=30), max_size=2),
    note=TOKENS,
    cut=st.integers(0, 40),
    which=st.sampled_from(["table", "csv", "compare", "merge", "reproduce", "report", "recommend", "run"]),
    cell=NAMES,
)
def test_records(
    runs: Path, tokens: dict[str, str], junk: list[bytes], note: str, cut: int, which: str, cell: str
) -> None:
    run, other = runs / "run", runs / "other"
    rows = [record(cell_id=f"{number}", bpd=1.0, bpd_mae=0.1) for number in range(2)]
    data = b"\n".join([*junk, line_of(rows[0], tokens) + line_of(rows[1], {})])
    (run / "records.jsonl").write_bytes(data[: len(data) - cut])
    (run / "environments.jsonl").write_bytes(b"\n".join([*junk, note.encode()]))
    (run / "run.json").write_text(note)
    commands = {
        "table": ("table", str(run)),
        "csv": ("table", str(run), "--format", "csv"),
        "compare": ("compare", str(run), str(other)),
        "merge": ("merge", str(run), "--out", str(runs / "merged" / os.urandom(4).hex())),
        "reproduce": ("reproduce", "--in", str(run), "--", cell),
        "report": ("report", str(run)),
        "recommend": ("recommend", "gmm-2d", "--in", str(run)),
        "run": ("run", "-t", "gaussian-2d", "-e", "f2d2[steps=1]", "--limit", "2", "--resume", "--no-report",
                "--out", str(run)),
    }  # fmt: skip
    with warnings.catch_warnings(), nothing_outside(runs, run, runs / "merged"):
        warnings.simplefilter("ignore")
        assert_one_line(call(*commands[which]), (0, 1, 2) if which == "reproduce" else (0, 2))


# --- suites -------------------------------------------------------------------------------------------------

ENTRY = {"tasks": ["gaussian-2d"], "models": ["closed-form"], "estimators": ["f2d2[steps=1]"]}


def as_toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(k))} = {as_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(as_toml, value)) + "]"
    if isinstance(value, float):
        return str(value)
    return json.dumps(value) if value is not None else '""'


@bad
@given(
    entry=st.dictionaries(
        st.sampled_from([*ENTRY, "splits", "seeds", "n_items", "batch_size", "dtype", "density", "x"]),
        LEAVES,
        min_size=1,
        max_size=3,
    ),
    defaults=st.dictionaries(
        st.sampled_from(["n_items", "dtype", "rounds", "draws", "split"]), LEAVES, max_size=2
    ),
    tail=st.one_of(st.just(b""), st.binary(max_size=12)),
)
def test_suites(
    tmp_path_factory: pytest.TempPathFactory, entry: dict[str, Any], defaults: dict[str, Any], tail: bytes
) -> None:
    folder = tmp_path_factory.mktemp("suites")
    text = "[defaults]\n" + "".join(f"{k} = {as_toml(v)}\n" for k, v in defaults.items())
    text += "[[cells]]\n" + "".join(f"{k} = {as_toml(v)}\n" for k, v in (ENTRY | entry).items())
    (folder / "suite.toml").write_bytes(text.encode("utf-8", "replace") + tail)
    with nothing_outside(folder, folder / "out"):
        arguments = ("run", str(folder / "suite.toml"), "--dry-run", "--out", str(folder / "out"))
        assert_one_line(call(*arguments), (0, 2))


# --- names and paths ----------------------------------------------------------------------------------------


@bad
@given(name=NAMES, which=st.sampled_from(["suite", "-t", "-m", "-e", "--seeds", "--timeout", "--memory", "--device",
                                          "--executor", "table", "figures", "compare", "train", "list"]))  # fmt: skip
def test_names(name: str, which: str) -> None:
    here = Path.cwd()
    before = set(here.iterdir())
    if which in ("table", "figures"):
        result = call(which, "--", name)
    elif which == "compare":
        result = call("compare", "--", name, name)
    elif which == "train":
        result = call("train", "--", "gmm-2d", name)
    elif which == "list":
        result = call("list", "--", name)
    elif which == "suite":
        result = call("run", "--dry-run", "--", name)
    else:
        result = call("run", f"{which}={name}" if which.startswith("--") else f"{which}{name}", "--dry-run")
    assert_one_line(result, (0, 2))
    assert set(here.iterdir()) == before


# --- places and permissions -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    path = list(sys.path)
    yield str(write_task(tmp_path_factory.mktemp("user"), "around"))
    task_file.forget()
    sys.modules.pop("field", None)
    sys.path[:] = path


@bad
@given(place=PLACES, which=st.sampled_from(sorted(commands(Path(), Path(), ""))))
def test_places(tmp_path_factory: pytest.TempPathFactory, mine: str, place: Place, which: str) -> None:
    folder = tmp_path_factory.mktemp("places")
    good = write_fake_run(folder / "good", tasks=("thin-2d",), n=2, steps=(1,))
    at = place.make(folder)
    words = commands(good, at, mine)[which]
    with nothing_outside(folder, folder / "parent", folder / "merged"), bound_by_permissions():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            done = call(*words)
        note = f"{which} {place}: {done.output[-300:]!r} {done.exception!r}"
        assert done.exit_code in (0, 1, 2), note
        assert isinstance(done.exception, SystemExit | None), note
        lines = [line for line in done.stderr.splitlines() if line.startswith("flowlik: ")]
        assert done.exit_code == 0 or len(lines) == 1, note
    open_again(folder)
    assert not list(folder.rglob(".flowlik-*")), which


# --- plug-ins -------------------------------------------------------------------------------------------------

GROUPS: dict[str, Callable[[], Any]] = {
    "flowlik.tasks": all_tasks.__wrapped__,
    "flowlik.suites": suites.files.__wrapped__,
    "flowlik.figures": kinds.all_kinds.__wrapped__,
    "flowlik.measures": lambda: plugins.load_plugins("flowlik.measures", (), measures.register),
    "flowlik.estimators": lambda: plugins.load_plugins(
        "flowlik.estimators", ("ode",), estimator_registry._admitted
    ),
}


@bad
@given(given_=PLUGINS, group=st.sampled_from(sorted(GROUPS)))
def test_plugins(given_: list[tuple[str, str]], group: str) -> None:
    points = [Point(name, act, group) for name, act in given_]
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        patch.setattr(plugins, "entry_points", lambda group: points)
        found, message = attempt(GROUPS[group], ValueError)
    lines = [message, *(str(one.message) for one in told)]
    assert not any("\n" in line for line in lines), lines
    names = [name for name, _ in given_]
    if found is None:
        assert "rename or uninstall one" in message
        return
    assert len(set(names)) == len(names)
    left_out = [name for name in names if name not in found]
    assert len(told) == len(left_out), (lines, names)


@bad
@given(act=st.sampled_from(sorted(ANSWERS)), items=st.integers(1, 5), batch=st.integers(1, 3))
def test_estimators_that_misbehave(act: str, items: int, batch: int) -> None:
    options = Options(n_items=items, batch_size=batch, rounds=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row, arrays = run_cell(
            Cell(task="gaussian-2d", model="closed-form", estimator=Misbehaving(act=act), options=options)
        )
    assert row["status"] in {"ok", *FAILED}
    assert row["status"] == "ok" or "\n" not in row["reason"]
    if row["status"] == "ok":
        assert arrays["log_prob"].shape == (items,)
        assert np.isfinite(arrays["log_prob"][arrays["valid"]]).all()
        assert row["invalid_share"] == pytest.approx(1 - arrays["valid"].mean())
    assert to_line(row)


def test_as_many_inputs_as_promised() -> None:
    figure("bad inputs", f"{KINDS * EACH}: 0 tracebacks, 0 hangs", "200 or 1,000")
    assert size(200, 1000) <= KINDS * EACH


# --- what names may hold ------------------------------------------------------------------------------------

HOSTILE = "<script>alert('x')</script>\"&{{ 7*7 }}"


def test_the_report_escapes_whatever_a_name_holds(tmp_path: Path) -> None:
    names = dict.fromkeys(("task", "model", "estimator_label", "reason", "ref_id", "split"), HOSTILE)
    write_rows(
        tmp_path, [record(cell_id="1", bpd=1.0, bpd_mae=0.1, status="diverged", **names), record(cell_id="2")]
    )
    (tmp_path / "environments.jsonl").write_text(json.dumps({"env_id": "abc123", "cpu": HOSTILE}) + "\n")
    (tmp_path / "run.json").write_text(json.dumps({"argv": [HOSTILE], "suite": HOSTILE}))
    write.write_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<script>alert" not in page
    assert html.escape("<script>alert") in page
    assert "{{ 7*7 }}" in html.unescape(page)
    assert not re.search(r"alert\('x'\)</script>", page)


def test_an_output_folder_that_is_a_file_or_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/none/such")):
        assert_one_line(call("run", "-t", "gaussian-2d", "--limit", "2", "--out", str(out)))


def test_sizes_of_one_item_and_of_none() -> None:
    options = Options(n_items=1, batch_size=1, rounds=0)
    row, arrays = run_cell(
        Cell(task="gaussian-2d", model="closed-form", estimator=get("f2d2"), options=options)
    )
    assert row["status"] == "ok"
    assert arrays["log_prob"].shape == (1,)
    assert call("run", "--limit", "0", "--dry-run").exit_code == 2
    assert np.isfinite(row["bpd"])
