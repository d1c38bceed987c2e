"""Suites spell out cells, and say what is wrong with them in one line."""

from __future__ import annotations

import re
import sys
from importlib.metadata import EntryPoint
from itertools import product
from pathlib import Path
from types import ModuleType

import pytest
from own_files import KINDS, write_task

from flowlik.cells import Options
from flowlik.evaluation.models import load
from flowlik.planning import suites
from flowlik.planning.selection import plan_cells
from flowlik.planning.suites import expand, load_suite
from flowlik.running.run import run_cell
from flowlik.tasks.registry import get_task
from flowlik_estimators import parse_spec
from flowlik_models import plugins, zoo
from flowlik_models.zoo import TASK_MODELS

ONE = """
[defaults]
n_items = 30
[[cells]]
tasks = ["gmm-2d", "thin-2d"]
models = ["closed-form"]
estimators = ["ode[solver=euler,steps=1|2,trace=closed]"]
seeds = [0, 1]
density = true
"""


def write(folder: Path, text: str) -> str:
    file = folder / "mine.toml"
    file.write_text(text)
    return str(file)


def test_a_suite_is_the_product_of_its_lists_and_its_controls(tmp_path: Path) -> None:
    cells = suites.load_suite(write(tmp_path, ONE))
    estimates = [cell for cell in cells if not cell.is_control]
    assert len(estimates) == 2 * 2 * 2
    assert {cell.options.n_items for cell in cells} == {30}
    assert all(cell.options.density for cell in estimates)
    assert len(cells) - len(estimates) == 2 * 4
    assert len(set(cells)) == len(cells)


def test_controls_can_be_left_out_and_options_overridden(tmp_path: Path) -> None:
    cells = suites.load_suite(
        write(tmp_path, "controls = false\n" + ONE), overrides={"n_items": 5, "seeds": (3,)}
    )
    assert len(cells) == 4
    assert {(cell.options.n_items, cell.options.seed) for cell in cells} == {(5, 3)}


@pytest.mark.parametrize("task", ["fashion-mnist", "cifar10"])
def test_the_published_table_has_every_model_at_every_number_of_steps(task: str) -> None:
    cells = [cell for cell in suites.load_suite(task) if not cell.is_control]
    assert {cell.task for cell in cells} == {task}
    # a table of the published sizes; what two cores train is no part of it
    models = [model for model in TASK_MODELS[task] if not model.endswith("-small")]
    assert {cell.model for cell in cells} == set(models)
    plain = {"teacher": "ode", "meanflow": "meanflow"}
    for model in models:
        name = plain.get(model, "f2d2")
        for split in ("test", "train", "teacher-samples"):
            steps = [
                cell.estimator.steps
                for cell in cells
                if (cell.model, cell.options.split, cell.estimator.name) == (model, split, name)
                and cell.options.seed == 0
                and getattr(cell.estimator, "solver", "euler") == "euler"
            ]
            assert steps == [8, 4, 2, 1], (model, split)
    sampled = [cell for cell in cells if cell.options.samples]
    assert {(cell.model, cell.options.seed) for cell in sampled} == set(product(models, range(3)))
    assert max(cell.options.n_items for cell in cells) == 10_000  # the whole test set


def test_a_limit_holds_for_items_and_samples_of_every_cell() -> None:
    cells = plan_cells("cifar10", None, None, None, seeds=None, limit=7, device="cpu")
    assert {cell.options.n_items for cell in cells} == {7}
    assert {cell.options.samples for cell in cells if not cell.is_control} == {0, 7}
    controls = [cell for cell in cells if cell.is_control]
    assert len(controls) == len(set(controls)) == 3 * 3


def test_a_model_without_a_checkpoint_is_skipped_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "SHIPPED", Path("nowhere"))
    cells = plan_cells("cifar10", None, None, ["direct-f2d2"], seeds=None, limit=2, device="cpu")
    row, _ = run_cell(next(cell for cell in cells if not cell.is_control))
    assert row["status"] == "skipped"
    assert row["reason"] == (
        "the checkpoint of direct-f2d2 on cifar10 is not there; make it with `flowlik train cifar10 direct-f2d2` "
        "and run with `--checkpoints runs/train`"
    )


@pytest.mark.parametrize("name", suites.available())
def test_shipped_suites_name_only_what_exists(name: str) -> None:
    assert suites.load_suite(name)
    assert suites.read_suite(name)["description"]


def test_quick_is_there_and_covers_every_task() -> None:
    cells = suites.load_suite("quick")
    assert {cell.task for cell in cells} >= {
        *("gaussian-2d", "gmm-2d", "gmm-64d", "checkerboard-2d", "thin-2d", "digits")
    }
    assert 60 <= len(cells) <= 180


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("n_items = 30", "n_item = 30"), "did you mean 'n_items'"),
        (("n_items = 30", 'n_items = "many"'), "expected int"),
        (("n_items = 30", "n_items = 0"), "at least 1"),
        (("n_items = 30", 'dtype = "float16"'), "valid: float32, float64"),
        (("gmm-2d", "gmm2d"), "did you mean 'gmm-2d'"),
        (("closed-form", "closedform"), "did you mean 'closed-form'"),
        (("ode[", "odd["), "unknown estimator"),
        (("density = true", "density = "), "expected a TOML file"),
        (("tasks = ", "tusks = "), "did you mean 'tasks'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        suites.load_suite(write(tmp_path, ONE.replace(*change)))
    assert "\n" not in str(caught.value)


SAMPLES_ALONE = "density = true\nlikelihood = false\nsamples = 5"


@pytest.mark.parametrize(
    ("instead", "message"),
    [
        (SAMPLES_ALONE, "density has no effect with likelihood = false"),
        (SAMPLES_ALONE.replace("density = true", 'uses = ["gradient"]'), "uses has no effect"),
        (SAMPLES_ALONE.replace("density = true", "draws = 2"), "draws has no effect"),
        (SAMPLES_ALONE.replace("density = true", "rounds = 2"), "rounds has no effect"),
        (SAMPLES_ALONE.replace("density = true", "timing_batch = 8"), "timing_batch has no effect"),
        ("likelihood = false", "expected samples"),
        ("rounds = 0\ntiming_batch = 8", "timing_batch has no effect with rounds = 0"),
        ("draws = 2", "draws = 2 has no effect on task 'gmm-2d'"),
        ('split = "test"\nsplits = ["train"]', "split has no effect beside splits"),
        ("seed = 3", "seed has no effect beside seeds"),
    ],
)
def test_an_option_without_effect_is_refused(tmp_path: Path, instead: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        suites.load_suite(write(tmp_path, ONE.replace("density = true", instead)))
    assert "\n" not in str(caught.value)


def test_samples_alone_take_what_says_that_nothing_is_timed(tmp_path: Path) -> None:
    plain = SAMPLES_ALONE.replace("density = true", "rounds = 0\ndraws = 1\nuses = []\ndensity = false")
    assert suites.load_suite(write(tmp_path, ONE.replace("density = true", plain)))


def test_draws_are_for_splits_that_are_dequantised() -> None:
    options = Options(draws=2)
    for task, split in (("digits", "test"), ("digits-gmm", "images"), ("cifar10", "train")):
        assert suites.expand([task], None, ["control-mean"], options, splits=[split])
    for task, split in (("digits", "teacher-samples"), ("digits-gmm", "test"), ("thin-2d", "test")):
        with pytest.raises(ValueError, match="not dequantised"):
            suites.expand([task], None, ["control-mean"], options, splits=[split])


def test_an_unknown_suite_names_the_valid_ones() -> None:
    with pytest.raises(ValueError, match="did you mean 'quick'"):
        suites.load_suite("quik")


def test_suites_of_another_package_go_by_their_entry_points_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = ModuleType("others")
    others.PATH = write(tmp_path, ONE)  # type: ignore[attr-defined]
    others.path = lambda: Path(others.PATH)  # type: ignore[attr-defined]
    others.GONE = tmp_path / "gone.toml"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "others", others)
    points = [EntryPoint(name=name, value=f"others:{name}", group="flowlik.suites") for name in vars(others)]
    points = [point for point in points if not point.name.startswith("_")]
    monkeypatch.setattr(plugins, "entry_points", lambda group: points)
    with pytest.warns(UserWarning, match="'GONE'.*is left out"):
        found = suites.files.__wrapped__()
    assert found["PATH"] == found["path"] == Path(others.PATH)
    assert "GONE" not in found
    assert "quick" in found


def test_models_of_a_task_of_ones_own_are_run_by_what_fits_each(tmp_path: Path) -> None:
    file = str(write_task(tmp_path, "kinds-of-models", KINDS))
    cells = plan_cells(None, None, [file], None, seeds=None, limit=None, device="cpu")
    found = {(cell.model, cell.estimator.label) for cell in cells if not cell.is_control}
    assert found == {("net", "ode"), ("flow", "exact-flow"), ("energy", "energy")}


# --- what a command line asks for ---------------------------------------------------------------------------


def planned(specs: list[str], models: list[str] | None, task: str = "gmm-2d") -> tuple[set[str], list[str]]:
    """`model label` of the cells that are no controls, and what is said."""
    said: list[str] = []
    cells = plan_cells("quick", specs, [task], models, seeds=None, limit=5, device="cpu", say=said.append)
    return {f"{cell.model} {cell.label}" for cell in cells if not cell.is_control}, said


@pytest.mark.parametrize(
    ("specs", "models", "left", "said"),
    [
        (
            "ode f2d2",
            "teacher direct-f2d2",
            "teacher ode, direct-f2d2 ode, direct-f2d2 f2d2[steps=4]",
            "1 of 4 ",
        ),
        ("ode f2d2", "teacher", "teacher ode", "1 of 2 .*; nothing is left of f2d2"),
        ("f2d2[steps=2]", "teacher direct-f2d2", "direct-f2d2 f2d2[steps=2]", "1 of 2 "),
        ("f2d2[steps=2]", "teache*", "", "none of the . pairs"),
        ("f2d2[steps=2]", "teacher", "teacher f2d2[steps=2]", ""),
        ("f2d2[steps=2] control-mean", "teacher", "teacher f2d2[steps=2]", ""),
        ("ode f2d2", "direct-f2d2", "direct-f2d2 ode, direct-f2d2 f2d2[steps=4]", ""),
    ],
)
def test_of_a_cross_the_pairs_that_do_not_fit_are_left_out_and_counted(
    specs: str, models: str, left: str, said: str
) -> None:
    try:
        found, lines = planned(specs.split(), models.split())
    except ValueError as error:
        found, lines = set(), [str(error)]
    assert found == set(filter(None, left.split(", ")))
    assert len(lines) == bool(said)
    assert re.search(said, "".join(lines))


def of_tasks(*models: str) -> tuple[set[str], list[str]]:
    """`task model` of a line that asks these models of two tasks, and what is said."""
    said: list[str] = []
    tasks = ["gmm-2d", "gmm-64d"]
    cells = plan_cells("quick", ["ode"], tasks, models, seeds=None, limit=5, device="cpu", say=said.append)
    return {f"{cell.task} {cell.model}" for cell in cells if not cell.is_control}, said


def test_of_several_tasks_each_gets_the_named_models_that_it_has() -> None:
    assert of_tasks("teacher") == ({"gmm-2d teacher"}, ["gmm-64d has no model teacher and is left out"])
    found, said = of_tasks("teacher", "closed-form")
    assert (found, said) == ({"gmm-2d teacher", "gmm-2d closed-form", "gmm-64d closed-form"}, [])
    with pytest.raises(ValueError, match="unknown model 'teachr'; did you mean 'teacher'"):
        of_tasks("teachr", "closed-form")


def test_models_that_nobody_named_and_that_are_not_trained_are_no_misfits() -> None:
    trained = [model for model in get_task("gmm-2d").models if get_task("gmm-2d").has_model(model)]
    found, (line,) = planned(["ode", "f2d2"], None)
    unfit = 2 * len(trained) - len(found)
    assert line.startswith(f"{unfit} of {2 * len(trained)} pairs")


def test_a_cross_of_which_nothing_fits_says_why() -> None:
    with pytest.raises(
        ValueError, match=r"none of the 2 pairs .* fits; f2d2.* on teacher of gmm-2d: .*joint"
    ):
        planned(["f2d2", "f2d2[steps=1]"], ["teacher"])


def test_a_model_that_is_named_and_not_trained_is_skipped_with_the_cure_in_a_cross_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("flowlik_models.zoo.SHIPPED", tmp_path)
    load.cache_clear()
    found, said = planned(["ode", "f2d2"], ["closed-form", "direct-f2d2"])
    assert {"closed-form ode", "direct-f2d2 ode", "direct-f2d2 f2d2[steps=4]"} <= found
    assert not any("f2d2" in line for line in said)
    load.cache_clear()


def test_sweeps_are_bounded_by_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = "|".join(map(str, range(1, 200)))
    with pytest.raises(ValueError, match=r"f2d2\[...\] spells 39,601 estimators, expected at most 10,000"):
        parse_spec(f"f2d2[steps={many},grid={many}]")
    with pytest.raises(ValueError, match=r"3,600,000 cells or more, expected at most 100,000"):
        expand(["gmm-2d"], ["closed-form"], ["f2d2[steps=1|2|3|4]"] * 9, Options(), seeds=range(100_000))
    monkeypatch.setattr(suites, "MOST_CELLS", 20)
    file = write(tmp_path, ONE + ONE.partition("n_items = 30")[2])  # 8 cells twice
    assert len(load_suite(file)) < 20
    file = write(tmp_path, ONE + 2 * ONE.partition("n_items = 30")[2])
    with pytest.raises(ValueError, match=r"24 cells or more, expected at most 20: name fewer seeds"):
        load_suite(file)
